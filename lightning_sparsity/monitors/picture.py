"""The density of every layer over time, recorded in bounded space and drawn as a picture."""

from __future__ import annotations

import math
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
_NOTHING = (0, 0, 0)
_WIDTH = 640
_BAR = 16
_GAP = 8
_MAX_NAME = 40


class DensityHistory:
    """Densities of all layers at every update, thinned evenly when there are too many.

    Args:
        names: The layers.
        size: At most so many moments are kept; half of them stay when there are more.
    """

    def __init__(self, names: Sequence[str], size: int = _WIDTH) -> None:
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
            ``(3, height, width)`` uint8; None if there is no layer or no moment to draw.
        """
        if not self._steps or not self._names:
            return None
        values = torch.tensor([*self._values, [densities[name] for name in self._names]])
        starts = torch.tensor([*self._steps, max(end, self._steps[-1])])
        times = torch.linspace(float(starts[0]), float(starts[-1]), _WIDTH)
        moments = torch.searchsorted(starts.float(), times, right=True) - 1
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


def colours(densities: Tensor, lowest: float) -> Tensor:
    """Colours of densities on a logarithmic scale.

    Args:
        densities: Any shape, in [0, 1].
        lowest: Density of the darkest colour; the lightest stands for 1. Zero is black.

    Returns:
        ``(3, *shape)`` uint8.
    """
    points = torch.tensor(_VIRIDIS, dtype=torch.float32)
    scale = 1 - densities.float().clamp(min=lowest).log10() / math.log10(lowest)
    place = scale.clamp(0, 1) * (len(points) - 1)
    below = place.floor().long().clamp(max=len(points) - 2)
    rest = (place - below).unsqueeze(-1)
    mixed = (points[below] * (1 - rest) + points[below + 1] * rest).round()
    mixed = torch.where((densities > 0).unsqueeze(-1), mixed, torch.tensor(_NOTHING).float())
    return mixed.movedim(-1, 0).to(torch.uint8)


def draw(names: Sequence[str], densities: Tensor, steps: tuple[int, int]) -> Tensor:
    """A heat map with the layers' names, the first and last step and a scale.

    Args:
        names: The layers, from top to bottom.
        densities: ``(layers, width)``, in [0, 1].
        steps: First and last step on the horizontal axis.

    Returns:
        ``(3, height, width)`` uint8.
    """
    from PIL import Image, ImageDraw, ImageFont  # TensorBoard's pictures need it anyway

    font = ImageFont.load_default()
    labels = [name if len(name) <= _MAX_NAME else "..." + name[3 - _MAX_NAME :] for name in names]
    row = min(32, max(14, 240 // len(names)))
    height, width = row * len(names), densities.shape[1]
    left = math.ceil(max(font.getlength(label) for label in labels)) + 2 * _GAP
    top, line = 2 * _GAP + 12, 12
    lowest = _lowest(densities)
    marks = [10.0**power for power in range(round(math.log10(lowest)), 1)]
    right = _BAR + 3 * _GAP + math.ceil(max(font.getlength(f"{mark:g}") for mark in marks))
    tall = max(height, 6 * row)

    canvas = torch.full((3, top + tall + 2 * line + _GAP, left + width + right), 255)
    canvas = canvas.to(torch.uint8)
    heat = colours(densities, lowest).repeat_interleave(row, dim=1)
    heat[:, row - 1 :: row] = 255  # a white line below each layer
    canvas[:, top : top + height, left : left + width] = heat
    scale = lowest ** torch.linspace(0, 1, tall)
    bar = left + width + _GAP
    canvas[:, top : top + tall, bar : bar + _BAR] = colours(scale, lowest).unsqueeze(-1)

    image = Image.fromarray(canvas.movedim(0, -1).contiguous().numpy())
    pen = ImageDraw.Draw(image)
    pen.text((left, _GAP), "density of each layer over time", fill="black", font=font)
    for place, label in enumerate(labels):
        middle = top + place * row + row // 2
        pen.text((left - _GAP, middle), label, fill="black", font=font, anchor="rm")
    below = top + height + _GAP // 2
    pen.text((left, below), f"step {steps[0]:,}", fill="black", font=font)
    pen.text((left + width, below), f"{steps[1]:,}", fill="black", font=font, anchor="ra")
    for mark in marks:
        at = top + (math.log10(mark) / math.log10(lowest)) * (tall - 1)
        pen.text((bar + _BAR + _GAP, at), f"{mark:g}", fill="black", font=font, anchor="lm")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).movedim(-1, 0)


def _lowest(densities: Tensor) -> float:
    """The power of ten at or below the lowest density, from 0.0001 to 0.1."""
    live = densities[densities > 0]
    smallest = float(live.min()) if len(live) else 1.0
    return float(min(0.1, max(1e-4, 10.0 ** math.floor(math.log10(smallest) + 1e-6))))
