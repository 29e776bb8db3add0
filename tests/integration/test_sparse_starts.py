"""Where the live weights lie as training begins, and what values they have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sparsity import SNIP, MaskCallback, StaticSparse, smart_ratio
from lightning_sparsity.core.layer import Budget, Layer, Layers
from lightning_sparsity.scores import magnitude, without_gradient
from lightning_sparsity.starts import approximate_isometry
from lightning_sparsity.testing import Batches, Result, TinyModel, fit


class First(Callback):
    """The weights as training begins."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Copy."""
        if trainer.global_step == 0:
            self.weights = {k: p.detach().clone() for k, p in module.named_parameters()}


def begin(method: MaskCallback) -> tuple[dict[str, Tensor], Result]:
    """The weights as training begins, and the end of it."""
    first = First()
    result = fit([method, first], max_epochs=1)
    return first.weights, result


def penalty(weight: Tensor) -> float:
    """How far the live rows or columns, whichever are fewer, are from orthonormal."""
    rows = weight.flatten(1)
    rows = rows if len(rows) <= rows.shape[1] else rows.T
    rows = rows[rows.any(1)]
    return float((rows @ rows.T - torch.eye(len(rows))).norm())


def test_isometry_after_scores() -> None:
    plain, masks = begin(SNIP(0.4, data=Batches(2)))
    moved, same = begin(SNIP(0.4, data=Batches(2), weight_init=approximate_isometry()))
    for name, mask in masks.masks.items():
        assert torch.equal(same.masks[name], mask), "the scores are those of the model's weights"
        assert 0 < mask.sum() < mask.numel()
        assert not moved[name][~mask].any()
        assert penalty(moved[name]) < 0.5 * penalty(plain[name])
    assert penalty(moved["net.5.weight"]) < 0.2
    assert torch.equal(moved["net.7.bias"], plain["net.7.bias"])


@without_gradient
def ones(layers: Layers, budget: Budget, progress: float) -> Layers:
    """All weights are one."""
    return [dataclasses.replace(layer, weight=torch.ones_like(layer.weight)) for layer in layers]


def test_start_values_come_last() -> None:
    method = SNIP(0.4, data=Batches(2), shuffle=True, reinitialize=True, weight_init=ones)
    weights, result = begin(method)
    for name, mask in result.masks.items():
        assert torch.equal(weights[name], mask.float())


def test_start_values_must_be_a_rule() -> None:
    wrong: Any = "isometry"
    with pytest.raises(TypeError, match=r"SNIP\(weight_init='isometry'\): must be a function"):
        SNIP(0.4, weight_init=wrong)


def test_dense_layers_keep_their_values() -> None:
    isometry = approximate_isometry(orthogonal=True)
    plain = fit([])
    for method in (
        StaticSparse(1.0, distribution=smart_ratio, weight_init=isometry),
        SNIP(1.0, data=Batches(2), weight_init=isometry),
    ):
        result = fit([method])
        result.masks = {}
        result.assert_equal(plain)


def test_random_tickets_and_hybrid_ones() -> None:
    """Su et al.: the ratios at random places, or where a trained network is large."""
    _, result = begin(StaticSparse(0.32, distribution=smart_ratio, seed=1))
    layers = [Layer(n, m.float(), torch.ones_like(m)) for n, m in result.masks.items()]
    assert result.live == round(0.32 * 2184)
    assert [int(m.sum()) for m in result.masks.values()] == smart_ratio(layers, result.live)
    assert [int(m.sum()) for m in result.masks.values()] == [66, 614, 19]
    _, hybrid = begin(StaticSparse(0.32, distribution=smart_ratio, score=magnitude))
    name = "net.5.weight"
    weight = begin(StaticSparse(1.0))[0][name]
    kept = hybrid.masks[name]
    assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_ratios_that_the_linear_layers_do_not_allow() -> None:
    with pytest.raises(
        ValueError, match=r"StaticSparse: smart_ratio_with.*smallest density is 0.29"
    ):
        fit([StaticSparse(0.1, distribution=smart_ratio)], TinyModel)
