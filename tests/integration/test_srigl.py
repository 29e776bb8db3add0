"""SRigL: constant fan-in, ablation, budgets that do not drift, condensed weights."""

import itertools

import pytest
import torch
from torch import nn

from lightning_sparsity import SRigL, StaticSparse, fan_in
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.distributions import erk
from lightning_sparsity.ops.condensed import condense
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import Batches, TinyModel, fit


def a_layer(weight, grad=None, name="hidden", layout=None, seed=0):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    return Layer(
        name,
        weight,
        weight != 0,
        grad=torch.zeros_like(weight) if grad is None else torch.as_tensor(grad),
        layout=layout or Layout(),
        generator=torch.Generator().manual_seed(seed),
    )


def a_share(*layers, last="last", found=False, **start):
    names = tuple(layer.name for layer in layers)
    names = names if last in names else (*names, last)
    size = sum(layer.size for layer in layers)
    return Share(names, (size,), 0, found, {layer.name: layer.live for layer in layers} | start)


def update(callback, layer, progress=0.0, **start):
    return callback.update([layer], a_share(layer, **start), progress)[0]


def by_neuron(layer):
    return layer.layout.canonical(layer.mask).sum((2, 3)).view(-1).tolist()


def test_every_neuron_starts_with_the_rounded_mean_of_its_layer():
    shapes = {"a": (8, 1, 3, 3), "b": (16, 128), "c": (4, 16)}
    layers = [
        a_layer(torch.ones(shape), name=name, seed=place)
        for place, (name, shape) in enumerate(shapes.items())
    ]
    made = SRigL(0.3).begin(layers, a_share(*layers, last="c"))
    budgets = erk(layers, round(0.3 * 2184))
    for layer, budget in zip(made, budgets, strict=True):
        assert set(by_neuron(layer)) == {round(budget / layer.shape[0])}
    rows = {tuple(row) for row in made[1].mask.int().tolist()}
    assert len(rows) == 16, "every neuron draws its own"


def test_a_surplus_goes_by_magnitude_and_not_by_position():
    # two weights of four go: those of the second neuron, so that the first has one too many
    weight = [[2.0, 4.0, 3.0, 0.0], [0.1, 0.2, 0.3, 0.0]]
    grad = [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]
    layer = a_layer(weight, grad)
    rule = SRigL(0.5, drop_fraction=0.5, ablate=False)
    after = update(rule, layer, hidden=4)
    assert after.mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_neurons_die_and_the_others_take_their_weights_but_not_in_the_last_layer():
    torch.manual_seed(0)
    weight = torch.zeros(4, 12)
    weight[:, :3] = torch.tensor([5.0, 0.01, 6.0, 7.0])[:, None]
    grad = torch.rand(4, 12)
    grad[1] = 0
    hidden, last = a_layer(weight, grad), a_layer(weight, grad, name="last")
    share = a_share(hidden, last)
    after = {x.name: x for x in SRigL(0.25).update([hidden, last], share, 0.0)}
    assert by_neuron(after["hidden"]) == [4, 0, 4, 4]
    assert by_neuron(after["last"]) == [3, 3, 3, 3]
    kept = SRigL(0.25, ablate=False).update([hidden, last], share, 0.0)
    assert [by_neuron(layer) for layer in kept] == [[3, 3, 3, 3]] * 2


@pytest.mark.parametrize(
    ("gamma", "active"),
    [
        (0.3, [1, 1, 1, 1]),  # 0.3 * 5 is 1.5: one is enough
        (0.4, [1, 1, 1, 0]),
        (0.79, [1, 1, 0, 0]),  # 3.95: three are enough
        (0.8, [1, 0, 0, 0]),
        (1, [1, 1, 1, 1]),
        (3, [1, 1, 0, 0]),
        (99, [1, 0, 0, 0]),  # one neuron at least: it holds 20 weights
    ],
)
def test_gamma_is_a_share_of_the_fan_in_or_a_count(gamma, active):
    # the largest gradients are those of live weights: these alone are salient
    weight = torch.zeros(4, 20)
    for row, live in enumerate((5, 3, 2, 1)):
        weight[row, :live] = 1
    layer = a_layer(weight, (weight != 0) * torch.arange(1.0, 81).view(4, 20))
    (kept,) = SRigL(0.25, gamma=gamma, drop_fraction=0.0).rule.rules[0]([layer], [20], 0.0)
    assert kept.mask.any(1).int().tolist() == active


def test_so_many_neurons_stay_that_the_budget_finds_place():
    weight = torch.rand(6, 4) + 0.1
    weight[:, 3] = 0
    layer = a_layer(weight, torch.rand(6, 4))
    after = update(SRigL(0.75, gamma=100), layer)
    # 18 weights in rows of 4: five rows, of 3 weights
    assert sorted(by_neuron(after)) == [0, 3, 3, 3, 3, 3]


