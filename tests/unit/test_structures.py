"""Structures: units against brute-force loops, and against what the modules compute."""

import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_sparsity.core.filters import candidates
from lightning_sparsity.structures import NM, Block, Columns, Layout, Rows, Structure, Unstructured

MODULES = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "conv3d": lambda: nn.Conv3d(4, 2, (2, 1, 3)),
    "grouped": lambda: nn.Conv2d(8, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 2, (2, 3), stride=2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 4, (1, 2, 2)),
    "grouped transposed": lambda: nn.ConvTranspose2d(8, 4, 3, groups=2),
    "depthwise transposed": lambda: nn.ConvTranspose1d(4, 8, 3, groups=4),
}
TILED = [Rows(), Columns(), Block(1, 1), Block(2, 2), Block(1, 2), Block(2, 1)]


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


def layout_of(module):
    return next(c for c in candidates(module) if c.name == "weight").layout


def place(module, group, output, inputs):
    """First two indices of the weight between an output and an input of a group."""
    if "Transpose" in type(module).__name__:
        return group * (module.in_channels // module.groups) + inputs, output
    groups = getattr(module, "groups", 1)
    return group * (module.weight.shape[0] // groups) + output, inputs


def extent(module):
    """Groups, outputs and inputs of one group, from the attributes of the module."""
    if isinstance(module, nn.Linear):
        return 1, module.out_features, module.in_features
    return module.groups, module.out_channels // module.groups, module.in_channels // module.groups


def units_of(module, structure):
    """The flat indices of every unit, by plain loops, in canonical order."""
    groups, outputs, inputs = extent(module)
    shape = tuple(module.weight.shape)
    kernel = list(itertools.product(*map(range, shape[2:])))
    high, wide = {Rows: (1, inputs), Columns: (outputs, 1)}.get(type(structure), (None, None))
    if isinstance(structure, Block):
        high, wide = structure.rows, structure.columns
    slices = [[where] for where in kernel] if isinstance(structure, Block) else [kernel]
    units = []
    for group in range(groups):
        for top in range(0, outputs, high):
            for left in range(0, inputs, wide):
                for positions in slices:
                    unit = []
                    for o, i in itertools.product(range(high), range(wide)):
                        pair = place(module, group, top + o, left + i)
                        unit += [flat(shape, (*pair, *where)) for where in positions]
                    units.append(unit)
    return units


def flat(shape, index):
    place = 0
    for size, i in zip(shape, index, strict=True):
        place = place * size + i
    return place


def fits(structure, module):
    """Whether the structure divides the weight, which its own check must say alike."""
    _, outputs, inputs = extent(module)
    high = getattr(structure, "rows", 1)
    wide = getattr(structure, "columns", getattr(structure, "m", 1))
    possible = outputs % high == 0 and inputs % wide == 0
    shape, layout = tuple(module.weight.shape), layout_of(module)
    if possible:
        structure.check(shape, layout)
    else:
        with pytest.raises(ValueError, match="divide"):
            structure.check(shape, layout)
    return possible


# Units that are rectangles


@pytest.mark.parametrize("structure", TILED, ids=repr)
def test_units_against_loops(module, structure):
    weight, layout = module.weight.detach().double(), layout_of(module)
    if not fits(structure, module):
        return
    units = units_of(module, structure)
    shape = tuple(weight.shape)
    assert structure.size(shape, layout) == len(units)
    assert sorted(i for unit in units for i in unit) == list(range(weight.numel()))

    sums = [sum(weight.flatten()[unit].tolist()) for unit in units]
    torch.testing.assert_close(
        structure.reduce(weight, layout), torch.tensor(sums, dtype=torch.float64)
    )

    live = torch.rand(len(units), generator=torch.Generator().manual_seed(1)) < 0.5
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    for unit, alive in zip(units, live.tolist(), strict=True):
        mask[unit] = alive
    mask = mask.view(shape)
    assert torch.equal(structure.expand(live, shape, layout), mask)
    assert torch.equal(structure.live(mask, layout), live)


@pytest.mark.parametrize("structure", [Unstructured(), *TILED], ids=repr)
def test_expanding_and_asking_is_a_round_trip(module, structure):
    weight, layout = module.weight, layout_of(module)
    if not fits(structure, module):
        return
    shape = tuple(weight.shape)
    size = structure.size(shape, layout)
    live = torch.arange(size) % 3 == 0
    mask = structure.expand(live, shape, layout)
    assert mask.shape == weight.shape
    assert mask.is_contiguous()
    assert torch.equal(structure.live(mask, layout), live)
    per_unit = weight.numel() // size
    assert torch.equal(structure.reduce(mask.long(), layout), live.long() * per_unit)
    numbers = torch.arange(size, dtype=torch.float64)
    spread = structure.expand(numbers, shape, layout)
    assert torch.equal(structure.reduce(spread, layout), numbers * per_unit)


def test_channels_last_makes_no_difference():
    layout = Layout()
    weight = torch.randint(-9, 10, (4, 6, 3, 3)).float()  # sums are exact in any order
    last = weight.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for structure in (Unstructured(), Rows(), Columns(), Block(2, 3)):
        assert torch.equal(structure.reduce(last, layout), structure.reduce(weight, layout))
        assert torch.equal(structure.live(last > 0, layout), structure.live(weight > 0, layout))
    assert torch.equal(NM(2, 3).group(last, layout), NM(2, 3).group(weight, layout))


def test_unstructured_units_are_the_weights_in_row_major_order():
    structure, layout = Unstructured(), Layout()
    weight = torch.arange(6.0).view(2, 3)
    assert structure.size((2, 3), layout) == 6
    assert structure.reduce(weight, layout).tolist() == [0, 1, 2, 3, 4, 5]
    assert structure.live(weight > 2, layout).tolist() == [False] * 3 + [True] * 3


def test_a_vector_counts_as_a_column():
    assert Rows().size((5,), Layout()) == 5
    assert Columns().size((5,), Layout()) == 1
    assert Rows().reduce(torch.arange(5.0), Layout()).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(Columns().expand(torch.tensor([True]), (5,), Layout()), torch.ones(5).bool())


# What a row and a column are, by running the module


def without(module, structure, unit):
    """Set one unit of the module's weight to zero."""
    layout, shape = layout_of(module), tuple(module.weight.shape)
    live = torch.ones(structure.size(shape, layout), dtype=torch.bool)
    live[unit] = False
    with torch.no_grad():
        module.weight.mul_(structure.expand(live, shape, layout))


def pictures(module):
    if isinstance(module, nn.Linear):
        return torch.randn(3, module.in_features)
    sides = module.weight.ndim - 2
    return torch.randn(3, module.in_channels, *(4,) * sides)


def test_a_row_is_an_output_channel(module):
    groups, outputs, _ = extent(module)
    x = pictures(module)
    whole = module(x).detach().clone()
    assert Rows().size(tuple(module.weight.shape), layout_of(module)) == groups * outputs
    for unit in {0, groups * outputs // 2, groups * outputs - 1}:
        copy = pickle.loads(pickle.dumps(module))
        without(copy, Rows(), unit)
        pruned = copy(x).detach()
        assert torch.equal(pruned[:, unit], copy.bias[unit].detach().expand_as(pruned[:, unit]))
        others = [channel for channel in range(groups * outputs) if channel != unit]
        assert torch.equal(pruned[:, others], whole[:, others])


def test_a_column_is_an_input_channel(module):
    groups, _, inputs = extent(module)
    x = pictures(module)
    assert Columns().size(tuple(module.weight.shape), layout_of(module)) == groups * inputs
    for unit in {0, groups * inputs // 2, groups * inputs - 1}:
        copy = pickle.loads(pickle.dumps(module))
        without(copy, Columns(), unit)
        other = x.clone()
        other[:, unit] += 1.0
        assert torch.equal(copy(other), copy(x))
        assert not torch.equal(module(other), module(x))
        silent = x.clone()
        silent[:, unit] = 0.0
        torch.testing.assert_close(copy(x), module(silent))


# N:M


@pytest.mark.parametrize("m", [1, 2, 4])
def test_groups_run_along_the_inputs(module, m):
    weight, layout, structure = module.weight.detach(), layout_of(module), NM(1, m)
    groups, outputs, inputs = extent(module)
    if not fits(structure, module):
        return
    shape = tuple(weight.shape)
    rows = []
    for group, output in itertools.product(range(groups), range(outputs)):
        for where in itertools.product(*map(range, shape[2:])):
            for left in range(0, inputs, m):
                run = [(*place(module, group, output, left + i), *where) for i in range(m)]
                rows.append([float(weight[index]) for index in run])
    assert structure.group(weight, layout).tolist() == rows
    assert structure.size(shape, layout) == weight.numel()


@pytest.mark.parametrize("m", [1, 2, 4])
def test_ungrouping_undoes_grouping(module, m):
    weight, layout, structure = module.weight.detach(), layout_of(module), NM(1, m)
    if not fits(structure, module):
        return
    back = structure.ungroup(structure.group(weight, layout), tuple(weight.shape), layout)
    assert torch.equal(back, weight)
    assert back.is_contiguous()


def test_density_of_a_pattern():
    assert NM(2, 4).density == 0.5
    assert NM(1, 16).density == 1 / 16


# Checks


@pytest.mark.parametrize(
    ("structure", "shape", "layout", "message"),
    [
        (Block(4, 1), (6, 4), Layout(), r"Block\(rows=4, columns=1\).*6 outputs x 4 inputs"),
        (Block(1, 3), (6, 4), Layout(), "6 outputs x 4 inputs"),
        (Block(4, 1), (6, 4, 3, 3), Layout(), "6 outputs x 4 inputs"),
        # 8 outputs in 4 groups: 2 in each
        (Block(4, 1), (8, 4, 3), Layout(groups=4), "2 outputs x 4 inputs"),
        (Block(1, 4), (6, 4), Layout(transposed=True), "4 outputs x 6 inputs"),
        (NM(2, 4), (8, 6), Layout(), r"NM\(n=2, m=4\): m does not divide 6 inputs"),
        (NM(2, 4), (8, 1, 3, 3), Layout(groups=8), "m does not divide 1 inputs"),
        (NM(2, 4), (6, 8), Layout(transposed=True), "m does not divide 6 inputs"),
    ],
)
def test_what_cannot_be_cut(structure, shape, layout, message):
    with pytest.raises(ValueError, match=f"{message}.*exclude="):
        structure.check(shape, layout)


@pytest.mark.parametrize(
    ("structure", "shape", "layout"),
    [
        (Block(2, 3), (6, 3), Layout()),
        (Block(2, 4), (8, 4, 3), Layout(groups=4)),
        (Block(4, 6), (6, 4), Layout(transposed=True)),
        (NM(2, 4), (3, 8, 5, 5), Layout()),
        (NM(2, 3), (6, 4), Layout(groups=2, transposed=True)),
        (Rows(), (3, 5), Layout()),
        (Columns(), (3, 5, 7), Layout()),
        (Unstructured(), (1,), Layout()),
    ],
)
def test_what_can_be_cut(structure, shape, layout):
    structure.check(shape, layout)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 2), (1.5, 2), ("2", 2)])
def test_block_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="positive integers"):
        Block(*sizes)


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (-1, 4), (1, 0), (1.0, 4), (2, 4.0)])
def test_patterns_are_checked(pattern):
    with pytest.raises(ValueError, match=r"1 <= n <= m, such as NM\(2, 4\)"):
        NM(*pattern)


@pytest.mark.parametrize("structure", [Unstructured(), Rows(), Columns(), Block(2, 3), NM(2, 4)])
def test_structures_pickle_compare_and_repeat_the_call(structure):
    assert pickle.loads(pickle.dumps(structure)) == structure
    assert eval(repr(structure)) == structure
    assert len({structure, pickle.loads(pickle.dumps(structure))}) == 1
    assert isinstance(structure, Structure)


def test_canonical_and_restore_are_inverse():
    shape = (6, 4, 3, 2)
    weight = torch.arange(math.prod(shape)).view(shape)
    for layout in (Layout(), Layout(groups=3), Layout(2, True), Layout(1, True)):
        view = layout.canonical(weight)
        assert view.shape[0] == layout.groups
        assert view.shape[3] == 6
        assert torch.equal(layout.restore(view, shape), weight)
