"""Trainings of one net in one process or sharded over several; started by ``test_fsdp.py``.

    python fsdp_training.py FOLDER PART

where the part is "two" (FSDP2, DDP and tensor parallelism), "four" (FSDP2 over tensor
parallelism) or "one" (a mesh of one process).
"""

from __future__ import annotations

import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparsity import (
    ACDC,
    FORCE,
    GMP,
    SET,
    SNFS,
    SNIP,
    DensityMonitor,
    GraSP,
    NeuralTangentTransfer,
    OptG,
    ProsPr,
    RedrGradientGlobal,
    RigL,
    SNAPit,
    SparseCompute,
    SRigL,
    StaticSparse,
    SynFlow,
    global_by,
)
from lightning_sparsity.core.engine import Engine
from lightning_sparsity.ops.sharded import Split
from lightning_sparsity.scores import magnitude, unexplored
from lightning_sparsity.testing import Result, TinyModel, fit

METHODS: dict[str, Callable[[], list[Callback]]] = {
    "RigL, ERK": lambda: [RigL(0.3, update_interval=4), DensityMonitor(print_tables=False)],
    "RigL, global": lambda: [RigL(0.3, update_interval=4, distribution=global_by(magnitude))],
    "SET": lambda: [SET(0.3)],
    "GMP, global": lambda: [GMP(0.3, update_interval=4, distribution=global_by(magnitude))],
    "RedrGradientGlobal": lambda: [RedrGradientGlobal(0.3, update_interval=4)],
    "SRigL": lambda: [SRigL(0.3, update_interval=4)],
    "SNFS": lambda: [SNFS(0.3, update_interval=4)],
    "ACDC": lambda: [ACDC(0.3)],
    "SET, unexplored": lambda: [SET(0.3, update_interval=4, growth=unexplored())],
    "StaticSparse": lambda: [StaticSparse(0.3)],
}
WITHOUT_GATHERING = ["RigL, global", "SET", "GMP, global", "RedrGradientGlobal", "ACDC"]


def logits(module: pl.LightningModule, batch: Any) -> Tensor:
    found: Tensor = module.net(batch[0])
    return found


WITH_DATA: dict[str, Callable[[Any], list[Callback]]] = {
    "SNIP": lambda data: [SNIP(0.3, data=data, batches=4)],
    "FORCE": lambda data: [FORCE(0.3, data=data, batches=4)],
    "SNAPit": lambda data: [SNAPit(0.5, data=data, batches=4)],
    "SynFlow": lambda data: [SynFlow(0.3, data=data, forward_fn=logits)],
    "SNIP, RigL": lambda data: [SNIP(0.3, data=data), RigL(0.3, update_interval=4)],
}
# Their passes are not means over the processes' data: they see the same data here.
SAME_DATA: dict[str, Callable[[Any], list[Callback]]] = {
    "GraSP": lambda data: [GraSP(0.3, data=data, forward_fn=logits)],
    "ProsPr": lambda data: [ProsPr(0.3, data=data)],
    "NeuralTangentTransfer": lambda data: [
        NeuralTangentTransfer(0.3, data=data, steps=4, forward_fn=logits)
    ],
}
REFUSED: dict[str, Callable[[], list[Callback]]] = {
    "OptG": lambda: [OptG(0.3)],
    "SparseCompute": lambda: [SET(0.3), SparseCompute("csr")],
    "uneven": lambda: [SNIP(0.3, data=Uneven(), batches=4)],
}


