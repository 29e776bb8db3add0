"""The metrics inside a training, beside what DensityMonitor says."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparsity import DensityMonitor, RigL
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.metrics import (
    ITOP,
    Churn,
    Density,
    EffectiveDensity,
    GradientFlow,
    MaskSimilarity,
    ParameterEfficiency,
    live_masks,
)
from lightning_sparsity.testing import TinyModel, fit


class Measuring(TinyModel):
    """Logs metrics of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.density = Density()
        self.itop = ITOP()
        self.churn = Churn()
        self.flows = nn.ModuleList([GradientFlow(), GradientFlow(live=False)])
        self.efficiency = ParameterEfficiency()
        self.seen: list[tuple[float, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        self.efficiency.update(scores, batch[1], self)
        self.log("efficiency", self.efficiency, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(scores, batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        live, every = (float(flow(self)) for flow in self.flows)
        assert live == pytest.approx(every)
        assert live > 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("mine", self.density(self))
        self.seen.append(tuple(float(m(self)) for m in (self.density, self.itop, self.churn)))


class Reading(Callback):
    """What the monitor says at the same time."""

    def __init__(self, monitor: DensityMonitor) -> None:
        self.monitor = monitor
        self.seen: list[tuple[float, ...]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.monitor._watch is not None
        found = self.monitor._watch.metrics()
        kinds = ("density", "itop", "churn", "effective_density")
        self.seen.append(tuple(found[f"{kind}/total"] for kind in kinds))


def test_metrics_agree_with_the_monitor() -> None:
    monitor = DensityMonitor(connectivity=True, print_tables=False)
    reading = Reading(monitor)
    result = fit([RigL(0.2, update_interval=4), monitor, reading], Measuring)
    assert isinstance(result.model, Measuring)
    seen = result.model.seen
    assert len(seen) == 24
    for (density, itop, churn), (d, i, c, _) in zip(seen, reading.seen, strict=True):
        assert (density, itop) == pytest.approx((d, i))
        if churn:
            assert churn == pytest.approx(c)
    assert sum(churn > 0 for _, _, churn in seen) == 4  # updates; the monitor repeats the last
    assert seen[-1][1] > seen[0][1]
    logged = result.trainer.logged_metrics
    assert float(logged["mine"]) == pytest.approx(seen[-1][0])
    assert float(logged["efficiency"]) > 0
    effective = EffectiveDensity()(result.masks)
    assert float(effective) == pytest.approx(reading.seen[-1][3])


def test_masks_count_where_live_weights_are_zero() -> None:
    """What has just grown is zero, and live."""
    found = []

    class Counting(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            found.append((float(Density()(self)), float(Density()(self.net))))

    fit([RigL(0.2, update_interval=4)], Counting)
    assert {by_masks for by_masks, _ in found} == {found[0][0]}
    assert any(by_zeros < by_masks for by_masks, by_zeros in found)


def test_the_masks_of_a_fit_are_for_its_own_model() -> None:
    class Nested(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pl.LightningModule()
            self.inner.fc = nn.Linear(2, 2)
            self.looked = False

        def on_train_batch_end(self, *args: Any) -> None:
            assert list(live_masks(self.inner)) == ["fc.weight"]
            keeper = MaskKeeper.of(self.trainer)
            assert keeper is not None
            assert keeper.masks is not None
            assert list(live_masks(self)) == [kept.name for kept in keeper.masks]
            self.looked = True

    method = RigL(0.2, update_interval=4, include="net")
    assert fit([method], Nested).model.looked


def test_after_training_zeros_are_what_is_pruned() -> None:
    result = fit([RigL(0.2, update_interval=4)])
    assert MaskSimilarity("hamming")(result.model, result.masks) == 0
    assert torch.equal(live_masks(result.model)["net.5.weight"], result.masks["net.5.weight"])


def test_metrics_change_nothing() -> None:
    plain = fit([RigL(0.2, update_interval=4)])
    measured = fit([RigL(0.2, update_interval=4)], Measuring)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, measured.weights[name])
    assert plain.weights.keys() == measured.weights.keys()
