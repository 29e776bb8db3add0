"""Window: at which optimizer steps a method acts, and how far along it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal


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


@dataclass(frozen=True)
class Window:
    """When updates run. Steps are counted per optimizer, from 1.

    Due at ``start <= t <= end`` with ``(t - start) % every == 0``. Where the density changes
    over the window, also at ``end``, so that it arrives. A due update whose step is skipped
    (by a GradScaler, say) waits for the next.

    Args:
        every: Interval in optimizer steps, or "epoch": the last step of each epoch.
        start: First step (int) or fraction of training (float).
        end: Last step (int) or fraction of training (float).

    Raises:
        ValueError: If ``every`` is not positive, a time is negative or a fraction above 1,
            ``end`` is the int 1, or ``end`` comes before ``start``.
    """

    every: int | Literal["epoch"] = 100
    start: int | float = 0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        for name in ("every", "start", "end"):  # numbers of NumPy are numbers too
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, int | float):
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, plain)
        if self.every != "epoch" and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise ValueError(
                f"update_interval={self.every!r} must be a positive number of optimizer steps "
                'or "epoch".'
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
class Steps:
    """A :class:`Window` in optimizer steps, counted from 1.

    Args:
        every: Interval in steps, or "epoch".
        start: First step.
        end: Last step.
        arrives: Whether an update is due at ``end`` in any case.
    """

    every: int | Literal["epoch"]
    start: int
    end: int
    arrives: bool = False

    def due(self, step: int, last_of_epoch: bool = False) -> bool:
        """Whether an update follows optimizer step ``step``."""
        if not max(self.start, 1) <= step <= self.end:
            return False
        if self.arrives and step == self.end:
            return True
        return last_of_epoch if self.every == "epoch" else (step - self.start) % self.every == 0

    @property
    def jumps(self) -> bool:
        """Whether an interval in steps is so long that only the end is due."""
        return self.every != "epoch" and self.every > self.end - self.start > 0

    def opens(self, total: float) -> bool:
        """Whether a training of ``total`` steps may reach a step that is due."""
        first = max(self.start, 1) if self.every == "epoch" else self.start or self.every
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
