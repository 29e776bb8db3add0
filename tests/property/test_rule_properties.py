"""Rules over random shapes, structures, masks and fractions: subsets, supersets, counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparsity.callbacks.dynamic.set import drop_by_sign
from lightning_sparsity.core.layer import Distribution, Layer, Layers, Rule, Score
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.distributions import er, global_by, uniform
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import gradient, magnitude, random
from lightning_sparsity.structures import NM, Block, Columns, Layout, Rows, Structure, Unstructured

stable = settings(max_examples=60, deadline=None, derandomize=True)

LAYOUTS = [Layout(), Layout(groups=2), Layout(transposed=True), Layout(2, transposed=True)]
UNITS = [Unstructured(), Rows(), Columns(), Block(2, 2), Block(1, 4)]
SCORES = [magnitude, gradient, random]
fractions = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.999, 1.0]) | st.floats(0, 1)


@st.composite
def layers(draw: st.DrawFn, structure: Structure | None = None) -> Layer:
    """A layer with few distinct values, so that there are ties and live zeros."""
    unit = structure or draw(st.sampled_from(UNITS))
    # Multiples of 8 in both directions fit every structure under every layout.
    shape = (8 * draw(st.integers(1, 2)), 8, *draw(st.sampled_from([(), (3,), (2, 2)])))
    layout = draw(st.sampled_from(LAYOUTS)) if len(shape) > 2 else Layout()
    seed = draw(st.integers(0, 10**6))
    noise = torch.Generator().manual_seed(seed)
    mask = torch.ones(shape, dtype=torch.bool)
    if isinstance(unit, NM):
        groups = unit.group(torch.rand(shape, generator=noise), layout).argsort(1) < unit.n
        mask = unit.ungroup(groups, shape, layout)
    else:
        live = torch.rand(unit.size(shape, layout), generator=noise)
        mask = unit.expand(live < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])), shape, layout)
    spread = draw(st.sampled_from([1, 2, 100]))
    weight = torch.randint(-spread, spread + 1, shape, generator=noise).float() * mask
    grad = torch.randint(-spread, spread + 1, shape, generator=noise).float()
    return Layer("fc", weight, mask, grad, structure=unit, layout=layout, generator=generator(seed))


def counts(some: Layers) -> list[int]:
    return [layer.live for layer in some]


def whole(layer: Layer) -> bool:
    """Whether no unit is half alive, and no group of N:M too full."""
    unit = layer.structure
    if isinstance(unit, NM):
        return int(unit.group(layer.mask, layer.layout).sum(1).max()) <= unit.n
    return torch.equal(unit.expand(layer.units, layer.shape, layer.layout), layer.mask)


def apply(rule: Rule, some: Layers, budget: list[int] | None = None, at: float = 0.0) -> Layers:
    after = rule(some, counts(some) if budget is None else budget, at)
    assert all(whole(layer) for layer in after)
    return after


@pytest.mark.parametrize("score", SCORES)
@stable
@given(data=st.data())
def test_dropping_gives_a_subset_of_exactly_the_budget(score: Score, data: st.DataObject) -> None:
    layer = data.draw(layers())
    keep = data.draw(st.integers(0, layer.size))
    (after,) = apply(drop(score), [layer], [keep])
    assert after.live == min(keep, layer.live)
    assert bool((after.mask <= layer.mask).all())
    if score is not random and 0 < after.live < layer.live:
        values = layer.reduce(score(layer))
        assert values[layer.units & ~after.units].max() <= values[after.units].min()


@pytest.mark.parametrize(("rounding", "low", "high"), [(math.floor, -1, 0), (math.ceil, 0, 1)])
@stable
@given(layer=layers(), fraction=fractions)
def test_dropping_a_fraction_is_rounded_as_asked(
    rounding: Any, low: int, high: int, layer: Layer, fraction: float
) -> None:
    (after,) = apply(drop(magnitude, fraction, rounding=rounding), [layer])
    gone, exact = layer.live - after.live, fraction * layer.live
    most = max(layer.live - 1, 0)  # one always stays
    assert gone <= min(exact + high + 1e-6, most)
    assert gone == most or gone >= exact + low - 1e-6


@pytest.mark.parametrize("score", SCORES)
@stable
@given(data=st.data())
def test_growing_gives_a_superset_of_exactly_the_budget(score: Score, data: st.DataObject) -> None:
    layer = data.draw(layers())
    live = data.draw(st.integers(0, layer.size))
    (after,) = apply(grow(score), [layer], [live])
    assert after.live == max(live, layer.live)
    assert bool((after.mask >= layer.mask).all())
    assert torch.equal(after.weight, layer.weight)
    if score is not random and layer.live < after.live < layer.size:
        values = layer.reduce(score(layer))
        grown = after.units & ~layer.units
        assert values[~after.units].max() <= values[grown].min()


@pytest.mark.parametrize("score", SCORES)
@stable
@given(some=st.lists(layers(), min_size=1, max_size=4), fraction=fractions)
def test_dropping_and_growing_keeps_every_count(
    score: Score, some: Layers, fraction: float
) -> None:
    after = apply(chain(drop(magnitude, fraction), grow(score)), some)
    assert counts(after) == counts(some)
    for old, new in zip(some, after, strict=True):
        lost = int((old.units & ~new.units).sum())
        assert lost <= fraction * old.live + 1e-6


@stable
@given(layer=layers(NM(2, 4)), fraction=fractions, score=st.sampled_from(SCORES))
def test_patterns_stay_full(layer: Layer, fraction: float, score: Score) -> None:
    (after,) = apply(chain(drop(magnitude, fraction), grow(score)), [layer])
    groups = after.structure.group(after.mask, after.layout)  # type: ignore[attr-defined]
    assert (groups.sum(1) == 2).all()
    (thin,) = apply(drop(score), [layer], [layer.size // 4])
    assert (thin.structure.group(thin.mask, thin.layout).sum(1) == 1).all()  # type: ignore[attr-defined]
    assert bool((thin.mask <= layer.mask).all())


@stable
@given(some=st.lists(layers(), min_size=1, max_size=4), fraction=fractions)
def test_shared_growth_keeps_the_total_and_fits(some: Layers, fraction: float) -> None:
    share = global_by(gradient, min_per_layer=0)
    after = apply(chain(drop(magnitude, fraction), grow(gradient, share=share)), some)
    assert sum(counts(after)) == sum(counts(some))
    assert all(layer.live <= layer.size for layer in after)


@pytest.mark.parametrize("share", [er, global_by(magnitude)])
@stable
@given(some=st.lists(layers(), min_size=1, max_size=4), data=st.data())
def test_shared_drops_keep_exactly_the_total(
    share: Distribution, some: Layers, data: st.DataObject
) -> None:
    alive = sum(layer.live > 0 for layer in some)
    total = data.draw(st.integers(alive, sum(counts(some))))
    after = apply(drop(magnitude, share=share), some, uniform(some, total))
    assert sum(counts(after)) == total
    assert all((new.mask <= old.mask).all() for old, new in zip(some, after, strict=True))


@stable
@given(layer=layers(Unstructured()), fraction=fractions)
def test_dropping_by_sign_is_dropping_within_each_sign(layer: Layer, fraction: float) -> None:
    (after,) = apply(drop_by_sign(fraction), [layer])
    assert bool((after.mask <= layer.mask).all())

    def side(which: Tensor) -> Layer:
        return dataclasses.replace(layer, mask=layer.mask & which)

    for which in (layer.weight > 0, layer.weight < 0):
        live = int((layer.mask & which).sum())
        keep = live - int(round(fraction * live, 9))
        (alone,) = drop(magnitude)([side(which)], [keep], 0.0)
        assert torch.equal(after.mask & which, alone.mask)
    zeros = layer.weight == 0
    assert torch.equal(after.mask & zeros, layer.mask & zeros)


@stable
@given(
    some=st.lists(layers(), min_size=1, max_size=3),
    fraction=fractions,
    score=st.sampled_from(SCORES),
)
def test_the_same_generators_give_the_same_layers(
    some: Layers, fraction: float, score: Score
) -> None:
    rule = chain(drop(random, fraction), grow(score, start=0.5))

    def fresh(seed: int) -> Layers:
        return [dataclasses.replace(x, generator=generator(seed, i)) for i, x in enumerate(some)]

    first, again = apply(rule, fresh(1)), apply(rule, fresh(1))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize(
    ("structure", "updates"), [(Unstructured(), 1000), (Rows(), 200), (NM(2, 4), 200)], ids=repr
)
def test_a_thousand_updates_keep_the_budget(structure: Structure, updates: int) -> None:
    noise = torch.Generator().manual_seed(0)
    shape = (8, 8)
    start = Layer(
        "fc", torch.ones(shape), torch.ones(shape).bool(), structure=structure, generator=noise
    )
    budget = [start.size // 2]
    (layer,) = drop(random)([start], budget, 0.0)
    budget = [layer.live]
    assert layer.live == start.size // 2
    seen = set()
    for step in range(updates):
        rule = chain(drop(magnitude, 0.3), grow((gradient, random)[step % 2]))
        # The optimizer moves live weights only, some of them to zero.
        weight = torch.randint(-2, 3, shape, generator=noise).float() * layer.mask
        grad = torch.randint(-2, 3, shape, generator=noise).float()
        layer = dataclasses.replace(
            layer, weight=weight, grad=grad, generator=generator(0, "fc", step)
        )
        (layer,) = rule([layer], budget, step / updates)
        assert layer.live == budget[0]
        seen.add(layer.mask.numpy().tobytes())
    assert whole(layer)
    assert len(seen) > 50, "and the masks do move"
