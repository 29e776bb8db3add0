"""How long trainings last, who looks for their settings, and what is added to their models."""

from __future__ import annotations

import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from doubles import assert_close, double, doubles
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    timer,
)
from lightning.pytorch.tuner import Tuner, batch_size_scaling
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import (
    APART,
    EMERGENT,
    INITIAL,
    LEARN_TO_THE_END,
    LEARNED,
    LINEAR_ONLY,
    METHODS,
    expected_live,
    made,
    stored,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import SparseCompute, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import (
    Batch,
    Batches,
    Probe,
    Result,
    TinyModel,
    fit,
    quiet_trainer,
    sgd,
    tiny_net,
)

EVERY: dict[str, Callable[..., Any]] = {**METHODS, **APART}
# Their phases are epochs, and fill the training.
IN_PHASES = ["LotteryTicket", "ESPNFinetune", "ESPNRewind"]
# The step of 24 at which the density is reached, where that is after the 12th.
ARRIVES = {
    "GMP": 18,
    "NeST": 18,
    "IHT": 18,
    "ACDC": 24,
    "GraNet": 24,
    "GSM": 24,
    "DPF": 24,
    "OptG": 16,
    "DSD": 16,
    "MovementPruning": 17,
    "LotteryTicket": 17,
}


def callbacks(name: str, storage: str, **options: Any) -> list[Callback]:
    """A method of either table, and what keeps its weights compressed if that is asked for."""
    return [APART[name](**options)] if name in APART else made(name, storage, **options)


@functools.cache
def whole(name: str, storage: str) -> Result:
    """The training of 24 steps that nothing stops."""
    return fit(callbacks(name, storage))


@functools.cache
def short(name: str, storage: str) -> Result:
    """Twelve epochs of two batches each; three of a method that must not have more."""
    return fit(callbacks(name, storage), data=Batches(2), max_epochs=_epochs(name))


def _epochs(name: str) -> int:
    return 3 if name == "LotteryTicket" else 12


def same(result: Result, other: Result, after: int = 0) -> None:
    """Raise unless both went the same way, from a step on, and ended in the same bits."""
    result.assert_equal(other)
    assert result.history == other.history[after:]


def in_budget(name: str, masks: dict[str, Tensor]) -> None:
    """Raise unless as many weights live as the method was asked for."""
    if name in METHODS:
        assert sum(int(mask.sum()) for mask in masks.values()) == expected_live(name, 0.3, masks)


def saver(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


Said = list[warnings.WarningMessage]


@pytest.fixture
def said() -> Iterator[Said]:
    """What methods warn of: messages that begin with the name of one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", rf"({'|'.join(EVERY)})\b")
        yield caught


# ------------------------------------------------------------ a search for a batch size


class Sized(TinyModel):
    """Has a batch size to be found; no dropout, as trials use up random numbers."""

    def __init__(self, batch_size: int = 2) -> None:
        net = tiny_net()
        assert isinstance(net, nn.Sequential)
        net[4] = nn.Identity()
        super().__init__(net)
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        pictures, labels = zip(*Batches(4), strict=True)
        data = TensorDataset(torch.cat(pictures), torch.cat(labels))
        return DataLoader(data, self.batch_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without collecting garbage after every trial."""
    monkeypatch.setattr(batch_size_scaling, "garbage_collection_cuda", lambda: None)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


def _trained(model: Sized, *extra: Callback, folder: Path) -> Result:
    probe = Probe()
    trainer = quiet_trainer([*extra, probe], default_root_dir=folder)
    trainer.fit(model)
    return Result(model, trainer, probe.weights, probe.masks, probe.state, probe.history)


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_batch_size_finder(name: str, storage: str, tmp_path: Path) -> None:
    finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
    pl.seed_everything(3, verbose=False)
    found = _trained(Sized(), *callbacks(name, storage), finder, folder=tmp_path)
    assert found.model.batch_size == 4
    assert len(found.history) == 24
    in_budget(name, found.masks)
    pl.seed_everything(3, verbose=False)
    same(found, _trained(Sized(4), *callbacks(name, storage), folder=tmp_path))


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("name", ["RigL", "SNIP", "OptG", "ESPNRewind"])
def test_tuner_finds_a_batch_size_before_the_training(name: str, tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    model = Sized()
    trainer = quiet_trainer(callbacks(name, "dense"), default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(model, steps_per_trial=1, init_val=2, max_trials=2)
    probe = Probe()
    trainer.callbacks.insert(0, probe)  # type: ignore[attr-defined]
    trainer.fit(model)
    pl.seed_everything(3, verbose=False)
    alone = _trained(Sized(4), *callbacks(name, "dense"), folder=tmp_path)
    assert all(torch.equal(mask, probe.masks[key]) for key, mask in alone.masks.items())
    assert all(torch.equal(value, probe.weights[key]) for key, value in alone.weights.items())


# -------------------------------------------------------------------- part of the data


class Validated(TinyModel):
    """Counts the zeros that validation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        weights = (getattr(module, "weight", None) for module in self.modules())
        self.seen.append(sum(int((w == 0).sum()) for w in weights if w is not None and w.ndim > 1))


class Both(pl.LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches()

    def val_dataloader(self) -> Batches:
        return Batches()


@pytest.mark.parametrize(
    ("argument", "limit"),
    [("limit_train_batches", 2), ("limit_train_batches", 0.25), ("overfit_batches", 0.25)],
)
@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_part_of_the_data_is_less_data(
    name: str, storage: str, argument: str, limit: float
) -> None:
    options: dict[str, Any] = {"limit_val_batches": 1, "num_sanity_val_steps": 0, argument: limit}
    result = fit(
        callbacks(name, storage), Validated, data=Both(), max_epochs=_epochs(name), **options
    )
    same(result, short(name, storage))
    in_budget(name, result.masks)
    epochs = math.ceil(len(result.history) / 2)
    seen = result.model.seen
    assert isinstance(seen, list)
    assert len(seen) == epochs * (2 if argument == "overfit_batches" else 1)
    assert seen[-1] >= sum(int((~mask).sum()) for mask in result.masks.values())


# ---------------------------------------------------------------------- trainings cut short


class Logged(TinyModel):
    """Logs the loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class Clock(Callback):
    """A second passes with every batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def on_train_batch_start(self, *args: Any) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What Lightning's Timer looks at."""
    made = Clock()
    monkeypatch.setattr(timer, "time", made)
    return made


def cut_short(name: str, storage: str, result: Result, step: int, said: Said) -> None:
    """Raise unless a training stopped after a step is told what it has not come to."""
    assert result.history == whole(name, storage).history[:step]
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()
    if ARRIVES.get(name, 0) <= step:
        assert not said
        in_budget(name, result.masks)
        return
    size = sum(mask.numel() for mask in result.masks.values())
    density = result.live / size
    (message,) = (str(warning.message) for warning in said)
    assert re.match(rf"{name}: training (ended at step {step}|was stopped after)", message)
    is_not = "." if result.live == round(0.3 * size) else ", not 0.3"
    assert f"the density is {density:.4g}{is_not}" in message


@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_early_stopping(name: str, storage: str, said: Said) -> None:
    stopping = EarlyStopping("loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    result = fit([*callbacks(name, storage), stopping], Logged)
    assert len(result.history) == 16
    cut_short(name, storage, result, 16, said)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_limited_batches_resume(
    name: str, storage: str, clock: Clock, said: Said, tmp_path: Path
) -> None:
    def run(seconds: int, **options: Any) -> Result:
        return fit(
            [*callbacks(name, storage), clock, saver(tmp_path, 3)],
            enable_checkpointing=True,
            max_epochs=_epochs(name),
            max_time={"seconds": seconds},
            limit_train_batches=2,
            **options,
        )

    run(3)
    file = str(tmp_path / "step=3.ckpt")  # in the middle of an epoch
    same(run(100, ckpt_path=file, seed=77), short(name, storage), after=3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_a_training_that_ran_out_of_time_is_resumed(
    name: str, storage: str, clock: Clock, said: Said, tmp_path: Path
) -> None:
    def run(seconds: int, **options: Any) -> Result:
        mine = [*callbacks(name, storage), clock, saver(tmp_path, 12)]
        return fit(mine, max_time={"seconds": seconds}, enable_checkpointing=True, **options)

    stopped = run(12)
    cut_short(name, storage, stopped, 12, said)
    said.clear()
    file = str(tmp_path / "step=12.ckpt")  # in the middle of an epoch
    same(run(100, ckpt_path=file, seed=77), whole(name, storage), after=12)
    assert not said
    # no time is left
    assert not run(12, ckpt_path=file).history


@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_windows_of_a_training_without_an_end_are_in_steps(
    name: str, storage: str, clock: Clock
) -> None:
    def run() -> Result:
        mine = [*callbacks(name, storage), clock]
        return fit(mine, max_epochs=-1, max_time={"seconds": 12})

    if name in INITIAL:
        result = run()
        assert result.history == whole(name, storage).history[:12]
        in_budget(name, result.masks)
        return
    with pytest.raises(MisconfigurationException, match=rf"^{name}\b"):
        run()


# ------------------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A layer with a low-rank path around it (Hu et al., 2022, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


BASES = {"net.5.weight": "net.5.base.weight", "net.7.weight": "net.7.base.weight"}
ADAPTERS = [f"net.{place}.{part}.weight" for place in (5, 7) for part in ("down", "up")]


class WithAdapters(TinyModel):
    """Linear layers with adapters.

    Args:
        frozen: Whether the layers themselves need no gradient.
        weights: Of the model without adapters.
    """

    def __init__(self, frozen: bool, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        if weights is not None:
            self.load_state_dict(weights)
        net = self.net
        assert isinstance(net, nn.Sequential)
        for place in (5, 7):
            layer = net[place]
            assert isinstance(layer, nn.Linear)
            net[place] = Adapted(layer.requires_grad_(not frozen))
        self.begun = {key: value.clone() for key, value in self.state_dict().items()}

    def configure_optimizers(self) -> Any:
        return sgd([p for p in self.parameters() if p.requires_grad])


def adapters_are_dense(result: Result) -> None:
    """Raise unless the adapters have no mask, and were trained."""
    assert not set(ADAPTERS) & set(result.masks)
    for name in ADAPTERS:
        assert not torch.equal(result.weights[name], result.model.begun[name])  # type: ignore[index]
        assert "up" in name or result.weights[name].all(), "its gradient was masked"


@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_adapters_stay_dense(name: str, storage: str) -> None:
    result = fit(
        callbacks(name, storage, exclude=["*.down", "*.up"]), lambda: WithAdapters(frozen=False)
    )
    adapters_are_dense(result)
    assert list(result.masks) == ["net.0.weight", *BASES.values()][name in LINEAR_ONLY :]
    in_budget(name, result.masks)


@pytest.mark.parametrize("name", INITIAL)
def test_frozen_layers_get_masks_that_stay(name: str) -> None:
    bases = list(BASES.values())
    result = fit(callbacks(name, "dense", include=bases), lambda: WithAdapters(frozen=True))
    adapters_are_dense(result)
    assert list(result.masks) == bases
    assert result.changes == 0
    in_budget(name, result.masks)
    for key, mask in result.masks.items():
        begun = result.model.begun[key]  # type: ignore[index]
        assert torch.equal(result.weights[key], begun * mask)


@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_adapters_around_layers_that_are_sparse_already(name: str, storage: str) -> None:
    first = whole(name, storage)
    mine: list[Callback] = [StaticSparse(include=list(BASES.values()))]
    mine += [SparseCompute("csr")] if storage == "csr" else []
    result = fit(mine, lambda: WithAdapters(frozen=True, weights=first.weights))
    adapters_are_dense(result)
    for key, base in BASES.items():
        assert torch.equal(result.weights[base], first.weights[key])
        assert torch.equal(result.masks[base], first.weights[key] != 0)


class Beside(TinyModel):
    """Gets a low-rank path around a layer when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential()

    def adapt(self) -> None:
        self.side.append(nn.Linear(128, 2, bias=False))
        self.side.append(nn.Linear(2, 16, bias=False))

    def loss(self, batch: Batch) -> Tensor:
        net = self.net
        assert isinstance(net, nn.Sequential)
        hidden = net[:5](batch[0])
        out = net[5](hidden)
        if self.side:
            out = out + self.side(hidden)
        return nn.functional.cross_entropy(net[6:](out), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd([p for p in self.parameters() if p.requires_grad])


class Started(Callback):
    """The masks with which a training begins."""

    def on_masks_ready(self, trainer: Any, pl_module: Any, keeper: MaskKeeper) -> None:
        assert keeper.masks is not None
        self.masks = {kept.name: kept.mask.clone() for kept in keeper.masks}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("name", "storage"), stored([n for n in EVERY if n not in IN_PHASES], ["RigL"])
)
def test_adapters_added_after_a_first_fit(name: str, storage: str, frozen: bool) -> None:
    pl.seed_everything(3, verbose=False)
    chosen = ["net.0.weight", *BASES][name in LINEAR_ONLY :]
    probe, started, model = Probe(), Started(), Beside()
    mine = [*callbacks(name, storage, include=chosen), started, probe]
    trainer = quiet_trainer(mine, max_epochs=2)
    trainer.fit(model, Batches())
    masks, weights = probe.masks, probe.weights
    model.adapt()
    begun = [weight.detach().clone() for weight in model.side.parameters()]
    for key in chosen if frozen else ():
        model.get_parameter(key).requires_grad_(False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, Batches())
    assert len(probe.history) == 24
    assert all(torch.equal(started.masks[key], masks[key]) for key in chosen)
    assert list(probe.masks) == chosen
    in_budget(name, probe.masks)
    for weight, before in zip(model.side.parameters(), begun, strict=True):
        assert not torch.equal(weight, before)
        assert weight.all()
    if frozen:
        for key in chosen:
            assert torch.equal(probe.masks[key], masks[key])
            assert torch.equal(probe.weights[key], weights[key])


# ----------------------------------------------------- masks that are learned, and storage


class Compressed(Callback):
    """How many weights are kept compressed, after every batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        self.counts.append(sum(kept.compressed is not None for kept in keeper.masks))


TO_THE_END = [*LEARN_TO_THE_END, *EMERGENT]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", [*LEARNED, *APART])
def test_learned_masks_are_compressed_when_they_are_final(name: str, tmp_path: Path) -> None:
    options = {"update_end": 12} if name in TO_THE_END else {}

    def run(*more: Callback, **kwargs: Any) -> Result:
        mine = [EVERY[name](**options), *more, saver(tmp_path, 8)]
        return fit(mine, double, data=doubles(), enable_checkpointing=True, **kwargs)

    watch = Compressed()
    result = run(SparseCompute("csr"), watch)
    final = watch.counts.index(3)
    assert 0 < final <= 16
    assert watch.counts == [0] * final + [3] * (24 - final)
    rest = run(SparseCompute("csr"), ckpt_path=str(tmp_path / "step=16.ckpt"), seed=77)
    same(rest, result, after=16)
    dense = run()
    assert result.history == dense.history
    assert_close(result, dense, 1e-11)


@pytest.mark.parametrize("name", TO_THE_END)
def test_masks_that_are_learned_to_the_end_stay_dense(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Compressed()
    with caplog.at_level("INFO"):
        result = fit([EVERY[name](), SparseCompute("csr"), watch])
    assert watch.counts == [0] * 24
    same(result, whole(name, "dense"))
    names = "net.0.weight, net.5.weight, net.7.weight"
    assert f"SparseCompute: {names}: dense while masks are learned" in caplog.text


def test_the_table_says_whose_masks_are_learned(caplog: pytest.LogCaptureFixture) -> None:
    mine = [METHODS["RigL"](include="net.5"), METHODS["DNW"](include="net.7")]
    with caplog.at_level("INFO"):
        fit([*mine, SparseCompute("csr")])
    lines = caplog.text.splitlines()
    rows = [line for line in lines if line.startswith("net.7.weight") and "|" in line]
    assert any("dense" in row and "its mask is learned" in row for row in rows)
