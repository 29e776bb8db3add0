"""What users do to the dynamic methods that they did not ask for."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightning_sparsity
from lightning_sparsity import (
    ACDC,
    CHT,
    GMP,
    SET,
    SNFS,
    DeepR,
    GraNet,
    NeST,
    RedrLoss,
    RedrWoodfisher,
    RigL,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.scores import drawn_by, momentum
from lightning_sparsity.testing import Batch, Batches, Result, TinyModel, fit

HIDDEN = "net.5.weight"


class Spy(Callback):
    """Copies the mask, the weights and the slots of one layer after every batch."""

    def __init__(self, name: str = HIDDEN) -> None:
        self.name = name
        self.masks: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.slots: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Copy."""
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks[self.name]
        self.masks.append(kept.mask.clone())
        self.weights.append(kept.weight.clone())
        self.slots.append({key: value.clone() for key, value in kept.slots.items()})


class Skipping(TinyModel):
    """A model whose middle layer is passed by in every second batch, or in all.

    Args:
        always: In all.
        keeps_gradients: Gradients are set to zero between steps, not to None.
    """

    def __init__(self, always: bool = False, keeps_gradients: bool = False) -> None:
        middle = [nn.Linear(16, 16), nn.ReLU()]
        super().__init__(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), *middle, nn.Linear(16, 4))
        )
        self.always, self.keeps_gradients, self.calls = always, keeps_gradients, 0

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, with or without the middle layer."""
        self.calls += 1
        hidden = self.net[:3](batch[0])  # type: ignore[index]
        if self.calls % 2 and not self.always:
            hidden = self.net[3](hidden)  # type: ignore[index]
        return nn.functional.cross_entropy(self.net[4:](hidden), batch[1])  # type: ignore[index]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Zeros, or None."""
        optimizer.zero_grad(set_to_none=not self.keeps_gradients)


class TwoSteps(TinyModel):
    """Manual optimization with two steps on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Step twice."""
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class OneInfinity(TinyModel):
    """The second step has infinite gradients, which clipping by value makes finite."""

    def on_after_backward(self) -> None:
        """Infinite, once."""
        if self.trainer.global_step == 1:
            self.net[5].weight.grad.fill_(torch.inf)  # type: ignore[index]


# Growth by momentum --------------------------------------------------------------


@pytest.mark.parametrize(
    "second",
    [
        lambda **kw: RigL(growth=momentum(0.9), update_end=20, **kw),
        lambda **kw: SET(growth=momentum(0.9), **kw),
        lambda **kw: GraNet(0.2, growth=momentum(0.9), **kw),
    ],
)
def test_growth_by_momentum_may_be_queued(second: Any) -> None:
    # KeyError: "net.0.weight has no slot 'momentum'" at the first update.
    first = GMP(0.5, update_interval=4, update_end=8)
    result = fit([first, second(update_start=8, update_interval=2)])
    assert result.changes > 3


@pytest.mark.parametrize(
    "method",
    [
        lambda **kw: RigL(0.3, growth=momentum(0.9), **kw),
        lambda **kw: SET(0.3, growth=momentum(0.9), **kw),
        lambda **kw: GraNet(0.3, growth=momentum(0.9), **kw),
        lambda **kw: CHT(0.3, growth=momentum(0.9), **kw),
    ],
)
@pytest.mark.filterwarnings("ignore:.*got no gradient")
def test_growth_by_momentum_with_a_layer_that_has_no_gradient(method: Any) -> None:
    result = fit([method(update_interval=4)], lambda: Skipping(always=True))
    assert result.changes > 1


def test_draws_by_momentum_gather_it() -> None:
    # drawn_by(...) hides the observe of the score in it.
    assert fit([RigL(0.3, growth=drawn_by(momentum(0.9)), update_interval=4)]).changes > 1


# What an earlier method left in the slots -------------------------------------------


def test_a_queued_method_does_not_go_on_with_the_momentum_of_another() -> None:
    first = RigL(0.5, growth=momentum(0.9), update_interval=2, update_end=4)
    spy = Spy()
    fit([first, SNFS(update_interval=4, update_start=12), spy])
    old, before = spy.slots[3].get("momentum"), spy.slots[10].get("momentum")
    assert before is None or old is None or not torch.equal(old, before)


def test_a_queued_nest_grows_by_gradients_and_not_by_place() -> None:
    first = GMP(0.3, update_interval=2, update_end=4)
    second = NeST(
        0.1,
        peak_density=0.8,
        growth_end=0.6,
        update_interval="epoch",
        update_start=4,
        update_end=24,
    )
    spy = Spy()
    fit([first, second, spy])
    grown = spy.masks[7] & ~spy.masks[6]
    places = grown.view(-1).nonzero().view(-1)
    free = (~spy.masks[6]).view(-1).nonzero().view(-1)
    assert len(places) > 100
    assert not torch.equal(places, free[: len(places)]), "the first free places in row-major order"
    assert spy.weights[7][grown].any(), "at zero"


