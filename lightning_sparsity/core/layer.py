"""Layer: the frozen view of one sparse weight that scores, rules and distributions read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_sparsity.ops.live import Live
from lightning_sparsity.ops.sharded import Gathered, Sharded
from lightning_sparsity.structures import Layout, Structure, Unstructured


@dataclass(frozen=True, eq=False)
class Layer:
    """One sparse weight at one moment. Rules return changed copies, never write.

    Args:
        name: Plain parameter name, such as ``net.0.weight``.
        weight: The weight, detached.
        mask: Same shape, bool, True = live.
        grad: Dense gradient of the last optimizer step, or None if it was not kept.
        slots: The method's own tensors, by name.
        statistics: Inputs and output gradients of this step's micro-batches, by name, if
            the method asked for them.
        structure: What one unit is.
        layout: Where outputs and inputs lie.
        generator: CPU generator of this layer and update, the same on every rank.
        bias: The bias of the layer's output units, detached, if it has one.
        lr: Learning rate of the optimizer step that was just made, if there is one.
        weight_decay: Of the weight, as its optimizer has it; None: no optimizer steps it.
        place: Number of the layer among all linear and convolutional layers of the model, in
            its order; None: unknown.
        barred: Same shape as the mask, True = may not come to life in this update as long
            as there is room elsewhere; None: nothing is.
    """

    name: str
    weight: Tensor
    mask: Tensor
    grad: Tensor | None = None
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    structure: Structure = field(default_factory=Unstructured)
    layout: Layout = field(default_factory=Layout)
    generator: torch.Generator | None = None
    bias: Tensor | None = None
    lr: float | None = None
    weight_decay: float | None = None
    place: int | None = None
    barred: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    @cached_property
    def size(self) -> int:
        """Number of units, live or not (weights, if unstructured)."""
        return self.structure.size(self.shape, self.layout)

    @cached_property
    def units(self) -> Tensor:
        """Which units are live: ``(size,)`` bool."""
        return self.structure.live(self.mask, self.layout)

    @cached_property
    def live(self) -> int:
        """Number of live units."""
        return int(self.units.count_nonzero())

    @property
    def free(self) -> Tensor:
        """Weights that may come to life: bool, shape of the weight."""
        return ~self.mask if self.barred is None else ~(self.mask | self.barred)

    def reduce(self, score: Tensor) -> Tensor:
        """Sum a per-weight score over each unit: ``(size,)``."""
        return self.structure.reduce(score, self.layout)

    def ranked(self, score: Tensor, among: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A per-weight score by unit, to choose among some units.

        Args:
            score: Shape of the weight.
            among: The units to choose among, ``(size,)`` bool.

        Returns:
            Scores, and which of them count; and None, as both are ``(size,)``, or the units that
            they belong to, if the score is known at live weights alone and no other counts.
        """
        if isinstance(score, Live) and isinstance(self.structure, Unstructured):
            places = score.positions
            there = among[places]
            if int(there.count_nonzero()) == int(among.count_nonzero()):
                return score.values_there, there, places
        return self.reduce(score), among, None

    def gathered(self) -> Layer:
        """This layer with whole tensors, for rules that do not work on parts.

        Masks and slots are gathered at once, weight and gradient when somebody computes with them.
        """
        if not any(isinstance(tensor, Sharded) for tensor in (self.weight, self.mask)):
            return self
        slots = {key: _gathered(slot) for key, slot in self.slots.items()}
        return dataclasses.replace(
            self,
            weight=_when_read(self.weight),
            mask=_gathered(self.mask),
            grad=None if self.grad is None else _when_read(self.grad),
            slots=slots,
            barred=None if self.barred is None else _gathered(self.barred),
        )

    def with_units(self, units: Tensor) -> Layer:
        """This layer with the mask whose live units are ``units``, ``(size,)`` bool."""
        mask = self.structure.expand(units, self.shape, self.layout)
        return dataclasses.replace(self, mask=mask)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.formed() if isinstance(tensor, Sharded) else tensor


def _when_read(tensor: Tensor) -> Tensor:
    return Gathered(tensor) if isinstance(tensor, Sharded) else tensor


def dense_layers(shapes: Mapping[str, Sequence[int]]) -> list[Layer]:
    """Layers that have a shape and no data, to try distributions without a model.

    Example:
        >>> [layer.size for layer in dense_layers({"fc1": (300, 784), "fc2": (10, 300)})]
        [235200, 3000]
    """
    return [
        Layer(
            name=name,
            weight=torch.empty(tuple(shape), device="meta"),
            mask=torch.ones((), dtype=torch.bool).expand(tuple(shape)),
        )
        for name, shape in shapes.items()
    ]


def density_of(layers: Sequence[Layer]) -> float:
    """Live share of all units of some layers."""
    return sum(layer.live for layer in layers) / sum(layer.size for layer in layers)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Put ``name`` before the text of a TypeError or ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def works_on_parts(part: object) -> bool:
    """Whether a rule, score or ``observe=`` works on sharded layers without gathering them."""
    owner = getattr(part, "__self__", None)  # momentum(0.9).observe is as its score
    return bool(getattr(owner if isinstance(owner, Scorer) else part, "on_parts", False))


def call_of(part: object) -> str:
    """The name of a function, the repr of anything else, for messages and reprs."""
    return getattr(part, "__name__", repr(part))


Layers = Sequence[Layer]
"""The layers that a rule or a distribution works on."""

Budget = Sequence[int]
"""Live units per layer."""

Score = Callable[[Layer], Tensor]
"""Per-weight score, shape of the weight; larger = keep, or grow first."""

Distribution = Callable[[Layers, int], list[int]]
"""Splits a total over the live units of each layer; exact, never more than ``layer.live``."""

Schedule = Callable[[float], float]
"""Maps training progress in [0, 1] to a value."""


class Curve:
    """Base of the schedules that are classes; command lines look for it."""

    def __call__(self, progress: float) -> float:
        """Value at ``progress``, in [0, 1]."""
        raise NotImplementedError


class Scorer:
    """Base of the scores that are classes; command lines look for it."""

    def __call__(self, layer: Layer) -> Tensor:
        """Per-weight score of ``layer``, shape of its weight."""
        raise NotImplementedError


class Verb:
    """Base of the rules that are classes; command lines look for it."""

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """The layers, changed."""
        raise NotImplementedError


Ramp = Callable[[float, float], Curve] | Callable[[float, float], Schedule]
"""``ramp(start, end)`` is a schedule: a schedule class such as ``cubic``, or a function."""

Rule = Callable[[Layers, Budget, float], Layers]
"""Turns layers into layers, given live units per layer and progress in [0, 1]. Pure."""
