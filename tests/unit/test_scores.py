"""Scores: formulas, shapes, draws, and errors that say what is missing."""

import itertools
import math
import pickle

import pytest
import torch

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.rules import drop, grow
from lightning_sparsity.scores import (
    drawn_by,
    gradient,
    magnitude,
    momentum,
    nearby,
    needs_gradient,
    random,
    saliency,
    slot,
    unexplored,
    without_gradient,
)
from lightning_sparsity.structures import NM, Layout, Rows

WEIGHT = torch.tensor([[1.0, -2.0, 0.0], [-0.5, 3.0, 4.0]])
GRAD = torch.tensor([[-1.0, 0.5, 7.0], [2.0, 0.0, -0.25]])
MASK = torch.tensor([[True, True, False], [True, False, True]])


@pytest.fixture
def layer():
    slots = {"momentum": -GRAD, "fisher": GRAD.square()}
    return Layer("fc.weight", WEIGHT, MASK, GRAD, slots, generator=generator(0))


def test_formulas(layer):
    assert magnitude(layer).tolist() == [[1, 2, 0], [0.5, 3, 4]]
    assert gradient(layer).tolist() == [[1, 0.5, 7], [2, 0, 0.25]]
    assert saliency(layer).tolist() == [[1, 1, 0], [1, 0, 1]]
    assert momentum()(layer).tolist() == [[1, 0.5, 7], [2, 0, 0.25]]
    assert slot("fisher")(layer).tolist() == [[1, 0.25, 49], [4, 0, 0.0625]]


@pytest.mark.parametrize(
    "score",
    [
        magnitude,
        gradient,
        saliency,
        random,
        momentum(),
        nearby(),
        drawn_by(gradient),
        unexplored(),
    ],
    ids=["w", "g", "wg", "random", "m", "nearby", "drawn", "unexplored"],
)
def test_scores_have_the_shape_of_the_weight_and_change_nothing(layer, score):
    before = [t.clone() for t in (layer.weight, layer.grad, layer.slots["momentum"])]
    values = score(layer)
    assert values.shape == WEIGHT.shape
    assert bool((values >= 0).all())
    after = (layer.weight, layer.grad, layer.slots["momentum"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_random_is_uniform_and_repeats_with_its_generator():
    wide = torch.zeros(100, 1000)
    first = random(Layer("fc", wide, wide == 0, generator=generator(1)))
    assert torch.equal(first, random(Layer("fc", wide, wide == 0, generator=generator(1))))
    assert not torch.equal(first, random(Layer("fc", wide, wide == 0, generator=generator(2))))
    assert 0 <= first.min() < first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.005)
    assert first.var() == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("score", [gradient, saliency])
def test_gradients_are_not_there_before_training(score):
    bare = Layer("net.0.weight", WEIGHT, MASK)
    with pytest.raises(ValueError, match=rf"{score.__name__}: net.0.weight has no gradient"):
        score(bare)


def test_a_slot_that_nobody_filled(layer):
    with pytest.raises(KeyError, match=r"fc.weight has no slot 'start'.*fisher.*observe="):
        slot("start")(layer)


def test_what_the_engine_asks():
    assert not needs_gradient(magnitude)
    assert not needs_gradient(random)
    assert not needs_gradient(momentum())
    assert not needs_gradient(slot("fisher"))
    assert not needs_gradient(nearby())
    assert not needs_gradient(unexplored())
    assert not needs_gradient(drawn_by(magnitude))
    assert needs_gradient(drawn_by(gradient))
    assert needs_gradient(gradient)
    assert needs_gradient(saliency)
    assert needs_gradient(lambda layer: layer.weight), "unless it says otherwise"
    assert not needs_gradient(without_gradient(lambda layer: layer.weight))


def test_slots_pickle_and_compare():
    assert pickle.loads(pickle.dumps(slot("fisher"))) == slot("fisher") != slot("momentum")
    assert repr(momentum()) == "momentum(beta=0.9)"


@pytest.mark.parametrize(
    "score",
    [
        momentum(0.5),
        nearby(0.2),
        drawn_by(nearby(0.2), power=2),
        drawn_by(momentum()),
        unexplored(),
    ],
    ids=repr,
)
def test_scores_pickle_compare_hash_and_repeat_the_call(score):
    assert pickle.loads(pickle.dumps(score)) == score
    assert len({score, pickle.loads(pickle.dumps(score))}) == 1
    assert eval(repr(score)) == score


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: momentum(1.0), ValueError, r"momentum\(beta=1.0\): beta must lie in \[0, 1\)"),
        (lambda: momentum(-0.1), ValueError, "beta must lie"),
        (lambda: momentum(math.nan), ValueError, "beta must lie"),
        (lambda: nearby(0), ValueError, r"nearby\(length=0\): length must be"),
        (lambda: nearby(-1.0), ValueError, "above 0, such as 0.1"),
        (lambda: nearby(math.inf), ValueError, "above 0, such as 0.1"),
        (lambda: nearby(math.nan), ValueError, "above 0, such as 0.1"),
        (lambda: drawn_by("magnitude"), TypeError, "score must be a function of a layer"),
        (lambda: drawn_by(None), TypeError, "score must be a function of a layer"),
        (lambda: drawn_by(magnitude, power=-1), ValueError, "power must be a finite number >= 0"),
        (lambda: drawn_by(magnitude, power=math.inf), ValueError, "power must be"),
        (lambda: drawn_by(magnitude, power=math.nan), ValueError, "power must be"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Momentum


def test_momentum_is_a_running_mean():
    grads = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    score, slots, expected = momentum(0.75), {}, torch.zeros(2, 3)
    for grad in grads:
        slots = {**slots, **score.observe(Layer("fc", WEIGHT, MASK, grad, slots))}
        expected = 0.75 * expected + 0.25 * grad
    assert slots.keys() == {"momentum"}
    torch.testing.assert_close(score(Layer("fc", WEIGHT, MASK, slots=slots)), expected.abs())
    last = momentum(0.0).observe(Layer("fc", WEIGHT, MASK, grads[0], slots))
    assert torch.equal(last["momentum"], grads[0])


def test_momentum_that_nobody_gathered():
    with pytest.raises(KeyError, match="no slot 'momentum'"):
        momentum()(Layer("fc", WEIGHT, MASK))
    with pytest.raises(ValueError, match="momentum: fc has no gradient"):
        momentum().observe(Layer("fc", WEIGHT, MASK))


# Weighted draws

CHANCES = [1.0, 2.0, 3.0, 0.0, 4.0]


def chance(power=1):
    """Probability of every pair of the five, drawn one after the other."""
    s = [c**power if c else 0.0 for c in CHANCES]
    return {
        pair: sum(s[i] / sum(s) * s[j] / (sum(s) - s[i]) for i, j in itertools.permutations(pair))
        for pair in itertools.combinations(range(5), 2)
    }


def assert_frequencies(chosen, expected):
    """``chosen`` is (draws, units) bool, two True per row; all within 5 standard deviations."""
    draws = len(chosen)
    assert set(chosen.sum(1).tolist()) == {2}
    for (i, j), p in expected.items():
        count = int((chosen[:, i] & chosen[:, j]).sum())
        assert abs(count - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)), (i, j)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_draws_have_the_chances_of_weighted_sampling_without_replacement(power):
    weight = torch.tensor(CHANCES).repeat(20_000, 1)
    wide = Layer("fc", weight, weight > 5, generator=generator(0))
    score = drawn_by(magnitude, power)(wide)
    assert score.dtype == torch.float64
    first = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(2).indices, True)
    assert_frequencies(first, chance(power))
    # The same through a rule, where every row is a group.
    pattern = Layer("fc", weight, weight > 5, structure=NM(2, 5), generator=generator(1))
    (grown,) = grow(drawn_by(magnitude, power))([pattern], [40_000], 0.0)
    assert_frequencies(grown.mask, chance(power))


