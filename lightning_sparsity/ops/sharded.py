"""Sharded tensors: parts on several processes, as FSDP2 and tensor parallelism cut weights.

Functions that act entry by entry are computed on the part that a process has, counts are summed
over processes, and selection (``ops.selection``) counts over all parts. For everything else the
whole tensor is gathered, and freed when its work is done. All processes must compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_sparsity.ops.live import Formed
from lightning_sparsity.ops.ranks import concatenated, sum_over_ranks

_ATEN = torch.ops.aten
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN._reshape_alias.default}
_FILLED = {
    _ATEN.zeros_like.default,
    _ATEN.ones_like.default,
    _ATEN.empty_like.default,
    _ATEN.full_like.default,
}
_COUNTS: dict[Any, Callable[[int, int], bool | int]] = {
    _ATEN.count_nonzero.default: lambda count, size: count,
    _ATEN.any.default: lambda count, size: count > 0,
    _ATEN.all.default: lambda count, size: count == size,
}


@dataclass(frozen=True)
class Split:
    """How a tensor is cut over processes.

    Args:
        mesh: The processes, a ``DeviceMesh``.
        placements: How each dimension of the mesh cuts it, as a ``DTensor`` has them.
        shape: Of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Split:
        """How a ``DTensor`` is cut."""
        cut: Any = tensor
        return cls(cut.device_mesh, tuple(cut.placements), tuple(tensor.shape))

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether processes compute with their parts, by the name of a dimension of the mesh."""
        names = self.mesh.mesh_dim_names or ()
        across = [i for i, name in enumerate(names) if name in ("tensor_parallel", "tp")]
        return any(self.mesh.size(dim) > 1 for dim in across)

    @property
    def is_owner(self) -> bool:
        """Whether this process is the first of those that have the same part."""
        places = zip(self.placements, self.mesh.get_coordinate(), strict=True)
        first = all(place == 0 for placement, place in places if placement.is_replicate())
        return first and self._is_first_copy

    @cached_property
    def _is_first_copy(self) -> bool:
        """Whether the first process is in the mesh: others have copies of all that it holds."""
        return bool((self.mesh.mesh == 0).any())

    @torch.no_grad()
    def part_of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, the same on every process, that this process has."""
        return _redistributed(whole, self.mesh, self.placements)

    @torch.no_grad()
    def gather(self, part: Tensor) -> Tensor:
        """The whole of a tensor whose part this process has; call it on all processes."""
        from torch.distributed.tensor import DTensor

        sent = part.view(torch.uint8) if part.dtype == torch.bool else part
        stride = tuple(math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))
        spread = DTensor.from_local(
            sent.contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=stride,
        )
        whole: Tensor = spread.full_tensor()
        return whole.view(torch.bool) if part.dtype == torch.bool else whole

    @cached_property
    def runs(self) -> tuple[Tensor, int]:
        """Where the part lies in the whole: the first flat index of each run, and their length."""
        cut = [p.dim for p in self.placements if not p.is_replicate()]
        last = max(cut, default=0)
        device = self.mesh.device_type
        indices = [self._indices(dim, device) for dim in range(last + 1)]
        inner = math.prod(self.shape[last + 1 :])
        along = indices[last]
        length = inner
        if len(along) and int(along[-1] - along[0]) + 1 == len(along):
            indices[last], length = along[:1], inner * len(along)
        starts = torch.zeros(1, dtype=torch.int64, device=device)
        for dim, index in enumerate(indices):
            stride = math.prod(self.shape[dim + 1 :])
            starts = (starts[:, None] + index * stride).view(-1)
        return starts, length

    def _indices(self, dim: int, device: str) -> Tensor:
        """Which indices along a dimension this process has."""
        from torch.distributed.tensor import Replicate

        everything = torch.arange(self.shape[dim], device=device)
        mine = [
            _along_first(p) if not p.is_replicate() and p.dim == dim else Replicate()
            for p in self.placements
        ]
        return _redistributed(everything, self.mesh, mine)

    def places(self, hits: Tensor) -> Tensor:
        """Flat indices in the whole of the True entries of a part."""
        starts, length = self.runs
        found = hits.reshape(-1).nonzero().view(-1)
        return starts[found // max(length, 1)] + found % max(length, 1)

    def ranks(self, hits: Tensor) -> Tensor:
        """How many True entries of the whole come before each of those of a part.

        Args:
            hits: Bool, of the part. Call it on all processes.

        Returns:
            ``(True entries of the part,)`` int64, in the order of the part.
        """
        starts, length = self.runs
        grid = hits.reshape(len(starts), length)
        counts = grid.count_nonzero(dim=1)
        owned = slice(None) if self.is_owner else slice(0)
        everywhere, order = concatenated(starts[owned]).sort()
        counted = concatenated(counts[owned])[order]
        before = (counted.cumsum(0) - counted)[torch.searchsorted(everywhere, starts)]
        return (before[:, None] + grid.cumsum(dim=1) - 1)[grid]

    def chosen(self, hits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All values at True entries and their flat indices, in order, on every process.

        Args:
            hits: Bool, of the part. Call it on all processes.
            values: Of the part.
        """
        owned = hits if self.is_owner else torch.zeros_like(hits)
        places, order = concatenated(self.places(owned)).sort()
        return concatenated(values.reshape(-1)[owned.reshape(-1)])[order], places


class Sharded(Formed):
    """A tensor of which every process has a part; flat, or of the shape that is cut.

    Args:
        part: What this process has.
        split: How it is cut.
        shape: ``split.shape``, the default, or ``(numel,)``.
        is_own: Whether nobody else sees the part, so that it may be written.
    """

    part: Tensor
    cut: Split
    is_own: bool

    @staticmethod
    def __new__(
        cls,
        part: Tensor,
        split: Split,
        shape: Sequence[int] | None = None,
        is_own: bool = False,
    ) -> Sharded:
        """A tensor without memory of its own."""
        shape = split.shape if shape is None else tuple(shape)
        made = Formed.__new__(cls, lambda: split.gather(part).view(shape), shape, part)
        assert isinstance(made, Sharded)
        made.part, made.cut, made.is_own = part, split, is_own
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute on parts where that gives the same; else gather."""
        named = dict(kwargs or {})
        made = _on_parts(function, args, named)
        if made is NotImplemented:
            return super().__torch_dispatch__(function, types, args, named)
        return made

    def of(self, part: Tensor) -> Sharded:
        """A new tensor that is cut as this one, from its part, flat or not."""
        return Sharded(part.view(self.part.shape), self.cut, self.shape, is_own=True)


class Gathered(Formed):
    """A sharded tensor that is gathered whenever somebody computes with it, whatever it is.

    Args:
        tensor: What is gathered.
    """

    gathered_from: Sharded

    @staticmethod
    def __new__(cls, tensor: Sharded) -> Gathered:
        """A tensor without memory."""
        made = Formed.__new__(cls, tensor.formed, tensor.shape, tensor)
        assert isinstance(made, Gathered)
        made.gathered_from = tensor
        return made


def _on_parts(function: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """The function computed on parts; ``NotImplemented`` if it looks beyond single entries."""
    first = args[0] if args else None
    if function in _VIEWS and isinstance(first, Sharded):
        shape = _resolved(args[1], first.numel())
        if shape not in (first.cut.shape, (first.numel(),)):
            return NotImplemented
        return Sharded(first.part, first.cut, shape, is_own=first.is_own)
    if function in _COUNTS and isinstance(first, Sharded) and len(args) == 1:
        count = first.part.count_nonzero() * int(first.cut.is_owner)
        found = _COUNTS[function](int(sum_over_ranks(count)), first.numel())
        return torch.tensor(found, device=first.device)
    if function in _FILLED and isinstance(first, Sharded):
        return first.of(function(first.part, *args[1:], **named))
    if function is _ATEN._to_copy.default and isinstance(first, Sharded):
        if torch.device(named.get("device") or first.device).type != first.device.type:
            return NotImplemented
        return first.of(function(first.part, *args[1:], **named))
    if not is_pointwise(function):
        return NotImplemented
    sharded = [a for a in (*args, *named.values()) if isinstance(a, Sharded)]
    like = sharded[0] if sharded else None
    if like is None or any((a.cut, a.shape) != (like.cut, like.shape) for a in sharded):
        return NotImplemented
    writes = function._schema.is_mutable
    if writes and not (isinstance(first, Sharded) and first.is_own and "out" not in named):
        return NotImplemented
    parts = [_part(a, like) for a in args]
    named = {key: _part(a, like) for key, a in named.items()}
    if any(p is NotImplemented for p in (*parts, *named.values())):
        return NotImplemented
    made = function(*parts, **named)
    return first if writes else like.of(made)


@cache
def is_pointwise(function: Any) -> bool:
    """Whether an operation gives one tensor and computes every entry from those at its place."""
    if [str(made.type) for made in function._schema.returns] != ["Tensor"]:
        return False
    if torch.Tag.pointwise in function.tags:
        return True
    name = function._schema.name.partition("::")[2]
    if not name.endswith("_") or name.startswith("_"):
        return False
    outside = getattr(_ATEN, name[:-1], None)  # its twin that writes nothing
    twin = getattr(outside, function._overloadname, None)
    return twin is not None and torch.Tag.pointwise in twin.tags


def _part(argument: Any, like: Sharded) -> Any:
    """What of an argument belongs to a part; ``NotImplemented`` if that cannot be said."""
    if isinstance(argument, Sharded):
        return argument.part
    if not isinstance(argument, Tensor):
        return NotImplemented if isinstance(argument, list | tuple) else argument
    if argument.ndim == 0:
        return argument
    if argument.shape != like.shape or argument.device.type != like.device.type:
        return NotImplemented
    whole = argument.formed() if isinstance(argument, Formed) else argument
    return like.cut.part_of(whole.reshape(like.cut.shape))


def _resolved(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    """A shape in which one size may be -1."""
    rest = math.prod(size for size in shape if size != -1)
    return tuple(numel // max(rest, 1) if size == -1 else size for size in shape)


def _along_first(placement: Any) -> Any:
    """The same way of cutting, along the first dimension."""
    from torch.distributed.tensor import Shard

    if isinstance(placement, Shard):
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)


def _redistributed(whole: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = everywhere.redistribute(placements=placements).to_local()
    return part
