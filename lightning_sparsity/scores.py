"""Scores: which weight matters. A score maps a layer to a tensor of the weight's shape.

Larger means keep, or grow first. Scores are not negative, so that a structure may add
them up over a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_sparsity.core.layer import Layer, Score, Scorer, works_on_parts
from lightning_sparsity.core.numbers import settle

_F = TypeVar("_F", bound=Callable[..., Any])


def without_gradient(function: _F) -> _F:
    """Mark a score, rule or distribution that never reads ``layer.grad``.

    The engine keeps a copy of the dense gradients on update steps for every part that
    is not marked.
    """
    function.needs_gradient = False  # type: ignore[attr-defined]
    return function


def entrywise(function: _F) -> _F:
    """Mark a score or rule that works on sharded layers: it reads no entry but by its place.

    For every part that is not marked, weights that lie in parts on several processes are gathered.
    What such a part writes to, it has made itself.
    """
    function.on_parts = True  # type: ignore[attr-defined]
    return function


def needs_gradient(part: object) -> bool:
    """Whether a score, rule or distribution reads ``layer.grad`` (True if it doesn't say)."""
    return bool(getattr(part, "needs_gradient", True))


def observed_by(*parts: object) -> Callable[[Layer], Mapping[str, Tensor]] | None:
    """The ``observe=`` that gathers what all these scores read; None if they need nothing."""
    found = tuple(o for part in parts if (o := getattr(part, "observe", None)) is not None)
    return found[0] if len(found) == 1 else _together(found) if found else None


@dataclass(frozen=True)
class _together:
    parts: tuple[Callable[[Layer], Mapping[str, Tensor]], ...]

    @property
    def on_parts(self) -> bool:
        """Whether all of them work on sharded layers."""
        return all(map(works_on_parts, self.parts))

    def __call__(self, layer: Layer) -> Mapping[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part(layer).items()}


@entrywise
@without_gradient
def magnitude(layer: Layer) -> Tensor:
    r""":math:`|w|`."""
    return layer.weight.abs()


@entrywise
def gradient(layer: Layer) -> Tensor:
    r""":math:`|\nabla L|`, from the dense gradient of the last optimizer step."""
    return _grad(layer, "gradient").abs()


@entrywise
def saliency(layer: Layer) -> Tensor:
    r""":math:`|w \cdot \nabla L|`, first-order change of the loss (Mozer and Smolensky, 1989)."""
    return (layer.weight * _grad(layer, "saliency")).abs_()


@entrywise
@without_gradient
def random(layer: Layer) -> Tensor:
    """Uniform in [0, 1), from the layer's own generator.

    ``drop(random)`` and ``grow(random)`` draw positions directly instead of ranking
    these values.
    """
    values = torch.rand(layer.shape, generator=layer.generator)
    return values.to(layer.weight.device)


@dataclass(frozen=True)
class slot(Scorer):
    """One of the method's own tensors, in absolute value or with its sign.

    Args:
        name: Key in ``layer.slots``.
        signed: Whether negative values rank below 0.

    Raises:
        TypeError: If an argument is of the wrong type.
    """

    name: str
    signed: bool = False
    needs_gradient: ClassVar[bool] = False
    on_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"{self}: name must be that of a slot, such as 'momentum'.")
        if not isinstance(self.signed, bool):
            raise TypeError(f"{self}: signed must be True or False.")

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
        found = layer.slots[self.name]
        return found if self.signed else found.abs()


@dataclass(frozen=True)
class momentum(Scorer):
    r"""Running mean of dense gradients, :math:`|m|`, :math:`m \leftarrow \beta m + (1-\beta) g`.

    A callback that ranks by it gathers it: ``observe=momentum(0.9).observe``. It is SGD's
    momentum up to a factor, whatever the optimizer, and one dense tensor per layer.

    Args:
        beta: Share of the old mean that stays at every step, in [0, 1).

    Raises:
        TypeError: If ``beta`` is not a number.
        ValueError: If it lies outside [0, 1).
    """

    beta: float = 0.9
    needs_gradient: ClassVar[bool] = False
    on_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self)

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``.

        Raises:
            KeyError: If nothing was gathered yet.
        """
        return slot("momentum")(layer)

    def observe(self, layer: Layer) -> Mapping[str, Tensor]:
        """The new mean, in the slot "momentum"."""
        grad = _grad(layer, "momentum")
        mean = layer.slots.get("momentum")
        mean = torch.zeros_like(grad) if mean is None else mean
        grad = torch.where(grad.isfinite().all(), grad, mean)  # one infinity would stay for ever
        return {"momentum": mean.lerp(grad, 1 - self.beta)}


@dataclass(frozen=True)
class taylor(Scorer):
    r"""Running mean of squared first-order changes of the loss (Molchanov et al., 2019).

    :math:`I = \left(\sum_{s} g_s w_s\right)^2` over the weights of a unit, squared for every
    step before the mean is taken: :math:`m \leftarrow \beta m + (1 - \beta) I`. A callback that
    ranks by it gathers it: ``observe=taylor(0.9).observe``, one number per unit. A step whose
    gradient is not finite is left out.

    Args:
        beta: Share of the old mean that stays at every step, in [0, 1).

    Raises:
        TypeError: If ``beta`` is not a number.
        ValueError: If it lies outside [0, 1).
    """

    beta: float = 0.9
    needs_gradient: ClassVar[bool] = False
    on_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self)

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``, shape of the weight; summed over a unit it is the unit's."""
        each = layer.slots["taylor"] * (layer.size / layer.weight.numel())
        return layer.structure.expand(each, layer.shape, layer.layout)

    def observe(self, layer: Layer) -> Mapping[str, Tensor]:
        """The new mean, in the slot "taylor", ``(size,)``."""
        change = layer.reduce(layer.weight * _grad(layer, "taylor")).square()
        mean = layer.slots.get("taylor")
        mean = torch.zeros_like(change) if mean is None else mean
        change = torch.where(change.isfinite().all(), change, mean)
        return {"taylor": mean.lerp(change, 1 - self.beta)}


