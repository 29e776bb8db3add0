"""CHT: grow links that the topology predicts, without looking at a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection
from lightning_sparsity.core.layer import (
    Budget,
    Curve,
    Distribution,
    Layer,
    Layers,
    Ramp,
    Rule,
    Score,
    Scorer,
    Verb,
    call_of,
)
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops import link_prediction
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import (
    drawn_by,
    magnitude,
    needs_gradient,
    observed_by,
    slot,
    without_gradient,
)
from lightning_sparsity.starts import spread_inputs
from lightning_sparsity.structures import Structure


@without_gradient
def ch3_l3n(layer: Layer) -> Tensor:
    """CH3-L3n of the layer's mask, from dense products; see ``ops.link_prediction``."""
    return link_prediction.ch3_l3n(layer.mask)


@without_gradient
def ch2_l3n(layer: Layer) -> Tensor:
    """CH2-L3n of the layer's mask, from dense products; see ``ops.link_prediction``."""
    return link_prediction.ch2_l3n(layer.mask)


@without_gradient
def ch3_l3p(layer: Layer) -> Tensor:
    """CH3-L3p of the layer's mask, over all paths; slow; see ``ops.link_prediction``."""
    return link_prediction.ch3_l3p(layer.mask)


@without_gradient
def relative_importance(layer: Layer) -> Tensor:
    r""":math:`|w_{ij}| / \sum_k |w_{ik}| + |w_{ij}| / \sum_k |w_{kj}|`, over live weights."""
    weight = (layer.weight * layer.mask).abs()
    tiny = torch.finfo(weight.dtype).tiny
    shares = [weight / weight.sum(dim, keepdim=True).clamp(min=tiny) for dim in (0, 1)]
    return shares[0] + shares[1]


class CHT(MaskCallback):
    r"""Cannistraci-Hebb training (Zhang et al., 2024, ICLR; CHTs, CHTss: 2025, NeurIPS).

    Experimental. After every epoch each layer loses the share :math:`\zeta` of its weights,
    smallest magnitude first, and gains as many where link prediction on the bipartite graph of
    its live weights gives the highest score. No gradient is read. New weights start at zero.
    For linear layers only.

    CHTs is ``soft=True``: the links that stay are drawn without replacement, with chances in
    proportion to :math:`|w|^T`, :math:`T = 1 + 2 t / T_{end}`, and the links that grow with
    chances in proportion to their score. CHTss is CHTs with a density that falls in an S:
    ``ramp=sigmoid``, or ``functools.partial(sigmoid, steepness=12)`` for a gentler one; at every
    update the layer is first pruned to the density of the moment.

    Departures: equal scores, which topologies are full of, are ordered at random, not as a
    sort leaves them; scores are 64-bit. If fewer links than are to grow have a score above 0,
    :math:`10^{-5}` is added to all (``soft``), as in the official code. Links that chain removal
    took are grown back in their own layer, so that budgets stay exact. Starts from input
    correlations and small worlds, early stopping by overlap and the heads of attention are not
    here.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default uniform.
        drop_fraction: :math:`\zeta`, in [0, 1], or a schedule such as ``cosine(0.3)``.
        removal: What stays: ``magnitude`` (default), ``relative_importance`` or another score.
        growth: What grows: ``ch3_l3n`` (default), ``ch2_l3n``, ``ch3_l3p`` (exact paths, for
            small layers) or another score.
        soft: Draw what stays and what grows, by their scores, instead of ranking (CHTs).
        chain_removal: Also drop links into units without outputs, and out of units without
            inputs, between layers that follow each other in the model's order and whose
            widths match. For models that are plain chains of layers.
        topology: A rule that places the first live weights: ``spread_inputs`` (default: as many
            for every neuron, spread over its inputs), or ``drop(random)``.
        ramp: ``ramp(initial_density, density)`` gives the density over the window, such as
            ``sigmoid``; None: it stays.
        initial_density: Density at ``update_start`` under a ramp, in (0, 1]; masks that an
            earlier callback made come before it.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: :math:`T_{end}`, a step (int) or a fraction of training (float).
        include: Which linear layers are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense, such as ``last_layer``.
        structure: Single weights only; anything else is refused.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights; ``sparse_kaiming_normal`` is near the official one, None keeps the
            model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, a weight is not a matrix, or units are not
            single weights.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[CHT(density=0.05, soft=True)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.3,
        removal: Score | Scorer = magnitude,
        growth: Score | Scorer = ch3_l3n,
        soft: bool = False,
        chain_removal: bool = False,
        topology: Rule | Verb = spread_inputs,
        ramp: Ramp | None = None,
        initial_density: float = 0.5,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = nn.Linear,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_callable("removal", removal, "magnitude", optional=False)
        self._check_callable("growth", growth, "ch3_l3n", optional=False)
        self._check_callable("topology", topology, "spread_inputs", optional=False)
        for name, flag in (("soft", soft), ("chain_removal", chain_removal)):
            self._check_flag(name, flag)
        self._check_callable("weight_init", weight_init, "sparse_kaiming_normal")
        lose = (drop_softly if soft else drop)(removal, drop_fraction)
        rules: list[Rule] = [drop(removal)] if ramp else []
        rules += [lose, remove_chains] if chain_removal else [lose]
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(topology, weight_init) if weight_init else topology,
            update=chain(*rules, regrow(growth, soft)),
            ramp=ramp,
            initial_density=initial_density,
            observe=observed_by(growth, removal),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            single_weights=True,
            seed=seed,
        )

    def check(self, layers: Layers) -> None:
        """Raise if a weight is no matrix of single links, or the density is out of reach."""
        super().check(layers)
        for layer in layers:
            if layer.weight.ndim != 2:
                raise ValueError(
                    f"CHT: {layer.name} has shape {layer.shape}; link prediction is for linear "
                    "layers. Leave it out with exclude=, or give it to another method, such as SET."
                )


@dataclass(frozen=True, repr=False)
class drop_softly(drop):
    r"""Drop with what stays drawn by :math:`score^T`, :math:`T = 1 + 2 \cdot` progress."""

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop units."""
        fraction = self.fraction_at(progress)
        return drop(drawn_by(self.score, 1 + 2 * progress), fraction)(layers, budget, progress)


