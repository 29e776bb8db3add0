"""Random matrices, masks and layers: compressed storage is dense storage in another form."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sparsity import GMP, SET, RigL, SparseCompute
from lightning_sparsity.core.compressed import CompressedWeight
from lightning_sparsity.ops.compressed import Pattern, product
from lightning_sparsity.testing import Batches, Result, TinyModel, fit

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)
densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def random_mask(rows: int, columns: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


@given(sizes, sizes, densities, seeds)
def test_patterns_hold_what_lives(rows: int, columns: int, density: float, seed: int) -> None:
    mask = random_mask(rows, columns, density, seed)
    pattern = Pattern(mask)
    assert torch.equal(pattern.positions, mask.view(-1).nonzero().view(-1))
    values = torch.arange(1.0, pattern.nnz + 1)
    dense = pattern.scatter(values)
    assert torch.equal(dense != 0, mask)
    assert torch.equal(pattern.gather(dense), values)
    assert torch.equal(pattern.matrix(values).to_dense(), dense)
    assert torch.equal(pattern.transposed(values).to_dense(), dense.t())
    assert pattern.starts.diff().tolist() == mask.sum(1).tolist()


@given(sizes, sizes, st.integers(0, 5), densities, st.booleans(), seeds)
def test_products_are_dense_products(
    rows: int, columns: int, batch: int, density: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    mask = random_mask(rows, columns, density, seed)
    pattern = Pattern(mask)
    values = torch.randn(pattern.nnz, dtype=torch.float64).requires_grad_()
    inputs = torch.randn(batch, columns, dtype=torch.float64).requires_grad_()
    offset = torch.randn(rows, dtype=torch.float64).requires_grad_() if bias else None
    weight = pattern.scatter(values.detach()).requires_grad_()
    mine = product(inputs, values, pattern, offset)
    theirs = nn.functional.linear(inputs, weight, offset)
    torch.testing.assert_close(mine, theirs)
    slope = torch.randn_like(theirs)
    first = torch.autograd.grad(mine, [inputs, values], slope)
    second = torch.autograd.grad(theirs, [inputs, weight], slope)
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[1], second[1][mask])


@given(sizes, sizes, densities, densities, seeds)
def test_following_is_masking(
    rows: int, columns: int, before: float, after: float, seed: int
) -> None:
    torch.manual_seed(seed)
    old = random_mask(rows, columns, before, seed)
    new = random_mask(rows, columns, after, seed + 1)
    dense = torch.randn(rows, columns) * old
    weight = CompressedWeight(nn.Parameter(dense.clone()), old)
    state = torch.randn(rows, columns) * old
    held = weight.compress(dense), weight.compress(state)
    carried = weight.follow(new)
    assert torch.equal(weight.expand(carried(held[0])), dense * new)
    assert torch.equal(weight.expand(carried(held[1])), state * new)


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    spatial = draw(st.sampled_from([1, 2]))
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d}[spatial]
    channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(spatial))
    padding: Any = draw(st.sampled_from(["valid", "tuple"]))
    if padding == "tuple":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(spatial))
    layer = kind(
        channels,
        outputs,
        kernel,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(spatial)),
        dilation=dilation,
        padding=padding,
        bias=draw(st.booleans()),
    )
    shape = tuple(
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)
    )
    return layer.double(), (draw(st.integers(1, 3)), channels, *shape)


@given(convolutions(), densities, seeds)
def test_convolutions_are_dense_convolutions(
    drawn: tuple[nn.Module, tuple[int, ...]], density: float, seed: int
) -> None:
    dense, shape = drawn
    torch.manual_seed(seed)
    weight = dense._parameters["weight"]
    assert weight is not None
    mask = torch.rand(weight.shape) < density
    weight.data.mul_(mask)
    packed = copy.deepcopy(dense)
    held = packed._parameters["weight"]
    assert held is not None
    compressed = CompressedWeight(held, mask)
    held.data = compressed.compress(held.detach())
    compressed.install([packed])
    inputs = torch.randn(shape, dtype=torch.float64)
    mine, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    out, right = packed(mine), dense(theirs)
    torch.testing.assert_close(out, right)
    slope = torch.randn_like(right)
    out.backward(slope)
    right.backward(slope)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(held.grad, compressed.compress(weight.grad))  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.sampled_from([RigL, SET, GMP]),
    st.floats(0.02, 0.9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([None, 0.05]),
    st.integers(0, 1000),
)
def test_trainings_are_those_of_dense_storage(
    method: Any, density: float, interval: int, accumulate: int, clip: float | None, seed: int
) -> None:
    window = {"update_interval": interval, "update_end": 3, "seed": seed}

    def train(*more: Any) -> Result:
        batches = Batches(10)
        batches._batches = [(x.double(), y) for x, y in batches._batches]
        return fit(
            [method(density, **window), *more],
            lambda: TinyModel().double(),
            data=batches,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
        )

    with warnings.catch_warnings():
        # a short window of a random ramp may be a single update
        warnings.filterwarnings("ignore", ".* goes to its density in a single update")
        dense, packed = train(), train(SparseCompute("csr"))
    assert packed.history == dense.history
    for key, value in dense.weights.items():
        torch.testing.assert_close(packed.weights[key], value, rtol=0, atol=1e-9)
    for a, b in zip(packed.state, dense.state, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
