"""Scores: formulas, shapes, and errors that say what is missing."""

import pickle

import pytest
import torch

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.scores import (
    gradient,
    magnitude,
    momentum,
    needs_gradient,
    random,
    saliency,
    slot,
    without_gradient,
)

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
    [magnitude, gradient, saliency, random, momentum()],
    ids=["w", "g", "wg", "random", "m"],
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
    assert needs_gradient(gradient)
    assert needs_gradient(saliency)
    assert needs_gradient(lambda layer: layer.weight), "unless it says otherwise"
    assert not needs_gradient(without_gradient(lambda layer: layer.weight))


def test_slots_pickle_and_compare():
    assert pickle.loads(pickle.dumps(slot("fisher"))) == slot("fisher") != slot("momentum")
    assert repr(momentum()) == "momentum(beta=0.9)"