def test_nothing_is_gathered_after_the_last_update() -> None:
    # 18 x 34 x 34 floats beside 606 live weights, in memory and in every checkpoint.
    spy = Spy()
    fit([RedrWoodfisher(0.3), spy])  # the window ends at step 18, the last update was at 16
    assert "fisher" not in spy.slots[-1]


@pytest.mark.parametrize(
    "method",
    [
        lambda: SNFS(0.3, update_interval=4),
        lambda: NeST(0.3, update_interval=4),
        lambda: RigL(0.3, growth=momentum(0.9), update_interval=4),
    ],
)
@pytest.mark.filterwarnings("ignore:.*The update waits for the next step with finite scores")
@pytest.mark.filterwarnings("ignore:.*training ended at step")
def test_one_infinite_gradient_does_not_end_all_updates(method: Any) -> None:
    result = fit([method()], OneInfinity, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert all(weight.isfinite().all() for weight in result.weights.values())
    assert result.changes > 1


# Redr-Loss ------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
def test_redr_loss_with_two_steps_in_a_batch(interval: int) -> None:
    # The capture opens at the start of a batch, for its first step only.
    assert fit([RedrLoss(0.3, update_interval=interval, update_end=40)], TwoSteps).changes > 1


@pytest.mark.filterwarnings("ignore:.*got no gradient")
@pytest.mark.parametrize(("accumulate", "keeps"), [(2, False), (1, True)])
def test_redr_loss_with_a_layer_that_is_not_always_called(accumulate: int, keeps: bool) -> None:
    result = fit(
        [RedrLoss(0.3)],
        lambda: Skipping(keeps_gradients=keeps),
        accumulate_grad_batches=accumulate,
    )
    assert len(result.history) == 24


def test_redr_loss_reads_all_micro_batches_of_the_last_step_of_an_epoch() -> None:
    # With 2 steps of 4 micro-batches in an epoch, "epoch" and 2 steps are the same times.
    by_step = fit([RedrLoss(0.3, update_interval=2, update_end=6)], accumulate_grad_batches=4)
    by_epoch = fit(
        [RedrLoss(0.3, update_interval="epoch", update_end=6)], accumulate_grad_batches=4
    )
    by_epoch.assert_equal(by_step)


# Others ---------------------------------------------------------------------------


def test_acdc_says_that_its_phases_run_into_each_other() -> None:
    # 10 epochs: every one but the eighth ends in a compressed phase, which all begin there.
    def densities(result: Result) -> list[float]:
        return [round(sum(live.values()) / 2184, 1) for _, live in result.history[1::2]]

    with pytest.warns(UserWarning, match=r"ACDC.*phase"):
        result = fit([ACDC(0.1)], data=Batches(2), max_epochs=10)
    assert densities(result)[-1] == 0.1


def test_chain_removal_does_not_reach_over_an_excluded_layer() -> None:
    def three() -> TinyModel:
        layers = [nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
        return TinyModel(nn.Sequential(*layers, nn.Linear(8, 4)))

    # net.3 is dense, so that every unit of net.1 leads somewhere: there is nothing to remove.
    method = CHT(0.1, drop_fraction=0.0, chain_removal=True, exclude="net.3")
    assert fit([method], three).changes == 0


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_schedule_of_temperatures_below_zero_is_refused(bad: float) -> None:
    schedule: Any = lambda _: bad  # noqa: E731
    with pytest.raises(ValueError, match=r"DeepR\(temperature="):
        fit([DeepR(0.3, temperature=schedule)])


# Command lines --------------------------------------------------------------------

NAMES = sorted(
    name
    for name in lightning_sparsity.__all__
    if isinstance(kind := getattr(lightning_sparsity, name), type)
    and issubclass(kind, lightning_sparsity.MaskCallback)
    and kind not in (lightning_sparsity.MaskCallback, lightning_sparsity.LearnedMask)
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_named_on_a_command_line(name: str) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    takes = inspect.signature(getattr(lightning_sparsity, name)).parameters
    given = {"density": 0.2} if "density" in takes and name != "SRSTE" else {}  # it has a pattern
    options = [{"class_path": f"lightning_sparsity.{name}", "init_args": given}]
    made = parser.instantiate_classes(parser.parse_object({"callbacks": options}))
    assert type(made.callbacks[0]) is getattr(lightning_sparsity, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["RigL", "SET", "GraNet", "CHT"])
def test_growth_can_be_named_on_a_command_line(name: str) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    growth = {"class_path": "lightning_sparsity.scores.momentum"}
    init = {"density": 0.2, "growth": growth}
    options = [{"class_path": f"lightning_sparsity.{name}", "init_args": init}]
    made = parser.instantiate_classes(parser.parse_object({"callbacks": options}))
    assert made.callbacks[0].observe is not None
