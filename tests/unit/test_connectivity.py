"""Paths, dead units and effective weights, by hand and against brute force."""

import itertools

import pytest
import torch
from torch import nn

from lightning_sparsity.connectivity import (
    Wiring,
    dead_inputs,
    dead_outputs,
    effective_density,
    layers_of,
    wiring,
)
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.structures import Layout

PLAIN = Layout()


def layer(name, mask, layout=PLAIN):
    mask = torch.as_tensor(mask, dtype=torch.bool)
    return Layer(name, mask.float(), mask, layout=layout)


def by_brute_force(masks):
    """Weights of fully connected layers on a path, each path walked on its own."""
    on_path = [torch.zeros_like(mask) for mask in masks]
    widths = [masks[0].shape[1], *(mask.shape[0] for mask in masks)]
    for path in itertools.product(*map(range, widths)):
        steps = list(zip(path[1:], path[:-1], strict=True))
        if all(mask[step] for mask, step in zip(masks, steps, strict=True)):
            for found, step in zip(on_path, steps, strict=True):
                found[step] = True
    return [int(found.sum()) for found in on_path]


@pytest.mark.parametrize("seed", range(12))
def test_effective_weights_are_those_on_a_path(seed):
    generator = torch.Generator().manual_seed(seed)
    widths = [4, 5, 3, 4, 2]
    masks = [
        torch.rand(after, before, generator=generator) < 0.3
        for before, after in itertools.pairwise(widths)
    ]
    found = wiring(layer(str(n), mask) for n, mask in enumerate(masks))
    assert [found[str(n)].effective for n in range(4)] == by_brute_force(masks)
    assert [found[str(n)].live for n in range(4)] == [int(mask.sum()) for mask in masks]


def test_a_dead_layer_cuts_everything():
    found = wiring([layer("a", [[1, 1]]), layer("b", [[0], [0]]), layer("c", [[1, 0]])])
    assert [one.effective for one in found.values()] == [0, 0, 0]
    assert [one.dead_neurons for one in found.values()] == [1, 2, 0]
    assert effective_density(found) == 0


def test_channels_are_units():
    kernel = torch.zeros(2, 3, 2, 2)
    kernel[0, 1, 1, 0] = 1  # one weight links input channel 1 to output channel 0
    second = torch.zeros(2, 2, 1, 1)
    second[:, 1] = 1  # reads only the other channel
    found = wiring([layer("a", kernel), layer("b", second)])
    assert found["a"] == Wiring(weights=24, live=1, effective=0, neurons=2, dead_neurons=2)
    second[1, 0] = 1
    found = wiring([layer("a", kernel), layer("b", second)])
    assert found["a"] == Wiring(24, 1, 1, 2, 1)
    assert found["b"] == Wiring(4, 3, 1, 2, 0)


def test_every_weight_of_a_linked_kernel_counts():
    kernel = torch.ones(1, 2, 3, 3)
    kernel[0, 1, 0] = 0
    assert wiring([layer("a", kernel)])["a"].effective == 15


def test_flattened_channels():
    conv = torch.ones(2, 1, 1, 1)
    linear = torch.zeros(1, 6)
    linear[0, 2] = 1  # of channel 0, which has inputs 0 to 2
    found = wiring([layer("a", conv), layer("b", linear)])
    assert found["a"] == Wiring(2, 2, 1, 2, 1)
    conv[0] = 0
    assert wiring([layer("a", conv), layer("b", linear)])["b"].effective == 0


def test_groups_are_apart():
    # Two groups of one input and one output each; then a dense layer that reads group 1.
    grouped = torch.ones(2, 1, 1, 1)
    pointwise = torch.tensor([[0.0, 1.0]]).reshape(1, 2, 1, 1)
    first = torch.tensor([[1.0], [0.0]]).reshape(2, 1, 1, 1)  # feeds group 0 only
    found = wiring(
        [layer("a", first), layer("b", grouped, Layout(groups=2)), layer("c", pointwise)]
    )
    assert [one.effective for one in found.values()] == [0, 0, 0]
    assert found["b"].dead_neurons == 1


