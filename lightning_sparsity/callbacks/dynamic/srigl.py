"""SRigL: RigL with the same number of inputs for every neuron, and neurons that may die."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lightning_sparsity.callbacks.base import MaskCallback
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
)
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import erk
from lightning_sparsity.ops.selection import top_k, top_n_per_group
from lightning_sparsity.rules import chain, drop
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import gradient, magnitude, needs_gradient, random
from lightning_sparsity.structures import Structure


class SRigL(MaskCallback):
    r"""Structured RigL (Lasby et al., 2024, arXiv:2305.02299).

    Every neuron (filter) of a layer has equally many live weights, so that the layer is an
    index table and a table of values (``ops.condensed.condense``). At every update (Sec. 3.1)
    each layer

    1. marks as salient the :math:`1 - f(t)` of its live weights with the largest magnitude,
       :math:`f(t) = \frac{\alpha}{2}(1 + \cos(\pi t / T_{end}))`, and of all weights as many with
       the largest :math:`|\nabla L|` as are to grow;
    2. ablates the neurons with fewer than :math:`\gamma_{sal} \cdot c_0` salient weights;
    3. drops the share :math:`f(t)` of its live weights: those of ablated neurons, and then
       the smallest magnitudes, wherever they are;
    4. gives every other neuron :math:`c` = budget // active neurons live weights: the surplus
       goes, smallest magnitude first, and what is missing grows where :math:`|\nabla L|` is
       largest, from zero.

    :math:`c_0` is the fan-in at the start: the layer's budget over its neurons, rounded, at
    least 1. The budget from then on is :math:`c_0` times the neurons, so the live weights add
    up to the density asked for only roughly, and ablation may leave fewer, by less than one
    per active neuron. At least so many neurons stay as hold the budget when dense, those with
    the most salient weights. An ablated neuron comes back when the gradient makes enough of its
    weights salient. Its bias, and what normalises it, stay alive.

    Masks that an earlier callback made are made even as this one begins: every neuron gets the
    mean fan-in of its layer, rounded; its surplus goes by magnitude, what is missing grows at
    random. The official code cuts a neuron's surplus by position, not by magnitude, ranks
    magnitudes over all positions, where here only live weights compete, and rounds the fan-in
    of the start up.

    Args:
        density: Live share of all sparse weights, in (0, 1], up to rounding per neuron; may be
            left out when an earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ERK; ``fan_in`` has the same share of live inputs in every layer.
        drop_fraction: :math:`\alpha`, in [0, 1], falling as a cosine to 0 at ``update_end``;
            or a schedule, such as ``cosine(0.5, 0.005)``.
        gamma: :math:`\gamma_{sal}`: below 1 a share of :math:`c_0` (the threshold is rounded
            down, and at least 1), from 1 on a number of salient weights; above 0. The paper has
            0.3 for convolutional networks and 0.95 for transformers.
        ablate: Whether neurons may die. Those of the last layer never do.
        update_interval: :math:`\Delta T`, in optimizer steps, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: :math:`T_{end}`, a step (int) or a fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: Single weights only; anything else is refused.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights; ``sparse_kaiming_normal`` is the official one, None keeps the
            model's own.
        seed: Of the random start masks; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or units are not single weights.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SRigL(density=0.1), DensityMonitor()])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.3,
        gamma: float = 0.3,
        ablate: bool = True,
        update_interval: Interval = 100,
        update_start: int | float = 0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_number("gamma", gamma, 0, inside=True)
        self._check_flag("ablate", ablate)
        self._check_callable("weight_init", weight_init, "sparse_kaiming_normal")
        fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction)
        start = constant_fan_in(random, random, rounding=round)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=erk,
            initial=chain(start, weight_init) if weight_init else start,
            update=_update(fraction, plain(gamma) if ablate else 0),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            single_weights=True,
            seed=seed,
        )
        self.last_rule = _update(fraction, 0)

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make masks, or make those that were found even; see the base class."""
        begun = super().begin(layers, share)
        if not share.found:
            return begun
        even = constant_fan_in(magnitude, random, rounding=round)
        return even(begun, [layer.live for layer in begun], 0.0)

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Apply the rule, towards the live weights of the start: ablation leaves fewer."""
        assert self.rule is not None
        last = [layer for layer in layers if layer.name == share.names[-1]]
        others = [layer for layer in layers if layer.name != share.names[-1]]
        return [
            new
            for rule, part in ((self.rule, others), (self.last_rule, last))
            for new in rule(part, [share.start[layer.name] for layer in part], progress)
        ]


