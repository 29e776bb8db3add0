"""Sparse momentum: how many weights each layer regrows, and where."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sparsity import NM, SNFS, constant
from lightning_sparsity.callbacks.dynamic.snfs import by_momentum, exchange_by_momentum
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.scores import momentum
from lightning_sparsity.testing import TinyModel, fit, sgd

HALF = exchange_by_momentum(momentum(0.9), constant(0.5))


def layer(name: str, live: int, scale: float, shape: tuple[int, int] = (10, 10)) -> Layer:
    """A layer whose first weights live; weight ``i`` is ``i + 1``."""
    size = shape[0] * shape[1]
    mask = (torch.arange(size) < live).view(shape)
    weight = torch.arange(1.0, size + 1).view(shape) * mask
    generator = torch.Generator().manual_seed(live)
    mean = scale * (1 + torch.rand(shape, generator=generator))
    return Layer(name, weight, mask, slots={"momentum": mean})


def act(rule: Any, layers: Layers) -> list[Layer]:
    after = list(rule(layers, [layer.live for layer in layers], 0.0))
    assert [layer.name for layer in after] == [layer.name for layer in layers]
    assert sum(layer.live for layer in after) == sum(layer.live for layer in layers)
    return after


# the split -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "room", "total", "expected"),
    [
        ([1, 3], [100, 100], 40, [10, 30]),
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3]),
        ([2, 3, 5], [100, 100, 11], 40, [13, 17, 10]),  # 10 too many: 5 for each of the others
        ([0, 3, 5], [100, 100, 11], 40, [8, 22, 10]),  # a layer without momentum shares them too
        ([1, 8, 1], [11, 11, 100], 40, [10, 10, 20]),  # filled one after the other
        ([1, 1], [1, 1], 2, [1, 1]),  # 0.99 of one is none: every layer has to be full
        ([0, 1], [5, 5], 10, [5, 5]),
        ([1, 2], [5, 5], 0, [0, 0]),
    ],
)
def test_shares(means: list[float], room: list[int], total: int, expected: list[int]) -> None:
    assert by_momentum(means, room, total) == expected


def test_shares_always_add_up() -> None:
    draw = random.Random(0)
    for _ in range(500):
        count = draw.randint(1, 8)
        room = [draw.randint(0, 300) for _ in range(count)]
        means = [draw.choice([0.0, draw.random(), 1e6 * draw.random()]) for _ in range(count)]
        means[0] = 1.0
        total = draw.randint(0, sum(room))
        shares = by_momentum(means, room, total)
        assert sum(shares) == total
        assert all(0 <= n <= most for n, most in zip(shares, room, strict=True))
        if total <= sum(int(0.99 * most) for most in room):
            assert all(n <= 0.99 * most for n, most in zip(shares, room, strict=True))


# the rule --------------------------------------------------------------------------------


def test_new_weights_go_where_the_momentum_is() -> None:
    layers = [layer("calm", 40, 1.0), layer("wild", 20, 9.0)]
    means = [float(layer.slots["momentum"][layer.mask].mean()) for layer in layers]
    after = act(HALF, layers)
    grown = round(30 * means[0] / sum(means))
    assert [layer.live for layer in after] == [20 + grown, 10 + 30 - grown]
    for old, new, dropped in zip(layers, after, (20, 10), strict=True):
        flat = new.mask.view(-1)
        assert flat[dropped : old.live].all()  # the largest weights stay
        candidates = old.slots["momentum"].view(-1).clone()
        candidates[dropped : old.live] = -1
        count = new.live - (old.live - dropped)
        best = candidates.topk(count).indices.sort().values
        found = torch.cat([flat[:dropped].nonzero(), flat[old.live :].nonzero() + old.live])
        assert torch.equal(found.squeeze(1), best)


def test_the_mean_is_that_of_the_live_weights_before_the_drop() -> None:
    calm, wild = layer("calm", 20, 1.0), layer("wild", 20, 1.0)
    mean = torch.ones(100)
    mean[:10] = 19.0  # of weights that are dropped
    mean[20:] = 0.5
    wild = dataclasses.replace(wild, slots={"momentum": mean.view(10, 10)})
    calm = dataclasses.replace(calm, slots={"momentum": torch.ones(10, 10)})
    # means 1 and 10: of 20 the shares are 1.8 and 18.2
    assert [layer.live for layer in act(HALF, [calm, wild])] == [12, 28]


@pytest.mark.parametrize(("scale", "drops"), [(9.0, 10), (0.1, 45)])
def test_a_nearly_dense_layer_that_grows_drops_what_it_has_room_for(
    scale: float, drops: int
) -> None:
    layers = [layer("full", 90, scale), layer("other", 20, 1.0)]
    full, _ = act(HALF, layers)
    assert full.mask.view(-1)[drops:90].all()
    means = [float(layer.slots["momentum"][layer.mask].mean()) for layer in layers]
    grown, _ = by_momentum(means, [10 + drops, 90], drops + 10)
    assert full.live == 90 - drops + grown


def test_without_any_momentum_each_layer_regrows_its_own() -> None:
    layers = [layer("a", 40, 0.0), layer("b", 20, 0.0)]
    after = act(HALF, layers)
    assert [layer.live for layer in after] == [40, 20]


def test_a_layer_without_live_weights_does_not_break_the_others() -> None:
    after = act(HALF, [layer("dead", 0, 1.0), layer("alive", 40, 1.0)])
    assert [layer.live for layer in after] == [0, 40]


def test_a_layer_that_never_had_a_gradient_is_left_alone() -> None:
    frozen = dataclasses.replace(layer("frozen", 40, 1.0), slots={})
    after = act(HALF, [frozen, layer("a", 40, 1.0), layer("b", 40, 2.0)])
    assert after[0] is frozen
    assert after[1].live < 40 < after[2].live


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_momentum_that_is_not_finite_stops_the_update(bad: float) -> None:
    wrong = layer("wrong", 40, 1.0)
    wrong.slots["momentum"][0, 0] = bad
    with pytest.raises(NonFiniteScoreError, match="momentum of wrong is not finite"):
        HALF([wrong, layer("a", 40, 1.0)], [40, 40], 0.0)


def test_the_total_stays_over_many_updates() -> None:
    layers = [layer("a", 30, 1.0), layer("b", 95, 3.0), layer("c", 3, 0.1), layer("d", 1, 40.0)]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(100):
        layers = [
            dataclasses.replace(
                layer,
                weight=torch.randn(layer.shape, generator=generator) * layer.mask,
                slots={"momentum": torch.randn(layer.shape, generator=generator).exp()},
            )
            for layer in act(HALF, layers)
        ]
        assert all(layer.live for layer in layers)
        seen.add(tuple(layer.live for layer in layers))
    assert len(seen) > 50


# in training -----------------------------------------------------------------------------


def test_layers_exchange_weights_unless_told_not_to() -> None:
    moving = fit([SNFS(0.2)])
    counts = {tuple(live.values()) for _, live in moving.history}
    assert len(counts) == 3
    assert {sum(count) for count in counts} == {round(0.2 * 2184)}
    still = fit([SNFS(0.2, redistribute=False)])
    assert len({tuple(live.values()) for _, live in still.history}) == 1
    assert still.changes == moving.changes == 2  # not after the last of three epochs


def test_patterns_hold() -> None:
    result = fit([SNFS(structure=NM(2, 4), exclude="net.0")])
    assert {tuple(live.values()) for _, live in result.history} == {(1024, 32)}
    assert result.changes == 2


class Momentum(Callback):
    """The running mean of the dense gradients, and ours."""

    def __init__(self) -> None:
        self.ours: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            assert p.grad is not None
            self.mean[name] = 0.8 * self.mean.get(name, torch.zeros_like(p)) + 0.2 * p.grad

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        self.ours = {p.name: p.slots["momentum"] for p in keeper.masks}


@pytest.mark.parametrize("optimizer", [sgd, partial(torch.optim.Adam, weight_decay=0.1)])
def test_momentum_is_that_of_the_dense_gradient_with_any_optimizer(optimizer: Any) -> None:
    watch = Momentum()
    result = fit([SNFS(0.1, beta=0.8), watch], lambda: TinyModel(optimizer=optimizer), max_steps=20)
    for name, mask in result.masks.items():
        torch.testing.assert_close(watch.ours[name], watch.mean[name].detach())
        assert watch.ours[name][~mask].any()


def test_the_fraction_falls_to_its_floor() -> None:
    assert SNFS(0.1).drop_fraction_at(0) == 0.5
    assert SNFS(0.1).drop_fraction_at(1) == 0.005
    assert SNFS(0.1, drop_fraction=0.0).drop_fraction_at(1) == 0


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, "beta"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"beta": "0.9"}, TypeError, "beta must be a number"),
        ({"drop_fraction": 2}, ValueError, "drop_fraction must lie in"),
        ({"redistribute": 1}, TypeError, "must be True or False"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^SNFS.*{message}"):
        SNFS(0.3, **bad)
