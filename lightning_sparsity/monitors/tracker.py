"""MaskTracker: what happened to the masks so far. Reads them, and keeps one bit per weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.shards import local, over_parts, part_of, whole
from lightning_sparsity.ops.packing import pack, unpack
from lightning_sparsity.ops.sharded import Sharded
from lightning_sparsity.reports import Course


@dataclass(eq=False)
class _Track:
    """What happened to one mask.

    Args:
        mask: The mask as last seen, packed.
        fired: Weights that were ever live, packed.
        live: Weights live in ``mask``.
        ever_live: Weights live in ``fired``.
        start: Weights live at the start.
        dropped: Weights that the last update dropped.
        before: Weights live before the last update.
        dropped_in_all: Weights dropped by all updates.
    """

    mask: Tensor
    fired: Tensor
    live: int
    ever_live: int
    start: int
    dropped: int = 0
    before: int = 0
    dropped_in_all: int = 0

    @classmethod
    def of(cls, kept: SparseParameter) -> _Track:
        mask = pack(local(kept.mask))
        return cls(mask, mask.clone(), kept.live, kept.live, kept.live)


class MaskTracker:
    r"""Densities, churn and in-time over-parameterisation of all masks.

    The in-time over-parameterisation rate :math:`R_s` (Liu et al., 2021, arXiv:2102.02887)
    is the share of the weights that were live at any time, the start included. The churn of
    an update is the share of the live weights that it dropped; a weight that it dropped and
    regrew counts as kept.

    Args:
        masks: The masks to follow, as they are at the start.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._changes = masks.changes
        self._tracks = {kept.name: _Track.of(kept) for kept in masks}

    # ----------------------------------------------------------------------- following

    def look(self) -> None:
        """Note which weights are live, if the masks changed since the last look."""
        if self._masks.changes == self._changes:
            return
        self._changes = self._masks.changes
        for kept in self._masks:
            self._tracks[kept.name].fired |= pack(local(kept.mask))

    def update(self, names: Collection[str]) -> None:
        """Compare the masks with those of the last update.

        Args:
            names: Parameters that an update went over since, changed or not.
        """
        for name in [known for known in self._tracks if known in names]:  # in order on all ranks
            track, kept = self._tracks[name], self._masks[name]
            mask = pack(local(kept.mask))
            track.fired |= mask
            counts = torch.stack([_count(track.mask & ~mask), _count(track.fired)])
            counts = over_parts(kept.mask, counts)
            track.dropped, track.ever_live = counts.tolist()
            track.before, track.live = track.live, kept.live
            track.dropped_in_all += track.dropped
            track.mask = mask
        self._changes = self._masks.changes

    # ------------------------------------------------------------------------- reading

    @property
    def names(self) -> list[str]:
        """The parameters, in the model's order."""
        return list(self._tracks)

    @property
    def densities(self) -> dict[str, float]:
        """Live share of each parameter."""
        return {name: _share(track.live, n) for name, track, n in self._all()}

    @property
    def density(self) -> float:
        """Live share of all sparse weights; 1 if there are none."""
        return _share(sum(track.live for _, track, _ in self._all()), self._masks.numel)

    def metrics(self) -> dict[str, float]:
        """``density/``, ``churn/`` and ``itop/``, of each parameter and ``total``."""
        found = {f"density/{name}": value for name, value in self.densities.items()}
        for name, track, numel in self._all():
            found[f"churn/{name}"] = _share(track.dropped, track.before, 0.0)
            found[f"itop/{name}"] = _share(track.ever_live, numel)
        tracks = self._tracks.values()
        return {
            "density/total": self.density,
            "churn/total": _share(
                sum(track.dropped for track in tracks), sum(track.before for track in tracks), 0.0
            ),
            "itop/total": _share(sum(track.ever_live for track in tracks), self._masks.numel),
            **found,
        }

    def courses(self) -> dict[str, Course]:
        """What the whole training did to each parameter."""
        return {
            name: Course(track.start, track.ever_live, track.dropped_in_all)
            for name, track in self._tracks.items()
        }

    def _all(self) -> Iterator[tuple[str, _Track, int]]:
        return ((name, track, self._masks[name].numel) for name, track in self._tracks.items())

    # --------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only, one bit per weight."""
        return {
            name: {
                "shape": self._masks[name].shape,
                "fired": _whole(self._masks[name], track.fired).cpu(),
                "start": track.start,
                "dropped": track.dropped,
                "before": track.before,
                "dropped_in_all": track.dropped_in_all,
            }
            for name, track in self._tracks.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from a saved state, if it is one of the same parameters.

        Returns:
            Whether it was.
        """
        shapes = {kept.name: kept.shape for kept in self._masks}
        if shapes != {name: tuple(saved["shape"]) for name, saved in state.items()}:
            return False
        for name, saved in state.items():
            track, kept = self._tracks[name], self._masks[name]
            track.fired |= _part(kept, saved["fired"].to(track.fired.device))
            track.ever_live = int(over_parts(kept.mask, _count(track.fired)))
            track.start, track.dropped = saved["start"], saved["dropped"]
            track.before, track.dropped_in_all = saved["before"], saved["dropped_in_all"]
        return True


def _share(part: int, whole: int, empty: float = 1.0) -> float:
    return part / whole if whole else empty


def _whole(kept: SparseParameter, packed: Tensor) -> Tensor:
    """Bits of all weights, from those of the part that this process has."""
    mask = kept.mask
    if not isinstance(mask, Sharded):
        return packed
    return pack(whole(mask.of(unpack(packed, tuple(mask.part.shape)))))


def _part(kept: SparseParameter, packed: Tensor) -> Tensor:
    """Undo :func:`_whole`."""
    if not kept.is_sharded:
        return packed
    return pack(part_of(unpack(packed, kept.shape), kept.parameter))


def _count(packed: Tensor) -> Tensor:
    """Number of set bits: every byte adds up its pairs, quarters and halves."""
    bits = packed - ((packed >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return ((bits + (bits >> 4)) & 0x0F).sum()
