"""DSD: three phases, restarts at zero, learning rates of the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.optim import lr_scheduler as lrs

from lightning_sparsity import DSD, Magnitude, Rows, global_by
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import optimizer_state
from lightning_sparsity.scores import magnitude
from lightning_sparsity.testing import ManualModel, Result, TinyModel, fit

SIZES = [8 * 9, 128 * 16, 16 * 4]
NUMEL = sum(SIZES)
HIDDEN = "net.5.weight"


def lives(result: Result) -> list[int]:
    return [sum(live.values()) for _, live in result.history]


class Watch(Callback):
    """Weights, momentum and learning rate after the updates of every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.momentum: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        if keeper is None or keeper.masks is None:
            return
        kept = keeper.masks[HIDDEN]
        self.weights.append(kept.weight.clone())
        self.masks.append(kept.mask.clone())
        self.momentum += [m.clone() for m in optimizer_state(kept, trainer.optimizers[0])]


def test_dense_sparse_dense_at_the_steps_asked_for() -> None:
    few = sum(round(0.3 * size) for size in SIZES)
    assert lives(fit([DSD(0.3)])) == [NUMEL] * 7 + [few] * 8 + [NUMEL] * 9
    result = fit([DSD(0.3, update_start=5, update_end=11)])
    assert lives(result) == [NUMEL] * 4 + [few] * 6 + [NUMEL] * 14


def test_every_layer_keeps_its_largest() -> None:
    watch = Watch()
    result = fit([DSD(0.3), watch])
    assert list(result.history[7][1].values()) == [22, 614, 19]
    dense = fit([], max_epochs=1).weights[HIDDEN]
    assert torch.equal(watch.masks[7], dense.abs() >= dense.abs().flatten().topk(614).values[-1])
    assert len({digest for digest, _ in result.history[7:15]}) == 1, "fixed in the sparse phase"


def test_pruned_weights_come_back_at_zero_without_momentum_and_train() -> None:
    watch = Watch()
    result = fit([DSD(0.3), watch])
    off = ~watch.masks[14]
    assert off.any()
    assert not watch.weights[15][off].any()
    assert not watch.momentum[15][off].any()
    assert watch.momentum[15][~off].any()
    assert result.weights[HIDDEN][off].count_nonzero() > 0.5 * off.sum()
    assert all(mask.all() for mask in result.masks.values())


def test_ranked_together_in_units_and_from_found_masks() -> None:
    together = fit([DSD(0.3, distribution=global_by(magnitude))])
    assert sum(together.history[7][1].values()) == round(0.3 * NUMEL)
    assert list(together.history[7][1].values()) != [22, 614, 19]
    rows = fit([DSD(0.5, structure=Rows())])
    assert list(rows.history[7][1].values()) == [size // 2 for size in SIZES]
    found = fit([Magnitude(0.5), DSD(0.3)])
    assert lives(found)[0] == NUMEL // 2
    assert set(lives(found)) == {NUMEL // 2, round(0.3 * NUMEL), NUMEL}


def test_a_trained_network_is_pruned_at_once() -> None:
    watch = Watch()
    result = fit([DSD(0.3, update_start=0, update_end=8), watch])
    assert lives(result) == [22 + 614 + 19] * 7 + [NUMEL] * 17
    pl.seed_everything(3, verbose=False)
    begun = TinyModel().state_dict()[HIDDEN]
    assert torch.equal(watch.masks[0], begun.abs() >= begun.abs().flatten().topk(614).values[-1])
    by_name = fit([DSD(distribution={"net.5": 0.1, "*": 1.0}, update_start=0)])
    assert list(by_name.history[0][1].values()) == [72, 205, 64]


# learning rates -----------------------------------------------------------------------


def scheduled(make: Callable[[Any], Any]) -> type[TinyModel]:
    class Scheduled(TinyModel):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    return Scheduled


def sequence(optimizer: Any) -> Any:
    parts = [lrs.ConstantLR(optimizer, 0.5, 4), lrs.LambdaLR(optimizer, lambda t: 0.9**t)]
    return lrs.SequentialLR(optimizer, parts, [18])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: lrs.LambdaLR(o, lambda t: 1.0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 24),
    "warm restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 6),
    "step": lambda o: lrs.StepLR(o, 5),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.3, 24),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 5),
    "sequential": sequence,
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_at_a_tenth(name: str) -> None:
    model = scheduled(SCHEDULERS[name])
    plain, watch = Watch(), Watch()
    fit([plain], model)
    fit([DSD(0.3), watch], model)
    expected = plain.rates[:16] + [0.1 * rate for rate in plain.rates[16:]]
    assert watch.rates == pytest.approx(expected)


def test_another_factor_and_a_rate_in_a_tensor() -> None:
    class Capturable(TinyModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.01))

    watch = Watch()
    fit([DSD(0.3, lr_factor=0.5), watch], Capturable)
    assert watch.rates == pytest.approx([0.01] * 16 + [0.005] * 8)


def test_two_optimizers_slow_down_together() -> None:
    rates: list[list[float]] = []

    class Both(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])

    fit([DSD(0.3), Both()], ManualModel)
    assert rates[:16] == [[0.05, 0.05]] * 16
    assert rates[16:] == [pytest.approx([0.005, 0.005])] * 8


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [12, 16, 20])
def test_resuming_slows_down_once(step: int, tmp_path: Path) -> None:
    model = scheduled(SCHEDULERS["cosine"])

    def train(watch: Watch, **options: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([DSD(0.3), watch, saver], model, enable_checkpointing=True, **options)

    first, second = Watch(), Watch()
    whole = train(first)
    train(second, ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77).assert_equal(whole)
    assert second.rates == first.rates[step:]
    weights = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    assert not weights[HIDDEN][~first.masks[11]].any()


def test_a_second_fit_slows_down_again() -> None:
    method, watch = DSD(0.3), Watch()
    fit([method])
    fit([method, watch])
    assert watch.rates == pytest.approx([0.05] * 16 + [0.005] * 8)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"lr_factor": 0}, ValueError),
        ({"lr_factor": -0.1}, ValueError),
        ({"lr_factor": float("nan")}, ValueError),
        ({"lr_factor": "0.1"}, TypeError),
        ({"update_end": 1.0}, ValueError),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^DSD\({next(iter(bad))}="):
        DSD(0.7, **bad)


def test_bad_windows() -> None:
    with pytest.raises(ValueError, match="^DSD: update_end=0.2 comes before"):
        DSD(0.7, update_start=0.5, update_end=0.2)
