"""Selection: masks of the best k scores, with exact counts.

Everything here counts to the last element. Ties go to the earliest tensor and the
lowest flat (row-major) index, on every device and in every memory format.

The k-th largest score is found in counting passes: a small sample brackets it, one
pass counts the scores above the bracket, and only those inside are gathered and
ranked. A pass reads the scores chunk by chunk, so that no temporary is as large as
the scores, and needs no more of them than counts, a sample and the few scores inside
the bracket: sums and concatenations, should the scores lie on several machines.
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

_PAIRWISE = 16
"""Groups up to this size are ranked by comparing all pairs, larger ones by sorting."""


class NonFiniteScoreError(ValueError):
    """A candidate's score is NaN or infinite, so there is no honest ranking.

    Attributes:
        index: Which of the tensors it is in, counted from 0.
    """

    index: int


@torch.no_grad()
def top_k(
    scores: Sequence[Tensor], k: int, candidates: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Masks of the ``k`` largest scores over all tensors together.

    Args:
        scores: Floating-point tensors of any shapes; dtypes may differ.
        k: How many to choose, from 0 to the number of candidates.
        candidates: One bool tensor per score, same shape, True = may be chosen. None: all.

    Returns:
        One bool tensor per score, same shape, contiguous; exactly ``k`` True in total. Of
        equal scores those in the earliest tensor, at the lowest flat index, are chosen.

    Raises:
        NonFiniteScoreError: If a candidate's score is NaN or infinite.
        ValueError: If ``k`` is out of range or the candidates do not match the scores.
        TypeError: If a dtype is wrong.

    Example:
        >>> top_k([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0, 2.0])], 3)
        [tensor([ True, False]), tensor([ True,  True, False])]
    """
    pool = _Pool(scores, candidates)
    pool.check(k)
    if k == 0:
        masks = [torch.zeros_like(s, dtype=torch.bool) for s in pool.scores]
    elif k == pool.total:
        masks = pool.everything()
    else:
        kth = _kth_largest(pool, k)
        masks, chosen = pool.at_least(kth)
        pool.drop_last_ties(masks, kth, chosen - k)
    return [mask.view(s.shape) for mask, s in zip(masks, scores, strict=True)]


@torch.no_grad()
def top_k_counts(
    scores: Sequence[Tensor], k: int, candidates: Sequence[Tensor] | None = None
) -> list[int]:
    """How many of the ``k`` largest scores lie in each tensor.

    The counts of :func:`top_k`, with its arguments and errors, without its masks.

    Example:
        >>> top_k_counts([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0, 2.0])], 3)
        [1, 2]
    """
    pool = _Pool(scores, candidates)
    pool.check(k)
    if k == 0:
        return [0] * len(scores)
    if k == pool.total:
        return pool.sizes
    kth = _kth_largest(pool, k)
    above, counts = pool.count((torch.gt, kth), (torch.ge, kth))
    surplus = sum(counts) - k
    for i in reversed(range(len(counts))):
        dropped = min(surplus, counts[i] - above[i])
        counts[i] -= dropped
        surplus -= dropped
    return counts