@dataclass(frozen=True)
class unexplored(Scorer):
    """Random, but weights that were never live come first.

    The growth of In-Time Over-Parameterization that explores most (Liu et al., 2021; the
    authors' code calls it random_unfired). A callback that ranks by it remembers which
    weights were live: ``observe=unexplored().observe``, one byte per weight.
    """

    needs_gradient: ClassVar[bool] = False
    on_parts: ClassVar[bool] = True

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``: in [1, 2) if never live, else in [0, 1); float64."""
        draw = torch.rand(layer.shape, generator=layer.generator, dtype=torch.float64)
        return draw.to(layer.mask.device) + ~self._fired(layer)

    def observe(self, layer: Layer) -> Mapping[str, Tensor]:
        """The weights that are or were live, in the slot "fired"."""
        return {"fired": self._fired(layer)}

    @staticmethod
    def _fired(layer: Layer) -> Tensor:
        return layer.mask | layer.slots.get("fired", layer.mask)


@dataclass(frozen=True)
class drawn_by(Scorer):
    r"""Makes the choice a draw: without replacement, with chances in proportion to a score.

    The ``k`` largest of :math:`s_i^p / E_i`, with :math:`E_i` standard exponential, are a
    weighted sample without replacement (Efraimidis and Spirakis, 2006). A unit of several
    weights is one draw, with the sum of their chances. Weights with score 0 are chosen only
    when no others are left, in order.

    Args:
        score: The chances, up to a factor.
        power: :math:`p`, at least 0; 0 draws uniformly, a large one takes the best.

    Raises:
        TypeError: If ``score`` cannot be called.
        ValueError: If ``power`` is not a finite number of at least 0.
    """

    score: Score | Scorer
    power: float = 1.0

    def __post_init__(self) -> None:
        settle(self, "power")
        if not callable(self.score) or isinstance(self.score, type):
            raise TypeError(f"{self}: score must be a function of a layer, such as magnitude.")
        if not _is_number(self.power) or not 0 <= self.power < math.inf:
            raise ValueError(f"{self}: power must be a finite number >= 0.")

    @property
    def needs_gradient(self) -> bool:
        """Whether the score reads gradients."""
        return needs_gradient(self.score)

    @property
    def on_parts(self) -> bool:
        """Whether the score works on sharded layers."""
        return works_on_parts(self.score)

    @property
    def observe(self) -> Callable[[Layer], Mapping[str, Tensor]] | None:
        """What the score gathers, if anything."""
        return observed_by(self.score)

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``: a draw from its generator; float64, shape of the weight."""
        chance = self.score(layer).double()
        largest = chance.max().clamp(min=torch.finfo(torch.float64).tiny)
        units = torch.empty(layer.size, dtype=torch.float64)
        units.exponential_(generator=layer.generator)
        wait = layer.structure.expand(units, layer.shape, layer.layout)
        return (chance / largest) ** self.power / wait.to(chance.device).clamp(min=1e-300)


@dataclass(frozen=True)
class nearby(Scorer):
    r"""Links between units at nearby places of their layers: :math:`e^{-d / \lambda}`.

    A unit's place is its number over the width of its layer, in (0, 1), and :math:`d` the
    distance between the places of the two units that the weight joins (locality growth;
    Ström, 1997). ``grow(drawn_by(nearby(0.1)))`` draws new links with these chances.

    Args:
        length: :math:`\lambda`, above 0, as a share of the layer's width.

    Raises:
        ValueError: If ``length`` is not above 0.
    """

    length: float = 0.1
    needs_gradient: ClassVar[bool] = False
    on_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        settle(self, "length")
        if not _is_number(self.length) or not 0 < self.length < math.inf:
            raise ValueError(f"{self}: length must be a finite number above 0, such as 0.1.")

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``, float64, shape of the weight."""
        groups, outputs, inputs, kernel = layer.layout.canonical(layer.mask).shape
        place = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (outputs, inputs)]
        near = torch.exp(-(place[0][:, None] - place[1]).abs() / self.length)
        view = near[None, :, :, None].expand(groups, outputs, inputs, kernel)
        return layer.layout.restore(view, layer.shape).to(layer.weight.device)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_beta(score: momentum | taylor) -> None:
    settle(score, "beta")
    beta = score.beta
    if not _is_number(beta):
        raise TypeError(f"{score}: beta must be a number in [0, 1); 0.9 is usual.")
    if not 0 <= beta < 1:
        raise ValueError(f"{score}: beta must lie in [0, 1); 0.9 is usual.")


def _grad(layer: Layer, score: str) -> Tensor:
    if layer.grad is None:
        raise ValueError(
            f"{score}: {layer.name} has no gradient here. Scores of gradients work in updates "
            "during training; at the start use magnitude or random."
        )
    return layer.grad
