"""The density of every layer over time, recorded in bounded space and drawn as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Nine points of the viridis colour map: even steps in lightness, also for the colour-blind.
_VIRIDIS = [
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
]

# Letters of three by five dots: every octal digit is a row.
_FONT = dict(
    re.findall(
        r"(\S)=(\d+)",
        "a=25755 b=65656 c=34443 d=65556 e=74647 f=74644 g=34553 h=55755 i=72227 j=11152 "
        "k=55655 l=44447 m=57755 n=65555 o=25552 p=65644 q=25563 r=65655 s=34216 t=72222 "
        "u=55557 v=55552 w=55775 x=55255 y=55222 z=71247 0=75557 1=26227 2=71747 3=71717 "
        "4=55711 5=74717 6=74757 7=71222 8=75757 9=75717 .=00002 _=00007 -=00700 ,=00024",
    )
)

# In pixels. TensorBoard shows pictures some 350 pixels wide, so there is little room.
_WIDTH = 176
_LETTER = 8  # width of a letter and the space behind it
_HEIGHT = 10
_GAP = 6
_BAR = 12
_MAX_NAME = 18  # in letters


class DensityHistory:
    """Densities of all layers at every update, thinned evenly when there are too many.

    Args:
        names: The layers.
        size: At most so many moments are kept; when there are more, every second one is.
    """

    def __init__(self, names: Sequence[str], size: int = 512) -> None:
        self._names = list(names)
        self._size = size
        self._stride = 1
        self._count = 0
        self._steps: list[int] = []
        self._values: list[list[float]] = []

    def record(self, step: int, densities: Mapping[str, float]) -> None:
        """Note the densities from ``step`` on."""
        if self._count % self._stride == 0:
            self._steps.append(step)
            self._values.append([densities[name] for name in self._names])
        self._count += 1
        if len(self._steps) > self._size:
            self._stride *= 2
            self._steps, self._values = self._steps[::2], self._values[::2]

    def picture(self, end: int, densities: Mapping[str, float]) -> Tensor | None:
        """Draw it: layers from top to bottom, time from left to right, colour for density.

        Args:
            end: The present step.
            densities: The present densities.

        Returns:
            ``(3, height, width)`` uint8; None if there is nothing to draw.
        """
        if not self._steps or not self._names:
            return None
        values = torch.tensor([*self._values, [densities[name] for name in self._names]])
        starts = torch.tensor([*self._steps, max(end, self._steps[-1])], dtype=torch.float64)
        times = torch.linspace(float(starts[0]), float(starts[-1]), _WIDTH, dtype=torch.float64)
        moments = torch.searchsorted(starts, times, right=True) - 1
        return draw(self._names, values[moments].T, (int(starts[0]), int(starts[-1])))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only."""
        return {
            "stride": self._stride,
            "count": self._count,
            "steps": list(self._steps),
            "values": torch.tensor(self._values, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._stride, self._count = state["stride"], state["count"]
        self._steps, self._values = list(state["steps"]), state["values"].tolist()


def draw(names: Sequence[str], densities: Tensor, steps: tuple[int, int]) -> Tensor:
    """A heat map with the names of the layers, the first and last step, and a scale.

    Args:
        names: The layers, from top to bottom.
        densities: ``(layers, width)``, in [0, 1].
        steps: First and last step on the horizontal axis.

    Returns:
        ``(3, height, width)`` uint8.
    """
    lowest = _lowest(densities)
    marks = [10.0**power for power in range(round(math.log10(lowest)), 1)]
    labels = [_label(name) for name in names]
    row = min(32, max(_HEIGHT + 4, 200 // len(names)))
    height, width = row * len(names), densities.shape[1]
    scale_height = max(height, len(marks) * (_HEIGHT + _GAP))
    top = _HEIGHT + 2 * _GAP
    left = _GAP + _LETTER * max(map(len, labels)) + _GAP
    bar = left + width + 2 * _GAP
    right = bar + _BAR + _GAP + _LETTER * max(len(f"{mark:g}") for mark in marks)
    canvas = torch.full((3, top + scale_height + _HEIGHT + 2 * _GAP, right), 255)
    canvas = canvas.to(torch.uint8)

    heat = colours(densities, lowest).repeat_interleave(row, dim=1)
    heat[:, row - 1 :: row] = 255  # a white line below each layer
    canvas[:, top : top + height, left : left + width] = heat
    for place, label in enumerate(labels):
        write(canvas, label, top + place * row + (row - _HEIGHT) // 2, left - _GAP, "right")
    below = top + height + _GAP // 2
    write(canvas, f"step {steps[0]:,}", below, left)
    write(canvas, f"{steps[1]:,}", below, left + width, "right")

    write(canvas, "density", _GAP // 2, right, "right")
    levels = lowest ** torch.linspace(0, 1, scale_height)
    canvas[:, top : top + scale_height, bar : bar + _BAR] = colours(levels, lowest).unsqueeze(-1)
    for mark in marks:
        place = round(math.log10(mark) / math.log10(lowest) * (scale_height - _HEIGHT))
        write(canvas, f"{mark:g}", top + place, bar + _BAR + _GAP)
    return canvas


def colours(densities: Tensor, lowest: float) -> Tensor:
    """Colours of densities on a logarithmic scale.

    Args:
        densities: Any shape, in [0, 1].
        lowest: Density of the darkest colour; the lightest stands for 1. Zero is black.

    Returns:
        ``(3, *shape)`` uint8.
    """
    points = torch.tensor(_VIRIDIS, dtype=torch.float32)
    share = 1 - densities.float().clamp(min=lowest).log10() / math.log10(lowest)
    place = share.clamp(0, 1) * (len(points) - 1)
    below = place.long().clamp(max=len(points) - 2)
    mixed = torch.lerp(points[below], points[below + 1], (place - below).unsqueeze(-1)).round()
    return (mixed * (densities > 0).unsqueeze(-1)).movedim(-1, 0).to(torch.uint8)


def write(canvas: Tensor, text: str, y: int, x: int, align: str = "left") -> None:
    """Write black text into a picture, in place. Letters without a shape are left blank.

    Args:
        canvas: ``(3, height, width)`` uint8.
        text: One line; capitals and small letters look the same.
        y: Its upper edge.
        x: Its left edge, or its right edge if ``align`` is "right".
        align: "left" or "right".
    """
    if align == "right":
        x -= _LETTER * len(text)
    for place, letter in enumerate(text.lower()):
        for line, digit in enumerate(_FONT.get(letter, "00000")):
            for dot in range(3):
                if int(digit) >> (2 - dot) & 1:
                    top, left = y + 2 * line, x + _LETTER * place + 2 * dot
                    canvas[:, top : top + 2, left : left + 2] = 0


def _label(name: str) -> str:
    short = name.removesuffix(".weight") or name
    return short if len(short) <= _MAX_NAME else ".." + short[2 - _MAX_NAME :]


def _lowest(densities: Tensor) -> float:
    """The power of ten at or below the lowest density, from 0.0001 to 0.1."""
    live = densities[densities > 0]
    smallest = float(live.min()) if len(live) else 1.0
    return float(min(0.1, max(1e-4, 10.0 ** math.floor(math.log10(smallest) + 1e-6))))