@without_gradient
def remove_chains(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Drop links into units that lead nowhere, then links out of units that get nothing."""
    left = list(layers)
    for place in range(1, len(left)):
        before, after = left[place - 1], left[place]
        if before.mask.shape[0] == after.mask.shape[1] and _are_neighbours(before, after):
            into = before.mask & after.mask.any(0)[:, None]
            out = after.mask & before.mask.any(1)
            left[place - 1] = dataclasses.replace(before, mask=into)
            left[place] = dataclasses.replace(after, mask=out)
    return left


def _are_neighbours(before: Layer, after: Layer) -> bool:
    """Whether no other layer of the model lies between two layers, as far as is known."""
    if before.place is None or after.place is None:
        return True
    return after.place == before.place + 1


@dataclass(frozen=True)
class regrow:
    """Grow the links of highest score up to the budget, equal ones in random order.

    Args:
        score: Ranks the free links.
        soft: Draw them with chances in proportion to the score instead.
    """

    score: Score
    soft: bool = False

    def __repr__(self) -> str:
        return f"regrow({call_of(self.score)}, soft={self.soft})"

    @property
    def needs_gradient(self) -> bool:
        """Whether the score reads gradients."""
        return needs_gradient(self.score)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Grow links."""
        return [
            self._regrow(layer, count) if count > layer.live else layer
            for layer, count in zip(layers, budget, strict=True)
        ]

    def _regrow(self, layer: Layer, count: int) -> Layer:
        chance = self.score(layer).double().masked_fill(layer.mask, 0)
        if self.soft:
            if int(chance.count_nonzero()) < count - layer.live:
                chance = chance + 1e-5
        else:
            largest = chance.max().clamp(min=torch.finfo(torch.float64).tiny)
            order = torch.rand(layer.shape, generator=layer.generator, dtype=torch.float64)
            chance = (chance / largest).round(decimals=9) + 1e-10 * order.to(chance.device)
        scored = dataclasses.replace(layer, slots={"score": chance})
        best = grow(drawn_by(slot("score")) if self.soft else slot("score"))
        (grown,) = best([scored], [count], 0.0)
        return dataclasses.replace(grown, slots=layer.slots)
