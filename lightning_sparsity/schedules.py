"""Schedules: how a value changes over training.

A schedule maps training progress in [0, 1] to a value: a drop fraction, a density, a
temperature. Progress outside [0, 1] is clamped. No schedule counts steps: a window turns
steps into progress. One-shot pruning is :class:`constant`.

Schedules with a ``start`` and an ``end`` return these very numbers at progress 0 and 1.
A ramp of the density from ``1 - s0`` to ``1 - s1`` is the published ramp of the sparsity
from ``s0`` to ``s1``: for every schedule of the form ``end + (start - end) * left`` the
algebra is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_sparsity.core.layer import Curve, Ramp, Schedule, call_of
from lightning_sparsity.core.numbers import plain, settle


@dataclass(frozen=True)
class constant(Curve):
    """The same value throughout.

    Args:
        value: Any finite number.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is not finite.

    Example:
        >>> constant(0.3)(0.5)
        0.3
    """

    value: float

    def __post_init__(self) -> None:
        _check(self, "value")

    def __call__(self, progress: float) -> float:
        """The value, whatever the ``progress``."""
        return self.value


@dataclass(frozen=True)
class linear(Curve):
    r"""A straight line: :math:`end + (start - end)(1 - x)`.

    Args:
        start: Value at progress 0.
        end: Value at progress 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite.

    Example:
        >>> [linear(0.3)(x) for x in (0, 0.5, 1)]
        [0.3, 0.15, 0.0]
    """

    start: float
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return _between(self.start, self.end, 1 - _clamp(progress))


@dataclass(frozen=True)
class cosine(Curve):
    r"""Half a cosine: :math:`end + \frac{start - end}{2}(1 + \cos \pi x)`.

    The drop fraction of RigL (Evci et al., 2020, Sec. 3) with ``end=0``; the code of SNFS
    and GraNet ends at the floor ``end=0.005``.

    Args:
        start: Value at progress 0.
        end: Value at progress 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite.

    Example:
        >>> [round(cosine(0.3)(x), 5) for x in (0, 0.25, 0.5, 1)]
        [0.3, 0.25607, 0.15, 0.0]
    """

    start: float
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return _between(self.start, self.end, (1 + math.cos(math.pi * _clamp(progress))) / 2)


@dataclass(frozen=True)
class inverse_power(Curve):
    r"""A power of what is left: :math:`start \, (1 - x)^{power}`.

    google-research/rigl calls it ``exponential_<power>``.

    Args:
        start: Value at progress 0; the value at 1 is 0.
        power: Exponent, above 0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite, or ``power`` is not above 0.

    Example:
        >>> inverse_power(0.3, power=3)(0.5)
        0.0375
    """

    start: float
    power: float = 3

    def __post_init__(self) -> None:
        _check(self, "start")
        _check(self, "power", above=0)

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return _between(self.start, 0.0, (1 - _clamp(progress)) ** self.power)


@dataclass(frozen=True)
class cubic(Curve):
    r"""The ramp of gradual magnitude pruning (Zhu and Gupta, 2017, Eq. 1).

    :math:`end + (start - end)(1 - x)^3`, here from one density to another. The paper
    states it for the sparsity; with ``density = 1 - sparsity`` the formula is the same.

    Args:
        start: Density at progress 0.
        end: Density at progress 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite.

    Example:
        >>> [round(cubic(1.0, 0.1)(x), 4) for x in (0, 0.5, 1)]
        [1.0, 0.2125, 0.1]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self, "start", "end")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return _between(self.start, self.end, (1 - _clamp(progress)) ** 3)