def test_a_unit_is_drawn_by_the_sum_of_its_chances():
    counts = torch.zeros(3)
    for seed in range(1000):
        weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
        rows = Layer("fc", weight, weight >= 0, structure=Rows(), generator=generator(seed))
        (kept,) = drop(drawn_by(magnitude))([rows], [1], 0.0)
        counts += kept.units
    # With a standard deviation of some 15. Draws of single weights, added up over the unit,
    # would give 178, 287 and 535.
    assert counts.sum() == 1000
    assert (counts - torch.tensor([200.0, 400.0, 400.0])).abs().max() < 65


def test_power_zero_draws_uniformly_and_a_large_one_takes_the_best():
    weight = torch.tensor(CHANCES).repeat(20_000, 1)
    wide = Layer("fc", weight, weight > 5, structure=NM(2, 5), generator=generator(0))
    (grown,) = grow(drawn_by(magnitude, power=0))([wide], [40_000], 0.0)
    assert_frequencies(grown.mask, dict.fromkeys(chance(), 0.1))
    (grown,) = grow(drawn_by(magnitude, power=60))([wide], [40_000], 0.0)
    assert (grown.mask == torch.tensor([0, 0, 1, 0, 1]).bool()).float().mean() > 0.9999


def test_chances_of_zero_come_last_and_in_order():
    weight = torch.tensor([[0.0, 5.0, 0.0, 1e-30, 0.0, 1e30]])
    for seed in range(20):
        part = Layer("fc", weight, weight < 0, generator=generator(seed))
        (grown,) = grow(drawn_by(magnitude))([part], [3], 0.0)
        assert grown.mask.tolist() == [[False, True, False, True, False, True]]
        (grown,) = grow(drawn_by(magnitude))([part], [5], 0.0)
        assert grown.mask.tolist() == [[True, True, True, True, False, True]]
    zeros = Layer("fc", torch.zeros(2, 3), MASK & False, generator=generator(0))
    (grown,) = grow(drawn_by(magnitude))([zeros], [2], 0.0)
    assert grown.mask.tolist() == [[True, True, False], [False] * 3]


