"""What grows, how much is dropped, and how much of the network was ever live: as settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_sparsity import (
    NM,
    SET,
    Block,
    DensityMonitor,
    MaskCallback,
    RigL,
    Rows,
    cosine,
    erk,
    linear,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layers, call_of
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import (
    drawn_by,
    gradient,
    magnitude,
    momentum,
    nearby,
    random,
    unexplored,
)
from lightning_sparsity.testing import TinyModel, fit

Make = Callable[..., MaskCallback]
GROWTHS: dict[str, Make] = {
    "RigL, random": lambda **kw: RigL(0.3, growth=random, update_interval=4, **kw),
    "RigL, momentum": lambda **kw: RigL(0.3, growth=momentum(0.9), update_interval=4, **kw),
    "RigL, drawn": lambda **kw: RigL(0.3, growth=drawn_by(gradient, 2), update_interval=4, **kw),
    "RigL, nearby": lambda **kw: RigL(0.3, growth=drawn_by(nearby(0.1)), update_interval=4, **kw),
    "SET, nearby": lambda **kw: SET(0.3, growth=drawn_by(nearby(0.1)), **kw),
    "SET, unexplored": lambda **kw: SET(0.3, growth=unexplored(), **kw),
    "SET, momentum": lambda **kw: SET(0.3, growth=momentum(0.5), sign_split=True, **kw),
}


class Watch(Callback):
    """Masks and dense gradients of every step, seen from outside."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        self.grads.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.masks:
            self._look(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        self.masks.append({kept.name: kept.mask.clone() for kept in keeper.masks})


# Growth


@pytest.mark.parametrize("name", GROWTHS)
def test_every_growth_keeps_the_counts_and_is_one_of_a_kind(name: str) -> None:
    result = fit([GROWTHS[name]()])
    assert result.changes == (4 if name.startswith("RigL") else 2)
    assert {tuple(live.values()) for _, live in result.history} == {
        tuple(int(mask.sum()) for mask in result.masks.values())
    }
    usual = fit([RigL(0.3, update_interval=4) if name.startswith("RigL") else SET(0.3)])
    assert usual.history[0] == result.history[0], "the start is the same"
    assert usual.history[-1] != result.history[-1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", GROWTHS)
def test_every_growth_resumes(name: str, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        return fit([GROWTHS[name](), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    run(ckpt_path=str(tmp_path / "step=6.ckpt"), seed=77).assert_equal(whole)


@pytest.mark.parametrize(
    "growth", [random, momentum(), drawn_by(nearby()), unexplored()], ids=call_of
)
@pytest.mark.parametrize("structure", [Rows(), Block(2, 4), NM(1, 4)], ids=repr)
def test_every_growth_works_with_structures(growth: Any, structure: Any) -> None:
    density = None if isinstance(structure, NM) else 0.5
    options: dict[str, Any] = {} if structure == Rows() else {"exclude": "net.0"}
    result = fit([RigL(density, growth=growth, update_interval=4, structure=structure, **options)])
    assert result.changes > 0
    assert len({tuple(live.values()) for _, live in result.history}) == 1


def test_momentum_is_that_of_the_dense_gradients() -> None:
    watch = Watch()
    fit([watch, RigL(0.3, growth=momentum(0.8), update_interval=5, update_end=7)], max_epochs=1)
    name = "net.5.weight"
    mean = torch.zeros(16, 128)
    for grads in watch.grads[:5]:
        mean = 0.8 * mean + 0.2 * grads[name]
    before, after = watch.masks[4][name], watch.masks[5][name]
    new = after & ~before
    stayed_away = ~(after | before)
    assert int(new.sum()) > 20
    assert mean.abs()[new].min() > mean.abs()[stayed_away].max()
    last = watch.grads[4][name].abs()
    assert last[new].min() < last[stayed_away].max(), "the last gradient would choose others"
    assert any(grads[name][~before].any() for grads in watch.grads[:5])


def test_growth_nearby_is_nearby() -> None:
    def mean_distance(growth: Any) -> float:
        watch = Watch()
        fit([SET(0.05, distribution=erk, growth=growth, drop_fraction=0.9), watch])
        new = watch.masks[-1]["net.5.weight"] & ~watch.masks[0]["net.5.weight"]
        outputs, inputs = new.nonzero(as_tuple=True)
        assert len(outputs) > 30
        return float(((outputs + 0.5) / 16 - (inputs + 0.5) / 128).abs().mean())

    assert mean_distance(random) > 0.25
    assert mean_distance(drawn_by(nearby(0.05))) < 0.1


@pytest.mark.parametrize("method", [RigL, SET])
@pytest.mark.parametrize("growth", ["random", None, 3, drawn_by, momentum], ids=call_of)
def test_what_is_no_growth(method: Any, growth: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^{method.__name__}\(growth=.*: must be a function, such"
    ):
        method(0.3, growth=growth)


# Drop fractions


def test_a_number_falls_as_a_cosine_and_a_schedule_is_taken_as_it_is() -> None:
    assert [RigL(0.1).drop_fraction_at(x) for x in (0.0, 1.0)] == [0.3, 0.0]
    floor = RigL(0.1, drop_fraction=cosine(0.5, 0.005))
    assert [floor.drop_fraction_at(x) for x in (0.0, 0.5, 1.0)] == [0.5, 0.2525, 0.005]
    assert [SET(0.1).drop_fraction_at(x) for x in (0.0, 1.0)] == [0.3, 0.3]
    falling = SET(0.1, drop_fraction=linear(0.4))
    assert [falling.drop_fraction_at(x) for x in (0.0, 0.5, 1.0)] == [0.4, 0.2, 0.0]
    number, schedule = (
        fit([RigL(0.3, drop_fraction=fraction, update_interval=4)])
        for fraction in (0.4, cosine(0.4))
    )
    number.assert_equal(schedule)


def test_a_schedule_drops_what_it_says() -> None:
    # What is unexplored never was live, so that all that was dropped shows.
    watch = Watch()
    schedule = cosine(0.5, 0.005)
    callback = RigL(
        0.1, drop_fraction=schedule, growth=unexplored(), update_interval=4, update_end=24
    )
    fit([callback, watch])
    name = "net.5.weight"
    live = int(watch.masks[0][name].sum())
    for step in range(1, 25):
        new = int((watch.masks[step][name] & ~watch.masks[step - 1][name]).sum())
        due = step % 4 == 0 and step < 24  # nothing would train after the last step
        assert new == (math.floor(schedule(step / 24) * live) if due else 0)


@pytest.mark.parametrize("method", [RigL, SET])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, r"drop_fraction must lie in \[0, 1\]"),
        (1.5, ValueError, r"drop_fraction must lie in \[0, 1\]"),
        (math.nan, ValueError, r"drop_fraction must lie in \[0, 1\]"),
        ("0.3", TypeError, "drop_fraction must be a number"),
        (True, TypeError, "drop_fraction must be a number"),
        (None, TypeError, "drop_fraction must be a number"),
        (cosine, TypeError, "drop_fraction must be a number"),
        (cosine(1.2), ValueError, r"is 1.2 at progress 0.0; drop_fraction must lie in \[0, 1\]"),
        (linear(0.3, -0.1), ValueError, r"is -0.1 at progress 1.0; drop_fraction must lie"),
        (lambda x: 4 * x * (1.5 - x), ValueError, r"is 2.0 at progress 0.5; drop_fraction must"),
    ],
)
def test_what_is_no_drop_fraction(
    method: Any, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{method.__name__}\(drop_fraction=.*{message}"):
        method(0.3, drop_fraction=value)


# In-time over-parameterisation


class Memory(Logger):
    """A logger that keeps what it is given."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "itop/total" in metrics:
            assert step is not None
            self.rows[step] = dict(metrics)


def wide() -> TinyModel:
    return TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 300), nn.ReLU(), nn.Linear(300, 4)))


ITOP: dict[str, Any] = {
    "drop_fraction": cosine(0.5, 0.005),
    "update_interval": 2,
    "update_end": 1.0,
}


def rates(callback: MaskCallback) -> tuple[list[dict[str, float]], Watch]:
    """What the monitor logs of the rate after every step, and all masks."""
    memory, watch = Memory(), Watch()
    fit([callback, DensityMonitor(), watch], wide, logger=memory, log_every_n_steps=1)
    rows = [memory.rows[step] for step in sorted(memory.rows)]
    assert len(rows) == 24
    return rows, watch


@pytest.mark.parametrize(
    "callback",
    [
        RigL(0.1, **ITOP),
        SET(0.1, **ITOP),
        SET(0.1, **{**ITOP, "growth": unexplored()}),
        SET(0.1, sign_split=True),
    ],
    ids=["RigL", "SET", "unexplored", "epochs"],
)
def test_the_rate_is_the_union_of_all_masks(callback: MaskCallback) -> None:
    rows, watch = rates(callback)
    fired = {name: mask.clone() for name, mask in watch.masks[0].items()}
    total = []
    for row, masks in zip(rows, watch.masks[1:], strict=True):
        for name, mask in masks.items():
            fired[name] |= mask
            assert row[f"itop/{name}"] == int(fired[name].sum()) / mask.numel()
        ever = sum(int(union.sum()) for union in fired.values())
        total.append(row["itop/total"])
        assert row["itop/total"] == ever / sum(union.numel() for union in fired.values())
    assert total == sorted(total)
    assert total[0] == pytest.approx(0.1, abs=1e-3), "the masks at the start count"
    assert total[0] < total[-1] <= 1
    assert rows[-1]["density/total"] == pytest.approx(0.1, abs=1e-3)


def test_the_rate_of_random_growth_is_as_expected() -> None:
    # An update that drops n of k live weights draws n of the N - k + n others: of those that
    # never were live the share n / (N - k + n) comes alive.
    callback = SET(0.1, include="net.1", **ITOP)
    rows, watch = rates(callback)
    size, live = 36 * 300, 1080
    assert int(watch.masks[0]["net.1.weight"].sum()) == live
    never = float(size - live)
    for step in range(1, 25):
        if step % 2 == 0 and step < 24:
            n = math.floor(callback.drop_fraction_at(step / 24) * live)
            never *= 1 - n / (size - live + n)
        expected = 1 - never / size
        # Standard deviations of what comes alive stay below 60 of 10800.
        assert rows[step - 1]["itop/total"] == pytest.approx(expected, abs=0.015)
    assert rows[-1]["itop/total"] > 0.3


def test_unexplored_growth_explores_as_much_as_can_be() -> None:
    callback = SET(0.1, include="net.1", **{**ITOP, "growth": unexplored()})
    rows, _ = rates(callback)
    size, live = 36 * 300, 1080
    ever = live
    for step in range(1, 25):
        if step % 2 == 0 and step < 24:
            ever += math.floor(callback.drop_fraction_at(step / 24) * live)
        assert rows[step - 1]["itop/total"] == ever / size
    options = {"drop_fraction": 0.9, "growth": unexplored(), "update_interval": 1}
    rows, _ = rates(SET(0.3, include="net.1", **options))
    assert [row["itop/total"] for row in rows[:4]] == pytest.approx([0.57, 0.84, 1.0, 1.0])


def test_what_was_ever_live_is_in_the_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    watch = Watch()
    callback = SET(0.1, growth=unexplored(), update_interval=2)
    fit([callback, watch, saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    parameters = file["callbacks"]["MaskKeeper"]["parameters"]
    for name, saved in parameters.items():
        union = torch.stack([masks[name] for masks in watch.masks]).any(0)
        assert torch.equal(saved["slots"]["fired"], union)


# Learning rates


class Rates(MaskCallback):
    """Notes the learning rate that its layers show."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float | None]] = []
        super().__init__(
            density=0.5,
            default_distribution=erk,
            initial=chain(drop(random), self._note),
            update=chain(self._note, drop(magnitude, 0.3), grow(random)),
            update_interval=3,
            update_end=24,
        )

    def _note(self, layers: Layers, budget: Any, progress: float) -> Layers:
        self.seen.append({layer.name: layer.lr for layer in layers})
        return layers


class Scheduled(TinyModel):
    """Two parameter groups, and a scheduler that lowers both rates at every step."""

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.4}, {"params": rest}], lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step: 0.9**step, lambda step: 0.8**step]
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_layers_show_the_learning_rate_of_the_step_that_was_made() -> None:
    callback = Rates()
    fit([callback], Scheduled)
    start, *updates = callback.seen
    assert start == {"net.0.weight": 0.4, "net.5.weight": 0.1, "net.7.weight": 0.1}
    assert len(updates) == 7
    for step, seen in zip(range(3, 24, 3), updates, strict=True):
        # The scheduler has moved after every step but the one just made.
        assert seen == pytest.approx(
            {
                "net.0.weight": 0.4 * 0.9 ** (step - 1),
                "net.5.weight": 0.1 * 0.8 ** (step - 1),
                "net.7.weight": 0.1 * 0.8 ** (step - 1),
            }
        )


def test_weights_that_no_optimizer_steps_have_no_learning_rate() -> None:
    class Partly(TinyModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[5].parameters(), lr=0.3)

    callback = Rates()
    fit([callback], Partly, max_epochs=1)
    seen = {name: lr for group in callback.seen for name, lr in group.items()}
    assert seen == {"net.0.weight": None, "net.5.weight": 0.3, "net.7.weight": None}