def test_groups_agree_with_the_same_layer_written_densely():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(6, 4, 1, 1, generator=generator) < 0.4
    grouped = torch.rand(4, 3, 1, 1, generator=generator) < 0.4
    last = torch.rand(3, 4, 1, 1, generator=generator) < 0.4
    dense = torch.zeros(4, 6, 1, 1, dtype=torch.bool)
    dense[:2, :3], dense[2:, 3:] = grouped[:2], grouped[2:]
    one = wiring([layer("a", first), layer("b", grouped, Layout(groups=2)), layer("c", last)])
    other = wiring([layer("a", first), layer("b", dense), layer("c", last)])
    for name in "abc":
        assert one[name].effective == other[name].effective > 0
        assert one[name].dead_neurons == other[name].dead_neurons


def test_transposed_convolutions():
    weight = torch.zeros(3, 2, 2, 2, dtype=torch.bool)  # (in, out, ...)
    weight[1, 0, 1, 1] = True
    transposed = Layout(transposed=True)
    assert dead_outputs(weight, transposed).tolist() == [False, True]
    assert dead_inputs(weight, transposed).tolist() == [True, False, True]
    before = torch.tensor([[1], [0], [1]])  # does not feed channel 1
    found = wiring([layer("a", before), layer("b", weight, transposed)])
    assert found["b"].effective == 0


def test_other_widths_and_the_unknown_are_outside():
    a, b = [[1, 0], [0, 0]], [[0, 1, 0]]
    found = wiring([layer("a", a), layer("b", b)])
    assert [one.effective for one in found.values()] == [1, 1]
    assert [one.dead_neurons for one in found.values()] == [1, 0]
    a, b = [[1, 0], [0, 0]], [[0, 1]]
    assert [one.effective for one in wiring([layer("a", a), layer("b", b)]).values()] == [0, 0]
    apart = wiring([layer("a", a), None, layer("b", b)])
    assert [one.effective for one in apart.values()] == [1, 1]
    # The inputs of a linear layer are never a multiple of a linear layer's outputs by chance.
    assert wiring([layer("a", [[0], [1]]), layer("b", [[1, 1, 0, 0]])])["b"].effective == 2


def test_nothing_at_all():
    assert wiring([]) == {}
    assert effective_density({}) == 1.0


# ------------------------------------------------------------------ what models look like


def names(model):
    return [found and found.name for found in layers_of(model)]


class Lenet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.fc1 = nn.Linear(8, 4)
        self.fc2 = nn.Linear(4, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3)
        self.conv2 = nn.Conv2d(2, 2, 3)


def test_modules_in_a_row_are_a_chain():
    expected = ["features.0.weight", "fc1.weight", "fc2.weight"]
    assert names(Lenet()) == expected
    compiled = torch.compile(nn.Sequential(Lenet()), backend="eager")
    assert names(compiled) == [f"0.{name}" for name in expected]


def test_blocks_are_apart():
    # x + block(x) must not look like a chain; inside, conv1 and conv2 are one.
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Block(), nn.Sequential(Block()), nn.Conv2d(2, 1, 3))
    assert names(model) == [
        "0.weight",
        None,
        "1.conv1.weight",
        "1.conv2.weight",
        None,
        "2.0.conv1.weight",
        "2.0.conv2.weight",
        None,
        "3.weight",
    ]


@pytest.mark.parametrize(
    "between",
    [nn.Embedding(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 1), nn.Bilinear(4, 4, 4)],
)
def test_layers_with_other_matrices_cut_the_chain(between):
    model = nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 4))
    found = names(model)
    assert found[0] == "0.weight"
    assert found[-2:] == [None, "2.weight"]


def test_tied_weights_cut_the_chain():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert names(model) == ["1.weight", None, "3.weight"]


def test_masks_come_before_zeros():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
    mask = torch.tensor([[True, False], [True, False]])
    by_zeros, by_masks = layers_of(model), layers_of(model, {"1.weight": mask})
    assert [int(found.mask.sum()) for found in by_zeros] == [2, 4]
    assert [int(found.mask.sum()) for found in by_masks] == [4, 2]


def test_what_a_network_computes_depends_on_effective_weights_only():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 1, bias=False),
        nn.Flatten(),
        nn.Linear(3 * 9, 6, bias=False),
        nn.Linear(6, 2, bias=False),
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= torch.rand(parameter.shape) < 0.3
            parameter.abs_()
    x = torch.rand(3, 2, 5, 5, dtype=torch.float64)
    found = wiring(layers_of(net))
    assert effective_density(found) > 0
    net(x).sum().backward()
    for name, parameter in net.named_parameters():
        # All is positive: a weight on a path, and no other, has a share in the output.
        assert found[name].effective == int((parameter.grad * parameter).count_nonzero())
    assert any(one.effective < one.live for one in found.values())
