"""Numbers: those of NumPy are numbers too."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeVar, cast

_T = TypeVar("_T")


def plain(value: _T) -> _T:
    """A number as an int or float of Python's own; anything else as it is.

    So that it has their precision, prints and compares as they do, and may lie in a checkpoint.

    Example:
        >>> from fractions import Fraction
        >>> plain(Fraction(1, 4)), plain(True), plain("epoch")
        (0.25, True, 'epoch')
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return cast("_T", int(value) if isinstance(value, Integral) else float(value))


def settle(part: object, *names: str) -> None:
    """Make numbers of a frozen dataclass plain, at the beginning of its ``__post_init__``.

    Args:
        part: The new instance.
        names: Of the fields.
    """
    for name in names:
        object.__setattr__(part, name, plain(getattr(part, name)))
