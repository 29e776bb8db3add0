"""Apportionment: real-valued shares, and whole units that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fill(raw: Sequence[float], capacity: Sequence[int], total: float) -> list[float]:
    r"""Split ``total`` in proportion to ``raw``, none above its capacity.

    Water filling: :math:`c_l = \min(capacity_l, \varepsilon \, raw_l)` with the
    :math:`\varepsilon` for which the counts add up. What does not fit into one layer goes
    to the others in proportion; this is where the official ERK loop ends.

    Args:
        raw: Weight of each layer, at least 0; a layer with 0 gets nothing.
        capacity: Most that each layer can take.
        total: What is to be split; if it exceeds the capacities, each layer is full.

    Returns:
        Real-valued counts.

    Raises:
        ValueError: If a value of ``raw`` is negative, infinite or NaN.

    Example:
        >>> fill([1, 1, 2], [10, 2, 10], 10)
        [2.6666666666666665, 2.0, 5.333333333333333]
    """
    if not all(0 <= value < math.inf for value in raw):
        raise ValueError(f"fill: raw must hold finite numbers >= 0, not {list(raw)}.")
    counts = [0.0] * len(raw)
    open_ = [i for i, value in enumerate(raw) if value > 0]
    left = total
    while open_:
        weight = math.fsum(raw[i] for i in open_)
        shares = {i: left * raw[i] / weight for i in open_}
        full = [i for i in open_ if shares[i] >= capacity[i]]
        for i in open_:
            counts[i] = min(shares[i], float(capacity[i]))
        if not full:
            break
        left -= sum(capacity[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return counts


def apportion(
    ideal: Sequence[float], capacity: Sequence[int], total: int, floor: int = 1
) -> list[int]:
    """Round ideal counts to integers that add up to ``total``: largest remainder.

    Every count stays between ``floor`` (or the capacity, if that is less) and its
    capacity. Of equal remainders (to a billionth) the earlier layer gets the unit.

    Args:
        ideal: Real-valued counts, which should add up to ``total``, as from :func:`fill`.
        capacity: Most that each layer can take.
        total: What the counts add up to.
        floor: Least that each layer gets.

    Returns:
        Counts per layer.

    Raises:
        ValueError: If ``total`` exceeds the capacities, or is less than the floors.

    Example:
        >>> apportion([2.5, 7.5], [5, 15], 10)
        [3, 7]
        >>> apportion([0.1, 0.1, 4.8], [5, 5, 5], 5)
        [1, 1, 3]
    """
    floors = [min(floor, most) for most in capacity]
    check_total(total, floors, capacity)
    ideal = [round(value, 9) for value in ideal]
    counts = [
        min(max(math.floor(value), least), most)
        for value, least, most in zip(ideal, floors, capacity, strict=True)
    ]
    while missing := total - sum(counts):
        unit = 1 if missing > 0 else -1
        over = [round(count - value, 9) for count, value in zip(counts, ideal, strict=True)]
        # The earlier layer is the first to get a unit and the last to lose one.
        movable = [
            i for i in range(len(counts))[::unit] if floors[i] <= counts[i] + unit <= capacity[i]
        ]
        movable.sort(key=over.__getitem__, reverse=unit < 0)
        for i in movable[: abs(missing)]:
            counts[i] += unit
    return counts


def check_total(total: int, least: Sequence[int], most: Sequence[int]) -> None:
    """Raise unless ``total`` lies between the sums of what layers need and can take."""
    needed, there = sum(least), sum(most)
    if total > there:
        raise ValueError(
            f"cannot place {total} live units: the {len(most)} layers can take {there} in all, "
            "which is the largest total; lower the density."
        )
    if total < needed:
        density = needed / max(there, 1)
        raise ValueError(
            f"{total} live units are too few for {len(least)} layers, none of which may die: the "
            f"smallest total is {needed} of {there}, so the largest reachable sparsity is "
            f"{1 - density:.6g} (density {density:.4g}); raise the density, or leave layers out "
            "with exclude=."
        )


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Split ``total`` by size so that no share falls when the total rises (Webster).

    Largest remainders would, now and then: a ramp of several optimizers could then not
    keep both its parts and its sum.

    Args:
        total: Units to split, at most the sum of ``sizes``.
        sizes: Units that there are.

    Example:
        >>> shares(655, [72, 2112])
        [22, 633]
    """
    whole = max(sum(sizes), 1)
    least = 1 if total >= len(sizes) else 0  # no part is left without anything
    counts = [max(total * size // whole - len(sizes), min(least, size)) for size in sizes]
    while sum(counts) < total:
        open_ = [i for i, size in enumerate(sizes) if counts[i] < size]
        counts[max(open_, key=lambda i: (sizes[i] / (2 * counts[i] + 1), -i))] += 1
    return counts
