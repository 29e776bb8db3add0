"""What compressing a model did, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_sparsity.reports import quantity, table


@dataclass(frozen=True)
class Choice:
    """What became of one weight.

    Args:
        name: Of the layer in the model, empty if it is the model; of the parameter, if it is in
            a module that is never replaced.
        shape: Of the weight.
        density: Live weights / weights.
        dense_bytes: Of the dense weight.
        layout: What the layer has now.
        bytes: Of the weight as it is now.
        seconds: Time by layout, as far as it was measured: of all calls of the layer in one
            forward pass of the model.
        refused: Why other layouts are not possible, by layout.
        reason: Why no other layout was tried; empty if one was.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    dense_bytes: int
    layout: str
    bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def explanation(self) -> str:
        """Why the layer is dense; empty if it is not, or was asked to be."""
        if self.layout != "dense" or self.reason:
            return self.reason
        told = [
            f"{layout} takes {quantity(seconds, 's')}"
            for layout, seconds in self.seconds.items()
            if layout != "dense"
        ]
        told += [f"no csr: {why}" for layout, why in self.refused.items() if layout == "csr"]
        return ", ".join(told)


@dataclass(frozen=True)
class Compression:
    """What :func:`~lightning_sparsity.compress` did. Printed, it is a table.

    Args:
        layers: All weights of which a quarter or more is zero.
        dense_seconds: Of one forward pass of the model on the example.
        seconds: Of one of the compressed model.

    Example:
        >>> fc = Choice("fc", (64, 512), 0.05, 131_072, "csr", 13_368, {"dense": 9e-6, "csr": 4e-6})
        >>> print(Compression((fc,), dense_seconds=2e-5, seconds=1.4e-5))
        layer       |    shape | density | layout | time dense |     now | bytes dense |     now
        ----------------------------------------------------------------------------------------
        fc          | 64 x 512 |  0.0500 |    csr |    9.00 µs | 4.00 µs |      131 kB | 13.4 kB
        ----------------------------------------------------------------------------------------
        whole model |          |         |        |    20.0 µs | 14.0 µs |      131 kB | 13.4 kB
    """

    layers: tuple[Choice, ...]
    dense_seconds: float
    seconds: float

    @property
    def layouts(self) -> dict[str, str]:
        """The layout of each layer that was not left out, for ``compress(layout=...)``."""
        return {choice.name: choice.layout for choice in self.layers if not choice.reason}

    def __str__(self) -> str:
        header = ["layer", "shape", "density", "layout", "time dense", "now", "bytes dense", "now"]
        rows = [
            [
                choice.name or "(the model)",
                " x ".join(map(str, choice.shape)),
                f"{choice.density:.4f}",
                choice.layout,
                _time(choice.seconds.get("dense")),
                _time(choice.seconds.get(choice.layout)),
                quantity(choice.dense_bytes, "B"),
                quantity(choice.bytes, "B"),
            ]
            for choice in self.layers
        ]
        before = quantity(sum(choice.dense_bytes for choice in self.layers), "B")
        now = quantity(sum(choice.bytes for choice in self.layers), "B")
        times = _time(self.dense_seconds), _time(self.seconds)
        lines = [table(header, [*rows, ["whole model", "", "", "", *times, before, now]])]
        lines += [
            f"{choice.name or '(the model)'} is dense: {choice.explanation}."
            for choice in self.layers
            if choice.layout == "dense" and choice.explanation
        ]
        return "\n".join(lines)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else quantity(seconds, "s")