class Halves:
    """Eight batches of 16, of which each process gets its part."""

    def __init__(self, processes: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(128, 36, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(4, (128,), generator=generator)
        self.processes = processes

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank = int(os.environ.get("LOCAL_RANK", 0)) if self.processes > 1 else 0
        for images, labels in zip(self.images.split(16), self.labels.split(16), strict=True):
            yield images.chunk(self.processes)[rank], labels.chunk(self.processes)[rank]


class Uneven(Halves):
    """The first process has a batch less."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        return iter(list(super().__iter__())[: 3 if first else 4])


class Model(TinyModel):
    """Uneven shards, and layers with fewer rows than there are processes."""

    sizes = (36, 15, 7, 1, 4)

    def __init__(self) -> None:
        sizes = self.sizes
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        super().__init__(nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))))
        self.double()

    def configure_model(self) -> None:
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and not isinstance(self.net[0].weight, DTensor):
            self.cut()

    def cut(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class EvenModel(Model):
    """One that can be cut along inputs and outputs."""

    sizes = (36, 16, 8, 2, 4)
    fully = True

    def cut(self) -> None:
        across_tp = self.device_mesh["tensor_parallel"]
        if across_tp.size() > 1:
            across = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            across |= {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(self.net, across_tp, across)
        if across_tp.size() == 1 or self.fully:
            super().cut()


class Copies(EvenModel):
    """Cut by tensor parallelism alone: the rest of the processes have copies."""

    fully = False


class StopAfterTwo(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def train(
    callbacks: list[Callback], processes: int, *, sharded: bool = True, **options: Any
) -> Result:
    if processes > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        options |= {"strategy": strategy if sharded else "ddp", "devices": processes}
    return fit(callbacks, Model, data=Halves(processes), **options)


def train_even(
    callbacks: list[Callback],
    cuts: tuple[int, int] | None,
    model: type[Model] = EvenModel,
    **options: Any,
) -> Result:
    """Train the even model on the same batches everywhere.

    Args:
        callbacks: The callbacks.
        cuts: Over how many processes FSDP2 and tensor parallelism cut; None: neither.
        model: Its class.
        **options: Of the Trainer.
    """
    if cuts is not None:
        strategy = ModelParallelStrategy(data_parallel_size=cuts[0], tensor_parallel_size=cuts[1])
        options |= {"strategy": strategy, "devices": cuts[0] * cuts[1]}
    return fit(callbacks, model, data=Halves(), **options)


class Gathered:
    """Counts whole tensors that are made from parts, and how many there are at a time."""

    made = 0
    alive = 0
    most = 0

    def add(self, whole: Tensor) -> Tensor:
        self.made += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(whole, self._gone)
        return whole

    def _gone(self) -> None:
        self.alive -= 1


@contextmanager
def watched(method: str) -> Iterator[Gathered]:
    """Count what is gathered while the engine is in one of its methods."""
    found, gather, work = Gathered(), Split.gather, getattr(Engine, method)

    def watching(self: Engine, *args: Any, **kwargs: Any) -> Any:
        Split.gather = lambda split, part: found.add(gather(split, part))  # type: ignore[method-assign]
        try:
            return work(self, *args, **kwargs)
        finally:
            Split.gather = gather  # type: ignore[method-assign]

    setattr(Engine, method, watching)
    try:
        yield found
    finally:
        setattr(Engine, method, work)


def outcome(result: Result) -> dict[str, Any]:
    """What is compared: the same on every process."""
    return {"masks": result.masks, "history": result.history, "weights": result.weights}


def two(folder: Path) -> dict[str, Any]:
    """FSDP2, DDP and tensor parallelism over two processes."""
    found: dict[str, Any] = {}
    for name, make in METHODS.items():
        with watched("_update") as gathered:
            found[name] = outcome(train(make(), 2))
        found[name]["gathered"] = gathered.made
        found[f"{name}, DDP"] = outcome(train(make(), 2, sharded=False))
        found[f"{name}, TP"] = outcome(train_even(make(), (1, 2)))
    for name, of in WITH_DATA.items():
        with watched("begin") as gathered:
            found[name] = outcome(train(of(Halves(2)), 2))
        found[name]["most"] = gathered.most
        found[f"{name}, DDP"] = outcome(train(of(Halves(2)), 2, sharded=False))
    for name, of in {**WITH_DATA, **SAME_DATA}.items():
        found[f"{name}, TP"] = outcome(train_even(of(Halves()), (1, 2)))
    for name, of in SAME_DATA.items():
        found[f"{name}, even"] = outcome(train_even(of(Halves()), (2, 1)))
    for name, make in REFUSED.items():
        try:
            train(make(), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    saver = ModelCheckpoint(folder, filename="half", enable_version_counter=False)
    train([*METHODS["RigL, ERK"](), StopAfterTwo(), saver], 2, enable_checkpointing=True)
    resumed = train(METHODS["RigL, ERK"](), 2, ckpt_path=str(folder / "half.ckpt"), seed=77)
    found["resumed"] = outcome(resumed)
    saver = ModelCheckpoint(folder, filename="folder", enable_version_counter=False)
    train_even([*METHODS["RigL, ERK"](), StopAfterTwo(), saver], (2, 1), enable_checkpointing=True)
    for damage in ("flipped", "cut", "meta", "metadata"):
        found[damage] = refusal(damaged(folder, damage))
    for cuts in ((2, 1), (1, 2)):
        found[f"resumed from parts {cuts}"] = outcome(resume_even(folder, cuts))
    return found


def damaged(folder: Path, damage: str) -> Path:
    """A copy of the folder of parts, in which one file is not as it was."""
    copy = folder / f"{damage}.ckpt"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.copytree(folder / "folder.ckpt", copy)
        names = {"meta": "meta.pt", "metadata": ".metadata"}
        file = copy / names.get(damage, "__1_0.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content[: len(content) // (1 if damage in ("flipped", "meta") else 2)])
    torch.distributed.barrier()
    return copy


def refusal(path: Path) -> str:
    try:
        train_even(METHODS["RigL, ERK"](), (2, 1), ckpt_path=str(path))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def four(folder: Path) -> dict[str, Any]:
    """FSDP2 over tensor parallelism, two by two processes."""
    found: dict[str, Any] = {}
    for name in ("RigL, ERK", "GMP, global"):
        found[name] = outcome(train_even(METHODS[name](), (2, 2)))
        found[f"{name}, copies"] = outcome(train_even(METHODS[name](), (2, 2), Copies))
    for name in ("SNIP", "GraSP"):
        found[name] = outcome(train_even(({**WITH_DATA, **SAME_DATA})[name](Halves()), (2, 2)))
        found[f"{name}, copies"] = outcome(
            train_even(({**WITH_DATA, **SAME_DATA})[name](Halves()), (2, 2), Copies)
        )
    found["resumed from parts (2, 2)"] = outcome(resume_even(folder, (2, 2)))
    return found


def one(folder: Path) -> dict[str, Any]:
    """A mesh of one process."""
    return {"resumed from parts (1, 1)": outcome(resume_even(folder, (1, 1)))}


def resume_even(folder: Path, cuts: tuple[int, int]) -> Result:
    """Go on from the folder that two processes have left, cut as it may be."""
    path = str(folder / "folder.ckpt")
    return train_even(METHODS["RigL, ERK"](), cuts, ckpt_path=path, seed=77)


def main(folder: Path, part: str) -> None:
    found = {"one": one, "two": two, "four": four}[part](folder)
    torch.save(found, folder / f"{part}{os.environ.get('LOCAL_RANK', 0)}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
