"""Structures: what one unit of a weight is.

Every weight has a canonical view ``(groups, out, in, kernel)``; a structure cuts that
view. *Units* (:class:`Rows`, :class:`Columns`, :class:`Block`) live or die whole.
*Limits* (:class:`NM`) cap the live weights of each group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_sparsity.core.numbers import settle


@dataclass(frozen=True)
class Layout:
    """Where the output and input units of a weight lie.

    Args:
        groups: Groups of a grouped convolution.
        transposed: True for transposed convolutions, whose weight is
            ``(in, out / groups, *kernel)`` instead of ``(out, in / groups, *kernel)``.
    """

    groups: int = 1
    transposed: bool = False

    def canonical(self, tensor: Tensor) -> Tensor:
        """View ``tensor`` as ``(groups, out, in, kernel)``, sizes per group.

        A weight with one dimension counts as ``(n, 1)``.
        """
        first = tensor.shape[0]
        second = tensor.shape[1] if tensor.ndim > 1 else 1
        kernel = math.prod(tensor.shape[2:])
        view = tensor.reshape(self.groups, first // self.groups, second, kernel)
        return view.transpose(1, 2) if self.transposed else view

    def restore(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`canonical`."""
        return (view.transpose(1, 2) if self.transposed else view).reshape(shape)

    def by_neuron(self, tensor: Tensor) -> Tensor:
        """View ``tensor`` as ``(neurons, inputs * kernel)``: a row for every output unit."""
        view = self.canonical(tensor)
        return view.reshape(-1, view.shape[2] * view.shape[3])

    def from_neurons(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`by_neuron`; contiguous."""
        groups = self.groups
        inputs = shape[0] // groups if self.transposed else math.prod(shape[1:2])
        kernel = math.prod(shape[2:])
        return self.restore(rows.reshape(groups, -1, inputs, kernel), shape).contiguous()


class Structure:
    """How a weight is cut into units. Base class of all structures.

    A *unit* is what a rule drops or grows. Unit values are 1-D tensors, one entry
    per unit, in canonical order.
    """

    def check(self, shape: tuple[int, ...], layout: Layout) -> None:
        """Raise ``ValueError`` if a weight of this ``shape`` cannot be cut this way."""

    def size(self, shape: tuple[int, ...], layout: Layout) -> int:
        """Number of units of a weight of this ``shape``."""
        return math.prod(shape)

    def reduce(self, tensor: Tensor, layout: Layout) -> Tensor:
        """Sum ``tensor`` (shape of the weight) over each unit; returns ``(size,)``."""
        return tensor.reshape(-1)

    def live(self, mask: Tensor, layout: Layout) -> Tensor:
        """Which units are live under a weight-shaped bool ``mask``; ``(size,)`` bool."""
        return mask.reshape(-1)

    def expand(self, units: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
        """Spread unit values ``(size,)`` to a contiguous tensor of the weight's ``shape``."""
        return units.reshape(shape)


@dataclass(frozen=True)
class Unstructured(Structure):
    """Every weight is a unit of its own."""


@dataclass(frozen=True)
class _Tiled(Structure):
    """Units that are rectangles of the canonical view."""

    def _tile(self, view: Tensor) -> tuple[int, int, int]:
        """Height (outputs), width (inputs) and depth (kernel positions) of one unit."""
        raise NotImplementedError

    def _tiles(self, tensor: Tensor, layout: Layout) -> Tensor:
        """``tensor`` as ``(groups, rows, height, columns, width, slices, depth)``."""
        view = layout.canonical(tensor)
        height, width, depth = self._tile(view)
        groups, outputs, inputs, kernel = view.shape
        return view.reshape(
            groups, outputs // height, height, inputs // width, width, kernel // depth, depth
        )

    def size(self, shape: tuple[int, ...], layout: Layout) -> int:
        tile = self._tile(layout.canonical(_shape_only(shape)))
        return math.prod(shape) // math.prod(tile)

    def reduce(self, tensor: Tensor, layout: Layout) -> Tensor:
        return self._tiles(tensor, layout).sum((2, 4, 6)).reshape(-1)

    def live(self, mask: Tensor, layout: Layout) -> Tensor:
        return self._tiles(mask, layout)[:, :, 0, :, 0, :, 0].reshape(-1)

    def expand(self, units: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
        out = units.new_empty(shape)
        view = layout.canonical(out)
        height, width, depth = self._tile(view)
        groups, outputs, inputs, kernel = view.shape
        grid = units.reshape(groups, outputs // height, 1, inputs // width, 1, kernel // depth, 1)
        full = grid.expand(-1, -1, height, -1, width, -1, depth).reshape(view.shape)
        return layout.restore(full, shape).contiguous()


@dataclass(frozen=True)
class Rows(_Tiled):
    """Output units live or die whole: neurons of a linear layer, filters of a convolution."""

    def _tile(self, view: Tensor) -> tuple[int, int, int]:
        return 1, view.shape[2], view.shape[3]


@dataclass(frozen=True)
class Columns(_Tiled):
    """Input units live or die whole: inputs of a linear layer, channels of a convolution."""

    def _tile(self, view: Tensor) -> tuple[int, int, int]:
        return view.shape[1], 1, view.shape[3]


@dataclass(frozen=True)
class Block(_Tiled):
    """Tiles of ``rows`` outputs by ``columns`` inputs live or die whole.

    A convolution has one grid of tiles per kernel position, so that the weight
    unfolded in channels-last order is a block-sparse matrix.

    Args:
        rows: Outputs per tile; must divide the outputs of each group.
        columns: Inputs per tile; must divide the inputs of each group.

    Raises:
        ValueError: If a size is not a positive integer.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        settle(self, "rows", "columns")
        if not all(type(n) is int and n > 0 for n in (self.rows, self.columns)):
            raise ValueError(f"{self}: both sizes, rows and columns, must be positive integers.")

    def _tile(self, view: Tensor) -> tuple[int, int, int]:
        return self.rows, self.columns, 1

    def check(self, shape: tuple[int, ...], layout: Layout) -> None:
        _, outputs, inputs, _ = layout.canonical(_shape_only(shape)).shape
        if outputs % self.rows or inputs % self.columns:
            raise ValueError(
                f"{self} does not divide {outputs} outputs x {inputs} inputs; choose sizes "
                "that do, or leave the layer out with exclude=."
            )


@dataclass(frozen=True)
class NM(Structure):
    """At most ``n`` live weights in every ``m`` consecutive inputs (Zhou et al., 2021).

    Groups run along the input channels, at each output and kernel position. The
    pattern fixes the final density at ``n / m``.

    Args:
        n: Live weights per group.
        m: Weights per group; must divide the inputs of each layer.

    Raises:
        ValueError: If not ``1 <= n <= m``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        settle(self, "n", "m")
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n <= self.m):
            raise ValueError(f"{self}: needs integers with 1 <= n <= m, such as NM(2, 4).")

    @property
    def density(self) -> float:
        """The density that the pattern fixes."""
        return self.n / self.m

    def check(self, shape: tuple[int, ...], layout: Layout) -> None:
        inputs = layout.canonical(_shape_only(shape)).shape[2]
        if inputs % self.m:
            raise ValueError(
                f"{self}: m does not divide {inputs} inputs; leave the layer out with exclude=."
            )

    def group(self, tensor: Tensor, layout: Layout) -> Tensor:
        """``tensor`` (shape of the weight) as ``(number of groups, m)``."""
        return layout.canonical(tensor).transpose(2, 3).reshape(-1, self.m)

    def ungroup(self, groups: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
        """Undo :meth:`group`; returns a contiguous tensor of ``shape``."""
        view = layout.canonical(_shape_only(shape)).transpose(2, 3)
        return layout.restore(groups.reshape(view.shape).transpose(2, 3), shape).contiguous()


def _shape_only(shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape that holds no data."""
    import torch

    return torch.empty(shape, device="meta")
