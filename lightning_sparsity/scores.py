"""Scores: which weight matters. A score maps a layer to a tensor of the weight's shape.

Larger means keep, or grow first. Scores are not negative, so that a structure may add
them up over a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_sparsity.core.layer import Layer

_F = TypeVar("_F", bound=Callable[..., Any])


def without_gradient(function: _F) -> _F:
    """Mark a score, rule or distribution that never reads ``layer.grad``.

    The engine keeps a copy of the dense gradients on update steps for every part that
    is not marked.
    """
    function.needs_gradient = False  # type: ignore[attr-defined]
    return function


def needs_gradient(part: object) -> bool:
    """Whether a score, rule or distribution reads ``layer.grad`` (True if it doesn't say)."""
    return bool(getattr(part, "needs_gradient", True))


@without_gradient
def magnitude(layer: Layer) -> Tensor:
    r""":math:`|w|`."""
    return layer.weight.abs()


def gradient(layer: Layer) -> Tensor:
    r""":math:`|\nabla L|`, from the dense gradient of the last optimizer step."""
    return _grad(layer, "gradient").abs()


def saliency(layer: Layer) -> Tensor:
    r""":math:`|w \cdot \nabla L|`, first-order change of the loss (Mozer and Smolensky, 1989)."""
    return (layer.weight * _grad(layer, "saliency")).abs_()


@without_gradient
def random(layer: Layer) -> Tensor:
    """Uniform in [0, 1), from the layer's own generator.

    ``drop(random)`` and ``grow(random)`` draw positions directly instead of ranking
    these values.
    """
    values = torch.rand(layer.shape, generator=layer.generator)
    return values.to(layer.weight.device)


@dataclass(frozen=True)
class slot:
    """Absolute value of one of the method's own tensors.

    Args:
        name: Key in ``layer.slots``.
    """

    name: str
    needs_gradient: ClassVar[bool] = False

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``.

        Raises:
            KeyError: If the layer has no such slot.
        """
        if self.name not in layer.slots:
            raise KeyError(
                f"{self!r}: {layer.name} has no slot {self.name!r}; it has {sorted(layer.slots)}. "
                "A slot is filled by the observe= of the callback."
            )
        return layer.slots[self.name].abs()


momentum = slot("momentum")
"""Absolute mean of dense gradients, gathered by ``observe=average_gradient(beta)``."""


@dataclass(frozen=True)
class average_gradient:
    """An ``observe=`` that keeps the running mean of dense gradients in the slot "momentum".

    Args:
        beta: Share of the old mean that stays at every step, in [0, 1).

    Raises:
        ValueError: If ``beta`` lies outside [0, 1).
    """

    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"{self}: beta must lie in [0, 1); 0.9 is usual.")

    def __call__(self, layer: Layer) -> Mapping[str, Tensor]:
        """The new mean, by slot name; one dense tensor per layer."""
        grad = _grad(layer, "average_gradient")
        mean = layer.slots.get("momentum")
        mean = torch.zeros_like(grad) if mean is None else mean
        return {"momentum": mean.lerp(grad, 1 - self.beta)}


def _grad(layer: Layer, score: str) -> Tensor:
    if layer.grad is None:
        raise ValueError(
            f"{score}: {layer.name} has no gradient here. Scores of gradients work in updates "
            "during training; at the start use magnitude or random."
        )
    return layer.grad
