"""Window: at which optimizer steps a method acts, and how far along it is."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, TypeGuard


def resolve(time: int | float, total: float) -> int:
    """Turn a time into an optimizer step: an int is a step, a float a fraction of training.

    Raises:
        ValueError: If a fraction is asked of a training without a known end.
    """
    if isinstance(time, int) or time == 0:
        return int(time)
    if not (math.isfinite(total) and total > 0):
        raise ValueError(
            f"{time} is a fraction of training, but the number of steps is not known in advance "
            "(no max_steps or max_epochs, or a data set without a length). Give optimizer steps "
            "as an int, or set Trainer(max_steps=...)."
        )
    return max(1, round(time * total))


def is_time(value: object) -> bool:
    """Whether ``value`` can be a time: an int step >= 0 or a float fraction in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 if isinstance(value, int) else 0 <= value <= 1


def check_moment(where: str, value: object) -> None:
    """Raise unless ``value`` can be a moment of a round of training to go back to.

    Args:
        where: The call and argument, for the message.
        value: Good are an int step >= 0 and a float fraction in [0, 1).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    allowed = "an optimizer step (int >= 0) or a fraction of a round (float in [0, 1))"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}: must be {allowed}.")
    if not (value >= 0 if isinstance(value, int) else 0 <= value < 1):
        raise ValueError(f"{where}: must be {allowed}.")


@dataclass(frozen=True)
class epochs:
    """An interval of whole epochs: the last step of every ``number``-th epoch of training.

    ``epochs(1)`` is "epoch"; ``epochs(5)`` is due after epochs 5, 10 and so on, wherever a
    window starts.

    Args:
        number: Epochs from one update to the next, at least 1.

    Raises:
        TypeError: If ``number`` is not an integer.
        ValueError: If it is below 1.
    """

    number: int

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, Integral):
            raise TypeError(f"epochs({self.number!r}): number must be an integer >= 1.")
        if self.number < 1:
            raise ValueError(f"epochs({self.number!r}): number must be at least 1.")
        object.__setattr__(self, "number", int(self.number))  # numbers of NumPy are numbers too

    def __str__(self) -> str:
        return f"{self.number} epochs"


Interval = int | Literal["epoch"] | epochs
"""Time between updates: optimizer steps, "epoch", or ``epochs(n)``."""


@dataclass(frozen=True)
class Window:
    """When updates run. Steps are counted per optimizer, from 1.

    Due at ``start <= t <= end`` with ``(t - start) % every == 0``. Where the density changes
    over the window, also at ``end``, so that it arrives. A due update whose step is skipped
    (by a GradScaler, say) waits for the next.

    Args:
        every: Interval in optimizer steps, or "epoch": the last step of each epoch, or
            ``epochs(n)``: of every n-th epoch, counted from the start of training.
        start: First step (int) or fraction of training (float).
        end: Last step (int) or fraction of training (float).

    Raises:
        ValueError: If ``every`` is not positive, a time is negative or a fraction above 1,
            ``end`` is the int 1, or ``end`` comes before ``start``.
    """

    every: Interval = 100
    start: int | float = 0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        for name in ("every", "start", "end"):  # numbers of NumPy are numbers too
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, int | float):
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, plain)
        if not (self.every == "epoch" or isinstance(self.every, epochs)) and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise ValueError(
                f"update_interval={self.every!r} must be a positive number of optimizer steps, "
                '"epoch", or epochs(n).'
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            if not is_time(value):
                raise ValueError(
                    f"update_{name}={value!r} must be an optimizer step (int >= 0) or a fraction "
                    "of training (float in [0, 1])."
                )
        if isinstance(self.end, int) and self.end == 1:
            raise ValueError(
                "update_end=1 would be the first optimizer step; write update_end=1.0 for the end "
                "of training, or a larger number of steps."
            )
        if type(self.start) is type(self.end) and self.end < self.start:
            raise ValueError(
                f"update_end={self.end!r} comes before update_start={self.start!r}; exchange them."
            )

    def resolve(self, total: float, arrives: bool = False) -> Steps:
        """This window in steps.

        Args:
            total: Optimizer steps in the whole training.
            arrives: Whether an update is due at ``end`` in any case.

        Raises:
            ValueError: If a time is a fraction and ``total`` is unknown.
        """
        return Steps(self.every, resolve(self.start, total), resolve(self.end, total), arrives)


@dataclass(frozen=True)
class Ends(Window):
    """A window with two updates, one where it starts and one where it ends.

    Before step 1 nothing is due: with ``start`` 0 there is one update, at ``end``.
    """

    def resolve(self, total: float, arrives: bool = False) -> Steps:
        """This window in steps; see :class:`Window`."""
        steps = super().resolve(total, arrives=True)
        return replace(steps, every=max(1, steps.end - steps.start))


@dataclass(frozen=True)
class Asked(Window):
    """A window in which nothing is due by itself: the method asks for every update.

    See :meth:`~lightning_sparsity.core.keeper.MaskKeeper.update`.
    """

    def resolve(self, total: float, arrives: bool = False) -> Steps:
        """This window in steps; see :class:`Window`."""
        end = resolve(self.end, total) if math.isfinite(total) else sys.maxsize
        return Steps(self.every, resolve(self.start, total), end, arrives, asked=True)


@dataclass(frozen=True)
class Steps:
    """A :class:`Window` in optimizer steps, counted from 1.

    Args:
        every: Interval in steps or epochs.
        start: First step.
        end: Last step.
        arrives: Whether an update is due at ``end`` in any case.
        asked: Whether the method asks for every update, and none is due by itself.
    """

    every: Interval
    start: int
    end: int
    arrives: bool = False
    asked: bool = False

    @property
    def epochs(self) -> int | None:
        """The interval in epochs; None if it is in steps."""
        if isinstance(self.every, epochs):
            return self.every.number
        return 1 if self.every == "epoch" else None

    def counts(self, epoch: int) -> bool:
        """Whether the interval is one of epochs and ends with ``epoch``, counted from 0."""
        return self.epochs is not None and not self.asked and (epoch + 1) % self.epochs == 0

    def due(self, step: int, last_of_epoch: bool = False) -> bool:
        """Whether an update follows optimizer step ``step``.

        Args:
            step: Counted from 1.
            last_of_epoch: Whether it is the last of an epoch that counts.
        """
        if self.asked or not max(self.start, 1) <= step <= self.end:
            return False
        if self.arrives and step == self.end:
            return True
        return (step - self.start) % self.every == 0 if _in_steps(self.every) else last_of_epoch

    @property
    def jumps(self) -> bool:
        """Whether an interval in steps is so long that only the end is due."""
        return _in_steps(self.every) and self.every > self.end - self.start > 0

    def opens(self, total: float, epochs: float = math.inf) -> bool:
        """Whether a training may reach a step that is due.

        Args:
            total: Its optimizer steps.
            epochs: Its epochs.
        """
        if self.asked:
            return self.start <= min(self.end, total)
        first: float = self.start or self.every if _in_steps(self.every) else max(self.start, 1)
        if self.epochs is not None and self.epochs > epochs:
            first = math.inf
        if self.arrives and max(self.start, 1) <= self.end:
            first = min(first, self.end)
        return first <= min(self.end, total)

    def progress(self, step: int) -> float:
        """How much of the window has passed at ``step``, in [0, 1]."""
        if step >= self.end:
            return 1.0
        if step <= self.start:
            return 0.0
        return (step - self.start) / (self.end - self.start)


def _in_steps(every: Interval) -> TypeGuard[int]:
    return isinstance(every, int)
