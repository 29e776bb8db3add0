"""DSR: the threshold, what it drops, and where as many grow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sparsity import DSR, NM, Rows
from lightning_sparsity.callbacks.dynamic.dsr import drop_below_threshold
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.window import Window
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.structures import Structure, Unstructured
from lightning_sparsity.testing import ManualModel, fit


def layer(
    name: str, weights: list[float], size: int = 100, structure: Structure | None = None
) -> Layer:
    """A layer of ten columns whose first weights live."""
    flat = torch.zeros(size)
    flat[: len(weights)] = torch.tensor(weights)
    mask = (torch.arange(size) < len(weights)).view(-1, 10)
    return Layer(
        name,
        flat.view(-1, 10),
        mask,
        structure=structure or Unstructured(),
        generator=torch.Generator().manual_seed(size + len(weights)),
    )


def act(layers: Layers, **arguments: Any) -> list[Layer]:
    rule = DSR(0.5, **arguments).rule
    assert rule is not None
    after = list(rule(layers, [0] * len(layers), 0.0))
    assert sum(layer.live for layer in after) == sum(layer.live for layer in layers)
    return after


def threshold(layer: Layer) -> float:
    assert layer.slots["threshold"].shape == ()
    return float(layer.slots["threshold"])


# drop ------------------------------------------------------------------------------------


def test_all_layers_lose_what_is_below_one_threshold() -> None:
    layers = [layer("a", [0.5, -0.1, 0.3, 0.29]), layer("b", [-0.31, 0.2, 0.0])]
    after = drop_below_threshold(3, 0.3)(layers, [0, 0], 0.0)
    assert after[0].mask.nonzero().tolist() == [[0, 0], [0, 2]]  # 0.3 is not below
    assert after[1].mask.nonzero().tolist() == [[0, 0]]


def test_every_layer_keeps_its_largest_weight() -> None:
    layers = [layer("a", [0.01, -0.03, 0.02]), layer("b", [0.0, 0.0]), layer("c", [])]
    after = drop_below_threshold(3, 1.0)(layers, [0, 0, 0], 0.0)
    assert [layer.live for layer in after] == [1, 1, 0]
    assert after[0].mask[0, 1]


def test_a_unit_is_as_large_as_its_mean() -> None:
    rows = [0.2] * 10 + [0.4] * 10 + [0.0] * 9 + [5.0]  # means 0.2, 0.4, 0.5
    after = drop_below_threshold(1, 0.3)([layer("a", rows, structure=Rows())], [0], 0.0)
    assert after[0].units.tolist() == [False, True, True] + 7 * [False]


@pytest.mark.parametrize(
    ("dropped", "factor"), [(0, 2), (17, 2), (18, 1), (20, 1), (22, 1), (23, 0.5), (60, 0.5)]
)
@pytest.mark.parametrize("target", [20, 0.2])
def test_the_threshold_moves_by_two_outside_a_tenth(
    dropped: int, factor: float, target: int | float
) -> None:
    weights = [0.1] * dropped + [1.0] * (100 - dropped)
    layers = [layer("a", weights[::2]), layer("b", weights[1::2])]
    after = act(layers, prune_target=target, threshold=0.5)
    assert [threshold(layer) for layer in after] == [0.5 * factor] * 2
    again = act(after, prune_target=1, threshold=77.0)  # goes on from the slot
    assert threshold(again[0]) in (0.25 * factor, 0.5 * factor, factor)


def test_the_threshold_stays_a_number_above_zero() -> None:
    zeros = layer("zeros", [0.0] * 50)  # are always below
    for _ in range(200):
        (zeros,) = act([zeros], prune_target=1)
    assert threshold(zeros) > 0
    large = layer("large", [1e38] * 50)
    for _ in range(300):
        (large,) = act([large], prune_target=40)
    assert math.isfinite(threshold(large))


def test_weights_that_are_not_finite_stop_the_update() -> None:
    with pytest.raises(NonFiniteScoreError):
        act([layer("a", [math.nan, 1.0])])


# grow ------------------------------------------------------------------------------------


def test_growth_is_in_proportion_to_the_survivors() -> None:
    layers = [
        layer("a", [1.0] * 10 + [0.0] * 20),
        layer("b", [1.0] * 30 + [0.0] * 20),
        layer("c", [0.0] * 5, size=200),  # one survives
    ]
    after = act(layers, prune_target=20)
    # 44 grow by 10 : 30 : 1, which is 10.73, 32.20 and 1.07
    assert [layer.live for layer in after] == [21, 62, 2]


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    layers = [layer("full", [1.0] * 95 + [0.0] * 2), layer("other", [1.0] * 5 + [0.0] * 30)]
    after = act(layers)
    assert [layer.live for layer in after] == [98, 34]  # all that was free and not just dropped


def test_what_was_dropped_does_not_come_back_at_once() -> None:
    old = layer("a", [1.0] * 10 + [0.0] * 40)
    (new,) = act([old])
    assert new.live == 50
    assert not new.mask.view(-1)[10:50].any()
    assert new.mask.view(-1)[:10].all()


def test_what_was_dropped_comes_back_where_there_is_no_other_room() -> None:
    old = [layer("a", [1.0] * 30 + [0.0] * 60), layer("b", [1.0] * 100)]
    new = act(old)
    assert [layer.live for layer in new] == [90, 100]
    assert new[0].mask.view(-1)[90:].all()


def test_growth_is_random_and_by_its_own_generator() -> None:
    def grown(seed: int) -> Tensor:
        old = layer("a", [1.0] * 10 + [0.0] * 20)
        return act([dataclasses.replace(old, generator=torch.Generator().manual_seed(seed))])[
            0
        ].mask

    assert torch.equal(grown(1), grown(1))
    assert not torch.equal(grown(1), grown(2))


def test_the_total_stays_over_many_updates() -> None:
    layers: list[Layer] = [
        layer("a", [1.0] * 60),
        layer("b", [1.0] * 3, size=1000),
        layer("c", [1.0] * 19, size=20),
    ]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        layers = [
            dataclasses.replace(
                layer,
                weight=torch.randn(layer.shape, generator=generator) * layer.mask,
                barred=None,
            )
            for layer in act(layers)
        ]
        assert all(layer.live for layer in layers)
        seen.add(tuple(layer.live for layer in layers))
    assert len(seen) > 20
    # standard normal weights: 0.1 of them lie below 0.126
    assert 0.126 / 2 < threshold(layers[0]) < 0.126 * 2


# in training -----------------------------------------------------------------------------


class Watch(Callback):
    """The thresholds after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        self.seen.append({p.name: float(p.slots.get("threshold", 0)) for p in keeper.masks})


