"""Starts: where the first live weights lie, and what values they have."""

import dataclasses
import pickle

import pytest
import torch

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.distributions import fan_in
from lightning_sparsity.rules import chain
from lightning_sparsity.scores import needs_gradient
from lightning_sparsity.starts import (
    FOUND,
    approximate_isometry,
    redraw,
    shuffle_within_layers,
    sparse_uniform,
    spread_inputs,
)
from lightning_sparsity.structures import NM, Block, Columns, Layout, Rows, Unstructured


def dense(*shape, seed=0, **kwargs):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Layer("fc.weight", weight, torch.ones(shape).bool(), generator=generator(seed), **kwargs)


def neurons(layer):
    """The mask with one row per output unit and one column per link."""
    view = layer.layout.canonical(layer.mask)
    return view.reshape(view.shape[0] * view.shape[1], -1)


def apply(rule, layer, count=0):
    (after,) = rule([layer], [count], 0.0)
    return after


# Inputs spread evenly


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (dense(8, 50), (8, 50)),
        (dense(8, 5, 3, 2), (8, 30)),
        (dense(8, 6, 5, layout=Layout(groups=4)), (8, 30)),
        (dense(6, 8, 5, layout=Layout(transposed=True)), (8, 30)),
        (dense(12, 4, 5, layout=Layout(groups=2, transposed=True)), (8, 30)),
    ],
    ids=["linear", "conv", "grouped", "transposed", "grouped transposed"],
)
@pytest.mark.parametrize("each", [1, 3, 7])
def test_every_neuron_has_as_many_inputs_one_in_each_part(part, shape, each):
    after = apply(spread_inputs, part, 8 * each)
    assert after.live == 8 * each
    assert after.mask.shape == part.mask.shape
    assert after.mask.is_contiguous()
    links = neurons(after)
    assert links.shape == shape
    assert (links.sum(1) == each).all()
    edges = [k * shape[1] // each for k in range(each + 1)]
    widths = {b - a for a, b in zip(edges, edges[1:], strict=False)}
    assert max(widths) - min(widths) <= 1
    for start, end in zip(edges, edges[1:], strict=False):
        assert (links[:, start:end].sum(1) == 1).all()
    assert torch.equal(after.weight, part.weight), "values are left to another rule"


def test_inputs_are_drawn_uniformly_within_their_part():
    links = neurons(apply(spread_inputs, dense(20_000, 7), 40_000))
    counts = links.sum(0).tolist()
    # Parts of 3 and 4 inputs: 6667 and 5000 each, standard deviations of 67 and 61.
    assert max(abs(n - 20_000 / 3) for n in counts[:3]) < 330
    assert max(abs(n - 5_000) for n in counts[3:]) < 300


@pytest.mark.parametrize("count", [1, 5, 8, 17, 63, 79, 80])
def test_what_is_left_over_goes_to_neurons_at_random(count):
    found = []
    for seed in range(4):
        after = apply(spread_inputs, dense(8, 10, seed=seed), count)
        each = neurons(after).sum(1)
        assert after.live == count
        assert set(each.tolist()) <= {count // 8, count // 8 + 1}
        found.append(tuple(each.tolist()))
    assert (len(set(found)) > 1) is (count % 8 != 0)


def test_the_counts_of_fan_in_leave_nothing_over():
    net = [dense(30, 78), dense(10, 30, seed=1), dense(1, 10, seed=2)]
    counts = fan_in(net, 264)
    for after, count in zip(spread_inputs(net, counts, 0.0), counts, strict=True):
        assert len(set(neurons(after).sum(1).tolist())) == 1
        assert after.live == count


def test_a_full_budget_leaves_a_layer_dense():
    part = dense(8, 10)
    assert apply(spread_inputs, part, 80).mask.all()
    assert torch.equal(part.generator.get_state(), generator(0).get_state()), "nothing was drawn"


@pytest.mark.parametrize("structure", [Rows(), Columns(), Block(2, 5), NM(2, 5)], ids=repr)
def test_structures_have_their_units_drawn_at_random(structure):
    part = dense(8, 10, structure=structure)
    after = apply(spread_inputs, part, part.size // 5 * 2)
    assert after.live == part.size // 5 * 2
    assert torch.equal(structure.expand(after.units, (8, 10), Layout()), after.mask)
    if isinstance(structure, NM):
        assert (structure.group(after.mask, Layout()).sum(1) == 2).all()
    other = dataclasses.replace(part, generator=generator(9))
    assert not torch.equal(apply(spread_inputs, other, part.size // 5 * 2).mask, after.mask)


def test_a_mask_that_was_found_is_only_thinned():
    part = apply(spread_inputs, dense(8, 10), 40)
    thinner = apply(spread_inputs, part, 16)
    assert thinner.live == 16
    assert (thinner.mask <= part.mask).all()


def test_topologies_depend_on_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        apply(spread_inputs, dataclasses.replace(dense(8, 50), generator=generator(seed)), 30)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)


# Controls


def pruned(part, slots=None):
    """The first quarter of the rows lives."""
    mask = torch.zeros_like(part.mask)
    mask[: len(mask) // 4] = True
    return dataclasses.replace(part, mask=mask, slots=slots or {})


def half(part):
    found = torch.zeros_like(part.mask)
    found[: len(found) // 2] = True
    return found


@pytest.mark.parametrize("structure", [Unstructured(), Rows(), Block(2, 5), NM(1, 5)], ids=repr)
def test_places_are_drawn_among_those_that_were_found(structure):
    part = dense(16, 20, structure=structure)
    found = half(part)
    if isinstance(structure, NM):
        found = (torch.arange(20) % 5 < 4).expand(16, 20)
    part = apply(spread_inputs, dataclasses.replace(part, mask=found), part.size // 5)
    part = dataclasses.replace(part, slots={FOUND: found})
    after = apply(shuffle_within_layers, part)
    assert after.live == part.live
    assert not (after.mask & ~part.slots[FOUND]).any()
    assert not torch.equal(after.mask, part.mask)
    anywhere = apply(
        shuffle_within_layers, dataclasses.replace(part, slots={}, generator=generator(0))
    )
    assert anywhere.live == part.live
    assert (anywhere.mask & ~part.slots[FOUND]).any()


def test_values_are_dealt_among_weights_that_were_found():
    part = dense(16, 20)
    found = half(part)
    part = dataclasses.replace(pruned(part, {FOUND: found}), weight=part.weight * found)
    after = apply(redraw, part)
    assert after.weight[found].all()
    assert not after.weight[~found].any()
    assert torch.equal(after.weight[found].sort().values, part.weight[found].sort().values)
    assert not torch.equal(after.weight, part.weight)
    everything = apply(redraw, pruned(dense(16, 20)))
    assert torch.equal(
        everything.weight.flatten().sort().values, dense(16, 20).weight.flatten().sort().values
    )


@pytest.mark.parametrize("control", [shuffle_within_layers, redraw])
def test_controls_leave_dense_layers(control):
    part = dense(4, 5)
    assert apply(control, part) is part
    first, again, other = (
        apply(control, dataclasses.replace(pruned(dense(16, 20)), generator=generator(seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.weight, again.weight)
    assert not (torch.equal(first.mask, other.mask) and torch.equal(first.weight, other.weight))


# Uniform values


def test_uniform_values_by_live_inputs():
    mask = torch.zeros(3, 40_000).bool()
    mask[0, ::2] = True
    mask[1, :400] = True
    part = dataclasses.replace(dense(3, 40_000), mask=mask, bias=torch.zeros(3))
    after = apply(sparse_uniform(), part)
    for row, live in ((0, 20_000), (1, 400), (2, 1)):  # one without inputs counts as one
        values = after.weight[row]
        assert values.abs().max() <= 1 / live
        assert values.min() < -0.99 / live
        assert values.max() > 0.99 / live
        assert values.mean().abs() < 0.02 / live
        assert values.std() == pytest.approx(1 / (live * 3**0.5), rel=0.01)
        assert after.bias[row].abs() <= 1 / live**0.5
    assert torch.equal(after.mask, mask)
    assert not part.bias.any(), "the rule is pure"


def test_uniform_biases():
    mask = torch.zeros(20_000, 5).bool()
    mask[:10_000, 0] = True
    mask[10_000:, :4] = True
    part = dataclasses.replace(dense(20_000, 5), mask=mask, bias=torch.zeros(20_000))
    bias = apply(sparse_uniform(), part).bias
    for half, most in ((bias[:10_000], 1.0), (bias[10_000:], 0.5)):
        assert half.abs().max() <= most
        assert half.max() > 0.99 * most
        assert half.min() < -0.99 * most
        assert half.std() == pytest.approx(most / 3**0.5, rel=0.02)


def test_uniform_values_by_all_inputs():
    mask = torch.zeros(2, 10_000).bool()
    mask[:, 0] = True
    part = dataclasses.replace(dense(2, 10_000), mask=mask, bias=torch.ones(2))
    after = apply(sparse_uniform(fan_in="dense"), part)
    assert 0.99e-4 < after.weight.abs().max() <= 1e-4
    assert after.bias.abs().max() <= 0.01


def test_dense_layers_keep_what_the_model_gave_them():
    part = dense(4, 5, bias=torch.ones(4))
    assert apply(sparse_uniform(), part) is part
    assert apply(sparse_uniform("dense"), part) is part
    after = apply(chain(spread_inputs, sparse_uniform()), part, 20)
    assert torch.equal(after.weight, part.weight)
    assert torch.equal(after.bias, part.bias)


def test_uniform_values_of_convolutions():
    # Grouped: 4 outputs of 2 x 9 inputs; transposed: (in, out / groups, kernel).
    for shape, layout in (
        ((4, 2, 3, 3), Layout(groups=2)),
        ((4, 2, 3, 3), Layout(groups=2, transposed=True)),
    ):
        part = dense(*shape, layout=layout, bias=torch.zeros(4))
        links = torch.zeros(4, 18).bool()
        for output, live in enumerate((18, 9, 3, 1)):
            links[output, :live] = True
        view = links.view(layout.canonical(part.mask).shape)
        part = dataclasses.replace(part, mask=layout.restore(view, shape))
        after = apply(sparse_uniform(), part)
        largest = layout.canonical(after.weight).reshape(4, 18).abs().amax(1)
        for output, live in enumerate((18, 9, 3, 1)):
            assert 0.5 / live < largest[output] <= 1 / live
            assert 0 < after.bias[output].abs() <= 1 / live**0.5
        assert after.weight.shape == shape


def test_layers_without_a_bias_and_of_another_dtype():
    part = dataclasses.replace(dense(2, 4), mask=torch.eye(2, 4).bool())
    assert apply(sparse_uniform(), part).bias is None
    double = dataclasses.replace(
        part, weight=part.weight.double(), bias=torch.zeros(2).double(), generator=generator(0)
    )
    after = apply(sparse_uniform(), double)
    assert after.weight.dtype == after.bias.dtype == torch.float64


def test_values_depend_on_the_generator_alone():
    mask = torch.eye(4, 6).bool()
    first, again, other = (
        apply(sparse_uniform(), dataclasses.replace(dense(4, 6), mask=mask, generator=generator(s)))
        for s in (1, 1, 2)
    )
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_what_the_engine_and_the_user_ask():
    assert not needs_gradient(spread_inputs)
    assert not needs_gradient(sparse_uniform())
    assert pickle.loads(pickle.dumps(sparse_uniform("dense"))) == sparse_uniform("dense")
    assert eval(repr(sparse_uniform("dense"))) == sparse_uniform("dense")
    with pytest.raises(
        ValueError, match=r"fan_in='sparse'\): fan_in must be \"live\" or \"dense\""
    ):
        sparse_uniform("sparse")


# Approximate isometry


def sparse(*shape, share=0.3, **kwargs):
    part = dense(*shape, **kwargs)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    weight = 0.1 * part.weight
    return dataclasses.replace(part, mask=mask, weight=weight.to(kwargs.get("dtype", weight.dtype)))


def lengths(layer):
    """Singular values of each group's matrix, ``(groups, fewer of outputs and links)``."""
    view = layer.layout.canonical(layer.weight * layer.mask)
    return torch.linalg.svdvals(view.flatten(2))


@pytest.mark.parametrize(
    "part",
    [
        sparse(20, 60),
        sparse(60, 20),
        sparse(16, 8, 3, 3),
        sparse(16, 8, 3, 3, layout=Layout(groups=2)),
        sparse(8, 16, 3, 3, layout=Layout(transposed=True)),
        sparse(12, 4, 3, 3, layout=Layout(groups=2, transposed=True)),
    ],
    ids=["linear", "tall", "conv", "grouped", "transposed", "grouped transposed"],
)
@pytest.mark.parametrize("orthogonal", [False, True])
def test_isometry_keeps_lengths(part, orthogonal):
    before = lengths(part)
    after = apply(approximate_isometry(orthogonal=orthogonal), part)
    assert not ((before - 1).abs() < 0.2).all()
    assert ((lengths(after) - 1).abs() < 0.06).all()
    assert not after.weight[~part.mask].any()
    assert torch.equal(after.mask, part.mask)
    assert after.weight.shape == part.weight.shape
    assert after.weight.is_contiguous()


def test_isometry_takes_the_best_of_its_way():
    # Steps of a constant length circle around the minimum.
    part = sparse(20, 60)
    penalties = [
        float((lengths(apply(approximate_isometry(steps, tolerance=0), part)) ** 2 - 1).norm())
        for steps in (1, 10, 200, 201, 202, 203)
    ]
    assert penalties == sorted(penalties, reverse=True)
    assert penalties[-1] < 0.1


def test_isometry_stops_when_it_gains_no_more(monkeypatch):
    norms = []
    norm = torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda t, *a: norms.append(1) or norm(t, *a))
    apply(approximate_isometry(), sparse(20, 60))
    assert 100 < len(norms) < 1000
    norms.clear()
    apply(approximate_isometry(steps=120, tolerance=0), sparse(20, 60))
    assert len(norms) == 121


def test_isometry_of_an_exact_start_and_of_dead_rows():
    exact = dataclasses.replace(dense(4, 8), weight=torch.eye(4, 8), mask=torch.eye(4, 8).bool())
    assert torch.equal(apply(approximate_isometry(), exact).weight, exact.weight)
    part = sparse(6, 20)
    part.mask[2] = False
    after = apply(approximate_isometry(), part)
    assert after.weight.isfinite().all()
    assert not after.weight[2].any()
    assert ((lengths(after)[0, :5] - 1).abs() < 0.06).all()


def test_isometry_begins_with_the_model_or_with_a_draw():
    one, other = sparse(8, 20), sparse(8, 20, seed=5)
    own, drawn = approximate_isometry(), approximate_isometry(orthogonal=True)
    assert not torch.equal(apply(own, one).weight, apply(own, other).weight)
    state = torch.get_rng_state()
    first = apply(drawn, dataclasses.replace(one, generator=generator(1))).weight
    again = apply(drawn, dataclasses.replace(other, generator=generator(1))).weight
    assert torch.equal(first, again)
    assert not torch.equal(
        first, apply(drawn, dataclasses.replace(one, generator=generator(2))).weight
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_isometry_leaves_dense_layers_and_types():
    part = dense(4, 5)
    assert apply(approximate_isometry(orthogonal=True), part) is part
    for dtype in (torch.bfloat16, torch.float64):
        after = apply(approximate_isometry(steps=5), sparse(8, 20, share=0.5)).weight
        assert after.dtype == torch.float32
        half = sparse(8, 20, share=0.5)
        half = dataclasses.replace(half, weight=half.weight.to(dtype))
        assert apply(approximate_isometry(steps=5), half).weight.dtype == dtype


def test_arguments_of_isometry():
    rule = approximate_isometry(steps=5, lr=0.2)
    assert not needs_gradient(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert eval(repr(rule)) == rule
    for wrong, error in (
        ({"steps": 0}, ValueError),
        ({"steps": 1.5}, TypeError),
        ({"lr": 0}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"lr": float("nan")}, ValueError),
        ({"tolerance": -1}, ValueError),
        ({"orthogonal": 1}, TypeError),
    ):
        with pytest.raises(error, match=r"approximate_isometry\(steps="):
            approximate_isometry(**wrong)