def test_budgets_do_not_drift_and_neurons_come_back():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 30, generator=generator)
    weight[:, 7:] = 0
    layer = a_layer(weight)
    start, rule = layer.live, SRigL(0.2, gamma=0.9, drop_fraction=0.5)
    share = a_share(layer)
    seen = []
    for _ in range(40):
        grad = torch.randn(12, 30, generator=generator)
        grad *= torch.rand(12, 1, generator=generator)
        (after,) = rule.update([Layer("hidden", layer.weight, layer.mask, grad=grad)], share, 0.0)
        noise = 0.3 * torch.randn(12, 30, generator=generator)
        layer = Layer("hidden", (after.weight + noise) * after.mask, after.mask)
        fan_in = after.mask.sum(1)
        active = int(fan_in.count_nonzero())
        assert set(fan_in[fan_in > 0].tolist()) == {start // active}
        seen.append(frozenset(fan_in.nonzero().view(-1).tolist()))
    assert min(map(len, seen)) < 12
    assert any(after - before for before, after in itertools.pairwise(seen)), "none came back"


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 6, 3, 3), Layout()),
        ((8, 2, 3), Layout(groups=4)),
        ((8, 4, 2, 2), Layout(groups=2, transposed=True)),
    ],
)
def test_a_neuron_of_a_convolution_is_an_output_channel(shape, layout):
    torch.manual_seed(0)
    layer = a_layer(torch.randn(shape), torch.randn(shape), layout=layout)
    callback = SRigL(0.4)
    (made,) = callback.begin([layer], a_share(layer))
    (each,) = set(by_neuron(made))
    made = Layer("hidden", made.weight * made.mask, made.mask, layer.grad, layout=layout)
    after = update(callback, made)
    assert not torch.equal(after.mask, made.mask)
    active = sum(n > 0 for n in by_neuron(after))
    assert set(by_neuron(after)) - {0} == {each * len(by_neuron(made)) // active}


def test_found_masks_are_made_even_by_magnitude():
    weight = [[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]]
    layer = a_layer(weight)
    (made,) = SRigL().begin([layer], a_share(layer, found=True))
    assert by_neuron(made) == [2, 2, 2]
    assert made.mask[0].tolist() == [True, False, True, False]
    assert made.mask[2, 0]
    result = fit([StaticSparse(0.3), SRigL(update_interval=4, ablate=False)])
    for _, live in result.history:
        assert live == result.history[0][1]
    for mask in result.masks.values():
        assert len(set(mask.flatten(1).sum(1).tolist())) == 1


def test_neurons_die_in_training_and_the_last_layer_keeps_its_own():
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 4))

    callback = SRigL(0.2, gamma=0.9, update_interval=2, distribution=fan_in)
    result = fit([callback], lambda: TinyModel(net()), data=Batches())
    first, last = (mask.sum(1) for mask in result.masks.values())
    assert result.history[0][1] == {"net.1.weight": 40 * 7, "net.3.weight": 4 * 8}
    assert 0 < int((first == 0).sum()) < 40
    assert set(last.tolist()) == {8}
    assert result.live <= 40 * 7 + 4 * 8


def test_condensed_layer_computes_the_same():
    callback = SRigL(0.2, gamma=0.9, update_interval=2)
    result = fit([callback])
    weight, mask = result.weights["net.5.weight"], result.masks["net.5.weight"]
    neurons, indices, values = condense(weight, mask)
    assert values.numel() == mask.sum() < mask.numel()
    x = torch.randn(3, 128)
    out = torch.zeros(3, 16)
    out[:, neurons] = (x[:, indices] * values).sum(-1)
    torch.testing.assert_close(out, x @ weight.T)


def test_a_bad_gradient_names_its_layer():
    grad = torch.zeros(3, 4)
    grad[1, 2] = torch.nan
    layer = a_layer(torch.eye(3, 4), grad)
    for name in ("hidden", "last"):
        share = a_share(layer, last=name)
        with pytest.raises(NonFiniteScoreError, match="gradient of hidden"):
            SRigL(0.3, drop_fraction=0.5).update([layer], share, 0.0)


def test_the_drop_fraction_is_known_to_monitors():
    assert SRigL(0.1).drop_fraction_at(0.5) == pytest.approx(0.15)
    assert SRigL(0.1).needs_gradient


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"gamma": 0}, ValueError, "above 0"),
        ({"gamma": -0.3}, ValueError, "above 0"),
        ({"gamma": float("nan")}, ValueError, "above 0"),
        ({"gamma": "0.3"}, TypeError, "number"),
        ({"gamma": True}, TypeError, "number"),
        ({"ablate": 1}, TypeError, "True or False"),
        ({"drop_fraction": 2.0}, ValueError, "drop_fraction"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"SRigL\({next(iter(bad))}=.*{message}"):
        SRigL(0.1, **bad)
