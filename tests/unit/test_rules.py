"""Rules: worked masks, exact counts, purity."""

import dataclasses
import math
import pickle

import pytest
import torch

from lightning_sparsity.callbacks.dynamic.set import drop_by_sign
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.distributions import erk, global_by, in_proportion, per_layer, uniform
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.rules import (
    barring,
    chain,
    drop,
    exchange,
    find,
    grow,
    rewind,
)
from lightning_sparsity.schedules import constant, cosine, linear
from lightning_sparsity.scores import gradient, magnitude, needs_gradient, random, slot
from lightning_sparsity.starts import rescale_to_fan_in, sparse_kaiming_normal
from lightning_sparsity.structures import NM, Block, Columns, Layout, Rows


def layer(weight, mask=None, grad=None, seed=0, **kwargs):
    weight = torch.tensor(weight)
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    grad = None if grad is None else torch.tensor(grad)
    return Layer("fc.weight", weight, mask, grad, generator=generator(seed), **kwargs)


def apply(rule, *layers, budget=None, progress=0.0):
    budget = [part.live for part in layers] if budget is None else budget
    return rule(layers, budget, progress)


def masks(layers):
    return [part.mask.int().tolist() for part in layers]


def many(live=100, size=1000, seed=0, **kwargs):
    """A large layer with random weights, gradients and live positions."""
    random_ = torch.Generator().manual_seed(seed)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=random_)[:live]] = True
    return Layer(
        "fc.weight",
        (torch.randn(size, generator=random_) * mask).view(10, -1),
        mask.view(10, -1),
        grad=torch.randn(size, generator=random_).view(10, -1),
        generator=generator(seed),
        **kwargs,
    )


# Dropping


def test_drop_keeps_the_best_of_the_budget():
    (kept,) = apply(drop(magnitude), layer([[1.0, -4.0], [3.0, -2.0]]), budget=[2])
    assert masks([kept]) == [[[0, 1], [1, 0]]]


def test_drop_gives_ties_to_the_lowest_index():
    ones = layer([[1.0, -1.0, 1.0], [1.0, 2.0, -1.0]])
    assert masks(apply(drop(magnitude), ones, budget=[3])) == [[[1, 1, 0], [0, 1, 0]]]


def test_drop_never_grows():
    sparse = layer([[1.0, 0.0, 0.0]], [[1, 0, 0]])
    (kept,) = apply(drop(magnitude), sparse, budget=[3])
    assert kept.live == 1


def test_only_live_weights_compete_in_a_drop():
    # The dead weight has a value, as in a mask that was never committed; it may not be kept.
    part = layer([[9.0, 1.0, 2.0, 3.0]], [[0, 1, 1, 1]])
    assert masks(apply(drop(magnitude), part, budget=[2])) == [[[0, 0, 1, 1]]]


def test_a_live_zero_does_not_lose_to_a_dead_one():
    part = layer([[0.0, 0.0, 0.0, 5.0]], [[0, 0, 1, 1]])
    assert masks(apply(drop(magnitude), part, budget=[2])) == [[[0, 0, 1, 1]]]
    part = layer([[0.0] * 6], [[0, 1, 0, 1, 0, 1]])
    assert masks(apply(drop(magnitude, 0.4), part)) == [[[0, 1, 0, 1, 0, 0]]]
    part = layer([[0.0, 0.0]] * 3, [[0, 0], [1, 1], [1, 1]], structure=Rows())
    assert masks(apply(drop(magnitude), part, budget=[1])) == [[[0, 0], [1, 1], [0, 0]]]


@pytest.mark.parametrize(
    ("fraction", "rounding", "live", "left"),
    [
        (0.3, math.floor, 10, 7),  # 0.3 * 10 is 3.0000000000000004 in some orders
        (0.3, math.ceil, 10, 7),
        (0.7, math.ceil, 10, 3),  # 0.7 * 10 is 7.000000000000001
        (0.29, math.floor, 100, 71),  # 0.29 * 100 is 28.999999999999996
        (0.25, math.floor, 10, 8),
        (0.25, math.ceil, 10, 7),
        (0.01, math.floor, 10, 10),
        (0.01, math.ceil, 10, 9),
        (0.0, math.ceil, 10, 10),
        (1.0, math.floor, 10, 1),  # never the last one
        (1.0, math.ceil, 1, 1),
        (0.99, math.ceil, 2, 1),
    ],
)
def test_fraction_and_rounding(fraction, rounding, live, left):
    part = many(live)
    (kept,) = apply(drop(magnitude, fraction, rounding=rounding), part)
    assert kept.live == left
    assert bool((kept.mask <= part.mask).all())
    gone = (part.mask & ~kept.mask) * part.weight.abs()
    stays = part.weight.abs()[kept.mask]
    assert gone.max() <= stays.min()


