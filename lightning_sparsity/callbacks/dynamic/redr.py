"""The Redr algorithms that drop the smallest weights: four ways to choose what grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.apportion import apportion, fill
from lightning_sparsity.core.capture import Statistic
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import (
    Budget,
    Curve,
    Distribution,
    Layer,
    Layers,
    Rule,
    Score,
    Verb,
    call_of,
    works_on_parts,
)
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops.ranks import sum_over_ranks
from lightning_sparsity.ops.selection import Best, top_n_per_group
from lightning_sparsity.rules import chain, drop, exchange, grow
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import gradient, magnitude, needs_gradient, random
from lightning_sparsity.starts import sparse_uniform, spread_inputs
from lightning_sparsity.structures import NM, Structure


@dataclass(frozen=True)
class grow_best:
    """Bring the best free units of all layers together to life, up to the budget's sum.

    Layers are scored one after the other, and of each only what may be chosen is kept: there
    is never more than one layer's score beside as many candidates as can grow. The outcome
    is that of ``grow(score, share=global_by(score, min_per_layer=0))``. Layers of an ``NM``
    pattern, which fixes their density, grow their own.

    Args:
        score: Ranks the free units; the highest grow. Ties go to the earlier layer.
    """

    score: Score

    def __repr__(self) -> str:
        return f"grow_best({call_of(self.score)})"

    @property
    def needs_gradient(self) -> bool:
        """Whether the score reads gradients."""
        return needs_gradient(self.score)

    @property
    def on_parts(self) -> bool:
        """Whether the score works on sharded layers."""
        return works_on_parts(self.score)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Grow units."""
        if any(isinstance(layer.structure, NM) for layer in layers):
            return grow(self.score)(layers, budget, progress)
        best = Best(sum(budget) - sum(layer.live for layer in layers))
        for layer in layers:
            best.add(layer.reduce(self.score(layer)), ~layer.units)
        chosen = best.masks([layer.units for layer in layers])
        return [
            layer.with_units(layer.units | new) if new.any() else layer
            for layer, new in zip(layers, chosen, strict=True)
        ]


@dataclass(frozen=True)
class grow_at_loss:
    r"""Grow at the neurons of a layer that have the largest loss.

    The loss of a neuron is the mean of :math:`|\partial L / \partial z|` over the batch,
    :math:`z` its value before the activation. The neurons with the largest get equal parts
    of what grows, what does not divide going to those with the largest loss; each places its
    part at its largest :math:`|\nabla L|`. Where they have no room, the next ones share. In a
    layer that was not called in this step all neurons have the loss 0: it grows at its largest
    gradients.

    Args:
        neurons: Share of the layer's neurons that may grow, in (0, 1].
    """

    neurons: float = 0.3

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Grow units of every layer to its own budget."""
        return [
            self._grow(layer, count - layer.live) if count > layer.live else layer
            for layer, count in zip(layers, budget, strict=True)
        ]

    def _grow(self, layer: Layer, count: int) -> Layer:
        free = layer.layout.by_neuron(layer.free)
        room = free.count_nonzero(dim=1).tolist()
        losses = _losses(layer, len(free))
        if not losses.any():
            return grow(gradient)([layer], [layer.live + count], 0.0)[0]
        order = losses.sort(descending=True, stable=True).indices.tolist()
        chosen = max(1, round(self.neurons * len(order)))
        while sum(room[neuron] for neuron in order[:chosen]) < count:
            chosen += 1
        capacity = [room[neuron] for neuron in order[:chosen]]
        parts = torch.zeros(len(order), dtype=torch.int64)
        parts[order[:chosen]] = torch.tensor(
            apportion(fill([1.0] * chosen, capacity, count), capacity, count, floor=0)
        )
        scores = layer.layout.by_neuron(gradient(layer))
        new = top_n_per_group(scores, parts.to(free.device), free)
        mask = layer.mask | layer.layout.from_neurons(new, layer.shape)
        return dataclasses.replace(layer, mask=mask)


def _losses(layer: Layer, neurons: int) -> Tensor:
    """Sum of the absolute loss gradients at every output unit of the layer, over all ranks."""
    total = torch.zeros(neurons, dtype=torch.float64, device=layer.weight.device)
    for grad in layer.statistics.get("output_grads", ()):
        units = grad.ndim - 1 if layer.weight.ndim == 2 else grad.ndim - layer.weight.ndim + 1
        others = [dim for dim in range(grad.ndim) if dim != units]
        total += grad.double().abs().sum(others) if others else grad.double().abs()
    return sum_over_ranks(total)


class Redr(MaskCallback):
    r"""What the Redr algorithms that rank by magnitude share (Eibensteiner, Sec. 2).

    Every layer loses the share :math:`\frac{\alpha}{2}(1 + \cos \pi x)` of its live weights,
    smallest magnitude first, after every epoch until three quarters of training, and as
    many new ones, of value zero, grow. They differ in where.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default uniform. ``fan_in`` gives all neurons of a layer exactly as many inputs.
        drop_fraction: :math:`\alpha`, in [0, 1], falling as a cosine to 0 at ``update_end``;
            or a schedule.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is; default single weights. Units are placed at random.
        weight_init: Where this callback makes the masks: a rule for the start values, in the
            place of those that the model has; None keeps them (for a trained model, say).
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """

    growth: ClassVar[grow | grow_best | grow_at_loss]
    reads: ClassVar[tuple[Statistic, ...]] = ()
    only_single_weights: ClassVar[bool] = False

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.5,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = sparse_uniform(),  # noqa: B008 (frozen)
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_callable("weight_init", weight_init, "sparse_uniform()")
        fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(spread_inputs, weight_init) if weight_init else spread_inputs,
            update=exchange(drop(magnitude, fraction), self.growth),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            statistics=self.reads,
            single_weights=self.only_single_weights,
        )


class RedrRandom(Redr):
    """Redr-Random (Eibensteiner): what a layer drops grows at random places of the layer.

    Arguments as of all Redr algorithms.

    Example::

        Trainer(callbacks=[RedrRandom(density=0.06)])
    """

    growth = grow(random)


class RedrGradient(Redr):
    """Redr-Gradient (Eibensteiner): what a layer drops grows where its gradient is largest.

    Arguments as of all Redr algorithms.

    Example::

        Trainer(callbacks=[RedrGradient(density=0.06)])
    """

    growth = grow(gradient)


class RedrGradientGlobal(Redr):
    """Redr-Gradient-Global (Eibensteiner): growth at the largest gradients of the whole net.

    Every layer drops its own smallest weights; the total grows wherever the gradient is
    largest, so that live weights move between layers. Arguments as of all Redr algorithms.

    Example::

        Trainer(callbacks=[RedrGradientGlobal(density=0.06)])
    """

    growth = grow_best(gradient)


class RedrLoss(Redr):
    r"""Redr-Loss (Eibensteiner): a layer grows at the 30 % of its neurons with the largest loss.

    The text leaves open how a neuron's loss is put together: here it is the mean of
    :math:`|\partial L / \partial z|` over the batch of the update step. What these neurons
    get is shared equally and placed at their largest gradients. Arguments as of all Redr
    algorithms; it works on single weights only.

    Example::

        Trainer(callbacks=[RedrLoss(density=0.06)])
    """

    growth = grow_at_loss()
    reads = ("output_grads",)
    only_single_weights = True
