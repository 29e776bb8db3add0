"""DSR: one adaptive threshold for all layers; what it drops grows where weights survive."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Budget, Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import in_proportion, uniform
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.rules import barring, chain, drop, exchange, grow
from lightning_sparsity.scores import magnitude, random
from lightning_sparsity.structures import Structure


@dataclass(frozen=True)
class drop_below_threshold:
    r"""Drop what is smaller than a threshold, and move it towards the number that should go.

    The threshold :math:`H` lies in the slot "threshold" of every layer, a tensor without
    dimensions. If more than 1.1 times the target was dropped, it is halved; if fewer than 0.9
    times the target, doubled. A unit is as large as the mean magnitude of its weights. Every
    layer keeps its largest unit.

    Args:
        target: Units to drop at an update: a number (int), or a share of those that live
            (float).
        start: :math:`H` at the first update, above 0.
    """

    target: int | float
    start: float
    needs_gradient: ClassVar[bool] = False

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop units; ``budget`` is not used."""
        known = [layer.slots["threshold"] for layer in layers if "threshold" in layer.slots]
        threshold = float(known[0] if known else self.start)
        kept = [self._above(layer, threshold) for layer in layers]
        live = sum(layer.live for layer in layers)
        dropped = live - sum(layer.live for layer in kept)
        target = self.target if isinstance(self.target, int) else self.target * live
        if dropped > 1.1 * target:
            threshold /= 2
        elif dropped < 0.9 * target:
            threshold *= 2
        slot = torch.tensor(min(max(threshold, 1e-30), 1e30))  # stays a number above 0
        return [
            dataclasses.replace(layer, slots={**layer.slots, "threshold": slot}) for layer in kept
        ]

    @staticmethod
    def _above(layer: Layer, threshold: float) -> Layer:
        means = layer.reduce(magnitude(layer)) * (layer.size / layer.weight.numel())
        above = int((layer.units & (means >= threshold)).count_nonzero())
        keep = max(above, min(1, layer.live))
        if keep == layer.live:
            return layer
        return layer.with_units(top_k([means], keep, [layer.units])[0])


def survivors(layer: Layer) -> int:
    """Live units of a layer whose mask shows where units may grow."""
    taken = ~layer.mask if layer.barred is None else ~(layer.mask | layer.barred)
    return int(layer.structure.live(taken, layer.layout).count_nonzero())


class DSR(MaskCallback):
    r"""Dynamic Sparse Reparameterization (Mostafa and Wang, 2019, arXiv:1902.05967).

    At every update all weights with :math:`|w| < H` are dropped, in all layers alike, and as
    many grow at random positions (Alg. 1): of their number layer :math:`l` gets the share
    :math:`k_l / \sum_i k_i`, with :math:`k_l` the weights that survived in it. Where a layer is
    full, the others share the rest in the same proportion. What was dropped cannot regrow in
    the same update, and new weights start at zero. :math:`H` is then halved if more than
    1.1 times the target :math:`N_p` was dropped, and doubled if fewer than 0.9 times.

    The total is exact after every update: the counts per layer are rounded by largest
    remainder, where the authors' code rounds each and gives what is missing to a random layer.
    That code's :math:`N_p` is a number for each network (20000 for WRN-28-2, some 0.14 of
    its live weights at a density of 0.1); the default is a share of the live weights, which
    fits networks of any size and density. That code lengthens the interval (100, 200, 400, 800
    steps from epochs 0, 25, 80, 140 of 200); here it stays the same. It keeps the classifier
    dense: ``exclude=last_layer``. With several optimizers each has its own :math:`H`, and
    ``prune_target`` holds for the weights of each.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers at the start, or densities by name
            pattern; default uniform.
        prune_target: :math:`N_p`: a number of weights (int, >= 1), or a share of the live
            weights (float, in (0, 1)).
        threshold: :math:`H` at the first update, above 0. It finds its place by factors of 2.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float); default epoch 190 of 200.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights. Of a
            unit :math:`|w|` is the mean. An ``NM`` pattern keeps weights within their groups.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[DSR(density=0.1), DensityMonitor()])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        prune_target: int | float = 0.1,
        threshold: float = 1e-3,
        update_interval: Interval = 100,
        update_start: int | float = 0,
        update_end: int | float = 0.95,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_target(plain(prune_target))
        self._check_number("threshold", threshold, 0, inside=True)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(start, weight_init) if weight_init else start,
            update=exchange(
                barring(drop_below_threshold(plain(prune_target), plain(threshold))),
                grow(random, share=in_proportion(survivors)),
            ),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    @staticmethod
    def _check_target(value: object) -> None:
        message = (
            f"DSR(prune_target={value!r}): must be a number of weights (int >= 1) or a share of "
            "the live weights (float in (0, 1)), such as 0.1."
        )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(message)
        if value < 1 if isinstance(value, int) else not 0 < value < 1:
            raise ValueError(message)
