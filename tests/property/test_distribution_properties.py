"""Budgets add up, fit, leave no layer without a weight, and follow the total."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sparsity.core.apportion import apportion, fill
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.distributions import (
    epsilon,
    er,
    erk,
    erk_power,
    fan_in,
    global_by,
    keep_dense,
    lamp,
    smart_ratio_with,
    uniform,
)
from lightning_sparsity.scores import magnitude

EXACT = [
    uniform,
    er,
    erk,
    erk_power(0.3),
    lamp,
    global_by(magnitude),
    keep_dense(er, "0", True),
    smart_ratio_with(linear=1e-9),
    smart_ratio_with(linear=1e-9, vgg=True),
]
LOOSE = [epsilon(1.5), fan_in, keep_dense(uniform, "0")]


def name(distribution):
    return getattr(distribution, "__name__", repr(distribution))


shapes = st.one_of(
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def networks(draw, dense=False):
    layers = []
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=6))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        density = 1.0 if dense else draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
        mask = torch.rand(shape, generator=generator) < density
        # Few distinct values, so that there are ties.
        weight = torch.randint(-3, 4, shape, generator=generator) * mask.float()
        layers.append(Layer(str(i), weight, mask))
    return layers


def smallest(distribution, layers):
    first = layers[0].live - 1 if isinstance(distribution, keep_dense) and layers[0].live else 0
    return first + sum(layer.live > 0 for layer in layers)


@pytest.mark.parametrize("distribution", EXACT, ids=name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_add_up_and_fit(distribution, data):
    layers = data.draw(networks())
    live = [layer.live for layer in layers]
    total = data.draw(st.integers(smallest(distribution, layers), sum(live)))
    counts = distribution(layers, total)
    assert sum(counts) == total
    assert all(min(1, n) <= count <= n for count, n in zip(counts, live, strict=True))
    assert distribution(layers, total) == counts


@pytest.mark.parametrize("distribution", EXACT, ids=name)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_counts_hit_both_ends_and_nothing_beyond(distribution, data):
    layers = data.draw(networks())
    live = [layer.live for layer in layers]
    least = smallest(distribution, layers)
    assert distribution(layers, sum(live)) == live
    assert sum(distribution(layers, least)) == least
    for impossible in (sum(live) + 1, least - 1):
        with pytest.raises(ValueError, match="live units"):
            distribution(layers, impossible)


@pytest.mark.parametrize("distribution", LOOSE, ids=name)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_counts_that_do_not_add_up_fit_all_the_same(distribution, data):
    layers = data.draw(networks(dense=True))
    live = [layer.live for layer in layers]
    # Enough for one unit in each layer, should the first be dense and not be charged.
    least = -(-sum(live) * (len(live) - 1) // max(sum(live[1:]), 1))
    counts = distribution(layers, data.draw(st.integers(least, sum(live))))
    assert all(1 <= count <= n for count, n in zip(counts, live, strict=True))


@pytest.mark.parametrize("distribution", EXACT, ids=name)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_pruning_again_and_again_never_asks_for_what_is_gone(distribution, data):
    layers = data.draw(networks())
    for _ in range(3):
        live = [layer.live for layer in layers]
        total = data.draw(st.integers(smallest(distribution, layers), sum(live)))
        counts = distribution(layers, total)
        layers = [
            layer.with_units(layer.units & (layer.units.cumsum(0) <= count))
            for layer, count in zip(layers, counts, strict=True)
        ]
        assert [layer.live for layer in layers] == counts


shares = st.integers(0, 1000).map(lambda n: n / 1000)
raws = st.lists(
    st.tuples(st.just(0.0) | st.floats(1e-3, 1e3), st.integers(0, 1000)),
    min_size=1,
    max_size=8,
)


@given(raws, shares, shares)
def test_fill_is_water_filling(pairs, x, y):
    raw, capacity = (list(column) for column in zip(*pairs, strict=True))
    room = sum(c for r, c in pairs if r > 0)
    less, more = (fill(raw, capacity, room * share) for share in sorted((x, y)))
    assert math.isclose(sum(less), room * min(x, y), rel_tol=1e-9, abs_tol=1e-9)
    assert all(0 <= count <= c for count, c in zip(less, capacity, strict=True))
    # More water stands nowhere lower.
    assert all(b >= a * (1 - 1e-9) - 1e-9 for a, b in zip(less, more, strict=True))
    # Layers that are not full stand in proportion to raw; the full ones would stand higher.
    levels = [n / r for n, r, c in zip(less, raw, capacity, strict=True) if r and n < c]
    full = [c / r for n, r, c in zip(less, raw, capacity, strict=True) if r and n >= c > 0]
    if levels:
        assert max(levels) <= min(levels) * (1 + 1e-9)
        assert all(height <= min(levels) * (1 + 1e-9) for height in full)


@given(raws, shares, st.integers(0, 3))
def test_apportion_is_within_one_of_the_ideal_unless_a_floor_lifts(pairs, share, floor):
    raw, capacity = (list(column) for column in zip(*pairs, strict=True))
    raw = [r + 1e-3 for r in raw]
    least = sum(min(floor, c) for c in capacity)
    total = least + round(share * (sum(capacity) - least))
    ideal = fill(raw, capacity, total)
    counts = apportion(ideal, capacity, total, floor)
    assert sum(counts) == total
    assert all(min(floor, c) <= n <= c for n, c in zip(counts, capacity, strict=True))
    if all(value >= min(floor, c) for value, c in zip(ideal, capacity, strict=True)):
        assert all(abs(n - value) < 1 for n, value in zip(counts, ideal, strict=True))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=10), st.integers(0, 10**6))
def test_uniform_shares_are_the_largest_remainders(sizes, seed):
    total = len(sizes) + seed * (sum(sizes) - len(sizes)) // 10**6
    counts = apportion(fill(sizes, sizes, total), sizes, total, floor=0)
    floors = [total * size // sum(sizes) for size in sizes]
    rests = [total * size % sum(sizes) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -rests[i])
    expected = [n + (i in order[: total - sum(floors)]) for i, n in enumerate(floors)]
    assert counts == expected