def test_draws_depend_on_the_generator_alone(layer):
    state = torch.get_rng_state()
    first, other = (
        drawn_by(gradient)(Layer("fc", WEIGHT, MASK, GRAD, generator=generator(seed)))
        for seed in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert torch.equal(drawn_by(gradient)(layer), first)
    assert not torch.equal(first, other)


def test_draws_by_what_is_not_a_number(layer):
    bad = Layer("fc.weight", WEIGHT, MASK, GRAD * math.nan, generator=generator(0))
    with pytest.raises(ValueError, match=r"fc.weight is not finite"):
        grow(drawn_by(gradient))([bad], [5], 0.0)


# Nearness


def test_nearness_falls_with_the_distance_of_the_places():
    weight = torch.zeros(4, 2)
    score = nearby(0.5)(Layer("fc", weight, weight == 0))
    places = [1 / 8, 3 / 8, 5 / 8, 7 / 8], [1 / 4, 3 / 4]
    expected = [[math.exp(-abs(a - b) / 0.5) for b in places[1]] for a in places[0]]
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(nearby(0.5)(Layer("fc", weight.T, weight.T == 0)), score.T)


def test_nearness_of_channels():
    flat = nearby(0.2)(Layer("fc", torch.zeros(4, 3), torch.ones(4, 3).bool()))
    kernel = torch.ones(4, 3, 2, 2).bool()
    score = nearby(0.2)(Layer("conv", kernel.float(), kernel))
    assert torch.equal(score, flat[:, :, None, None].expand(4, 3, 2, 2)), "any kernel position"
    # Two groups of 4 outputs and 3 inputs, and the transposed one, (in, out / groups, kernel).
    kernel = torch.ones(8, 3, 2).bool()
    score = nearby(0.2)(Layer("conv", kernel.float(), kernel, layout=Layout(groups=2)))
    assert torch.equal(score, flat.repeat(2, 1)[:, :, None].expand(8, 3, 2))
    kernel = torch.ones(6, 4, 2).bool()
    layout = Layout(groups=2, transposed=True)
    score = nearby(0.2)(Layer("conv", kernel.float(), kernel, layout=layout))
    assert torch.equal(score, flat.T.repeat(2, 1)[:, :, None].expand(6, 4, 2))


def test_nearby_links_are_drawn_more_often():
    weight = torch.zeros(100, 100)
    part = Layer("fc", weight, weight > 0, generator=generator(0))
    (grown,) = grow(drawn_by(nearby(0.05)))([part], [500], 0.0)
    outputs, inputs = grown.mask.nonzero(as_tuple=True)
    distance = (outputs - inputs).abs().double() / 100
    assert grown.live == 500
    # Exponential distances, mean 0.05; uniform links would be a third apart.
    assert 0.04 < distance.mean() < 0.065


# What was never live


def test_unexplored_weights_come_first_and_the_rest_is_random():
    mask = torch.tensor([[True, False, False, False, False, False]])
    fired = torch.tensor([[True, True, True, False, False, True]])
    counts = torch.zeros(6)
    for seed in range(500):
        part = Layer("fc", mask.float(), mask, slots={"fired": fired}, generator=generator(seed))
        (one,) = grow(unexplored())([part], [2], 0.0)
        assert int((one.mask & ~fired).sum()) == 1
        (grown,) = grow(unexplored())([part], [4], 0.0)
        assert grown.mask[0, [0, 3, 4]].all()
        counts += grown.mask[0]
    # The fourth is one of three: 167 each, with a standard deviation of 11.
    assert (counts[[1, 2, 5]] - 167).abs().max() < 50


def test_observing_unites_the_masks():
    slots = {}
    union = torch.zeros(2, 3).bool()
    for place in (0, 3, 5, 3):
        mask = torch.zeros(6).bool().index_fill(0, torch.tensor([place]), True).view(2, 3)
        union |= mask
        slots = unexplored().observe(Layer("fc", WEIGHT, mask, slots=slots))
        assert torch.equal(slots["fired"], union)
    # What lives counts before anything was observed.
    score = unexplored()(Layer("fc", WEIGHT, MASK, generator=generator(0)))
    assert torch.equal(score < 1, MASK)


def test_unexplored_units_and_groups():
    mask = torch.zeros(4, 4).bool()
    mask[0] = True
    fired = mask.clone()
    fired[2] = True
    for seed in range(10):
        part = Layer(
            "fc",
            mask.float(),
            mask,
            slots={"fired": fired},
            structure=Rows(),
            generator=generator(seed),
        )
        (grown,) = grow(unexplored())([part], [3], 0.0)
        assert grown.units.tolist() == [True, True, False, True]
        pattern = Layer(
            "fc",
            fired.float(),
            mask & False,
            slots={"fired": torch.eye(4).bool()},
            structure=NM(3, 4),
            generator=generator(seed),
        )
        (grown,) = grow(unexplored())([pattern], [12], 0.0)
        assert torch.equal(grown.mask, ~torch.eye(4).bool())
