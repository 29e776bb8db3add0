"""Compressed matrices and products with them, against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from lightning_sparsity.ops.compressed import Pattern, product

MASK = torch.tensor(
    [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool
)


def matrix(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(mask.shape, dtype=dtype) * mask


def values_of(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(int(mask.sum()), dtype=dtype).requires_grad_()


def test_a_pattern_is_the_nonzero_entries_row_by_row() -> None:
    pattern = Pattern(MASK)
    assert pattern.shape == (4, 5)
    assert pattern.nnz == 8
    assert pattern.starts.tolist() == [0, 2, 2, 7, 8]
    assert pattern.columns.tolist() == [0, 2, 0, 1, 2, 3, 4, 3]
    assert pattern.starts.dtype == pattern.columns.dtype == torch.int32
    assert torch.equal(pattern.positions, MASK.view(-1).nonzero().view(-1))


def test_values_go_in_and_out() -> None:
    dense, pattern = matrix(MASK), Pattern(MASK)
    values = pattern.gather(dense)
    assert torch.equal(values, dense[MASK])
    assert torch.equal(pattern.scatter(values), dense)
    assert torch.equal(pattern.matrix(values).to_dense(), dense)
    assert torch.equal(pattern.transposed(values).to_dense(), dense.t())


def test_gathering_reads_what_is_not_contiguous() -> None:
    dense = matrix(MASK.t()).t()
    assert torch.equal(Pattern(MASK).gather(dense), dense[MASK])


def test_the_matrix_shares_memory_with_the_values() -> None:
    values = torch.zeros(8)
    held = Pattern(MASK).matrix(values)
    values.fill_(3)
    assert held.values().eq(3).all()


def test_the_transposed_pattern_is_counted_once_it_is_made() -> None:
    pattern = Pattern(MASK)
    assert pattern.nbytes == 4 * (5 + 8)
    pattern.transposed(torch.zeros(8))
    assert pattern.nbytes == 4 * (5 + 8) + 4 * (6 + 8 + 8)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), ()])
def test_a_pattern_is_of_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        Pattern(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK), torch.zeros_like(MASK)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_products_and_their_gradients(mask: Tensor, bias: bool, across: bool, batch: int) -> None:
    torch.manual_seed(0)
    pattern, values = Pattern(mask), values_of(mask)
    offset = torch.randn(4, dtype=torch.float64).requires_grad_() if bias else None
    inputs = torch.randn(5, batch, dtype=torch.float64).t()
    inputs = (inputs if across else inputs.contiguous()).requires_grad_()
    weight = pattern.scatter(values.detach()).requires_grad_()
    mine = product(inputs, values, pattern, offset)
    theirs = torch.nn.functional.linear(inputs, weight, offset)
    torch.testing.assert_close(mine, theirs)
    slope = torch.randn(batch, 4, dtype=torch.float64)
    leaves = [inputs, values, *([offset] if offset is not None else [])]
    found = torch.autograd.grad(mine, leaves, slope)
    leaves[1] = weight
    right = list(torch.autograd.grad(theirs, leaves, slope))
    right[1] = right[1][mask]
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    offset = torch.randn(4, dtype=torch.float64).requires_grad_()
    assert gradcheck(
        lambda *args: product(args[0], args[1], Pattern(MASK), args[2]),
        (inputs, values_of(MASK), offset),
    )


@pytest.mark.parametrize("needed", ["inputs", "values", "bias"])
def test_only_what_is_asked_for_is_computed(needed: str) -> None:
    leaves = {
        "inputs": torch.randn(3, 5, dtype=torch.float64),
        "values": values_of(MASK).detach(),
        "bias": torch.randn(4, dtype=torch.float64),
    }
    leaves[needed].requires_grad_()
    shown = []
    product(
        leaves["inputs"],
        leaves["values"],
        Pattern(MASK),
        leaves["bias"],
        lambda *both: shown.append(both),
    ).sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]
    assert len(shown) == (needed == "values")


def test_what_is_recorded_gives_the_dense_gradient() -> None:
    inputs = torch.randn(3, 5, dtype=torch.float64)
    weight, values = matrix(MASK).requires_grad_(), values_of(MASK)
    shown: list[tuple[Tensor, Tensor]] = []
    slope = torch.randn(3, 4, dtype=torch.float64)
    product(inputs, values, Pattern(MASK), None, lambda *both: shown.append(both)).backward(slope)
    torch.nn.functional.linear(inputs, weight).backward(slope)
    ((across, slopes),) = shown
    torch.testing.assert_close(slopes @ across.t(), weight.grad)


@pytest.mark.parametrize("features", [5, 1])
def test_what_is_recorded_holds_no_graph(features: int) -> None:
    # inputs whose transpose is contiguous are not copied, and are those of the graph
    first = torch.randn(features, 3, dtype=torch.float64).requires_grad_()
    mask = MASK[:, :features]
    shown: list[Tensor] = []
    product(
        (first * 2).t(), values_of(mask), Pattern(mask), None, lambda *both: shown.extend(both)
    ).sum().backward()
    assert not any(tensor.requires_grad for tensor in shown)


def test_outputs_may_be_changed_in_place() -> None:
    inputs, values = torch.randn(3, 5, dtype=torch.float64), values_of(MASK)
    weight = Pattern(MASK).scatter(values.detach()).requires_grad_()
    product(inputs, values, Pattern(MASK)).relu_().sum().backward()
    torch.nn.functional.linear(inputs, weight).relu().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(values.grad, weight.grad[MASK])


def test_inputs_changed_in_place_are_noticed() -> None:
    inputs = (torch.randn(5, 3, dtype=torch.float64).requires_grad_() * 1).t()
    out = product(inputs, values_of(MASK), Pattern(MASK))
    inputs.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_outputs_lie_transposed() -> None:
    out = product(torch.randn(3, 5), values_of(MASK, torch.float32), Pattern(MASK))
    assert out.t().is_contiguous()


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("held", [torch.float32, torch.float64])
def test_it_computes_in_the_dtype_of_the_values(given: torch.dtype, held: torch.dtype) -> None:
    inputs = torch.randn(3, 5).to(given).requires_grad_()
    values = values_of(MASK, held)
    out = product(inputs, values, Pattern(MASK))
    assert out.dtype == held
    dense = Pattern(MASK).scatter(values.detach())
    torch.testing.assert_close(out, inputs.to(held) @ dense.t())
    out.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.dtype == given


def test_the_backward_pass_of_autocast_computes_in_the_dtype_of_the_values() -> None:
    # manual optimization calls it inside training_step, where autocast is on
    torch.manual_seed(0)
    inputs = torch.randn(3, 5).requires_grad_()
    values = values_of(MASK, torch.float32)
    out = product(inputs, values, Pattern(MASK))
    right = torch.autograd.grad(out.square().sum(), [inputs, values], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out.square().sum(), [inputs, values])
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK)])
@pytest.mark.parametrize("width", [4, 6])
def test_inputs_of_another_width_are_an_error(mask: Tensor, width: int) -> None:
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        product(torch.randn(3, width, dtype=torch.float64), values_of(mask), Pattern(mask))


def test_it_can_be_differentiated_once() -> None:
    inputs = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    out = product(inputs, values_of(MASK), Pattern(MASK)).square().sum()
    (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


def test_nothing_as_large_as_the_matrix_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    largest = max(largest, tensor.numel())
            return out

    mask = torch.rand(64, 64) < 0.05
    pattern, values = Pattern(mask), values_of(mask)
    inputs = torch.randn(4, 64, dtype=torch.float64).requires_grad_()
    with Largest():
        product(inputs, values, pattern).sum().backward()
    assert 0 < largest <= 4 * 64


def test_no_warning_of_torch_is_heard() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pattern(MASK).matrix(torch.zeros(8))