@torch.no_grad()
def top_n_per_group(scores: Tensor, n: Tensor | int, candidates: Tensor | None = None) -> Tensor:
    """Mask of the ``n`` largest scores of every row.

    Args:
        scores: ``(groups, m)``, floating point.
        n: How many to choose in each row: an int, or integers ``(groups,)``.
        candidates: ``(groups, m)`` bool, True = may be chosen. None: all.

    Returns:
        ``(groups, m)`` bool; of equal scores in a row the first ones are chosen.

    Raises:
        NonFiniteScoreError: If a candidate's score is NaN or infinite.
        ValueError: If a row has fewer candidates than ``n``, ``n`` is negative, or shapes
            do not match.
        TypeError: If a dtype is wrong.

    Example:
        >>> top_n_per_group(torch.tensor([[1.0, 4.0, 2.0], [5.0, 5.0, 5.0]]), 2)
        tensor([[False,  True,  True],
                [ True,  True, False]])
    """
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)}: (groups, m) is needed.")
    pool = _Pool([scores], None if candidates is None else [candidates])
    pool.check_finite()
    groups, m = scores.shape
    wanted = torch.as_tensor(n, device=scores.device)
    if wanted.shape not in ((), (groups,)) or wanted.is_floating_point():
        raise ValueError(f"n={n}: it must be an int or integers of shape ({groups},), one per row.")
    room = m if candidates is None else candidates.count_nonzero(dim=1)
    if bool(((wanted < 0) | (wanted > room)).any()):
        raise ValueError(
            "n must lie between 0 and the number of candidates in every row; "
            "clamp it to candidates.count_nonzero(dim=1)."
        )
    rows = max(1, pool.chunk(0) // max(1, m))
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for start in range(0, groups, rows):
        part = slice(start, start + rows)
        values = pool.scores[0].view(groups, m)[part].to(pool.dtype)
        if candidates is not None:
            values = values.masked_fill(~candidates[part], -math.inf)
        count = wanted[part] if wanted.ndim else wanted
        mask[part] = _best_by_pairs(values, count) if m <= _PAIRWISE else _best(values, count)
    return mask


def sample(candidates: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Mask of ``k`` candidates drawn uniformly without replacement.

    Draws distinct ranks among the candidates and maps them to positions in order, so the
    result depends on the candidate set, ``k`` and the generator alone: not on device or
    memory format.

    Args:
        candidates: Bool tensor of any shape, True = may be drawn.
        k: How many to draw, from 0 to the number of candidates.
        generator: CPU generator.

    Returns:
        Bool tensor of the same shape, contiguous; exactly ``k`` True.

    Raises:
        ValueError: If ``k`` is out of range.
        TypeError: If the candidates are not bool.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> int(sample(torch.tensor([True, False, True, True]), 2, generator).sum())
        2
    """
    if candidates.dtype != torch.bool:
        raise TypeError(f"candidates are {candidates.dtype}; torch.bool is needed.")
    flat = candidates.reshape(-1)
    total = int(flat.count_nonzero())
    _check_k(k, total)
    draw_rest = k > total - k
    ranks = _distinct(total - k if draw_rest else k, total, generator)
    mask = flat.clone() if draw_rest else torch.zeros_like(flat)
    mask[_positions(flat, total, ranks.to(flat.device))] = not draw_rest
    return mask.view(candidates.shape)


class Best:
    """The ``k`` largest of the scores that are shown to it, tensor after tensor.

    Between two calls it keeps at most ``k`` values and where they came from. Ties go to the
    earlier tensor and the lower flat index, so that the outcome is that of :func:`top_k`.

    Args:
        k: How many to keep, at least 0.

    Example:
        >>> best = Best(2)
        >>> best.add(torch.tensor([1.0, 5.0]))
        >>> best.add(torch.tensor([3.0, 0.0]))
        >>> best.masks([torch.zeros(2), torch.zeros(2)])
        [tensor([False,  True]), tensor([ True, False])]
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._values = torch.empty(0, dtype=torch.float64)
        self._places = torch.empty(0, dtype=torch.int64)
        self._sources = torch.empty(0, dtype=torch.int64)
        self._seen = 0

    def add(self, scores: Tensor, candidates: Tensor | None = None) -> None:
        """Show it one tensor.

        Args:
            scores: Floating point, any shape.
            candidates: Bool tensor of the same shape, True = may be chosen. None: all.

        Raises:
            NonFiniteScoreError: If a candidate's score is NaN or infinite.
        """
        there = scores.numel() if candidates is None else int(candidates.count_nonzero())
        allowed = None if candidates is None else [candidates]
        (mask,) = top_k([scores], min(self._k, there), allowed)
        places = mask.reshape(-1).nonzero().squeeze(1)
        values = torch.cat([self._values, scores.reshape(-1)[places].double().cpu()])
        self._places = torch.cat([self._places, places.cpu()])
        self._sources = torch.cat([self._sources, torch.full((len(places),), self._seen)])
        (kept,) = top_k([values], min(self._k, len(values)))
        self._values, self._places = values[kept], self._places[kept]
        self._sources = self._sources[kept]
        self._seen += 1

    def masks(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Which scores were kept: one bool tensor for each tensor shown, shaped ``like`` them.

        Raises:
            ValueError: If fewer than ``k`` candidates were shown.
        """
        _check_k(self._k, len(self._values))
        masks = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in like]
        for source, mask in enumerate(masks):
            mask.view(-1)[self._places[self._sources == source].to(mask.device)] = True
        return masks


class _Pool:
    """The candidates of several score tensors, read as one long vector in chunks."""

    def __init__(self, scores: Sequence[Tensor], candidates: Sequence[Tensor] | None) -> None:
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
        # Row-major copies of what is not contiguous, so that every pass is quick.
        self.scores = [s.reshape(-1) for s in scores]
        self.candidates = None if candidates is None else [c.reshape(-1) for c in candidates]
        # Every score is compared in one dtype that holds them all exactly.
        self.dtype = reduce(torch.promote_types, (s.dtype for s in scores), torch.float32)
        self.home = scores[0].device if scores else torch.device("cpu")
        self.numel = sum(s.numel() for s in scores)
        if candidates is None:
            self.sizes = [s.numel() for s in scores]
        else:
            self.sizes = self._gather([c.count_nonzero() for c in candidates]).tolist()
        self.total = sum(self.sizes)

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
        _check_k(k, self.total)
        self.check_finite()

    def check_finite(self) -> None:
        """Raise if a candidate's score is NaN or infinite."""
        # A NaN or infinite score makes the sum so; the sum costs a fifth of looking.
        tensors = range(len(self.scores))
        sums = [values.sum() for i in tensors for _, values, _ in self.chunks(i)]
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

    def count(self, *tests: tuple[Callable[[Tensor, float], Tensor], float]) -> list[list[int]]:
        """How many candidates of each tensor pass each test, in one pass."""
        rows = []
        for i, s in enumerate(self.scores):
            row = torch.zeros(len(tests), dtype=torch.int64, device=s.device)
            for _, values, allowed in self.chunks(i):
                hits = [_and(compare(values, value), allowed) for compare, value in tests]
                row += torch.stack([hit.count_nonzero() for hit in hits])
            rows.append(row)
        counts: list[list[int]] = self._gather(rows).T.tolist()
        return counts

    def between(self, low: float, high: float) -> Tensor:
        """All candidate scores above ``low`` and below ``high``; 1-D."""
        inside = []
        for i in range(len(self.scores)):
            for _, values, allowed in self.chunks(i):
                hit = _and((values > low) & (values < high), allowed)
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
            inside.append(values[_and((values > low) & (values < high), allowed)].to(self.home))
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
                _and(torch.ge(values, kth, out=mask[part]), allowed)
            masks.append(mask)
        return masks, int(self._gather([mask.count_nonzero() for mask in masks]).sum())

    def drop_last_ties(self, masks: Sequence[Tensor], kth: float, surplus: int) -> None:
        """Clear, in place, the last ``surplus`` of the chosen scores equal to ``kth``."""
        for i in reversed(range(len(masks))):
            for part, values, allowed in self.chunks(i, backwards=True):
                if surplus == 0:
                    return
                ties = _and(values == kth, allowed).nonzero().view(-1)[-surplus:]
                masks[i][part][ties] = False
                surplus -= len(ties)

    def _gather(self, results: Sequence[Tensor]) -> Tensor:
        """Stack one small result per tensor or chunk, to wait for a device only once."""
        return torch.stack([r.to(self.home) for r in results]) if results else torch.empty(0)


def _check_k(k: int, total: int) -> None:
    if not 0 <= k <= total:
        raise ValueError(f"k={k}: it must lie between 0 and the number of candidates, {total}.")


def _and(mask: Tensor, allowed: Tensor | None) -> Tensor:
    return mask if allowed is None else mask.logical_and_(allowed)


def _kth_largest(pool: _Pool, k: int) -> float:
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


def _best(scores: Tensor, n: Tensor) -> Tensor:
    """The ``n`` best of each row, by sorting."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device)
    chosen = (places < n.view(-1, 1)).expand_as(order)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen)


def _best_by_pairs(scores: Tensor, n: Tensor) -> Tensor:
    """The ``n`` best of each row, by the number of scores in the row that come before each."""
    columns = scores.T.contiguous()
    m = len(columns)
    # Start as if every score came after all later ones in its row.
    rank = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=scores.device)
    rank = rank.view(-1, 1).repeat(1, len(scores))
    for i in range(m):
        for j in range(i + 1, m):
            first = (columns[i] >= columns[j]).view(torch.int8)
            rank[i] -= first
            rank[j] += first
    return (rank < n.to(torch.int8)).T


def _distinct(k: int, total: int, generator: torch.Generator) -> Tensor:
    """``k`` distinct integers below ``total``, in order; every set equally likely."""
    # Draw as many as are missing until none is. No set is favoured, because when to stop
    # depends on how many distinct ones were drawn and not on which.
    if 32 * k > total:
        drawn = torch.zeros(total, dtype=torch.bool)
        missing = k
        while missing:
            drawn[_integers(missing, total, generator)] = True
            missing = k - int(drawn.count_nonzero())
        return drawn.nonzero().view(-1)
    ranks = torch.empty(0, dtype=torch.int64)
    while len(ranks) < k:
        fresh = _integers(k - len(ranks), total, generator)
        ranks = torch.cat([ranks, fresh]).unique()
    return ranks


def _integers(n: int, below: int, generator: torch.Generator) -> Tensor:
    # torch.randint takes a remainder, which favours small numbers.
    return (torch.rand(n, dtype=torch.float64, generator=generator) * below).long()


def _positions(mask: Tensor, total: int, ranks: Tensor) -> Tensor:
    """Flat positions of the True entries of these ranks; lists the rarer of True and False."""
    if 2 * total <= mask.numel():
        return mask.nonzero().view(-1)[ranks]
    gaps = mask.logical_not().nonzero().view(-1)
    gaps -= torch.arange(len(gaps), device=gaps.device)  # True entries before each False one
    return ranks + torch.searchsorted(gaps, ranks, right=True)
