"""GSE: growth by the gradient, among weights drawn at random."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparsity import GSE, NM, Block, MaskCallback, RigL, Rows, StaticSparse, cosine
from lightning_sparsity.callbacks.dynamic.gse import er_of_links, explore
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer, dense_layers
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.distributions import er, erk
from lightning_sparsity.rules import drop, grow
from lightning_sparsity.scores import gradient, magnitude, random
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import fit


class Union(Callback):
    """The weights that are live after any batch."""

    def __init__(self) -> None:
        self.fired: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        for kept in keeper.masks:
            self.fired[kept.name] = kept.mask | self.fired.get(kept.name, kept.mask)


def layer(live: int = 100, size: int = 1000, seed: int = 0, **kwargs: Any) -> Layer:
    draw = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(2, 10, size // 10, generator=draw)
    whole = Layer(
        "fc.weight",
        weight,
        torch.ones_like(weight, dtype=torch.bool),
        grad,
        generator=generator(seed),
        **kwargs,
    )
    (part,) = drop(random)([whole], [live], 0.0)
    return dataclasses.replace(part, weight=weight * part.mask)


def update(part: Layer, candidate_fraction: float = 1.0, drop_fraction: float = 0.2) -> Layer:
    rule = GSE(0.1, candidate_fraction=candidate_fraction, drop_fraction=drop_fraction).rule
    assert rule is not None
    return rule([part], [part.live], 0.0)[0]


# What may grow


@pytest.mark.parametrize(
    ("fraction", "live", "drawn"),
    [
        (1.0, 100, 100),
        (0.5, 100, 50),
        (2.0, 100, 200),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (1.99, 1, 1),
        (0.1, 100, 20),  # as many as grow
        (0.0, 100, 20),
        (50.0, 100, 900),  # all that are free
    ],
)
def test_as_many_are_drawn_as_live_times_the_fraction(
    fraction: float, live: int, drawn: int
) -> None:
    part = layer(live)
    less = drop(magnitude, 0.2)([part], [live], 0.0)[0]
    less = dataclasses.replace(less, barred=part.mask & ~less.mask)
    (seen,) = explore(fraction)([less], [live], 0.0)
    assert torch.equal(seen.mask, less.mask)
    assert int(seen.free.sum()) == drawn
    assert not (seen.free & part.mask).any(), "neither what lives nor what just died"


def test_the_draw_is_uniform_and_depends_on_the_generator_alone() -> None:
    part = layer(5, size=20)
    counts = torch.zeros(20)
    state = torch.get_rng_state()
    for seed in range(500):
        drawn = dataclasses.replace(part, generator=generator(seed))
        counts += explore(1.0)([drawn], [5], 0.0)[0].free.reshape(-1)
    assert torch.equal(torch.get_rng_state(), state)
    # 5 of 15: 167 each, with a standard deviation of 11
    assert (counts[~part.mask.reshape(-1)] - 500 / 3).abs().max() < 50
    again = [
        explore(1.0)([dataclasses.replace(part, generator=generator(7))], [5], 0.0)[0].free
        for _ in range(2)
    ]
    assert torch.equal(*again)


def test_the_best_gradients_of_the_drawn_weights_grow() -> None:
    part = layer()
    after = update(part)
    # The same draws by hand: 20 die, 100 of the 900 others may grow, 20 of them do.
    twin = dataclasses.replace(part, generator=layer().generator)
    (less,) = drop(magnitude, 0.2)([twin], [100], 0.0)
    barred = part.mask & ~less.mask
    (seen,) = explore(1.0)([dataclasses.replace(less, barred=barred)], [100], 0.0)
    candidates = seen.free.reshape(-1).nonzero().view(-1)
    assert part.grad is not None
    order = part.grad.abs().reshape(-1)[candidates].argsort(descending=True)
    expected = less.mask.reshape(-1).clone()
    expected[candidates[order[:20]]] = True
    assert torch.equal(after.mask.reshape(-1), expected)
    assert after.live == 100
    assert not after.weight[after.mask & ~part.mask].any(), "new weights start at zero"


def test_between_set_and_rigl() -> None:
    # With all drawn it is RigL, but for what just died; with none to spare the gradient is idle.
    part = layer()
    (less,) = drop(magnitude, 0.2)([part], [100], 0.0)
    less = dataclasses.replace(less, barred=part.mask & ~less.mask)
    (best,) = grow(gradient)([less], [100], 0.0)
    assert torch.equal(update(part, 9.0).mask, best.mask)
    assert part.grad is not None
    flipped = dataclasses.replace(layer(), grad=1 / part.grad)
    assert torch.equal(update(layer(), 0.0).mask, update(flipped, 0.0).mask)
    gains = [
        float(part.grad.abs()[update(layer(), gamma).mask & ~part.mask].sum())
        for gamma in (0.2, 0.5, 1.0, 3.0, 9.0)
    ]
    assert gains == sorted(gains)


@pytest.mark.parametrize("live", [1, 2, 999, 1000])
def test_almost_empty_and_full_layers(live: int) -> None:
    part = layer(live)
    after = update(part, drop_fraction=0.5)
    assert after.live == live
    if live == 1000:
        assert torch.equal(after.weight, part.weight)


# Structures


@pytest.mark.parametrize("structure", [Rows(), Block(2, 5)], ids=repr)
def test_units_are_drawn_whole(structure: Any) -> None:
    part = layer(4, structure=structure)
    (seen,) = explore(1.0)([part], [4], 0.0)
    units = structure.live(seen.free, Layout())
    assert int(units.sum()) == 4
    assert torch.equal(structure.expand(units, part.shape, Layout()), seen.free)
    after = update(part, drop_fraction=0.25)
    assert after.live == 4
    assert int((after.units & ~part.units).sum()) == 1


def test_every_group_of_a_pattern_draws_its_own() -> None:
    part = dataclasses.replace(layer(1000), structure=NM(1, 4))
    (part,) = drop(magnitude)([part], [250], 0.0)
    for gamma, free in ((1.0, 1), (2.0, 2), (0.0, 0), (9.0, 3)):
        (seen,) = explore(gamma)([part], [250], 0.0)
        assert NM(1, 4).group(seen.free, Layout()).sum(1).eq(free).all()
    for gamma in (0.0, 1.0):
        after = update(part, gamma)
        assert NM(1, 4).group(after.mask, Layout()).sum(1).eq(1).all()
        assert int((after.mask & ~part.mask).sum()) == 50
    # Groups that lose two of two draw two; the gradient has no say.
    part = dataclasses.replace(layer(1000), structure=NM(2, 4))
    (part,) = drop(magnitude)([part], [500], 0.0)
    empty = dataclasses.replace(part, mask=part.mask & False, barred=part.mask)
    (seen,) = explore(0.0)([empty], [500], 0.0)
    assert NM(2, 4).group(seen.free, Layout()).sum(1).eq(2).all()
    assert not (seen.free & part.mask).any()


# Densities


def test_links_of_convolutions_count_with_their_kernel() -> None:
    net = dense_layers({"conv": (16, 8, 3, 3), "fc": (10, 64)})
    # 72 + 16 = 88 and 74 sides.
    assert er_of_links(net, 324) == [176, 148]
    assert er_of_links(net, 1792) == [1152, 640]
    assert er_of_links(net, 324) not in (er(net, 324), erk(net, 324))
    lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
    assert er_of_links(lenet, 26620) == er(lenet, 26620)
    mirrored = [
        Layer("a", torch.ones(4, 6, 3), torch.ones(4, 6, 3).bool(), layout=Layout(2, transposed))
        for transposed in (False, True)
    ]
    # 4 outputs of 18 links each, and 12 of 6.
    assert er_of_links(mirrored, 40) == [22, 18]


# In training


def test_updates_and_defaults() -> None:
    callback = GSE(0.1)
    assert callback.drop_fraction_at(0.0) == 0.2
    assert callback.drop_fraction_at(1.0) == 0.0
    assert (callback.window.every, callback.window.start, callback.window.end) == (1000, 0, 0.6)
    assert GSE(0.1, drop_fraction=cosine(0.5, 0.1)).drop_fraction_at(1.0) == 0.1
    result = fit([GSE(0.1, update_interval=2)])
    assert result.changes == 6  # steps 2 to 14, and at the last one nothing is dropped
    assert {tuple(live.values()) for _, live in result.history} == {
        tuple(mask.sum().item() for mask in result.masks.values())
    }
    net = dense_layers({"a": (8, 1, 3, 3), "b": (16, 128), "c": (4, 16)})
    assert [int(m.sum()) for m in result.masks.values()] == er_of_links(net, round(0.1 * 2184))


def test_the_fewer_are_drawn_the_more_is_explored() -> None:
    def ever_live(callback: MaskCallback) -> int:
        seen = Union()
        fit([callback, seen])
        return int(seen.fired["net.5.weight"].sum())

    options: dict[str, Any] = {"update_interval": 1, "drop_fraction": 0.5, "distribution": erk}
    counts = [ever_live(GSE(0.1, candidate_fraction=gamma, **options)) for gamma in (0.0, 1.0, 5.0)]
    counts.append(ever_live(RigL(0.1, update_end=0.6, **options)))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


def test_it_follows_masks_that_it_finds() -> None:
    result = fit([StaticSparse(0.2, distribution=erk), GSE(update_interval=4)])
    counts = erk(dense_layers({"a": (8, 1, 3, 3), "b": (16, 128), "c": (4, 16)}), 437)
    assert [int(mask.sum()) for mask in result.masks.values()] == counts
    assert result.changes == 3


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-0.1, ValueError),
        (math.inf, ValueError),
        (math.nan, ValueError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_candidate_fractions_are_checked(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^GSE\(candidate_fraction=.* must be .*at least 0"):
        GSE(0.1, candidate_fraction=value)