def test_a_scheduled_fraction_follows_progress():
    part = many(100)
    rule = drop(magnitude, cosine(0.3))
    left = [apply(rule, part, progress=x)[0].live for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert left == [70, 75, 85, 96, 100]
    assert [rule.fraction_at(x) for x in (0.0, 1.0)] == [0.3, 0.0]
    assert drop(magnitude, 0.2).fraction_at(0.9) == 0.2
    assert drop(magnitude).fraction_at(0.9) is None
    rule = drop(magnitude, linear(1.0, 0.0))
    assert [apply(rule, part, progress=x)[0].live for x in (0.0, 0.5, 1.0)] == [1, 50, 100]


@pytest.mark.parametrize("fraction", [1.5, -0.2, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction.*\[0, 1\]"):
        drop(magnitude, fraction)


def test_a_fraction_of_each_layer():
    left = apply(drop(magnitude, 0.5), many(100), many(7, seed=1), many(1, seed=2))
    assert [part.live for part in left] == [50, 4, 1]


def test_a_fraction_is_dropped_from_a_dense_layer_as_well():
    # Iterative pruning starts from a dense network: 20% of what lives, at every round.
    part = many(1000)
    (once,) = apply(drop(magnitude, 0.2), part)
    assert once.live == 800
    (twice,) = apply(drop(magnitude, 0.2), once)
    assert twice.live == 640


def test_rigl_leaves_a_full_layer_as_it_is():
    part = many(1000)
    (same,) = apply(chain(drop(magnitude, 0.3), grow(gradient)), part)
    assert same.mask.all()
    assert torch.equal(same.weight, part.weight)


def test_share_ranks_across_layers():
    small = layer([[1.0, 2.0, 3.0, 4.0]])
    large = layer([[10.0, 20.0, 30.0, 40.0]])
    everywhere = drop(magnitude, share=global_by(magnitude))
    assert masks(apply(everywhere, small, large, budget=[3, 2])) == [[[0, 0, 0, 1]], [[1] * 4]]
    half = drop(magnitude, 0.5, share=global_by(magnitude))
    assert masks(apply(half, small, large)) == [[[0, 0, 0, 1]], [[0, 1, 1, 1]]]


def test_share_may_be_any_distribution():
    shared = drop(magnitude, share=uniform)
    left = apply(shared, many(1000), many(1000, seed=1), budget=[1, 99])
    assert [part.live for part in left] == [50, 50]
    shared = drop(magnitude, share=per_layer({"a": 0.5, "b": 0.25}))
    a, b = (dataclasses.replace(many(1000, seed=s), name=n) for s, n in enumerate("ab"))
    assert [part.live for part in apply(shared, a, b, budget=[0, 0])] == [500, 250]


def test_share_splits_what_stays_of_a_fraction_exactly():
    layers = [many(100), many(33, seed=1), many(1, seed=2)]
    left = apply(drop(magnitude, 0.3, share=global_by(magnitude)), *layers)
    assert sum(part.live for part in left) == 70 + 24 + 1
    assert all(part.live >= 1 for part in left)


def test_rows_are_ranked_by_their_sum():
    part = layer([[1.0, 1.0], [-3.0, 0.0], [0.5, -2.0]], structure=Rows())
    assert masks(apply(drop(magnitude), part, budget=[2])) == [[[0, 0], [1, 1], [1, 1]]]
    part = dataclasses.replace(part, structure=Columns())
    assert masks(apply(drop(magnitude), part, budget=[1])) == [[[1, 0]] * 3]


def test_blocks_are_ranked_by_their_sum():
    weight = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 5.0, 0.0]]
    part = layer(weight, structure=Block(2, 2))
    assert masks(apply(drop(magnitude), part, budget=[1])) == [[[0, 0, 1, 1]] * 2]
    part = layer(weight, structure=Block(1, 2))
    assert masks(apply(drop(magnitude), part, budget=[2])) == [[[1, 1, 0, 0], [0, 0, 1, 1]]]


def test_n_of_m_keeps_the_best_of_every_group():
    weight = [[1.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0]]
    part = layer(weight, structure=NM(2, 4))
    expected = [[[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1]]]
    assert masks(apply(drop(magnitude), part, budget=[8])) == expected


def test_n_of_m_on_the_way_to_its_pattern():
    part = many(1000, structure=NM(1, 4))
    for per_group in (3, 2, 1):
        (part,) = apply(drop(magnitude), part, budget=[250 * per_group])
        counts = part.structure.group(part.mask, part.layout).sum(1)
        assert counts.tolist() == [per_group] * 250


def test_n_of_m_loses_a_fraction_of_the_layer_and_refills_its_groups():
    part = many(1000, structure=NM(2, 4))
    (part,) = apply(drop(magnitude), part, budget=[500])
    (less,) = apply(drop(magnitude, 0.3), part)
    assert less.live == 350
    assert bool((less.mask <= part.mask).all())
    assert part.weight.abs()[part.mask & ~less.mask].max() < part.weight.abs()[less.mask].min()
    (full,) = apply(grow(gradient), less, budget=[500])
    assert full.structure.group(full.mask, full.layout).sum(1).tolist() == [2] * 250
    assert bool((full.mask >= less.mask).all())


def test_every_layer_by_its_own_structure():
    # Callbacks that inherit structures from others see several kinds in one call.
    rule = chain(drop(magnitude, 0.5), grow(gradient))
    pattern = many(1000, structure=NM(2, 4))
    (pattern,) = apply(drop(magnitude), pattern, budget=[500])
    single, rows = many(100, seed=1), many(1000, seed=2, structure=Rows())
    (rows,) = apply(drop(magnitude), rows, budget=[5])
    for order in ((pattern, single, rows), (single, rows, pattern)):
        after = apply(rule, *order)
        assert [part.live for part in after] == [part.live for part in order]
        for part in after:
            if isinstance(part.structure, NM):
                assert set(part.structure.group(part.mask, part.layout).sum(1).tolist()) == {2}


def test_scores_that_cannot_be_ranked():
    part = layer([[1.0, math.nan, 2.0]])
    with pytest.raises(NonFiniteScoreError):
        apply(drop(magnitude), part, budget=[1])
    # A dead weight is not ranked, whatever stands there.
    part = layer([[1.0, math.nan, 2.0]], [[1, 0, 1]])
    assert masks(apply(drop(magnitude), part, budget=[1])) == [[[0, 0, 1]]]


# Growing


def test_grow_takes_the_largest_gradient_of_what_is_free():
    part = layer([[5.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0]], grad=[[9.0, -3.0, 1.0, 2.0]])
    assert masks(apply(grow(gradient), part, budget=[3])) == [[[1, 1, 0, 1]]]


def test_grow_gives_ties_to_the_lowest_index():
    part = layer([[0.0, 0.0, 5.0, 0.0, 0.0]], [[0, 0, 1, 0, 0]], grad=[[0.0] * 5])
    assert masks(apply(grow(gradient), part, budget=[3])) == [[[1, 1, 1, 0, 0]]]


def test_grow_never_drops():
    part = layer([[5.0, 1.0]], [[1, 1]], grad=[[1.0, 1.0]])
    (same,) = apply(grow(gradient), part, budget=[1])
    assert same.live == 2


def test_grow_only_needs_finite_scores_where_it_may_grow():
    part = layer([[5.0, 0.0, 0.0]], [[1, 0, 0]], grad=[[math.nan, 1.0, 2.0]])
    assert masks(apply(grow(gradient), part, budget=[2])) == [[[1, 0, 1]]]
    part = layer([[5.0, 0.0, 0.0]], [[1, 0, 0]], grad=[[1.0, math.nan, 2.0]])
    with pytest.raises(NonFiniteScoreError):
        apply(grow(gradient), part, budget=[2])


def test_grow_more_than_there_is_room():
    with pytest.raises(ValueError, match="must lie between 0 and"):
        apply(grow(random), layer([[1.0, 0.0]], [[1, 0]]), budget=[3])


def test_grow_with_a_share_moves_budgets():
    a = layer([[1.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0]], grad=[[0.0, 1.0, 2.0, 3.0]])
    b = layer([[1.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0]], grad=[[0.0, 9.0, 0.5, 0.1]])
    rule = grow(gradient, share=global_by(gradient, min_per_layer=0))
    assert masks(apply(rule, a, b, budget=[2, 3])) == [[[1, 0, 1, 1]], [[1, 1, 0, 0]]]
    # No more than fits, and only the sum of the budget counts.
    assert [x.live for x in apply(rule, a, b, budget=[1, 7])] == [4, 4]
    assert [x.live for x in apply(rule, a, b, budget=[1, 1])] == [1, 1]


def test_grown_rows_and_blocks_are_whole():
    grad = [[0.0, 3.0], [2.0, -2.0], [1.0, 1.0]]
    part = layer([[0.0, 0.0]] * 3, [[0, 0], [0, 0], [1, 1]], grad=grad, structure=Rows())
    assert masks(apply(grow(gradient), part, budget=[2])) == [[[0, 0], [1, 1], [1, 1]]]
    part = layer([[0.0] * 4] * 2, [[0] * 4] * 2, grad=[[1.0, 0, 0, 2]] * 2, structure=Block(2, 2))
    assert masks(apply(grow(gradient), part, budget=[1])) == [[[0, 0, 1, 1]] * 2]


def test_grown_weights_start_at_zero():
    part = many(100)
    (grown,) = apply(grow(gradient), part, budget=[150])
    assert torch.equal(grown.weight, part.weight)
    assert not grown.weight[grown.mask & ~part.mask].any()


def test_grown_weights_may_be_drawn():
    part = many(100, size=100_000)
    (grown,) = apply(grow(random, start=0.1), part, budget=[50_000])
    fresh = grown.weight[grown.mask & ~part.mask]
    assert fresh.std() == pytest.approx(0.1, rel=0.02)
    assert abs(fresh.mean()) < 0.002
    assert torch.equal(grown.weight[part.mask], part.weight[part.mask])
    assert not grown.weight[~grown.mask].any()


def test_what_is_dropped_and_regrown_keeps_its_value():
    part = layer([[3.0, 0.5, -0.25, 0.0]], [[1, 1, 1, 0]], grad=[[0.0, 0.0, 9.0, 1.0]])
    rule = chain(drop(magnitude, 0.7), grow(gradient))
    (after,) = apply(rule, part)
    assert masks([after]) == [[[1, 0, 1, 1]]]
    assert after.weight[0, 2] == -0.25
    # Also where new weights are drawn.
    rule = chain(drop(magnitude, 0.7), grow(gradient, start=1.0))
    (after,) = apply(rule, part)
    assert masks([after]) == [[[1, 0, 1, 1]]]
    assert after.weight[0, 2] == -0.25
    assert after.weight[0, 3] != 0


def test_rigl_in_one_chain_keeps_every_count():
    layers = [many(100), many(7, seed=1), many(1, seed=2), many(1000, seed=3)]
    rule = chain(drop(magnitude, cosine(0.9)), grow(gradient))
    after = apply(rule, *layers, progress=0.1)
    assert [part.live for part in after] == [100, 7, 1, 1000]
    assert not torch.equal(after[0].mask, layers[0].mask)


# Random choices


def test_random_choices_depend_on_the_generator_alone():
    first = apply(drop(random), many(500), budget=[200])
    again = apply(drop(random), many(500), budget=[200])
    assert torch.equal(first[0].mask, again[0].mask)
    other = apply(
        drop(random), dataclasses.replace(many(500), generator=generator(9)), budget=[200]
    )
    assert not torch.equal(first[0].mask, other[0].mask)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    apply(grow(random, start=0.1), many(500), budget=[600])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


def test_random_drops_only_the_live_and_grows_only_the_free():
    part = many(500)
    (less,) = apply(drop(random), part, budget=[200])
    assert less.live == 200
    assert bool((less.mask <= part.mask).all())
    (more,) = apply(grow(random), less, budget=[800])
    assert more.live == 800
    assert bool((more.mask >= less.mask).all())


def test_random_rows():
    part = many(1000, structure=Rows())
    (kept,) = apply(drop(random), part, budget=[3])
    assert sorted(kept.mask.sum(1).tolist()) == [0] * 7 + [100] * 3


def test_random_draws_are_uniform():
    counts = torch.zeros(10)
    for seed in range(1000):
        part = layer([[1.0] * 10], seed=seed)
        counts += apply(drop(random), part, budget=[3])[0].mask[0]
    # 300 each with a standard deviation of 14.5
    assert counts.sum() == 3000
    assert (counts - 300).abs().max() < 60


def test_random_within_groups():
    part = many(1000, structure=NM(2, 4))
    (kept,) = apply(drop(random), part, budget=[500])
    assert kept.structure.group(kept.mask, kept.layout).sum(1).tolist() == [2] * 250
    (again,) = apply(drop(random), many(1000, structure=NM(2, 4)), budget=[500])
    assert torch.equal(kept.mask, again.mask)


# Barring


def test_what_is_free():
    part = layer([[1.0, 0.0, 0.0]], [[1, 0, 0]])
    assert part.free.tolist() == [[False, True, True]]
    part = dataclasses.replace(part, barred=torch.tensor([[True, True, False]]))
    assert part.free.tolist() == [[False, False, True]]


def test_what_barring_drops_does_not_regrow():
    part = layer([[3.0, 0.5, -0.25, 0.0]], [[1, 1, 1, 0]], grad=[[0.0, 8.0, 9.0, 1.0]])
    free = chain(drop(magnitude, 0.4), grow(gradient))
    assert masks(apply(free, part)) == [[[1, 1, 1, 0]]]
    assert masks(apply(chain(barring(free.rules[0]), free.rules[1]), part)) == [[[1, 1, 0, 1]]]
    many_ = many(100)
    (less,) = apply(barring(drop(magnitude, 0.3)), many_)
    assert torch.equal(less.barred, many_.mask & ~less.mask)
    for score in (gradient, random):
        (after,) = apply(grow(score), less, budget=[100])
        assert after.live == 100
        assert not (after.mask & less.barred).any()


def test_barring_adds_to_what_is_barred_and_leaves_masks_alone():
    part = layer([[1.0, 2.0, 3.0, 4.0]], [[1, 1, 1, 1]])
    rule = chain(
        barring(drop(magnitude, 0.25)), drop(magnitude, 0.4), barring(drop(magnitude, 0.5))
    )
    (after,) = apply(rule, part)
    assert masks([after]) == [[[0, 0, 0, 1]]]
    assert after.barred.tolist() == [[True, False, True, False]]  # not what drop alone took
    (same,) = apply(barring(drop(magnitude, 0.0)), part)
    assert not same.barred.any()


def test_barred_units_grow_where_all_others_have():
    part = layer([[4.0, 0.5, 0.25, 0.0]], [[1, 1, 1, 0]], grad=[[0.0, 8.0, 9.0, 1.0]])
    rule = chain(barring(drop(magnitude, 0.7)), grow(gradient))
    # Two were dropped and one other place is free: the better of the two comes back.
    (after,) = apply(rule, part)
    assert masks([after]) == [[[1, 0, 1, 1]]]
    assert after.weight[0, 2] == 0.25
    (full,) = apply(rule, many(1000))
    assert full.live == 1000, "a dense layer has room nowhere else"


def test_barred_units_of_a_structure():
    grad = [[9.0, 9.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    part = layer(
        [[0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, 0.0]],
        [[1, 1], [0, 0], [0, 0], [1, 1]],
        grad=grad,
        structure=Rows(),
    )
    rule = chain(barring(drop(magnitude, 0.5)), grow(gradient))
    assert masks(apply(rule, part)) == [[[0, 0], [0, 0], [1, 1], [1, 1]]]
    (all_,) = apply(rule, part, budget=[4])
    assert all_.mask.all()


def test_barred_weights_of_a_pattern():
    weight = [[9.0, 1.0, 0.0, 0.0, 8.0, 7.0, 0.0, 0.0]]
    mask = [[1, 1, 0, 0, 1, 1, 0, 0]]
    part = layer(weight, mask, grad=[[0.0, 9.0, 1.0, 2.0, 0.0, 9.0, 9.0, 9.0]], structure=NM(2, 4))
    rule = chain(barring(drop(magnitude, 0.25)), grow(gradient))
    assert masks(apply(rule, part)) == [[[1, 0, 0, 1, 1, 1, 0, 0]]]
    # No room elsewhere in its group: the dropped one comes back, at any gradient.
    part = layer([[9.0, 1.0, 8.0, 7.0]], [[1, 1, 1, 1]], grad=[[1.0] * 4], structure=NM(4, 4))
    (after,) = apply(rule, part)
    assert after.mask.all()
    # Three of four barred, two to grow: the free one first, then the best of the barred.
    part = layer([[0.0] * 4], [[0] * 4], grad=[[3.0, 5.0, 4.0, 1.0]], structure=NM(2, 4))
    part = dataclasses.replace(part, barred=torch.tensor([[True, True, True, False]]))
    assert masks(apply(grow(gradient), part, budget=[2])) == [[[0, 1, 0, 1]]]


def test_shares_see_what_is_not_barred():
    seen = []

    def share(layers, total):
        seen.append([part.live for part in layers])
        return uniform(layers, total)

    a, b = many(100), many(100, seed=1)
    rule = chain(barring(drop(magnitude, 0.3)), grow(gradient, share=share))
    after = apply(rule, a, b)
    assert seen == [[900, 900]], "the dropped 30 of each have no room"
    assert [part.live for part in after] == [100, 100]
    for old, new in zip((a, b), after, strict=True):
        assert int((old.mask & new.mask).sum()) == 70


def test_shares_split_all_free_units_where_those_not_barred_are_too_few():
    full = many(1000)
    part = layer([[1.0, 0.0]], [[1, 0]], grad=[[1.0, 1.0]])
    rule = chain(barring(drop(magnitude, 0.5)), grow(random, share=in_proportion(lambda x: x.live)))
    after = apply(rule, full, part)
    assert sum(x.live for x in after) == 1001
    assert {x.live for x in after} <= {1, 2, 999, 1000}


def test_a_share_may_give_a_layer_more_than_what_is_not_barred():
    # 4 to grow, 5 free and not barred: the share is asked within these.
    a = layer([[1.0, 2.0, 3.0, 4.0, 0.0]], [[1, 1, 1, 1, 0]], grad=[[9.0] * 5])
    b = layer([[1.0, 2.0] + [0.0] * 4], [[1, 1, 0, 0, 0, 0]], grad=[[1.0] * 6])
    rule = chain(
        barring(drop(magnitude, 0.5)), grow(gradient, share=global_by(gradient, min_per_layer=0))
    )
    after = apply(rule, a, b)
    assert [part.live for part in after] == [3, 3]
    assert masks(after) == [[[0, 0, 1, 1, 1]], [[0, 1, 1, 1, 0, 0]]]


# Exchange


def test_exchange_grows_as_many_as_it_dropped():
    a, b = many(100), many(40, seed=1)
    swap = exchange(drop(magnitude, 0.3), grow(gradient))
    assert [x.live for x in apply(swap, a, b, budget=[1, 900])] == [100, 40]
    plain = chain(drop(magnitude, 0.3), grow(gradient))
    for new, old in zip(apply(swap, a, b, budget=[1, 1]), apply(plain, a, b), strict=True):
        assert torch.equal(new.mask, old.mask)


def test_exchange_after_pruning_is_granet():
    rule = chain(drop(magnitude), exchange(drop(magnitude, 0.5), grow(gradient)))
    (after,) = apply(rule, many(100), budget=[60])
    assert after.live == 60
    # Each layer exchanges what a shared pruning left it.
    rule = chain(
        drop(magnitude, share=global_by(magnitude)), exchange(drop(magnitude, 0.5), grow(random))
    )
    a, b = many(100), many(100, seed=1)
    left = apply(rule.rules[0], a, b, budget=[60, 60])
    after = apply(rule, a, b, budget=[60, 60])
    assert [x.live for x in after] == [x.live for x in left] != [60, 60]


def test_exchange_is_no_chain():
    parts = drop(magnitude), grow(random)
    assert exchange(*parts) == exchange(*parts) != chain(*parts)
    assert repr(exchange(*parts)) == "exchange(drop(magnitude), grow(random))"
    assert find(chain(barring(parts[0]), exchange(*parts)), drop) == [parts[0]] * 2


# By sign


def test_drop_by_sign_takes_from_each_side():
    weight = [[0.1, 0.2, 0.3, 0.4, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]]
    (kept,) = apply(drop_by_sign(0.5), layer(weight))
    assert masks([kept]) == [[[0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]]
    (kept,) = apply(drop_by_sign(0.3), layer(weight))
    assert masks([kept]) == [[[0, 1, 1, 1, 0, 1, 1, 1, 1, 1]]]
    (kept,) = apply(drop(magnitude, 0.5, share=global_by(magnitude)), layer(weight))
    assert masks([kept]) == [[[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]], "and that is the difference"


def test_drop_by_sign_keeps_live_zeros_and_no_dead_ones():
    part = layer([[0.0, 1.0, 2.0, -0.0, -1.0, -2.0, 0.0]], [[1, 1, 1, 1, 1, 1, 0]])
    (kept,) = apply(drop_by_sign(0.5), part)
    assert masks([kept]) == [[[1, 0, 1, 1, 0, 1, 0]]]
    (kept,) = apply(drop_by_sign(1.0), part)
    assert masks([kept]) == [[[1, 0, 0, 1, 0, 0, 0]]]
    (kept,) = apply(drop_by_sign(0.0), part)
    assert torch.equal(kept.mask, part.mask)


def test_drop_by_sign_of_one_sign_and_of_dead_values():
    assert masks(apply(drop_by_sign(0.5), layer([[1.0, 2.0, 3.0, 4.0]]))) == [[[0, 0, 1, 1]]]
    assert masks(apply(drop_by_sign(0.5), layer([[-1.0, -1.0, -1.0]]))) == [[[1, 1, 0]]]
    part = layer([[9.0, 1.0, 2.0, -9.0, -1.0, -2.0]], [[0, 1, 1, 0, 1, 1]])
    assert masks(apply(drop_by_sign(0.5), part)) == [[[0, 0, 1, 0, 0, 1]]]


def test_drop_by_sign_rounds_down():
    weight = [[float(i) for i in range(1, 11)] + [-1.0, -2.0, -3.0]]
    (kept,) = apply(drop_by_sign(0.3), layer(weight))
    assert kept.live == 13 - 3
    (kept,) = apply(chain(drop_by_sign(0.3), grow(random)), layer(weight), budget=[13])
    assert kept.live == 13


# Values


def test_rewind_gives_the_kept_values_back():
    start = torch.tensor([[7.0, 8.0]])
    part = layer([[1.0, 0.0]], [[1, 0]], slots={"start": start})
    (back,) = apply(rewind("start"), part)
    assert torch.equal(back.weight, start)
    assert torch.equal(back.mask, part.mask)


def test_rewind_of_a_slot_that_is_not_there():
    with pytest.raises(KeyError, match="start"):
        apply(rewind("start"), layer([[1.0, 0.0]]))


def test_rescaling_restores_the_variance_of_each_neuron():
    weight = [[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0]]
    mask = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    (scaled,) = apply(rescale_to_fan_in, layer(weight, mask))
    assert scaled.weight[0].tolist() == [1, 2, 3, 4]
    assert scaled.weight[1, 1] == 2.0  # one of four inputs lives: sqrt(4)
    assert torch.isfinite(scaled.weight).all()


def test_rescaling_counts_kernel_positions_and_groups():
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    mask[:, 0, :, 0] = True  # 3 of 18 inputs of every filter
    part = Layer("conv", torch.ones(4, 2, 3, 3), mask, layout=Layout(groups=2))
    (scaled,) = apply(rescale_to_fan_in, part)
    torch.testing.assert_close(scaled.weight, torch.full((4, 2, 3, 3), 6**0.5))
    # A transposed convolution: the weight is (in, out / groups, kernel).
    mask = torch.zeros(4, 3, 5, dtype=torch.bool)
    mask[:2, 0] = True  # output 0 of the first group: both its inputs live, all positions
    mask[0, 1, 0] = True  # output 1 of the first group: 1 of 10
    part = Layer("conv", torch.ones(4, 3, 5), mask, layout=Layout(2, transposed=True))
    (scaled,) = apply(rescale_to_fan_in, part)
    torch.testing.assert_close(scaled.weight[:2, 0], torch.ones(2, 5))
    torch.testing.assert_close(scaled.weight[:2, 1], torch.full((2, 5), 10**0.5))


def test_sparse_kaiming_draws_by_live_inputs():
    mask = torch.zeros(2, 20_000, dtype=torch.bool)
    mask[0, ::2] = True
    mask[1, ::50] = True
    part = Layer("fc", torch.zeros(2, 20_000), mask, generator=generator(0))
    (drawn,) = apply(sparse_kaiming_normal, part)
    for row, live in ((0, 10_000), (1, 400)):
        values = drawn.weight[row][mask[row]]
        assert values.std() == pytest.approx((2 / live) ** 0.5, rel=0.1)
    assert torch.equal(drawn.mask, mask)
    (again,) = apply(sparse_kaiming_normal, dataclasses.replace(part, generator=generator(0)))
    assert torch.equal(again.weight, drawn.weight)
    double = dataclasses.replace(part, weight=part.weight.double(), generator=generator(0))
    assert apply(sparse_kaiming_normal, double)[0].weight.dtype == torch.float64


# Chains


def test_a_chain_is_a_rule_and_passes_budget_and_progress_on():
    seen = []

    def spy(layers, budget, progress):
        seen.append((budget, progress))
        return layers

    part = many(10)
    assert apply(chain(spy, chain(spy), spy), part, budget=[4], progress=0.25) == (part,)
    assert seen == [([4], 0.25)] * 3
    assert apply(chain(), part) == (part,)


def test_granet_drops_to_the_budget_and_then_regrows():
    rule = chain(drop(magnitude), drop(magnitude, 0.5), grow(gradient))
    (after,) = apply(rule, many(100), budget=[60])
    assert after.live == 60


def test_find_looks_into_chains():
    first, second = drop(magnitude), drop(random, 0.1)
    assert find(chain(first, chain(grow(random), second)), drop) == [first, second]
    assert find(first, drop) == [first]
    assert find(grow(random), drop) == []
    assert find(None, drop) == []


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        (drop(magnitude), False),
        (drop(gradient), True),
        (drop(magnitude, share=global_by(gradient)), True),
        (drop(magnitude, share=erk), False),
        (drop(slot("momentum")), False),
        (grow(random), False),
        (grow(gradient), True),
        (grow(random, share=global_by(gradient)), True),
        (chain(drop(magnitude), grow(random)), False),
        (chain(drop(magnitude), chain(grow(gradient))), True),
        (drop_by_sign(0.3), False),
        (barring(drop(magnitude)), False),
        (barring(drop(gradient)), True),
        (exchange(drop(magnitude), grow(random)), False),
        (exchange(drop(magnitude), grow(gradient)), True),
        (grow(random, share=in_proportion(len)), False),
        (rewind("start"), False),
        (rescale_to_fan_in, False),
        (sparse_kaiming_normal, False),
        (lambda layers, budget, progress: layers, True),
    ],
)
def test_which_rules_read_gradients(rule, reads):
    assert needs_gradient(rule) is reads


RULES = [
    drop(magnitude),
    drop(magnitude, 0.5),
    drop(random, cosine(0.5)),
    drop(magnitude, constant(0.5), share=global_by(magnitude)),
    grow(gradient),
    grow(random, start=0.1),
    chain(drop(magnitude, 0.3, rounding=math.ceil), grow(gradient, share=global_by(gradient))),
    drop_by_sign(0.5),
    exchange(barring(drop(magnitude, 0.3)), grow(random)),
    rewind("start"),
    rescale_to_fan_in,
    sparse_kaiming_normal,
]


@pytest.mark.parametrize("structure", [None, Rows(), Block(2, 5), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", repr(rule)))
def test_rules_change_copies_only(rule, structure):
    whole = {} if structure is None else {"structure": structure}
    if isinstance(rule, drop_by_sign) and structure is not None:
        return
    layers = [many(1000, seed=1, **whole), many(1000, seed=2, **whole)]
    budget = [part.size // 2 for part in layers]
    layers = [
        dataclasses.replace(part, slots={"start": part.weight + 1.0})
        for part in drop(magnitude)(layers, budget, 0.0)
    ]
    before = [(p.weight.clone(), p.mask.clone(), p.grad.clone(), dict(p.slots)) for p in layers]
    budget = [part.live for part in layers]
    after = rule(tuple(layers), tuple(budget), 0.3)
    assert len(after) == 2
    for part, (weight, mask, grad, slots) in zip(layers, before, strict=True):
        assert torch.equal(part.weight, weight)
        assert torch.equal(part.mask, mask)
        assert torch.equal(part.grad, grad)
        assert part.slots == slots
    for old, new in zip(layers, after, strict=True):
        assert (new.name, new.shape, new.structure) == (old.name, old.shape, old.structure)
        assert new.mask.dtype == torch.bool
        assert new.weight.dtype == old.weight.dtype
        assert new.mask.shape == old.mask.shape


@pytest.mark.parametrize("rule", RULES[:-2], ids=repr)
def test_rules_pickle_compare_and_repeat_the_call(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert repr(pickle.loads(pickle.dumps(rule))) == repr(rule)
    assert repr(rule).startswith(type(rule).__name__ + "(")
