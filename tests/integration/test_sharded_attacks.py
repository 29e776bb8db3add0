"""What users do with weights in parts: structures, groups, scores of their own, transformers."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_sparsity import (
    ACDC,
    GMP,
    SET,
    SNIP,
    DensityMonitor,
    LotteryTicket,
    MaskCallback,
    RigL,
    StaticSparse,
    SynFlow,
    erk,
    lamp,
)
from lightning_sparsity.core.layer import Budget, Layer, Layers
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import drawn_by, entrywise, magnitude, momentum
from lightning_sparsity.structures import NM, Block, Columns, Rows
from lightning_sparsity.testing import TinyModel, fit

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


class Same:
    """Eight batches of 16, the same on every process."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(128, 36, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(4, (128,), generator=generator)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(16), self.labels.split(16), strict=True)


def uneven() -> nn.Module:
    """Layers with fewer rows than there are processes."""
    sizes = (36, 15, 7, 1, 4)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))


def even() -> nn.Module:
    """Sizes that structures divide."""
    return nn.Sequential(nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def tied() -> nn.Module:
    """Two layers with one weight."""
    net = nn.Sequential(
        nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 4)
    )
    net[2].weight = net[0].weight
    return net


class Attention(nn.Module):
    """An encoder layer, which reads weights of its children, and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(11, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Words from pictures."""
        words = (images[:, :12].abs() * 5).long().clamp(max=10)
        found: Tensor = self.head(self.out(self.encoder(self.embed(words))).mean(1))
        return found


Cut = Callable[[nn.Module, Any], None]


def each(net: nn.Module, mesh: Any, **options: Any) -> None:
    """A group for every linear layer, and one for the rest."""
    for layer in net.modules():
        if type(layer) is nn.Linear:
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)


def at_once(net: nn.Module, mesh: Any) -> None:
    fully_shard(net, mesh=mesh)


def pairs(net: nn.Module, mesh: Any) -> None:
    assert isinstance(net, nn.Sequential)
    fully_shard([net[0], net[2]], mesh=mesh)
    fully_shard(net, mesh=mesh)


def one_layer(net: nn.Module, mesh: Any) -> None:
    assert isinstance(net, nn.Sequential)
    fully_shard(net[2], mesh=mesh)


def biases(net: nn.Module, mesh: Any) -> None:
    weights = {p for name, p in net.named_parameters() if name.endswith("weight")}
    fully_shard(net, mesh=mesh, ignored_params=weights)


def columns(net: nn.Module, mesh: Any) -> None:
    each(net, mesh, shard_placement_fn=lambda p: Shard(1 if p.ndim > 1 else 0))


def unfreed(net: nn.Module, mesh: Any) -> None:
    each(net, mesh, reshard_after_forward=False)


