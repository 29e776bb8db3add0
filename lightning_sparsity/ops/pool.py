"""Pool: the candidates of several score tensors, and the k-th largest of them.

It is found in counting passes: a small sample brackets it, one pass counts the scores
above the bracket, and only those inside are gathered and ranked. A pass reads the scores
chunk by chunk, so that no temporary is as large as the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

_CHUNK = {"cpu": 2**21}
"""Scores read at once, by device: few enough that temporaries stay in the cache, and
enough that threads seldom wait for each other."""

_CHUNK_ELSEWHERE = 2**24

_SAMPLE = 2**16
"""At most so many scores, and a sixteenth of them, are looked at for a bracket."""

_FEW = 2**15
"""So many scores are ranked without a bracket."""


class NonFiniteScoreError(ValueError):
    """A candidate's score is NaN or infinite, so there is no honest ranking.

    Attributes:
        index: Which of the tensors it is in, counted from 0.
    """

    index: int


class Pool:
    """The candidates of several score tensors, read as one long vector in chunks."""

    def __init__(self, scores: Sequence[Tensor], candidates: Sequence[Tensor] | None) -> None:
        check_pairs(scores, candidates)
        # Row-major copies of what is not contiguous, so that every pass is quick.
        self.scores = [s.reshape(-1) for s in scores]
        self.candidates = None if candidates is None else [c.reshape(-1) for c in candidates]
        # Every score is compared in one dtype that holds them all exactly.
        self.dtype = reduce(torch.promote_types, (s.dtype for s in scores), torch.float32)
        self.home = scores[0].device if scores else torch.device("cpu")
        self.numel = sum(s.numel() for s in scores)
        self.sizes = self._count_candidates()
        self.total = sum(self.sizes)

    def _count_candidates(self) -> list[int]:
        if self.candidates is None:
            return [s.numel() for s in self.scores]
        counts: list[int] = self._gather([c.count_nonzero() for c in self.candidates]).tolist()
        return counts

    def chunk(self, i: int) -> int:
        """Number of scores of tensor ``i`` to read at once."""
        return _CHUNK.get(self.scores[i].device.type, _CHUNK_ELSEWHERE)

    def chunks(
        self, i: int, backwards: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of tensor ``i`` in row-major order, with its scores and candidates there."""
        starts = range(0, len(self.scores[i]), self.chunk(i))
        for start in reversed(starts) if backwards else starts:
            part = slice(start, start + self.chunk(i))
            allowed = None if self.candidates is None else self.candidates[i][part]
            yield part, self.scores[i][part].to(self.dtype), allowed

    def check(self, k: int) -> None:
        """Raise if ``k`` candidates cannot be chosen by these scores."""
        check_k(k, self.total)
        self.check_finite()

    def check_finite(self) -> None:
        """Raise if a candidate's score is NaN or infinite."""
        # A NaN or infinite score makes the sum so; the sum costs a fifth of looking.
        tensors = range(len(self.scores))
        nothing = torch.zeros((), dtype=self.dtype, device=self.home)
        sums = [sum((v.sum() for _, v, _ in self.chunks(i)), nothing) for i in tensors]
        if bool(self._gather(sums).isfinite().all()):
            return
        above_minus_inf, inf = self.count((torch.gt, -math.inf), (torch.ge, math.inf))
        for i, size in enumerate(self.sizes):
            bad = size - (above_minus_inf[i] - inf[i])
            if bad:
                error = NonFiniteScoreError(
                    f"scores[{i}]: {bad} of {size} candidate scores are NaN or infinite and cannot "
                    "be ranked. Leave them out of the candidates or give them a finite score."
                )
                error.index = i
                raise error

    def kth_largest(self, k: int) -> float:
        """The ``k``-th largest candidate score, for k from 1 to ``total``."""
        return _kth_largest(self, k)

    def masks(self, flat: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
        """Flat masks in the shapes of the scores."""
        return [mask.view(s.shape) for mask, s in zip(flat, scores, strict=True)]

    def count(self, *tests: tuple[Callable[[Tensor, float], Tensor], float]) -> list[list[int]]:
        """How many candidates of each tensor pass each test, in one pass."""
        rows = []
        for i, s in enumerate(self.scores):
            row = torch.zeros(len(tests), dtype=torch.int64, device=s.device)
            for _, values, allowed in self.chunks(i):
                hits = [both(compare(values, value), allowed) for compare, value in tests]
                row += torch.stack([hit.count_nonzero() for hit in hits])
            rows.append(row)
        counts: list[list[int]] = self._gather(rows).T.tolist()
        return counts

    def between(self, low: float, high: float) -> Tensor:
        """All candidate scores above ``low`` and below ``high``; 1-D."""
        inside = []
        for i in range(len(self.scores)):
            for _, values, allowed in self.chunks(i):
                hit = both((values > low) & (values < high), allowed)
                inside.append(values[hit].to(self.home))
        return torch.cat(inside)

    def sample_between(self, low: float, high: float, generator: torch.Generator) -> Tensor:
        """As :meth:`between`, of one random position in each of many equal parts."""
        parts = min(_SAMPLE, self.numel // 16)
        steps = torch.rand(parts, dtype=torch.float64, generator=generator) + torch.arange(parts)
        positions = (steps * (self.numel / parts)).long().clamp_(max=self.numel - 1)
        sizes = torch.tensor([s.numel() for s in self.scores])
        ends = sizes.cumsum(0)
        cuts = torch.searchsorted(positions, ends)
        inside = []
        for i, local in enumerate(positions.tensor_split(cuts[:-1])):
            where = (local - (ends[i] - sizes[i])).to(self.scores[i].device)
            values = self.scores[i][where].to(self.dtype)
            allowed = None if self.candidates is None else self.candidates[i][where]
            inside.append(values[both((values > low) & (values < high), allowed)].to(self.home))
        return torch.cat(inside)

    def everything(self) -> list[Tensor]:
        """Flat masks of all candidates."""
        if self.candidates is None:
            return [torch.ones_like(s, dtype=torch.bool) for s in self.scores]
        return [c.clone() for c in self.candidates]

    def at_least(self, kth: float) -> tuple[list[Tensor], int]:
        """Flat masks of the candidates whose score is ``kth`` or more, and their number."""
        masks = []
        for i, s in enumerate(self.scores):
            mask = torch.empty_like(s, dtype=torch.bool)
            for part, values, allowed in self.chunks(i):
                both(torch.ge(values, kth, out=mask[part]), allowed)
            masks.append(mask)
        return masks, int(self._gather([mask.count_nonzero() for mask in masks]).sum())

    def drop_last_ties(self, masks: Sequence[Tensor], kth: float, surplus: int) -> None:
        """Clear, in place, the last ``surplus`` of the chosen scores equal to ``kth``."""
        for i in reversed(range(len(masks))):
            for part, values, allowed in self.chunks(i, backwards=True):
                if surplus == 0:
                    return
                ties = both(values == kth, allowed).nonzero().view(-1)[-surplus:]
                masks[i][part][ties] = False
                surplus -= len(ties)

    def _gather(self, results: Sequence[Tensor]) -> Tensor:
        """Stack one small result per tensor or chunk, to wait for a device only once."""
        return torch.stack([r.to(self.home) for r in results]) if results else torch.empty(0)


def check_pairs(scores: Sequence[Tensor], candidates: Sequence[Tensor] | None) -> None:
    """Raise unless scores are numbers, and candidates fit them."""
    if candidates is not None and len(candidates) != len(scores):
        raise ValueError(f"{len(scores)} scores but {len(candidates)} candidates.")
    for i, s in enumerate(scores):
        if not s.is_floating_point():
            raise TypeError(f"scores[{i}] is {s.dtype}; a floating-point dtype is needed.")
        c = None if candidates is None else candidates[i]
        if c is not None and c.dtype != torch.bool:
            raise TypeError(f"candidates[{i}] is {c.dtype}; torch.bool is needed.")
        if c is not None and c.shape != s.shape:
            raise ValueError(
                f"candidates[{i}] has shape {tuple(c.shape)}, its scores {tuple(s.shape)}."
            )


def check_k(k: int, total: int) -> None:
    """Raise unless ``k`` of ``total`` can be chosen."""
    if not 0 <= k <= total:
        raise ValueError(f"k={k}: it must lie between 0 and the number of candidates, {total}.")


def both(mask: Tensor, allowed: Tensor | None) -> Tensor:
    """A fresh mask, written to, where something is allowed too."""
    return mask if allowed is None else mask.logical_and_(allowed)


def _kth_largest(pool: Pool, k: int) -> float:
    """The ``k``-th largest candidate score, for k from 1 to ``pool.total``."""
    generator = torch.Generator().manual_seed(0)
    low, high = -math.inf, math.inf
    above, rest = 0, pool.total  # candidates >= high; candidates > low
    # Invariant: above < k <= rest, so that the k-th largest lies in between. Each round
    # shuts out at least one sampled score, whatever the data.
    while rest - above > max(_FEW, pool.numel // 32):
        inside = pool.sample_between(low, high, generator)
        if len(inside) < 256:
            break
        lo, hi = _bracket(inside, (k - above) / (rest - above))
        lo, hi = max(low, lo), min(high, hi)
        ge_hi, gt_lo = map(sum, pool.count((torch.ge, hi), (torch.gt, lo)))
        if ge_hi < k <= gt_lo:
            low, high, above, rest = lo, hi, ge_hi, gt_lo
            continue
        gt_hi, ge_lo = map(sum, pool.count((torch.gt, hi), (torch.ge, lo)))
        if gt_hi < k <= ge_hi:
            return hi
        if gt_lo < k <= ge_lo:
            return lo
        if k <= gt_hi:
            low, rest = hi, gt_hi
        else:
            high, above = lo, ge_lo
    return _nth_largest(pool.between(low, high), k - above)


def _bracket(sample: Tensor, share: float) -> tuple[float, float]:
    """Two values around the upper ``share`` quantile, three standard deviations apart each."""
    size = len(sample)
    margin = 3 * math.sqrt(size * share * (1 - share)) + 3
    first, last = int(size * share - margin), math.ceil(size * share + margin)
    top = sample.topk(min(last + 1, size)).values
    low = float(top[last]) if last < size else -math.inf
    high = float(top[first]) if first > 0 else math.inf
    return low, high


def _nth_largest(values: Tensor, n: int) -> float:
    # topk is linear on any input; kthvalue is quadratic on a descending one.
    if 2 * n <= len(values):
        return float(values.topk(n, sorted=False).values.min())
    return float(values.topk(len(values) - n + 1, largest=False, sorted=False).values.max())
