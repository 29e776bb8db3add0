"""SNFS, or sparse momentum: give new weights to the layers with the largest momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.apportion import apportion
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import (
    Budget,
    Curve,
    Distribution,
    Layer,
    Layers,
    Rule,
    Schedule,
    Verb,
    errors_of,
)
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.rules import chain, drop, exchange, grow
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import magnitude, momentum, random
from lightning_sparsity.structures import NM, Structure


@dataclass(frozen=True)
class exchange_by_momentum:
    r"""Drop the smallest weights of every layer; regrow as many where momentum is largest.

    Layers that never had a gradient have no momentum and are left as they are.

    Args:
        score: The momentum.
        fraction: Share of each layer's live units to drop, rounded up, in [0, 1].
        redistribute: Whether what grows is split over the layers by their mean momentum. If
            not, or if an ``NM`` pattern fixes the density of a layer, each regrows its own.
    """

    score: momentum
    fraction: Schedule
    redistribute: bool = True
    needs_gradient: ClassVar[bool] = False

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop and grow units; ``budget`` is not used.

        Raises:
            NonFiniteScoreError: If the momentum of a layer is not finite.
        """
        able = [layer for layer in layers if "momentum" in layer.slots]
        if not self.redistribute or any(isinstance(layer.structure, NM) for layer in able):
            lose = drop(magnitude, self.fraction, rounding=math.ceil)
            after = exchange(lose, grow(self.score))(able, budget, progress)
        else:
            after = self._exchange(able, progress)
        changed = {layer.name: layer for layer in after}
        return [changed.get(layer.name, layer) for layer in layers]

    def _exchange(self, layers: Layers, progress: float) -> Layers:
        means = [_mean_momentum(layer) for layer in layers]
        average = math.fsum(means) / max(len(means), 1)
        fraction = self.fraction(progress)
        pruned: list[Layer] = []
        for layer, mean in zip(layers, means, strict=True):
            free = 1 - layer.live / layer.size
            rate = min(fraction, free) if free < 0.2 and mean > average else fraction
            pruned += drop(magnitude, rate, rounding=math.ceil)([layer], [layer.live], progress)
        grown = [old.live - new.live for old, new in zip(layers, pruned, strict=True)]
        if average > 0:
            room = [layer.size - layer.live for layer in pruned]
            grown = by_momentum(means, room, sum(grown))
        budget = [layer.live + count for layer, count in zip(pruned, grown, strict=True)]
        return grow(self.score)(pruned, budget, progress)


def by_momentum(means: Sequence[float], room: Sequence[int], total: int) -> list[int]:
    """Split what grows in proportion to the mean momenta of the layers.

    No layer fills more than 0.99 of its room, unless all of them must. What a layer cannot
    take goes to the others in equal parts. The counts add up to ``total``.

    Args:
        means: Mean momentum of each layer, at least 0, not all 0.
        room: Units that each layer could grow.
        total: Units to grow.

    Example:
        >>> by_momentum([1.0, 2.0, 3.0], [100, 100, 20], 60)
        [16, 25, 19]
    """
    most = [math.floor(0.99 * count) for count in room]
    if sum(most) < total:
        most = list(room)
    ideal = [
        min(total * mean / math.fsum(means), float(limit))
        for mean, limit in zip(means, most, strict=True)
    ]
    for _ in ideal:  # every round places all that is left, or fills a layer
        open_ = [i for i, limit in enumerate(most) if ideal[i] < limit]
        left = total - math.fsum(ideal)
        for i in open_:
            ideal[i] = min(ideal[i] + left / len(open_), float(most[i]))
    return apportion(ideal, most, total, floor=0)


def _mean_momentum(layer: Layer) -> float:
    if not layer.live:
        return 0.0
    mean = float(layer.slots["momentum"][layer.mask].abs().float().mean())
    if not math.isfinite(mean):
        raise NonFiniteScoreError(f"momentum of {layer.name} is not finite everywhere.")
    return mean


class SNFS(MaskCallback):
    r"""Sparse Networks from Scratch, or sparse momentum (Dettmers and Zettlemoyer, 2019).

    arXiv:1907.04840. After every epoch each layer drops the fraction :math:`a` of its live
    weights, rounded up, smallest magnitude first. With :math:`v_l` the mean of :math:`|M|`
    over the live weights of layer :math:`l`, from before the drop, divided by the sum over all
    layers, layer :math:`l` regrows the share :math:`v_l` of all that was dropped, where
    :math:`|M|` is largest. :math:`M` is the running mean of the dense gradient,
    :math:`M \leftarrow \beta M + (1 - \beta) \nabla L`. New weights start at zero.

    As in the authors' code, a layer with less than 0.2 of its weights free, and :math:`v_l`
    above average, drops no more than is free; no layer fills more than 0.99 of its room; and
    what it cannot take is shared equally among the layers. That code rounds down in the end
    and makes up for the difference at later updates; here counts are rounded by largest
    remainder, so that the total is exact at every update and there is nothing to make up for.
    It reads :math:`M` from the optimizer, Adam's divided by the root of the second moment;
    here it is a tensor of its own, the same with any optimizer, and weight decay is no part of
    it. The starting mask has exact counts, where that code draws every weight.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks; 0.05 in the authors' code.
        distribution: How ``density`` is split over layers at the start, or densities by name
            pattern; default uniform.
        drop_fraction: :math:`a` at the start, in [0, 1], falling as a cosine to 0.005 at
            ``update_end``; or a schedule.
        beta: :math:`\beta`, in [0, 1).
        redistribute: Whether layers exchange weights. If not, each regrows what it dropped.
            An ``NM`` pattern allows no exchange.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random start masks; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SNFS(density=0.05), DensityMonitor()])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.5,
        beta: float = 0.9,
        redistribute: bool = True,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        self._check_flag("redistribute", redistribute)
        with errors_of("SNFS"):
            mean = momentum(beta)
        self._fraction = (
            drop_fraction
            if callable(drop_fraction)
            else cosine(drop_fraction, min(drop_fraction, 0.005))
        )
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(start, weight_init) if weight_init else start,
            update=exchange_by_momentum(mean, self._fraction, redistribute),
            observe=mean.observe,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the live weights that an update at ``progress`` drops."""
        return self._fraction(progress)