def test_the_threshold_finds_its_place() -> None:
    watch = Watch()
    result = fit([DSR(0.2, update_interval=1, update_end=1.0), watch], max_epochs=5)
    assert {sum(live.values()) for _, live in result.history} == {round(0.2 * 2184)}
    assert len({tuple(live.values()) for _, live in result.history}) > 5
    for seen in watch.seen:
        assert len(set(seen.values())) == 1  # the same in every layer
        exponent = math.log2(seen["net.0.weight"] / 1e-3)
        assert exponent == pytest.approx(round(exponent), abs=1e-5)
    assert watch.seen[0]["net.0.weight"] == pytest.approx(2e-3)
    assert max(seen["net.0.weight"] for seen in watch.seen) > 4e-3


def test_every_optimizer_has_its_own_threshold() -> None:
    watch = Watch()
    result = fit([DSR(0.5, update_interval=1, update_end=20), watch], ManualModel)
    assert result.live == round(0.5 * 2184)
    assert watch.seen[18]["net.5.weight"] == watch.seen[18]["net.7.weight"]
    assert watch.seen[18]["net.0.weight"] != watch.seen[18]["net.5.weight"]


def test_patterns_hold() -> None:
    result = fit([DSR(structure=NM(2, 4), exclude="net.0", update_interval=2, threshold=0.02)])
    assert {tuple(live.values()) for _, live in result.history} == {(1024, 32)}
    assert result.changes > 5


def test_defaults() -> None:
    assert DSR(0.1).window == Window(100, 0, 0.95)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"prune_target": 0}, ValueError, "prune_target=0"),
        ({"prune_target": 1.0}, ValueError, "prune_target=1.0"),
        ({"prune_target": -0.1}, ValueError, "prune_target"),
        ({"prune_target": math.nan}, ValueError, "prune_target"),
        ({"prune_target": True}, TypeError, "prune_target"),
        ({"prune_target": None}, TypeError, "prune_target"),
        ({"threshold": 0.0}, ValueError, "threshold"),
        ({"threshold": math.inf}, ValueError, "threshold"),
        ({"threshold": "small"}, TypeError, "threshold"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^DSR\({message}"):
        DSR(0.3, **bad)
