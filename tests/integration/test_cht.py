"""CHT: what goes, what grows, soft rules, chain removal, and a falling density."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_sparsity import CHT, SET, StaticSparse, sigmoid
from lightning_sparsity.callbacks.dynamic.cht import (
    ch2_l3n,
    ch3_l3n,
    ch3_l3p,
    regrow,
    relative_importance,
    remove_chains,
)
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import gradient, random
from lightning_sparsity.testing import TinyModel, fit


def a_layer(weight, name="fc", seed=0):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return Layer(name, weight, weight != 0, generator=generator)


def update(callback, layer, progress=0.0):
    return callback.rule([layer], [layer.live], progress)[0]


# Outputs 0 and 1 share input 1, outputs 2 and 3 have one input each.
CHAIN = [
    [1.0, 2.0, 0.0, 0.0, 0.0],
    [0.0, 3.0, 4.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 5.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 6.0],
]


@pytest.mark.parametrize("growth", [ch3_l3n, ch2_l3n, ch3_l3p])
@pytest.mark.parametrize("soft", [False, True])
def test_links_grow_that_close_paths_of_three(growth, soft):
    layer = a_layer(CHAIN)
    (after,) = regrow(growth, soft)([layer], [8], 0.0)
    new = (after.mask & ~layer.mask).nonzero().tolist()
    assert new == [[0, 2], [1, 0]]
    assert after.slots is layer.slots


@pytest.mark.parametrize("soft", [False, True])
def test_where_no_score_is_positive_any_link_may_grow(soft):
    grown = set()
    for seed in range(60):
        layer = a_layer(torch.eye(4), seed=seed)
        (after,) = regrow(ch3_l3n, soft)([layer], [5], 0.0)
        grown |= {tuple(place) for place in (after.mask & ~layer.mask).nonzero().tolist()}
    assert len(grown) > 8, "of 12"


def test_equal_scores_grow_in_random_order_and_better_ones_first():
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 1.0, 3.0]])
    grown = set()
    for seed in range(40):
        layer = a_layer([[1.0, 0, 0, 0, 0, 0, 0]], seed=seed)
        (after,) = regrow(lambda _: scores)([layer], [4], 0.0)
        assert after.mask[0, [0, 1, 6]].all()
        grown |= set(after.mask[0, 2:6].nonzero().view(-1).tolist())
    assert grown == {0, 1, 2, 3}


@pytest.mark.parametrize(("progress", "chance"), [(0.0, 2 / 3), (0.5, 4 / 5), (1.0, 8 / 9)])
def test_soft_removal_keeps_by_a_power_that_rises_from_1_to_3(progress, chance):
    lose = CHT(0.5, drop_fraction=0.5, soft=True).rule.rules[0]
    layer = a_layer([[1.0, 2.0, 0.0]])
    kept = [lose([layer], [2], progress)[0].mask[0] for _ in range(600)]
    assert all(int(mask.sum()) == 1 for mask in kept)
    share = sum(bool(mask[1]) for mask in kept) / len(kept)
    assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / len(kept)) ** 0.5)


def test_soft_growth_draws_by_the_score():
    scores = torch.tensor([[0.0, 3.0, 1.0, 0.0]])
    layer = a_layer([[1.0, 0.0, 0.0, 0.0]])
    rule = regrow(lambda _: scores, soft=True)
    grown = [rule([layer], [2], 0.0)[0].mask[0] for _ in range(600)]
    assert not any(bool(mask[3]) for mask in grown)
    assert sum(bool(mask[1]) for mask in grown) / 600 == pytest.approx(0.75, abs=0.07)


def test_magnitude_goes_first_and_the_count_stays():
    layer = a_layer(CHAIN)
    callback = CHT(0.3, drop_fraction=0.4)
    (kept,) = callback.rule.rules[0]([layer], [6], 0.0)
    assert (layer.weight * kept.mask).sum() == 3 + 4 + 5 + 6
    assert update(callback, layer).live == 6


def test_relative_importance():
    layer = a_layer([[1.0, -3.0], [0.0, 1.0]])
    expected = torch.tensor([[1 + 1 / 4, 3 / 4 + 3 / 4], [0.0, 1 / 4 + 1]])
    torch.testing.assert_close(relative_importance(layer), expected)


def test_chain_removal_takes_what_leads_nowhere_and_what_gets_nothing():
    first = a_layer([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], name="first")
    second = a_layer([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], name="second")
    other = a_layer(torch.eye(5), name="other")
    left = remove_chains([first, second, other], [], 0.0)
    # unit 1 leads nowhere; unit 2 gets nothing
    assert left[0].mask.int().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert left[1].mask.int().tolist() == [[1, 0, 0], [1, 0, 0]]
    assert left[2].mask.equal(other.mask), "widths differ"
    rule = CHT(0.5, chain_removal=True, drop_fraction=0.0).rule
    after = rule([first, second, other], [3, 3, 5], 0.0)
    assert [layer.live for layer in after] == [3, 3, 5]


def _mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)
    )


@pytest.mark.parametrize("soft", [False, True])
def test_counts_are_exact_with_chain_removal(soft):
    callback = CHT(0.1, chain_removal=True, soft=soft, update_interval=3)
    result = fit([callback], lambda: TinyModel(_mlp()))
    counts = [live for _, live in result.history]
    assert counts == [counts[0]] * 24
    assert result.live == round(0.1 * (36 * 30 + 30 * 20 + 20 * 4))
    assert result.changes == 7


@pytest.mark.parametrize("steepness", [6.0, 12.0])
def test_the_density_falls_in_an_s(steepness):
    ramp = partial(sigmoid, steepness=steepness)
    callback = CHT(0.1, soft=True, ramp=ramp, update_interval=2)
    result = fit([callback], lambda: TinyModel(_mlp()))
    numel = 36 * 30 + 30 * 20 + 20 * 4
    totals = [sum(live.values()) for _, live in result.history]
    assert totals[0] == round(0.5 * numel)
    assert totals[11] == round(0.3 * numel), "half-way"
    assert totals[-1] == round(0.1 * numel)
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) > 6


def test_the_density_may_fall_by_more_than_an_update_drops():
    ramp = partial(sigmoid, steepness=12.0)
    result = fit([CHT(0.1, ramp=ramp)], lambda: TinyModel(_mlp()))
    numel = 36 * 30 + 30 * 20 + 20 * 4
    totals = [sum(live.values()) for _, live in result.history]
    expected = [round(ramp(0.5, 0.1)(epoch / 3) * numel) for epoch in (1, 2, 3)]
    assert totals[7::8] == expected
    assert expected[1] < 0.7 * expected[0]


def test_the_start_is_spread_or_what_the_user_says():
    spread = fit([CHT(0.25)], max_epochs=1).masks["net.5.weight"]
    assert set(spread.sum(1).tolist()) == {32}
    free = fit([CHT(0.25, topology=drop(random))], max_epochs=1).masks["net.5.weight"]
    assert len(set(free.sum(1).tolist())) > 1
    assert free.sum() == spread.sum()


def test_after_other_callbacks():
    result = fit([StaticSparse(0.2, include=nn.Linear), CHT()])
    assert result.changes == 2
    assert result.live == round(0.2 * 2112)
    mixed = fit([CHT(0.2), SET(0.4, include=nn.Conv2d)])
    assert mixed.live == round(0.2 * 2112) + round(0.4 * 72)


def test_no_gradient_is_kept_unless_asked_for():
    assert not CHT(0.1, soft=True, chain_removal=True, ramp=sigmoid).needs_gradient
    assert CHT(0.1, growth=gradient).needs_gradient
    assert CHT(0.1, soft=True).drop_fraction_at(0.5) == 0.3


def test_a_convolution_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^CHT: net\.0\.weight has shape .*linear layers"):
        fit([CHT(0.3, include=["net.0", "net.5"])])


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"soft": 1}, TypeError),
        ({"chain_removal": "yes"}, TypeError),
        ({"growth": None}, TypeError),
        ({"removal": "magnitude"}, TypeError),
        ({"topology": None}, TypeError),
        ({"drop_fraction": 1.5}, ValueError),
        ({"initial_density": 0}, ValueError),
    ],
)
def test_bad_arguments(bad, error):
    with pytest.raises(error, match=rf"CHT\({next(iter(bad))}="):
        CHT(0.1, **bad)
