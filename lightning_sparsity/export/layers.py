"""Layers that hold only the live weights of a linear or convolutional layer, for inference."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_sparsity.export import products

SIDES = (64, 32, 16, 8, 4)
FILL = 0.75

Dense = nn.Linear | _ConvNd


class LayoutError(ValueError):
    """A layer cannot have the layout asked for; the message says why."""


class Compressed(nn.Module):
    """Base of the layers below: no gradients, no dense weight.

    It has the attributes of the dense layer, such as ``in_features``.

    Args:
        layer: The layer in whose place this one stands.
        layout: How it holds the weight.
    """

    def __init__(self, layer: Dense, layout: str) -> None:
        super().__init__()
        own = {key: value for key, value in vars(layer).items() if key not in vars(self)}
        vars(self).update(copy.deepcopy(own))  # in_features and the like
        self.layout = layout
        self._shape = tuple(layer.weight.shape)
        self._kind = layer.extra_repr()
        self.bias = None if layer.bias is None else _frozen(layer.bias.detach().clone())
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every reading: for code that asks for it, and slow."""
        return self._dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """The dense layer's outputs, to rounding; contiguous.

        Under autocast the product is computed in the dtype of the values, and returned in
        that of autocast.

        Raises:
            RuntimeError: If ``x`` wants a gradient.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: the input wants a gradient, and compressed layers have "
                "none; use torch.no_grad(), or the model that was compressed."
            )
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._compute(x)
        with torch.autocast(kind, enabled=False):
            out = self._compute(x.to(self._values().dtype))
        return out.to(torch.get_autocast_dtype(kind))

    @property
    def weight_bytes(self) -> int:
        """Of all that stands for the weight."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(t.numel() * t.element_size() for t in tensors if t is not self.bias)

    def extra_repr(self) -> str:
        """As that of the dense layer, and the layout."""
        return f"{self._kind}, layout={self.layout}"

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _dense_weight(self) -> Tensor:
        raise NotImplementedError

    def _values(self) -> Tensor:
        raise NotImplementedError


