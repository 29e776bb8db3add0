"""The metrics inside a training, beside what DensityMonitor says."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from doubles import double, doubles
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparsity import DensityMonitor, RigL, SparseCompute, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.metrics import (
    ITOP,
    Churn,
    CompressionRatio,
    Density,
    EffectiveDensity,
    FLOPs,
    GradientFlow,
    HardnessNormalizedEfficiency,
    MaskSimilarity,
    ParameterEfficiency,
    gradient_norms,
    live_masks,
)
from lightning_sparsity.ops import native
from lightning_sparsity.testing import Batches, TinyModel, fit


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


@pytest.mark.filterwarnings("ignore:Dead neurons")
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


class Everything(Callback):
    """All metrics, of the module, of the net in it and of the masks, in every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.similarity = MaskSimilarity()
        self.churn = Churn()
        self.itop = ITOP()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        found = {}
        for name, source in (("module", pl_module), ("net", pl_module.net), ("m", keeper.masks)):
            found |= {f"{name}/{k}": float(v) for k, v in gradient_norms(source).items()}
            found[f"{name}/flow"] = float(GradientFlow()(source))
            for kind in (Density, EffectiveDensity, CompressionRatio):
                found[f"{name}/{kind.__name__}"] = float(kind()(source))
            for kind in (ParameterEfficiency, HardnessNormalizedEfficiency):
                found[f"{name}/{kind.__name__}"] = float(kind().at(0.7, source))
        inputs = torch.zeros(2, 1, 6, 6, dtype=pl_module.dtype)
        found["flops"] = float(FLOPs()(pl_module.net, inputs))
        found |= {
            "similarity": float(self.similarity(pl_module)),
            "churn": float(self.churn(pl_module)),
            "itop": float(self.itop(pl_module)),
        }
        self.seen.append(found)


def test_compressed_storage_gives_the_same_numbers() -> None:
    dense, packed = Everything(), Everything()
    fit([RigL(0.2, update_interval=4), dense], double, data=doubles())
    compressed = SparseCompute("csr")
    fit([RigL(0.2, update_interval=4), compressed, packed], double, data=doubles())
    assert len(dense.seen) == len(packed.seen) == 24
    for one, other in zip(packed.seen, dense.seen, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    last, live = packed.seen[-1], 437
    assert last["module/Density"] == pytest.approx(live / 2184)
    assert last["module/ParameterEfficiency"] == pytest.approx(70e6 / (live + 44))
    assert last["m/ParameterEfficiency"] == pytest.approx(70e6 / live)
    assert last["flops"] == pytest.approx(2 * (16 * 37 + 351 + 49))


def test_off_the_mask_compressed_weights_have_no_gradient() -> None:
    class Asking(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for source in (pl_module, pl_module.net):
                with pytest.raises(ValueError, match=r"0\.weight are asked for off its mask"):
                    GradientFlow(live=False)(source)

    fit([StaticSparse(0.2), SparseCompute("csr"), Asking()], max_epochs=1)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_flops_of_compressed_layers_are_those_of_dense_ones(kernels: Any) -> None:
    class Reading(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert monitor._watch is not None
            flops = monitor._watch.cost.flops
            assert flops is not None
            assert not flops.unknown
            assert dict(flops.layers) == {
                "net.0.weight": 2 * 9 * 8 * 16,
                "net.5.weight": 2 * 128 * 16,
                "net.7.weight": 2 * 16 * 4,
            }
            assert flops.other == 0

    if kernels == "native" and (reason := native.unavailable()):
        pytest.skip(reason)
    monitor = DensityMonitor(print_tables=False)
    storage = SparseCompute("csr", kernels=kernels)
    result = fit([StaticSparse(0.2), storage, monitor, Reading()], max_epochs=1)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in result.model.modules()]
    assert not any(hooks)


def test_the_report_counts_what_compressed_weights_take() -> None:
    told: list[str] = []

    class Told(DensityMonitor):
        def _print(self, text: str) -> None:
            told.append(text)

    fit([StaticSparse(0.2), SparseCompute("csr"), Told()], data=Batches(2), max_epochs=1)
    end = told[-1]
    assert "FLOPs saved are no time saved" not in end
    # 437 values and their columns, the starts of 28 rows; two layers have a transpose as well
    taken = 437 * 4 + (437 + 9 + 17 + 5) * 4 + (2 * (351 + 49) + 129 + 17) * 4
    assert f"{taken / 1000:.2f} kB now" in end


def test_metrics_change_nothing() -> None:
    plain = fit([RigL(0.2, update_interval=4)])
    measured = fit([RigL(0.2, update_interval=4)], Measuring)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, measured.weights[name])
    assert plain.weights.keys() == measured.weights.keys()
