"""Trainings of one net in one process or sharded over two; started by ``test_fsdp.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_sparsity import (
    ACDC,
    GMP,
    SET,
    SNFS,
    SNIP,
    DensityMonitor,
    OptG,
    RedrGradientGlobal,
    RigL,
    SparseCompute,
    SRigL,
    global_by,
)
from lightning_sparsity.scores import magnitude
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
}
WITH_DATA: dict[str, Callable[[int], list[Callback]]] = {
    "SNIP": lambda processes: [SNIP(0.3, data=Halves(processes), batches=4)],
}
REFUSED: dict[str, Callable[[], list[Callback]]] = {
    "OptG": lambda: [OptG(0.3)],
    "SNIP": lambda: [SNIP(0.3)],
    "SparseCompute": lambda: [SET(0.3), SparseCompute("csr")],
}


class Halves:
    """Eight batches of 16, of which each of two processes gets its half."""

    def __init__(self, processes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(128, 36, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(4, (128,), generator=generator)
        self.processes = processes

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        for images, labels in zip(self.images.split(16), self.labels.split(16), strict=True):
            yield images.chunk(self.processes)[rank], labels.chunk(self.processes)[rank]


class Model(TinyModel):
    """Uneven shards, and layers with fewer rows than there are processes."""

    def __init__(self) -> None:
        sizes = [36, 15, 7, 1, 4]
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        super().__init__(nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))))
        self.double()

    def configure_model(self) -> None:
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


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


def outcome(result: Result) -> dict[str, Any]:
    """What is compared: the same on every process."""
    weights = {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in result.weights.items()
    }
    return {"masks": result.masks, "history": result.history, "weights": weights}


def main(folder: Path, rank: int) -> None:
    found: dict[str, Any] = {}
    for name, make in METHODS.items():
        found[name] = outcome(train(make(), 2))
        found[f"{name}, DDP"] = outcome(train(make(), 2, sharded=False))
    for name, of in WITH_DATA.items():
        found[f"{name}, DDP"] = outcome(train(of(2), 2, sharded=False))
    for name, make in REFUSED.items():
        try:
            train(make(), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    saver = ModelCheckpoint(folder, filename="half", enable_version_counter=False)
    train([*METHODS["RigL, ERK"](), StopAfterTwo(), saver], 2, enable_checkpointing=True)
    resumed = train(METHODS["RigL, ERK"](), 2, ckpt_path=str(folder / "half.ckpt"), seed=77)
    found["resumed"] = outcome(resumed)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0)))