class _Indexed(Compressed):
    """A layer over a sparse matrix; its tensors are those of ``products``.

    ``width`` is that of the matrix, its rows are the output units.
    """

    crow: Tensor
    columns: Tensor
    values: nn.Parameter

    def __init__(self, layer: Dense, matrix: Tensor, layout: str) -> None:
        super().__init__(layer, layout)
        self.width = matrix.shape[1]
        side = block_side(matrix) if layout == "bsr" else 1
        if side == 0:
            raise LayoutError(
                f"its zeros do not leave square blocks, {SIDES[-1]} x {SIDES[-1]} or larger, that "
                "are live as a whole"
            )
        blocks, places = _cut(matrix, side)
        tall = matrix.shape[0] // side
        counts = places[:, 0].bincount(minlength=tall)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if max(len(places), self.width) >= 2**31:
            raise LayoutError("it has more live weights than 32-bit indices can count")
        self.register_buffer("crow", crow.int())
        self.register_buffer("columns", places[:, 1].int())
        self.values = _frozen(blocks.flatten() if layout == "csr" else blocks)

    def _values(self) -> Tensor:
        return self.values

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        values, columns = (state_dict.get(prefix + key) for key in ("values", "columns"))
        if values is not None and columns is not None and len(values) != len(self.values):
            self.values = _frozen(self.values.new_empty(len(values), *self.values.shape[1:]))
            self.columns = self.columns.new_empty(len(columns))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _dense_matrix(self) -> Tensor:
        side = self.values.shape[1] if self.values.dim() == 3 else 1
        tall = len(self.crow) - 1
        rows = torch.arange(tall, device=self.crow.device).repeat_interleave(self.crow.diff())
        out = self.values.new_zeros(tall, self.width // side, side, side)
        out[rows, self.columns] = self.values.view(-1, side, side)
        return out.transpose(1, 2).reshape(tall * side, self.width)


class CompressedLinear(_Indexed):
    """A linear layer by its live weights. Made by :func:`lightning_sparsity.compress`.

    Args:
        layer: The linear layer, which is left alone.
        layout: ``"csr"`` or ``"bsr"``.

    Raises:
        LayoutError: If the layout does not fit the zeros.

    Example:
        >>> dense = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = dense.weight.copy_(torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]))
        >>> layer = CompressedLinear(dense, "csr")
        >>> layer.values, layer.columns
        (Parameter containing:
        tensor([5.]), tensor([2], dtype=torch.int32))
        >>> torch.equal(layer.weight, dense.weight)
        True
    """

    def __init__(self, layer: nn.Linear, layout: str) -> None:
        super().__init__(layer, layer.weight.detach(), layout)

    def _dense_weight(self) -> Tensor:
        return self._dense_matrix()

    def _compute(self, x: Tensor) -> Tensor:
        product: Any = products.linear
        if torch.compiler.is_compiling():
            product = torch.ops.lightning_sparsity.linear
        out: Tensor = product(x, self.crow, self.columns, self.values, self.bias, self.width)
        return out


class CompressedConv(_Indexed):
    """A convolution by its live weights: a product with the columns that its kernel sees.

    The columns are made for as many samples at a time as fit in a cache.

    Args:
        layer: A convolution of any dimension, which is left alone.
        layout: ``"csr"`` or ``"bsr"``.

    Raises:
        LayoutError: If the layout does not fit the zeros.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, layer: _ConvNd, layout: str) -> None:
        super().__init__(layer, _unfolded(layer.weight.detach(), layer.groups), layout)

    def _dense_weight(self) -> Tensor:
        return _folded(self._dense_matrix(), self._shape, self.groups)

    def _compute(self, x: Tensor) -> Tensor:
        product: Any = products.convolution
        if torch.compiler.is_compiling():
            product = torch.ops.lightning_sparsity.convolution
        batched = x.dim() == len(self._shape)
        out: Tensor = product(
            x if batched else x.unsqueeze(0),
            self.crow,
            self.columns,
            self.values,
            self.bias,
            list(self.kernel_size),
            list(self.stride),
            list(self.dilation),
            list(self._reversed_padding_repeated_twice),
            "constant" if self.padding_mode == "zeros" else self.padding_mode,
        )
        return out if batched else out.squeeze(0)


class SemiStructuredLinear(Compressed):
    """A linear layer with two live weights in four, for the sparse tensor cores of NVIDIA GPUs.

    Holds what ``torch.sparse.to_sparse_semi_structured`` makes. That is specific to the GPU and
    to the library that torch uses there.

    Args:
        layer: The linear layer, on a CUDA device, in half precision; left alone.

    Raises:
        LayoutError: If the zeros, the device, the dtype or the shape do not allow it.
    """

    packed: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, "semi_structured")
        weight = layer.weight.detach()
        crowded = groups_above_two(weight)
        if crowded:
            raise LayoutError(f"{crowded}; NM(2, 4) keeps two")
        if weight.device.type != "cuda":
            raise LayoutError(f"it needs a CUDA device, and the weight is on {weight.device}")
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise LayoutError(f"it needs half precision, and the weight is {weight.dtype}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            sparse: Any = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        names, self._rest = sparse.__tensor_flatten__()
        self._type = type(sparse)
        self._names = list(names)
        for name in names:
            self.register_buffer(name, getattr(sparse, name))

    def _values(self) -> Tensor:
        return self.packed

    def _sparse(self) -> Tensor:
        parts = {name: getattr(self, name) for name in self._names}
        size = torch.Size(self._shape)
        made: Tensor = self._type.__tensor_unflatten__(parts, self._rest, size, (size[1], 1))
        return made

    def _dense_weight(self) -> Tensor:
        return self._sparse().to_dense()

    def _compute(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._sparse(), self.bias)


def made(layer: Dense, layout: str) -> Compressed:
    """The layer in another layout.

    Raises:
        LayoutError: If that cannot be.
    """
    if layout == "semi_structured":
        if not isinstance(layer, nn.Linear):
            raise LayoutError("it is for linear layers only")
        return SemiStructuredLinear(layer)
    if isinstance(layer, nn.Linear):
        return CompressedLinear(layer, layout)
    return CompressedConv(layer, layout)


def groups_above_two(weight: Tensor) -> str:
    """What keeps a weight from the 2:4 pattern along its inputs; empty if nothing does.

    Args:
        weight: ``(out, in, ...)``.

    Example:
        >>> groups_above_two(torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
        '1 of 2 groups of 4 inputs have more than 2 live weights'
    """
    rows = weight.movedim(1, -1)
    if rows.shape[-1] % 4:
        return f"its {rows.shape[-1]} inputs are no multiple of 4"
    live = (rows.reshape(-1, 4) != 0).sum(1)
    crowded = int((live > 2).sum())
    return f"{crowded:,} of {len(live):,} groups of 4 inputs have more than 2 live weights" * (
        crowded > 0
    )


def block_side(matrix: Tensor) -> int:
    """Side of the largest square blocks that are live or dead as a whole; 0 if there are none.

    A few zeros inside live blocks do not matter: at least three quarters must be live.

    Example:
        >>> tiles = torch.eye(2).repeat_interleave(8, 0).repeat_interleave(8, 1)
        >>> block_side(tiles), block_side(torch.eye(16))
        (8, 0)
    """
    live = matrix != 0
    total = int(live.sum())
    for side in SIDES:
        if matrix.shape[0] % side or matrix.shape[1] % side:
            continue
        tiles = live.view(matrix.shape[0] // side, side, -1, side)
        if total >= FILL * side**2 * int(tiles.amax((1, 3)).sum()):
            return side
    return 0


def _cut(matrix: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The live blocks ``(n, side, side)`` and where they are ``(n, 2)``, row by row."""
    tiles = matrix.reshape(matrix.shape[0] // side, side, matrix.shape[1] // side, side)
    tiles = tiles.transpose(1, 2)
    places = (tiles != 0).flatten(2).any(2).nonzero()
    return tiles[places[:, 0], places[:, 1]], places


def _unfolded(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution as a matrix ``(out, kernel * in)``, zero between groups."""
    out, each = weight.shape[:2]
    places = math.prod(weight.shape[2:])
    matrix = weight.new_zeros(groups, out // groups, places, groups, each)
    for group, rows in enumerate(weight.reshape(groups, out // groups, each, places)):
        matrix[group, :, :, group] = rows.transpose(1, 2)
    return matrix.reshape(out, -1)


def _folded(matrix: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """Undo :func:`_unfolded`."""
    out, each = shape[:2]
    parts = matrix.view(groups, out // groups, math.prod(shape[2:]), groups, each)
    rows = torch.stack([parts[group, :, :, group] for group in range(groups)])
    return rows.transpose(2, 3).reshape(shape)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