def offloaded(net: nn.Module, mesh: Any) -> None:
    each(net, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def encoder_apart(net: nn.Module, mesh: Any) -> None:
    assert isinstance(net, Attention)
    fully_shard(net.encoder, mesh=mesh)
    fully_shard(net, mesh=mesh)


def logits(module: Any, batch: Any) -> Tensor:
    found: Tensor = module.net(batch[0])
    return found


def by_rows(layer: Layer) -> Tensor:
    """A score that looks beyond single entries, and writes to what it has made."""
    score = torch.zeros_like(layer.weight)
    score[layer.weight > 0] = 1.0
    score += layer.weight.abs().softmax(1)
    return score


@entrywise
def in_place(layer: Layer) -> Tensor:
    """Entry by entry, in place on what it has made."""
    return layer.weight.abs().mul_(2).add_(layer.mask)


@entrywise
def one_row(layer: Layer) -> Tensor:
    """Says that it works on parts, and writes to a row."""
    score = layer.weight.abs()
    score[0] = 9.0
    return score


class Model(TinyModel):
    """A net in float64, cut as a case says."""

    def __init__(self, net: nn.Module, cut: Cut) -> None:
        super().__init__(net)
        self.double()
        self._cut = cut

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not any(
            isinstance(p, DTensor) for p in self.parameters()
        ):
            self._cut(self.net, self.device_mesh["data_parallel"])


class Validated(Model):
    """Whose weights are gathered by a pass without a derivative, before and between steps."""

    def val_dataloader(self) -> Any:
        return _DATA

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


class Penalised(Model):
    """Whose loss adds up all weights."""

    def loss(self, batch: Any) -> Tensor:
        squares = [p.pow(2).sum() for name, p in self.named_parameters() if "weight" in name]
        penalty = sum(s.full_tensor() if isinstance(s, DTensor) else s for s in squares)
        return super().loss(batch) + 0.05 * penalty


class Failing(Model):
    """With an error on one process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 0 and self.trainer.global_step == 5:
            raise ValueError("boom")
        return self.loss(batch)


class Stop(Callback):
    """Stops after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


Make = Callable[[], list[Callback]]
_DATA = Same()


def snip_rigl() -> list[Callback]:
    return [SNIP(0.5, data=_DATA), RigL(update_interval=4)]


CASES: dict[str, tuple[Make, Callable[[], nn.Module], Cut, dict[str, Any]]] = {
    "tied": (snip_rigl, tied, at_once, {}),
    "groups of layers": (snip_rigl, uneven, pairs, {}),
    "one sharded layer": (snip_rigl, uneven, one_layer, {}),
    "sharded biases": (snip_rigl, uneven, biases, {}),
    "columns": (snip_rigl, even, columns, {}),
    "not freed": (snip_rigl, uneven, unfreed, {}),
    "offloaded": (snip_rigl, uneven, offloaded, {}),
    "attention, SNIP": (snip_rigl, Attention, encoder_apart, {}),
    "attention, SynFlow": (
        lambda: [SynFlow(0.3, data=_DATA, forward_fn=logits)],
        Attention,
        encoder_apart,
        {},
    ),
    "clipping by norm": (
        lambda: [RigL(0.3, update_interval=4)],
        uneven,
        each,
        {"gradient_clip_val": 0.05},
    ),
    "clipping by value": (
        lambda: [RigL(0.3, update_interval=4)],
        uneven,
        each,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "accumulation": (
        lambda: [RigL(0.3, update_interval=2), DensityMonitor(print_tables=False)],
        uneven,
        each,
        {"accumulate_grad_batches": 3},
    ),
    "biases too": (lambda: [SET(0.5, include="*", update_interval=3)], uneven, each, {}),
    "StaticSparse, SET": (lambda: [StaticSparse(0.4), SET(update_interval=3)], uneven, each, {}),
    "momentum": (
        lambda: [SET(0.3, update_interval=4, growth=drawn_by(momentum()))],
        uneven,
        each,
        {},
    ),
    "rows": (lambda: [GMP(0.5, structure=Rows(), update_interval=4)], even, each, {}),
    "columns of units": (
        lambda: [RigL(0.5, structure=Columns(), update_interval=4)],
        even,
        each,
        {},
    ),
    "blocks": (lambda: [SNIP(0.5, structure=Block(2, 2), data=_DATA)], even, each, {}),
    "2:4": (lambda: [RigL(structure=NM(2, 4), update_interval=4)], even, each, {}),
    "own score": (lambda: [GMP(0.5, score=by_rows, update_interval=4)], even, each, {}),
    "own score on parts": (lambda: [GMP(0.5, score=in_place, update_interval=4)], even, each, {}),
    "drawn": (lambda: [SET(0.4, update_interval=3, growth=drawn_by(magnitude))], even, each, {}),
    "validated": (
        lambda: [RigL(0.3, update_interval=4)],
        uneven,
        at_once,
        {"model": Validated, "num_sanity_val_steps": 2},
    ),
    "validated, SNIP": (
        lambda: [SNIP(0.3, data=_DATA, batches=3)],
        uneven,
        unfreed,
        {"model": Validated, "num_sanity_val_steps": 2},
    ),
    "penalty": (lambda: [SNIP(0.3, data=_DATA)], even, at_once, {"model": Penalised}),
    "lamp": (lambda: [GMP(0.3, distribution=lamp, update_interval=4)], even, each, {}),
    "ACDC": (
        lambda: [ACDC(0.3, update_interval=2, compressed=[(0.3, 0.5), (0.8, 1.0)])],
        uneven,
        each,
        {},
    ),
}
REFUSED: dict[str, Make] = {
    "never writes": lambda: [GMP(0.5, score=one_row, update_interval=4)],
    "returns changed copies": lambda: [Writing()],
    "the mask of rank 1 is not that of rank 0": lambda: [GMP(0.5, score=unlike, update_interval=4)],
}


def unlike(layer: Layer) -> Tensor:
    """A score with random numbers of its own, others on every process."""
    seed = int(os.environ.get("LOCAL_RANK", 0))
    return torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed))


