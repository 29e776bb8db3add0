"""Learned masks beside what else a training has: stops, averages, a second Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparsity import (
    L0,
    STR,
    ContinuousSparsification,
    EdgePopup,
    ESPNFinetune,
    ESPNRewind,
    LearnedMask,
)
from lightning_sparsity.testing import Batches, TinyModel, fit, quiet_trainer

WEIGHT = "net.5.weight"


class Stop(Callback):
    """Ends the training early."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop |= trainer.current_epoch + 1 == self.epochs


# ESPN ------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "phase"), [(1, "warmup"), (3, "joint")])
def test_espn_says_that_it_was_stopped_before_its_last_phase(epochs: int, phase: str) -> None:
    method = ESPNFinetune(0.3, warmup_epochs=1, tune_epochs=1)
    with pytest.warns(UserWarning, match=rf"stopped in the {phase} phase.* is 1, not 0\.3"):
        fit([method, Stop(epochs)], max_epochs=10)


@pytest.mark.parametrize("stopped", [True, False])
def test_espn_begins_anew_with_another_trainer(stopped: bool) -> None:
    method = ESPNRewind(0.3, rewind_to=1, tune_epochs=1, alpha=0.1, joint_lr=0.1)
    with pytest.warns(UserWarning, match="joint phase") if stopped else nullcontext():
        model = fit([method, *[Stop(2)] * stopped], max_epochs=10).model
    found = model.get_parameter(WEIGHT).detach().clone()

    class Look(Callback):
        seen: torch.Tensor

        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 0:
                self.seen = model.get_parameter(WEIGHT).detach().clone()

    look = Look()
    quiet_trainer([method, look], max_epochs=10).fit(model, Batches())
    assert torch.equal(look.seen, found)


def test_espn_keeps_no_weights_that_it_does_not_need() -> None:
    options: dict[str, Any] = {"alpha": 0.1, "joint_lr": 0.1, "tune_epochs": 1}
    for method in (ESPNFinetune(0.3, **options), ESPNRewind(0.3, **options)):
        fit([method], max_epochs=10)
        assert "module" not in (method.state_dict()["snapshot"] or {})


def test_espn_refuses_a_number_of_steps() -> None:
    with pytest.raises(MisconfigurationException, match="leave max_steps out"):
        fit([ESPNRewind(0.3, tune_epochs=1)], max_epochs=10, max_steps=40)


@pytest.mark.filterwarnings("ignore:.*makes no update")
def test_espn_has_a_dev_run() -> None:
    fit([ESPNRewind(0.3, tune_epochs=1)], max_epochs=10, fast_dev_run=2)


# Frozen weights --------------------------------------------------------------------


def test_weights_frozen_by_hand_are_named() -> None:
    def frozen() -> TinyModel:
        model = TinyModel()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        return model

    with pytest.raises(ValueError, match=r"Without a gradient, and passed over: net\.0\.weight"):
        fit([EdgePopup(0.5)], frozen)


# Averages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContinuousSparsification(lr_scale=50.0, update_end=0.5),
        lambda: L0(0.01, lr=0.05, examples=64, update_end=0.5),
        lambda: STR(s_init=-3.0, weight_decay=1e-2, update_end=0.5),
    ],
)
def test_averages_follow_when_masks_are_baked(make: Callable[[], LearnedMask]) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.sizes: list[float] = []

        def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
        ) -> None:
            weight: Any = pl_module.get_submodule("net.5").weight
            self.sizes.append(float(weight.detach().abs().sum()))

    class Validated(TinyModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    look = Look()
    pl.seed_everything(3, verbose=False)
    options: dict[str, Any] = {"limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = quiet_trainer([make(), EMAWeightAveraging(decay=0.99), look], max_epochs=4, **options)
    trainer.fit(Validated(), Batches(), Batches())
    before, after = look.sizes[1:3]
    assert 0.75 < after / before < 1.33
