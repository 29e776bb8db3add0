"""Products with a sparse matrix, given as plain tensors, as operations that torch can export.

A *sparse matrix* is three tensors: ``crow`` ``(block rows + 1,)`` int32, ``columns`` int32, one
entry per block, and ``values``, ``(live,)`` for single weights (CSR) or ``(blocks, side, side)``
for square blocks (BSR); and its width.

``torch.export`` and ``torch.compile`` cannot read torch's sparse tensors. For them each product
is one custom operation, ``lightning_sparsity::linear`` and ``lightning_sparsity::convolution``;
whoever loads an exported program imports this module first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 1 << 18
"""Most entries of the columns of a convolution that are made at a time: what a cache holds."""


def linear(
    x: Tensor, crow: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, width: int
) -> Tensor:
    """``x @ matrix.T + bias``.

    Args:
        x: ``(..., width)``.
        crow: Of the sparse matrix.
        columns: Of the sparse matrix.
        values: Of the sparse matrix, dtype of ``x``.
        bias: ``(height,)`` or None.
        width: Of the sparse matrix.

    Returns:
        ``(..., height)``, contiguous.

    Example:
        >>> crow, columns = torch.tensor([[0, 1, 1], [2, 0, 0]], dtype=torch.int32)
        >>> linear(torch.tensor([[1.0, 2.0, 3.0]]), crow, columns[:1], torch.ones(1), None, 3)
        tensor([[3., 0.]])
    """
    matrix = _matrix(crow, columns, values, width)
    rows = x.reshape(-1, width)
    if len(rows) == 1:
        out = matrix.mv(rows[0]) if bias is None else torch.addmv(bias, matrix, rows[0])
    else:
        out = _times(matrix, rows.T.contiguous(), bias).T.contiguous()
    return out.reshape(*x.shape[:-1], matrix.shape[0])


def convolution(
    x: Tensor,
    crow: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
) -> Tensor:
    """The matrix times the columns that a convolution sees, sample by sample.

    Args:
        x: ``(batch, channels, *sizes)``, one to three sizes.
        crow: Of the sparse matrix.
        columns: Of the sparse matrix, whose columns are ``(*kernel, channels)``, flat.
        values: Of the sparse matrix, dtype of ``x``.
        bias: ``(height,)`` or None.
        kernel: Its sizes.
        stride: Per size.
        dilation: Per size.
        padding: As ``torch.nn.functional.pad`` wants it, the last size first.
        padding_mode: As there.

    Returns:
        ``(batch, height, *sizes)``, contiguous.
    """
    matrix = _matrix(crow, columns, values, x.shape[1] * math.prod(kernel))
    height, width = matrix.shape
    sizes = _out_sizes(x.shape[2:], kernel, stride, dilation, padding)
    places = math.prod(sizes)
    out = x.new_empty(len(x), height, *sizes)
    at_a_time = max(1, CHUNK // max(1, width * places))
    for part, into in zip(x.split(at_a_time), out.split(at_a_time), strict=True):
        padded = pad(part, list(padding), padding_mode) if any(padding) else part
        seen = _windows(padded, kernel, stride, dilation, sizes).reshape(width, -1)
        product = _times(matrix, seen, bias).view(height, len(part), *sizes)
        into.copy_(product.transpose(0, 1))
    return out


def _times(matrix: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``matrix @ right``, plus the bias in every column."""
    if bias is None:
        return matrix @ right
    return torch.addmm(bias.unsqueeze(1), matrix, right)


def _matrix(crow: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    _be_quiet()
    if values.dim() == 1:
        size = (len(crow) - 1, width)
        return torch.sparse_csr_tensor(crow, columns, values, size, check_invariants=False)
    size = ((len(crow) - 1) * values.shape[1], width)
    return torch.sparse_bsr_tensor(crow, columns, values, size, check_invariants=False)


@cache
def _be_quiet() -> None:
    """Have torch say now, unheard, what it says once: that such tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
        torch.zeros(1, 1).to_sparse_bsr((1, 1))


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """A view of what each place of the kernel sees, ``(*kernel, channels, batch, *sizes)``."""
    batch, channel, *steps = x.stride()
    return x.as_strided(
        (*kernel, x.shape[1], x.shape[0], *sizes),
        (
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            channel,
            batch,
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
    )


def _out_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> list[int]:
    last_first = [*zip(padding[::2], padding[1::2], strict=True)]
    return [
        (n + sum(both) - d * (k - 1) - 1) // s + 1
        for n, k, s, d, both in zip(
            sizes, kernel, stride, dilation, reversed(last_first), strict=True
        )
    ]


_linear = torch.library.custom_op(
    "lightning_sparsity::linear",
    linear,
    mutates_args=(),
    schema="(Tensor x, Tensor crow, Tensor columns, Tensor values, Tensor? bias, SymInt width)"
    " -> Tensor",
)
_convolution = torch.library.custom_op(
    "lightning_sparsity::convolution",
    convolution,
    mutates_args=(),
    schema="(Tensor x, Tensor crow, Tensor columns, Tensor values, Tensor? bias, SymInt[] kernel,"
    " SymInt[] stride, SymInt[] dilation, SymInt[] padding, str padding_mode) -> Tensor",
)


@_linear.register_fake
def _(
    x: Tensor, crow: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, width: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _height(crow, values))


@_convolution.register_fake
def _(
    x: Tensor,
    crow: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
) -> Tensor:
    sizes = _out_sizes(x.shape[2:], kernel, stride, dilation, padding)
    return x.new_empty(x.shape[0], _height(crow, values), *sizes)


def _height(crow: Tensor, values: Tensor) -> int:
    return (crow.shape[0] - 1) * (values.shape[1] if values.dim() == 3 else 1)