def through_a_view(layers: Layers, budget: Budget, progress: float) -> Layers:
    """A rule that writes to the weights it sees."""
    layers[0].weight.view(-1)[0] = 0.125
    return layers


class Writing(MaskCallback):
    """A method with that rule."""

    def __init__(self) -> None:
        super().__init__(
            density=0.3,
            initial=drop(magnitude),
            default_distribution=erk,
            update=through_a_view,
            update_interval=4,
        )


def train(case: tuple[Any, ...], processes: int) -> dict[str, Any]:
    """Masks after every batch, and weights at the end."""
    make, net, cut, options = case
    model = options.get("model", Model)
    options = {"max_epochs": 2} | {k: v for k, v in options.items() if k != "model"}
    if processes:
        strategy = ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)
        options = {**options, "strategy": strategy, "devices": processes}
    result = fit(make(), lambda: model(net(), cut), data=_DATA, **options)
    return {"masks": result.masks, "history": result.history, "weights": result.weights}


@cache
def alone(name: str) -> dict[str, Any]:
    """One process, weights whole."""
    return train(CASES[name], 0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes make of every case."""
    folder = tmp_path_factory.mktemp("attacks")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[name]["history"] == alone(name)["history"]
        for key, mask in alone(name)["masks"].items():
            assert torch.equal(rank[name]["masks"][key], mask), key
        for key, weight in alone(name)["weights"].items():
            torch.testing.assert_close(rank[name]["weights"][key], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_go_wrong_in_silence_is_refused(
    message: str, ranks: list[dict[str, Any]]
) -> None:
    assert all(message in rank[message] for rank in ranks)


def test_what_is_logged_of_every_layer(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    logged = monitored(tmp_path, 0)
    assert any(key.startswith("itop/net.2") for key in logged)
    assert ranks[0]["logged"] == logged


def test_a_lottery_ticket_resumes(ranks: list[dict[str, Any]]) -> None:
    whole = train((ticket, even, each, {"max_epochs": 3}), 0)
    for rank in ranks:
        assert rank["ticket"]["history"] == whole["history"][-16:]
        for key, weight in whole["weights"].items():
            torch.testing.assert_close(rank["ticket"]["weights"][key], weight, rtol=0, atol=1e-9)


def test_an_error_on_one_process_is_seen(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path), "boom"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "ValueError: boom" in done.stderr
    assert "EnforceNotMet" not in done.stderr


def ticket() -> list[Callback]:
    return [LotteryTicket(0.3, rounds=2)]


def monitored(folder: Path, processes: int) -> dict[str, str]:
    """The last line that a monitor logs, without times."""
    logger = CSVLogger(folder, name="", version="")
    callbacks = [RigL(0.3, update_interval=4), DensityMonitor(print_tables=False)]
    train((lambda: callbacks, even, each, {"logger": logger}), processes)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return {}
    logger.save()
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    wanted = ("density/", "churn/", "itop/")
    return {key: value for key, value in rows[-1].items() if key.startswith(wanted)}


def main(folder: Path) -> None:
    found: dict[str, Any] = {name: train(case, 2) for name, case in CASES.items()}
    for message, make in REFUSED.items():
        try:
            train((make, even, each, {}), 2)
        except RuntimeError as error:
            found[message] = str(error)
    found["logged"] = monitored(folder, 2)
    saver = ModelCheckpoint(folder, filename="ticket", every_n_train_steps=8, save_top_k=1)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    train((lambda: [*ticket(), saver, Stop(8)], even, each, options), 2)
    resumed = {"max_epochs": 3, "ckpt_path": str(folder / "ticket.ckpt")}
    found["ticket"] = train((ticket, even, each, resumed), 2)
    torch.save(found, folder / f"{os.environ.get('LOCAL_RANK', 0)}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        train((lambda: [RigL(0.3, update_interval=4)], even, each, {"model": Failing}), 2)
    main(Path(sys.argv[1]))