@dataclass(frozen=True)
class exponential(Curve):
    r"""Equal ratios: :math:`start^{1 - x} \, end^x`.

    ``exponential(1.0, d)`` is the density :math:`d^{k/N}` after :math:`k` of :math:`N`
    prunings, each of which removes the same share of what is left. Where the share is
    given and not the end, see :class:`geometric`; to end at 0, :class:`cosine`.

    Args:
        start: Value at progress 0, above 0.
        end: Value at progress 1, above 0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite, or not above 0.

    Example:
        >>> [round(exponential(1.0, 0.01)(x), 4) for x in (0, 0.5, 1)]
        [1.0, 0.1, 0.01]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(self, "start", "end", above=0)

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        x = _clamp(progress)
        return math.pow(self.start, 1 - x) * math.pow(self.end, x)


@dataclass(frozen=True)
class geometric(Curve):
    r"""The same factor at every update: :math:`start \cdot gamma^{updates \cdot x}`.

    ``geometric(1.0, 0.8, updates=20)`` is iterative magnitude pruning of a fifth of the
    weights twenty times: :math:`d_k = 0.8^k` at progress :math:`k / 20`.

    Args:
        start: Value at progress 0.
        gamma: Factor per update, above 0.
        updates: Number of updates from progress 0 to 1, above 0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite, or ``gamma`` or ``updates`` is not above 0.

    Example:
        >>> [round(geometric(0.3, 0.99, updates=100)(x), 5) for x in (0, 0.25, 1)]
        [0.3, 0.23335, 0.10981]
    """

    start: float
    gamma: float
    updates: float

    def __post_init__(self) -> None:
        _check(self, "start")
        _check(self, "gamma", "updates", above=0)

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.start * math.pow(self.gamma, self.updates * _clamp(progress))


@dataclass(frozen=True)
class step(Curve):
    """Piecewise constant: multiplied by a factor at each milestone.

    Args:
        value: Value at progress 0.
        factors: Milestones, in (0, 1], and the factor each applies from there on; a
            mapping or pairs.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is not finite, or a milestone lies outside (0, 1].

    Example:
        Milestones at epochs 90 and 120 of 160, as in MEST:

        >>> mest = step(0.1, {90 / 160: 0.5, 120 / 160: 0.0})
        >>> [mest(epoch / 160) for epoch in (0, 89, 90, 120)]
        [0.1, 0.1, 0.05, 0.0]
    """

    value: float
    factors: Mapping[float, float] | Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        _check(self, "value")
        try:
            factors = {plain(at): plain(factor) for at, factor in dict(self.factors).items()}
        except (TypeError, ValueError):
            raise TypeError(
                f"{self}: factors must be a mapping or pairs of numbers, such as {{0.5: 0.1}}."
            ) from None
        for milestone, factor in factors.items():
            _check_number(self, "milestone", milestone, above=0)
            _check_number(self, f"factor at {milestone}", factor)
            if milestone > 1:
                raise ValueError(
                    f"{self}: milestone {milestone} must lie in (0, 1]; it is a fraction of the "
                    "whole, so write 90 / 160 for epoch 90 of 160."
                )
        object.__setattr__(self, "factors", tuple(sorted(factors.items())))

    def __call__(self, progress: float) -> float:
        """Value at ``progress``; a milestone counts as passed when it is reached."""
        x = _clamp(progress)
        passed = [factor for milestone, factor in dict(self.factors).items() if x >= milestone]
        return self.value * math.prod(passed)


@dataclass(frozen=True)
class sigmoid(Curve):
    r"""An S-shaped ramp, OptG Eq. 16 (Zhang et al., 2022).

    The paper's sparsity at epoch :math:`k` of :math:`\tau` is
    :math:`P_k = P / (1 + \exp(-\alpha(k - \tau/2)))`. With :math:`x = k / \tau`, a
    ``steepness`` :math:`s = \alpha\tau` and any ``start`` and ``end``:

    .. math:: start + (end - start) \, \frac{\sigma(s(x - 1/2)) - \sigma(-s/2)}
              {\sigma(s/2) - \sigma(-s/2)}

    Eq. 16 itself (``normalize=False``) has no such shift and scale: it starts at
    :math:`\sigma(-s/2)` of the way and never arrives. Departure from the paper: at
    progress 1 it is ``end`` all the same.

    Args:
        start: Value at progress 0, if normalised.
        end: Value at progress 1.
        steepness: :math:`\alpha\tau`, above 0. The paper's :math:`\alpha = 0.5` per
            epoch over 160 epochs gives 80.
        normalize: Shift and scale the curve so that it starts at ``start`` and runs
            into ``end``; matters for a steepness below 20 or so.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is not finite, or ``steepness`` is not above 0.

    Example:
        >>> [round(sigmoid(0.0, 0.9)(epoch / 160), 5) for epoch in (0, 70, 80, 90, 160)]
        [0.0, 0.00602, 0.45, 0.89398, 0.9]
    """

    start: float
    end: float
    steepness: float = 80.0
    normalize: bool = True

    def __post_init__(self) -> None:
        _check(self, "start", "end")
        _check(self, "steepness", above=0)
        if not isinstance(self.normalize, bool):
            raise TypeError(f"{self}: normalize must be True or False.")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        x = _clamp(progress)
        if x == 1:
            return self.end
        # 1 - sigma(z) = (1 - tanh(z / 2)) / 2, which cannot overflow.
        bend = self.steepness / 4
        scale = math.tanh(bend) if self.normalize else 1.0
        return _between(self.start, self.end, (1 - math.tanh(bend * (2 * x - 1)) / scale) / 2)


@dataclass(frozen=True)
class cyclic(Curve):
    r"""Down and up again: :math:`low + \frac{high - low}{2}(1 + \cos((2c - 1) \pi x))`.

    Starts at ``high``, reaches ``low`` ``c = cycles`` times, the last time at the end.
    One cycle is ``cosine(high, low)``.

    Args:
        low: Smallest value, and the value at progress 1.
        high: Largest value, and the value at progress 0.
        cycles: How often ``low`` is reached, an integer >= 1.

    Raises:
        TypeError: If an argument is not a number, or ``cycles`` not an integer.
        ValueError: If it is not finite, ``low`` exceeds ``high``, or ``cycles`` is below 1.

    Example:
        >>> [round(cyclic(0.1, 0.5, cycles=2)(x / 3), 5) for x in range(4)]
        [0.5, 0.1, 0.5, 0.1]
    """

    low: float
    high: float
    cycles: int

    def __post_init__(self) -> None:
        _check(self, "low", "high")
        _check(self, "cycles", above=0)
        if not isinstance(self.cycles, int):
            raise TypeError(f"{self}: cycles must be an integer, not {self.cycles!r}.")
        if self.low > self.high:
            raise ValueError(f"{self}: low must not exceed high; swap the two.")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        turns = (2 * self.cycles - 1) * _clamp(progress)
        return _between(self.high, self.low, (1 + math.cos(math.pi * turns)) / 2)


@dataclass(frozen=True)
class early(Curve):
    """Another schedule, over before progress 1; its last value then stays.

    Args:
        schedule: The schedule.
        at: Progress at which it is over, in (0, 1].

    Raises:
        TypeError: If ``schedule`` cannot be called, or ``at`` is not a number.
        ValueError: If ``at`` lies outside (0, 1].

    Example:
        >>> [early(linear(0.3), 0.5)(x) for x in (0, 0.25, 0.5, 1)]
        [0.3, 0.15, 0.0, 0.0]
    """

    schedule: Schedule
    at: float

    def __post_init__(self) -> None:
        settle(self, "at")
        _check_early(self, self.schedule, self.at)

    def __repr__(self) -> str:
        return f"early({call_of(self.schedule)}, {self.at!r})"

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.schedule(_clamp(progress / self.at))


@dataclass(frozen=True)
class until:
    """A ramp that arrives before progress 1 and then holds, for methods that go on after it.

    Args:
        ramp: A ramp between two densities, such as :class:`cubic`.
        at: Progress at which it arrives, in (0, 1].

    Raises:
        TypeError: If ``ramp`` cannot be called, or ``at`` is not a number.
        ValueError: If ``at`` lies outside (0, 1].

    Example:
        >>> ramp = until(cubic, 0.5)
        >>> [round(ramp(1.0, 0.1)(x), 4) for x in (0, 0.25, 0.5, 1)]
        [1.0, 0.2125, 0.1, 0.1]
    """

    ramp: Ramp
    at: float

    def __post_init__(self) -> None:
        settle(self, "at")
        _check_early(self, self.ramp, self.at, Curve)

    def __repr__(self) -> str:
        return f"until({call_of(self.ramp)}, {self.at!r})"

    def __call__(self, start: float, end: float) -> Curve:
        """The schedule from ``start`` to ``end``."""
        return early(self.ramp(start, end), self.at)


Phases = Sequence[tuple[float, float]]
"""Beginnings and ends of phases, as fractions of a window."""


@dataclass(frozen=True)
class alternating:
    """A ramp that is at its final density in compressed phases, and dense outside of them.

    Args:
        compressed: Beginnings and ends of the phases, rising from 0 to 1. A phase begins at its
            first fraction and ends before its second; progress 1 is always compressed.

    Example:
        >>> density = alternating([(0.2, 0.5), (0.8, 1.0)])(1.0, 0.1)
        >>> [density(x) for x in (0, 0.2, 0.5, 0.8, 1)]
        [1.0, 0.1, 1.0, 0.1, 0.1]
    """

    compressed: Phases = ()

    def __call__(self, start: float, end: float) -> Curve:
        """The schedule; ``start`` is not used, as dense is dense."""
        return _Alternation(self.compressed, end)

    def are_over(self, progress: float) -> bool:
        """Whether the last phase has begun."""
        return progress + _TINY >= self.compressed[-1][0]


@dataclass(frozen=True)
class _Alternation(Curve):
    compressed: Phases
    density: float

    def __call__(self, progress: float) -> float:
        x = progress + _TINY
        inside = any(begin <= x < end for begin, end in self.compressed)
        return self.density if inside or progress >= 1 else 1.0


_TINY = 1e-9  # fractions such as 0.1 + 0.2 lie beside the steps they mean


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


def _between(start: float, end: float, left: float) -> float:
    """``start`` where ``left`` is 1 and ``end`` where it is 0, both to the last bit."""
    return end + (start - end) * left if left < 1 else start


def _check(schedule: object, *arguments: str, above: float = -math.inf) -> None:
    """Raise unless these arguments of ``schedule`` are finite numbers above a bound."""
    settle(schedule, *arguments)
    for argument in arguments:
        _check_number(schedule, argument, getattr(schedule, argument), above)


def _check_number(schedule: object, argument: str, value: object, above: float = -math.inf) -> None:
    allowed = "a finite number" if above == -math.inf else f"a finite number above {above}"
    message = f"{schedule}: {argument} must be {allowed}, not {value!r}."
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(message)
    if not above < value < math.inf:
        raise ValueError(message)


def _check_early(what: object, part: object, at: object, *classes: type) -> None:
    if not callable(part) or (isinstance(part, type) and not issubclass(part, classes)):
        raise TypeError(f"{what}: {part!r} must be a schedule or ramp, such as cubic.")
    _check_number(what, "at", at, above=0)
    if at > 1:  # type: ignore[operator]
        raise ValueError(f"{what}: at must lie in (0, 1]; write 110 / 160 for epoch 110 of 160.")
