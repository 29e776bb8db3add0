"""Pool of parts: scores that lie in parts on several processes, counted where they are.

The k-th largest is found digit by digit: every pass counts how often each value of the next 16
bits comes up among the scores that begin as it does, and sums the counts over processes. No
score leaves its process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparsity.ops.live import Formed
from lightning_sparsity.ops.pool import Pool, check_pairs
from lightning_sparsity.ops.ranks import is_first_rank, sum_over_ranks
from lightning_sparsity.ops.sharded import Sharded

_DIGIT = 16
_HALF = 2 ** (_DIGIT - 1)


class PoolOfParts(Pool):
    """Candidates of which some tensors are :class:`~lightning_sparsity.ops.sharded.Sharded`.

    Whole tensors, the same on every process, are counted on the first one.

    Args:
        scores: See :func:`~lightning_sparsity.ops.selection.top_k`.
        candidates: See there.
    """

    def __init__(self, scores: Sequence[Tensor], candidates: Sequence[Tensor] | None) -> None:
        check_pairs(scores, candidates)
        self._splits = [s.cut if isinstance(s, Sharded) else None for s in scores]
        self._counts_here = [
            is_first_rank() if split is None else split.is_owner for split in self._splits
        ]
        likes = list(scores)
        if candidates is not None:
            candidates = [_part(c, s) for c, s in zip(candidates, likes, strict=True)]
        super().__init__([_part(s, s) for s in likes], candidates)

    def _count_candidates(self) -> list[int]:
        if self.candidates is None:
            here = [torch.tensor(s.numel(), device=self.home) for s in self.scores]
        else:
            here = [c.count_nonzero() for c in self.candidates]
        counts: list[int] = self._gather(here).tolist()
        return counts

    def kth_largest(self, k: int) -> float:
        """The ``k``-th largest candidate score, for k from 1 to ``total``."""
        width = 64 if self.dtype == torch.float64 else 32
        found: int | None = None
        for shift in range(width - _DIGIT, -1, -_DIGIT):
            counts = self._digits(shift, found)
            at_least = counts.flip(0).cumsum(0).flip(0)
            digit = int((at_least >= k).count_nonzero()) - 1
            k -= int(at_least[digit] - counts[digit])
            found = digit - _HALF if found is None else found << _DIGIT | digit
        assert found is not None
        return _value(found, self.dtype)

    def _digits(self, shift: int, before: int | None) -> Tensor:
        """How many candidates go on with each digit after those ``before``, on all processes."""
        counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=self.home)
        for i, here in enumerate(self._counts_here):
            for _, values, allowed in self.chunks(i) if here else ():
                keys = _keys(values if allowed is None else values[allowed])
                if before is None:
                    digits = (keys >> shift) + _HALF
                else:
                    digits = keys[keys >> (shift + _DIGIT) == before] >> shift & (2 * _HALF - 1)
                counts += torch.bincount(digits, minlength=2 * _HALF).to(self.home)
        return sum_over_ranks(counts)

    def drop_last_ties(self, masks: Sequence[Tensor], kth: float, surplus: int) -> None:
        """Clear, in place, the last ``surplus`` of the chosen scores equal to ``kth``."""
        ties = [
            mask & (scores.to(self.dtype) == kth)
            for mask, scores in zip(masks, self.scores, strict=True)
        ]
        counts = self._gather([tied.count_nonzero() for tied in ties]).tolist()
        for mask, tied, count, split in reversed(
            list(zip(masks, ties, counts, self._splits, strict=True))
        ):
            if surplus == 0:
                return
            kept = max(count - surplus, 0)
            surplus -= count - kept
            if kept == 0:
                mask &= ~tied
            else:
                order = torch.arange(count, device=mask.device)
                order = order if split is None else split.ranks(tied)
                mask[tied] = order < kept

    def masks(self, flat: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
        """Flat masks in the shapes of the scores, cut as they are."""
        return [
            s.of(mask) if isinstance(s, Sharded) else mask.view(s.shape)
            for mask, s in zip(flat, scores, strict=True)
        ]

    def _gather(self, results: Sequence[Tensor]) -> Tensor:
        """One small result per tensor, summed over processes."""
        found = super()._gather(results)
        for i, here in enumerate(self._counts_here[: len(results)]):
            if not here:
                found[i] = 0
        return sum_over_ranks(found)


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """What of a tensor this process counts, if it counts the part here of ``like``."""
    if isinstance(like, Sharded):
        if not isinstance(tensor, Sharded):
            return like.cut.part_of(tensor.reshape(like.cut.shape))
        return tensor.part
    return tensor.formed() if isinstance(tensor, Formed) else tensor


def _keys(values: Tensor) -> Tensor:
    """Signed integers in the order of the floats, from their bits; -0.0 counts as 0.0."""
    as_int = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values + 0.0).view(as_int)
    return torch.where(bits < 0, bits ^ torch.iinfo(as_int).max, bits)


def _value(key: int, dtype: torch.dtype) -> float:
    """The float of a key."""
    as_int = torch.int64 if dtype == torch.float64 else torch.int32
    bits = key if key >= 0 else key ^ torch.iinfo(as_int).max
    return float(torch.tensor(bits, dtype=as_int).view(dtype))
