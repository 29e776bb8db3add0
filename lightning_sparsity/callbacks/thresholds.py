"""Thresholds: numbers that the weights of a layer, or of each of its output units, share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.structures import Rows

Granularity = Literal["layer", "output"]
"""What shares one number: all weights of a layer, or those of each neuron or filter."""


def thresholds(layer: Layer, granularity: Granularity, value: float) -> Tensor:
    """Start values, float32: 0-dim, or ``(output units,)``.

    Args:
        layer: Whose weights they are for.
        granularity: What shares one number.
        value: Every one of them.
    """
    shape = () if granularity == "layer" else (Rows().size(layer.shape, layer.layout),)
    return torch.full(shape, value, dtype=torch.float32, device=layer.weight.device)


def spread(values: Tensor, layer: Layer) -> Tensor:
    """What :func:`thresholds` made, as a tensor to compare weights with; differentiable."""
    values = values.to(layer.weight.dtype)
    return values if values.ndim == 0 else Rows().expand(values, layer.shape, layer.layout)


def check_granularity(name: str, value: object) -> None:
    """Raise unless ``value`` is one of :data:`Granularity`.

    Args:
        name: Of the callback.
        value: What it was given.

    Raises:
        ValueError: If it is something else.
    """
    if value not in ("layer", "output"):
        raise ValueError(
            f'{name}(granularity={value!r}): must be "layer", one threshold for all weights of a '
            'layer, or "output", one for those of each neuron or filter.'
        )
