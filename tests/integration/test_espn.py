"""ESPN in whole trainings: its phases, their settings, both endings, and resuming in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity import ESPNFinetune, ESPNRewind, RigL
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

FAST: dict[str, Any] = {"alpha": 0.1, "joint_lr": 0.1, "tune_epochs": 2}
MAKE: dict[str, Callable[..., ESPNFinetune | ESPNRewind]] = {
    "ESPNFinetune": lambda d=0.3, **kw: ESPNFinetune(d, **{**FAST, "warmup_epochs": 1, **kw}),
    "ESPNRewind": lambda d=0.3, **kw: ESPNRewind(d, **{**FAST, "rewind_to": 1, **kw}),
}
WHOLE = 2184


class Scheduled(TinyModel):
    """SGD with weight decay and a learning rate that falls every epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.8, weight_decay=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Settings(Callback):
    """By epoch: what the optimizer is set to, and how many weights had momentum at its start."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []
        self.fresh: list[bool] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        if trainer.is_last_batch or len(self.seen) == trainer.current_epoch:
            group = optimizer.param_groups[0]
            now = (group["lr"], group["momentum"], group["weight_decay"])
            if len(self.seen) == trainer.current_epoch:
                self.seen.append(now)
                self.fresh.append(not optimizer.state)
            assert self.seen[-1] == now, "settings change within an epoch"


def test_fine_tuning_has_three_phases_with_their_settings() -> None:
    settings = Settings()
    method = MAKE["ESPNFinetune"](tune_lr_step=1, tune_weight_decay=3e-4)
    result = fit([method, settings], Scheduled, max_epochs=20)
    joint = len(settings.seen) - 3
    assert 1 <= joint < 17, "the joint training ends when the budget is reached"
    assert settings.seen[0] == (0.05, 0.8, 1e-2)
    assert set(settings.seen[1:-2]) == {(0.1, 0.9, 0.0)}
    assert settings.seen[-2:] == [(1e-3, 0.9, 3e-4), (1e-4, 0.9, 3e-4)]
    assert settings.fresh == [True, True, *[False] * (joint - 1), True, False]
    assert result.live == round(0.3 * WHOLE)
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[7] == WHOLE, "dense before"
    assert live[-16] == result.live, "exact after"


def test_rewinding_brings_weights_and_schedule_back() -> None:
    settings = Settings()

    class Seen(Callback):
        before: dict[str, Tensor]
        after: dict[str, Tensor]

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
        ) -> None:
            state = {k: v.clone() for k, v in pl_module.state_dict().items()}
            if trainer.global_step == 8:
                self.before = state
            if method._phase == "tune" and not hasattr(self, "after"):
                self.after = state

    method, seen = MAKE["ESPNRewind"](), Seen()
    result = fit([method, settings, seen], Scheduled, max_epochs=20)
    assert settings.seen[0] == (0.05, 0.8, 1e-2)
    assert set(settings.seen[1:-2]) == {(0.1, 0.9, 0.0)}
    assert settings.seen[-2:] == [(0.025, 0.8, 1e-2), (0.0125, 0.8, 1e-2)]
    assert result.live == round(0.3 * WHOLE)
    for name, value in seen.before.items():  # biases and statistics of batches too
        mask = result.masks.get(name)
        assert torch.equal(seen.after[name], value if mask is None else value * mask), name


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("step", [4, 8, 12, 16, 20, 24])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resume_in_every_phase(name: str, step: int, tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        data = Batches(4)
        return fit(
            [MAKE[name](alpha=0.3), saver],
            Scheduled,
            data=data,
            enable_checkpointing=True,
            max_epochs=9,
            **options,
        )

    whole = run()
    file = tmp_path / f"step={step}.ckpt"
    bare = TinyModel()
    bare.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=True)
    rest = run(ckpt_path=str(file), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_a_missed_budget_is_an_error_or_a_warning() -> None:
    options: dict[str, Any] = {"tune_epochs": 1, "alpha": 1e-5}
    with pytest.raises(MisconfigurationException, match=r"of 2184 factors are above.*22 may live"):
        fit([ESPNFinetune(0.01, **options)], data=Batches(2), max_epochs=3)
    with pytest.warns(UserWarning, match="largest factors are kept all the same"):
        result = fit(
            [ESPNFinetune(0.01, on_missed="warn", **options)], data=Batches(2), max_epochs=3
        )
    assert result.live == 22


def test_rigl_goes_on_from_the_mask() -> None:
    method = MAKE["ESPNFinetune"](alpha=0.3, tune_epochs=3, on_missed="warn")
    rigl = RigL(update_start=0.625, update_end=1.0, update_interval=2)
    result = fit([method, rigl], data=Batches(4), max_epochs=8)
    assert result.live == round(0.3 * WHOLE)
    late = {digest for digest, _ in result.history[-8:]}
    assert len(late) > 1, "RigL moved no weight"


def test_validation_is_without_small_factors() -> None:
    class Look(Callback):
        looked = 0

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
        ) -> None:
            keeper = MaskKeeper.of(trainer)
            assert keeper is not None
            assert keeper.masks is not None
            kept = keeper.masks["net.5.weight"]
            if kept.effective is None:
                return
            small = kept.slots["factor"].abs() <= 0.05
            layer: Any = pl_module.net[5]  # type: ignore[index]
            assert torch.equal(layer.weight, kept.parameter * kept.slots["factor"])
            layer.eval()
            assert not layer.weight[small].any()
            layer.train()
            self.looked += int(small.any())

    look = Look()
    fit([MAKE["ESPNFinetune"](0.05, epsilon=0.05, on_missed="warn"), look], max_epochs=6)
    assert look.looked


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"alpha": 0}, r"alpha=0\): alpha must be above 0"),
        ({"alpha": "1"}, r"alpha='1'\): alpha must be a number"),
        ({"epsilon": -1}, r"epsilon=-1\): epsilon must lie in \[0, 1\]"),
        ({"joint_lr": float("nan")}, r"joint_lr=nan\): joint_lr must be above 0"),
        ({"tune_epochs": 0}, r"tune_epochs=0\): must be at least 1"),
        ({"tune_epochs": 1.5}, r"tune_epochs=1.5\): must be an int >= 1"),
        ({"on_missed": "stop"}, r'on_missed=\'stop\'\): must be "raise" or "warn"'),
    ],
)
@pytest.mark.parametrize("name", MAKE)
def test_bad_arguments(name: str, bad: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\({message}"):
        MAKE[name](0.1, **bad)


@pytest.mark.parametrize("name", MAKE)
def test_what_the_phases_need(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"^{name}: .*give at least 4"):
        fit([MAKE[name]()], max_epochs=3)
    with pytest.raises(MisconfigurationException, match=rf"^{name} gives.* not for 2"):
        fit([MAKE[name]()], ManualModel, max_epochs=4)
    with pytest.raises(MisconfigurationException, match=rf"^{name}: .*with Adam give joint_lr"):
        fit(
            [MAKE[name](joint_lr=None)],
            lambda: TinyModel(optimizer=torch.optim.Adam),
            max_epochs=4,
        )
