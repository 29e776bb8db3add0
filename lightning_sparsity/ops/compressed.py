"""Compressed matrices: a weight as the values of its live entries, and products with it.

The values lie in row-major order, in one vector. A :class:`Pattern` says where: in compressed
rows, and as a permutation in compressed columns, for products with the transpose. Activations
go in and come out transposed in memory, ``(features, batch)``, the order in which torch's
sparse products are fastest: a chain of such layers and elementwise functions copies nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sparsity.ops import native

DTYPES = (torch.float32, torch.float64)
"""Dtypes that torch multiplies compressed matrices of, on every device."""

_FEW = 4
"""Samples from which the native kernels are faster: they read whole vectors of them."""

Record = Callable[[Tensor, Tensor], None]
"""Is shown input ``(columns, batch)`` and output gradient ``(rows, batch)`` of a product."""

Kernels = Literal["torch", "native"]
"""What computes: sparse products of torch, or kernels of :mod:`lightning_sparsity.ops.native`."""


class Pattern:
    """Where the live entries of a matrix are.

    Args:
        mask: ``(rows, columns)`` bool.

    Raises:
        ValueError: If the mask has another number of dimensions, or more live entries than an
            int32 counts.

    Attributes:
        shape: ``(rows, columns)``.
        nnz: Number of live entries.
        starts: Where each row begins, ``(rows + 1,)`` int32.
        columns: Column of each entry, row by row, ``(nnz,)`` int32.

    Example:
        >>> pattern = Pattern(torch.tensor([[True, False], [True, True]]))
        >>> pattern.matrix(torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[1., 0.],
                [2., 3.]])
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim != 2:
            raise ValueError(f"mask of shape {tuple(mask.shape)}: a pattern has rows and columns.")
        _silence_beta_warning()
        self.shape = (mask.shape[0], mask.shape[1])
        self.starts, self.columns = _compress(mask)
        self.nnz = len(self.columns)
        self._transposed: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def positions(self) -> Tensor:
        """Flat row-major index of each entry, ``(nnz,)`` int64."""
        return _rows(self.starts, self.nnz).mul_(self.shape[1]).add_(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors that exist now."""
        tensors = [self.starts, self.columns, *(self._transposed or ())]
        return sum(tensor.nbytes for tensor in tensors)

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with these values, ``(nnz,)``, in torch's CSR layout; shares memory."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, values, self.shape, check_invariants=False
        )

    def transposed(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`matrix`, in CSR layout; the values are copied."""
        if self._transposed is None:
            self._transposed = self._transpose()
        starts, columns, order = self._transposed
        return torch.sparse_csr_tensor(
            starts, columns, values.index_select(0, order), self.shape[::-1], check_invariants=False
        )

    def _transpose(self) -> tuple[Tensor, Tensor, Tensor]:
        # A stable sort by column keeps the rows of each column in order.
        columns, order = self.columns.sort(stable=True)
        rows = _rows(self.starts, self.nnz)[order]
        return _starts(columns, self.shape[1]), rows.to(torch.int32), order.to(torch.int32)

    def scatter(self, values: Tensor) -> Tensor:
        """The dense matrix with these values, ``(rows, columns)``."""
        return spread(values, self.positions, self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """The values of a dense matrix ``(rows, columns)`` at the live entries, ``(nnz,)``."""
        return dense.reshape(-1).index_select(0, self.positions)


def spread(values: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense tensor with these values at these flat row-major positions, zero elsewhere.

    Example:
        >>> spread(torch.tensor([5.0, 6.0]), torch.tensor([1, 2]), (2, 2))
        tensor([[0., 5.],
                [6., 0.]])
    """
    dense = values.new_zeros(tuple(shape))
    dense.view(-1).index_copy_(0, positions, values)
    return dense


def product(
    inputs: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    record: Record | None = None,
    kernels: Kernels = "torch",
) -> Tensor:
    """``inputs @ matrix.T + bias``, differentiable once by inputs, values and bias.

    Computes in the dtype of the values. The gradient of the values is sampled at the live
    entries; nothing as large as the dense matrix is made.

    Args:
        inputs: ``(batch, columns)``; fastest if its transpose is contiguous.
        values: ``(nnz,)``, float32 or float64.
        pattern: Where the values are in the matrix ``(rows, columns)``.
        bias: ``(rows,)`` or None.
        record: Called in the backward pass, if the values need a gradient.
        kernels: "torch", or "native" for those that are compiled on first use; CPU only.

    Returns:
        ``(batch, rows)``, a view whose transpose is contiguous.

    Raises:
        ValueError: If the inputs have another shape, ``kernels`` is neither, or native ones are
            asked for on another device.
        RuntimeError: If native kernels cannot be used on this machine.

    Example:
        >>> pattern = Pattern(torch.tensor([[True, False], [True, True]]))
        >>> product(torch.tensor([[1.0, 10.0]]), torch.tensor([1.0, 2.0, 3.0]), pattern)
        tensor([[ 1., 32.]])
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"product(kernels={kernels!r}): must be 'torch' or 'native'.")
    if inputs.ndim != 2 or inputs.shape[1] != pattern.shape[1]:
        raise ValueError(
            f"inputs of shape {tuple(inputs.shape)}: must be (batch, {pattern.shape[1]})."
        )
    result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        inputs.to(values.dtype), values, bias, pattern, record, kernels
    )
    return result.t()


class _Product(torch.autograd.Function):
    """The transpose of a product, ``(rows, batch)``."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        record: Record | None,
        kernels: Kernels,
    ) -> Tensor:
        across = inputs.t().contiguous()  # (columns, batch)
        ctx.save_for_backward(across, values)
        ctx.pattern, ctx.record, ctx.kernels = pattern, record, kernels
        shape = (pattern.shape[0], inputs.shape[0])
        if not pattern.nnz or not inputs.numel():
            out = across.new_zeros(shape)
            return out if bias is None else out + bias[:, None]
        bias = None if bias is None else bias.to(values.dtype)
        return _multiply(pattern.matrix(values.detach()), across, bias, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.autocast(grad.device.type, enabled=False):
            return _Product._backward(ctx, grad.contiguous())

    @staticmethod
    def _backward(ctx: Any, slopes: Tensor) -> Any:
        across, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        of_inputs = of_values = of_bias = None
        empty = not pattern.nnz or not across.numel() or not slopes.numel()
        if ctx.needs_input_grad[0]:
            if empty:
                of_inputs = torch.zeros_like(across).t()
            else:
                of_inputs = _multiply(pattern.transposed(values), slopes, None, ctx.kernels).t()
        if ctx.needs_input_grad[1]:
            if ctx.record is not None:
                ctx.record(across.detach(), slopes.detach())
            if empty:
                of_values = torch.zeros_like(values)
            else:
                of_values = _sample(pattern.matrix(values), slopes, across, ctx.kernels)
        if ctx.needs_input_grad[2]:
            of_bias = slopes.sum(1)
        return of_inputs, of_values, of_bias, None, None, None


def _multiply(matrix: Tensor, across: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
    """``matrix @ across + bias[:, None]``."""
    if kernels == "native" and across.shape[1] >= _FEW:
        return native.multiply(matrix, across, None if bias is None else bias.contiguous())
    if bias is None:
        return matrix @ across
    shape = (matrix.shape[0], across.shape[1])
    return torch.addmm(bias[:, None].expand(shape), matrix, across)


def _sample(matrix: Tensor, slopes: Tensor, across: Tensor, kernels: Kernels) -> Tensor:
    """``slopes @ across.T`` at the entries of the matrix."""
    if kernels == "native":
        return native.sample(matrix, slopes, across)
    starts, columns = matrix.crow_indices(), matrix.col_indices()
    zeros = torch.zeros_like(matrix.values())
    out = torch.sparse_csr_tensor(starts, columns, zeros, matrix.shape, check_invariants=False)
    torch.sparse.sampled_addmm(out, slopes, across.t(), out=out)
    return out.values()


@cache
def _silence_beta_warning() -> None:
    """Have torch say here, where nobody hears it, what it says once of all CSR tensors."""
    none = torch.zeros(1, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(none, none[:0], torch.zeros(0), (0, 1))


def _compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row starts and column indices of a bool matrix."""
    live = mask.reshape(-1).nonzero().view(-1)
    if len(live) >= 2**31:
        raise ValueError(f"{len(live)} live entries: int32 indices count to {2**31 - 1}.")
    rows, columns = mask.shape
    begins = torch.arange(rows + 1, device=mask.device).mul_(columns)
    starts = torch.searchsorted(live, begins, out_int32=True)
    return starts, live.remainder_(max(columns, 1)).to(torch.int32)


def _starts(sorted_indices: Tensor, size: int) -> Tensor:
    """Where each of ``size`` indices begins in a sorted list of them."""
    every = torch.arange(size + 1, dtype=sorted_indices.dtype, device=sorted_indices.device)
    return torch.searchsorted(sorted_indices, every, out_int32=True)


def _rows(starts: Tensor, nnz: int) -> Tensor:
    """Row of each entry, ``(nnz,)`` int64."""
    counts = starts.diff()
    every = torch.arange(len(counts), device=starts.device)
    return every.repeat_interleave(counts, output_size=nnz)