@dataclass(frozen=True, repr=False)
class drop_and_ablate(drop):
    """Drop a fraction of each layer's live units, beginning with whole neurons.

    Salient are the units that would stay without ablation and, of all units, as many with the
    largest gradients as the budget then has room for. Neurons with few of them lose all
    their units and are barred from growing, but never so many neurons that the budget finds
    no place.

    Args:
        least: Salient weights that a neuron needs; below 1 a share of the budget per neuron,
            rounded down, at least 1. 0: none is ablated.
    """

    least: float = 0.0

    @property
    def needs_gradient(self) -> bool:
        """Salience does."""
        return True

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop units; ``budget`` is what the layer is to have after growing."""
        kept = super().__call__(layers, budget, progress)
        return [self._ablate(*each) for each in zip(layers, kept, budget, strict=True)]

    def _ablate(self, layer: Layer, kept: Layer, count: int) -> Layer:
        everything = dataclasses.replace(layer, mask=torch.ones_like(layer.mask))
        (wanted,) = drop(gradient)([everything], [max(count - kept.live, 0)], 0.0)
        salient = layer.layout.by_neuron(kept.mask | wanted.mask).count_nonzero(dim=1)
        neurons, links = len(salient), layer.size // len(salient)
        least = self.least
        if 0 < least < 1:
            least = max(1, math.floor(round(least * count / neurons, 9)))
        (needed,) = top_k([salient.double()], -(-count // links))
        stays = (salient >= least) | needed
        if bool(stays.all()):
            return kept
        gone = layer.layout.from_neurons((~stays)[:, None].expand(neurons, links), layer.shape)
        left = dataclasses.replace(layer, mask=layer.mask & ~gone, barred=gone)
        return drop(self.score)([left], [kept.live], 0.0)[0]


@dataclass(frozen=True)
class constant_fan_in:
    """Give every neuron of a layer as many live weights: the budget over the neurons.

    Neurons that are barred as a whole get none.

    Args:
        keep: Ranks the live weights of a neuron that has too many.
        grow: Ranks the others of a neuron that has too few.
        rounding: ``math.floor``, or ``round``; no neuron gets less than 1.
    """

    keep: Score
    grow: Score
    rounding: Callable[[float], int] = math.floor

    @property
    def needs_gradient(self) -> bool:
        """Whether a score reads gradients."""
        return needs_gradient(self.keep) or needs_gradient(self.grow)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop and grow, neuron by neuron."""
        return [self._even(layer, count) for layer, count in zip(layers, budget, strict=True)]

    def _even(self, layer: Layer, count: int) -> Layer:
        live = layer.layout.by_neuron(layer.mask)
        active = live.new_ones(len(live))
        if layer.barred is not None:
            active = ~layer.layout.by_neuron(layer.barred).all(1)
        each = self.rounding(count / int(active.count_nonzero()))
        fan_in = active * min(max(each, 1), live.shape[1])
        few = fan_in.minimum(live.count_nonzero(dim=1))
        kept = top_n_per_group(layer.layout.by_neuron(self.keep(layer)), few, live)
        grown = top_n_per_group(layer.layout.by_neuron(self.grow(layer)), fan_in - few, ~kept)
        return dataclasses.replace(layer, mask=layer.layout.from_neurons(kept | grown, layer.shape))


def _update(fraction: Curve | Callable[[float], float], least: float) -> Rule:
    lose = drop_and_ablate(magnitude, fraction, least=least)
    return chain(lose, constant_fan_in(magnitude, gradient))
