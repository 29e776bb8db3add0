"""Selection: masks of the best k scores, with exact counts.

Everything here counts to the last element. Ties go to the earliest tensor and the
lowest flat (row-major) index, on every device and in every memory format, and wherever
the parts of :class:`~lightning_sparsity.ops.sharded.Sharded` scores lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparsity.ops.pool import NonFiniteScoreError as NonFiniteScoreError
from lightning_sparsity.ops.pool import Pool, check_k
from lightning_sparsity.ops.pool_of_parts import PoolOfParts
from lightning_sparsity.ops.sharded import Sharded

_PAIRWISE = 16
"""Groups up to this size are ranked by comparing all pairs, larger ones by sorting."""


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
    pool = _pool(scores, candidates)
    pool.check(k)
    if k == 0:
        masks = [torch.zeros_like(s, dtype=torch.bool) for s in pool.scores]
    elif k == pool.total:
        masks = pool.everything()
    else:
        kth = pool.kth_largest(k)
        masks, chosen = pool.at_least(kth)
        pool.drop_last_ties(masks, kth, chosen - k)
    return pool.masks(masks, scores)


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
    pool = _pool(scores, candidates)
    pool.check(k)
    if k == 0:
        return [0] * len(scores)
    if k == pool.total:
        return pool.sizes
    kth = pool.kth_largest(k)
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
    pool = _pool([scores], None if candidates is None else [candidates])
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
    total = int(candidates.count_nonzero())
    check_k(k, total)
    draw_rest = k > total - k
    ranks = _distinct(total - k if draw_rest else k, total, generator).to(candidates.device)
    if isinstance(candidates, Sharded):
        drawn = _drawn_here(candidates, ranks)
        return candidates & ~drawn if draw_rest else drawn
    flat = candidates.reshape(-1)
    mask = flat.clone() if draw_rest else torch.zeros_like(flat)
    mask[_positions(flat, total, ranks)] = not draw_rest
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
        if isinstance(mask, Sharded) and isinstance(scores, Sharded):
            best, places = mask.cut.chosen(mask.part, scores.part)
        else:
            places = mask.reshape(-1).nonzero().squeeze(1)
            best = scores.reshape(-1)[places]
        values = torch.cat([self._values, best.double().cpu()])
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
        check_k(self._k, len(self._values))
        masks = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in like]
        for source, mask in enumerate(masks):
            mask.view(-1)[self._places[self._sources == source].to(mask.device)] = True
        return masks


def _pool(scores: Sequence[Tensor], candidates: Sequence[Tensor] | None) -> Pool:
    """The candidates, wherever they lie."""
    parted = any(isinstance(t, Sharded) for t in (*scores, *(candidates or ())))
    return PoolOfParts(scores, candidates) if parted else Pool(scores, candidates)


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


def _drawn_here(candidates: Sharded, ranks: Tensor) -> Tensor:
    """The candidates of these ranks, in order, each on the process that has it."""
    part = candidates.part.reshape(-1)
    mine = candidates.cut.ranks(part)
    nearest = torch.searchsorted(ranks, mine).clamp_(max=max(len(ranks) - 1, 0))
    drawn = torch.zeros_like(part)
    if len(ranks):
        drawn[part] = ranks[nearest] == mine
    return candidates.of(drawn)


def _positions(mask: Tensor, total: int, ranks: Tensor) -> Tensor:
    """Flat positions of the True entries of these ranks; lists the rarer of True and False."""
    if 2 * total <= mask.numel():
        return mask.nonzero().view(-1)[ranks]
    gaps = mask.logical_not().nonzero().view(-1)
    gaps -= torch.arange(len(gaps), device=gaps.device)  # True entries before each False one
    return ranks + torch.searchsorted(gaps, ranks, right=True)
