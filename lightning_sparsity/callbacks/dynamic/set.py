"""SET: drop the smallest weights after every epoch and grow others at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

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
    Scorer,
    Verb,
)
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import er
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import magnitude, observed_by, random, without_gradient
from lightning_sparsity.structures import Structure


class SET(MaskCallback):
    r"""Sparse Evolutionary Training (Mocanu et al., 2018, arXiv:1707.04780).

    Starts from an Erdős-Rényi topology. After every epoch each layer loses the fraction
    :math:`\zeta` of its weights that are nearest zero and gains as many at random (Alg. 1);
    not after the last epoch.

    The paper drops :math:`\zeta` of the positive weights and :math:`\zeta` of the negative
    ones, each nearest zero; later users rank by magnitude alone, which is the default here.
    New weights start at zero, as in the authors' Keras version; their sparse-matrix
    version draws them from :math:`N(0, 0.1^2)` (``new_weight_std=0.1``). The paper's
    :math:`\varepsilon` is ``distribution=epsilon(20)``, which fixes the density.

    In-Time Over-Parameterization (Liu et al., 2021, arXiv:2102.02887) is a setting:
    ``distribution=erk, drop_fraction=cosine(0.5, 0.005), update_interval=1500``; the share of
    weights ever live, :math:`R_s`, is logged by ``DensityMonitor``.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks, or with ``distribution=epsilon(...)``.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default Erdős-Rényi.
        drop_fraction: :math:`\zeta`, in [0, 1], or a schedule such as ``cosine(0.5, 0.005)``.
        growth: What grows: ``random`` (default), ``drawn_by(nearby(0.1))`` (links between
            nearby units), ``unexplored()`` (weights that were never live first),
            ``momentum(0.9)`` or any other score.
        sign_split: Drop from positive and negative weights separately, as the paper does;
            single weights only.
        new_weight_std: Standard deviation of the values of new weights, >= 0.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as
            ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or ``sign_split`` meets a structure.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SET(distribution=epsilon(20))])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.3,
        growth: Score | Scorer = random,
        sign_split: bool = False,
        new_weight_std: float = 0.0,
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
        self._check_callable("growth", growth, "random", optional=False)
        self._check_number("new_weight_std", new_weight_std, 0)
        self._check_flag("sign_split", sign_split)
        self.sign_split = sign_split
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        start = drop(random)
        fraction = plain(drop_fraction)
        lose: Rule = drop_by_sign(fraction) if sign_split else drop(magnitude, fraction)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=er,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(lose, grow(growth, start=plain(new_weight_std))),
            observe=observed_by(growth),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            single_weights=sign_split,
        )


@dataclass(frozen=True)
class drop_by_sign:
    """Drop a fraction of the positive weights and of the negative ones, nearest zero first.

    Args:
        fraction: Of each sign's live weights, rounded down, in [0, 1].
    """

    fraction: float | Curve
    needs_gradient = False
    on_parts = True

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop weights; ``budget`` is not used."""
        fraction = self.fraction(progress) if callable(self.fraction) else self.fraction
        return [self._drop(layer, fraction) for layer in layers]

    def _drop(self, layer: Layer, fraction: float) -> Layer:
        kept = layer.mask & (layer.weight == 0)
        for side in (layer.weight > 0, layer.weight < 0):
            live = layer.mask & side
            count = int(live.count_nonzero())
            count -= int(round(fraction * count, 9))
            kept |= top_k([magnitude(layer)], count, [live])[0]
        return dataclasses.replace(layer, mask=kept)


without_gradient(drop_by_sign)
