"""GraNet: prune gradually over all layers, and let what was pruned grow again elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import (
    Curve,
    Distribution,
    Layers,
    Ramp,
    Rule,
    Schedule,
    Score,
    Scorer,
    Verb,
    call_of,
)
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import erk, fixes_total, global_by
from lightning_sparsity.rules import chain, drop, exchange, grow
from lightning_sparsity.schedules import cosine, cubic, until
from lightning_sparsity.scores import gradient, magnitude, observed_by, random
from lightning_sparsity.structures import NM, Structure


@dataclass(frozen=True)
class but_not_last(Curve):
    """A schedule, and 0 at progress 1: what grows in the last update may never be trained.

    Args:
        schedule: The schedule.
    """

    schedule: Schedule

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.schedule(progress) if progress < 1 else 0.0


class GraNet(MaskCallback):
    r"""Gradual pruning with zero-cost neuroregeneration (Liu et al., 2021, arXiv:2106.10404).

    At every update, first, the weights of smallest magnitude of the whole network go, down to
    the density of the moment, which falls as
    :math:`d_t = d_f + (d_i - d_f)(1 - x)^3`, :math:`x` from 0 to 1 over the first
    ``prune_end`` of the window (the cubic ramp of Zhu and Gupta, 2017, Eq. 1). Then each layer
    loses the fraction :math:`f(t)` of what it has left, rounded up, smallest magnitude first,
    and regrows as many where :math:`|\nabla L|` is largest. From the first update after
    ``prune_end`` the density holds, and weights are still exchanged. Regrown weights start at
    zero; one that is dropped and regrown by the same update keeps its value and momentum, as
    in the authors' code.

    That code keeps what lies strictly above the magnitude of the last weight that should stay,
    and prunes last one interval before the end of the ramp: it arrives at a density a little
    off. Here every count is exact and the density is reached. The update at ``update_end``
    only prunes, as nothing may train after it. ``initial_density=1.0`` is the paper's
    dense-to-sparse setting; its sparse-to-sparse one, from 0.5, is the default. Its ImageNet
    training has ``update_interval=4000, prune_end=0.3``. A layer without a gradient in an
    update step is neither pruned nor exchanged in it.

    Args:
        density: Final live share of all sparse weights, in (0, 1]. How it lies over the
            layers is found by the pruning.
        distribution: How the density of the start is split over layers; default ERK.
        initial_density: Density at ``update_start``, at least ``density``; default 0.5, or
            ``density`` where that is more. Masks that an earlier callback made come before it.
        ramp: ``ramp(initial_density, density)`` gives the schedule of the density, such as
            ``linear``; default ``cubic``.
        prune_end: Share of the window after which the density holds, in (0, 1]; default
            epoch 110 of 160.
        drop_fraction: :math:`f(0)`, in [0, 1], falling as a cosine to 0.005 at
            ``update_end``; or a schedule.
        growth: What grows: ``gradient`` (default), ``random``, ``momentum(0.9)`` or any other
            score.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random start masks; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or ``distribution`` is one that sets the
            density of each layer.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[GraNet(density=0.1), DensityMonitor()])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        initial_density: float | None = None,
        ramp: Ramp = cubic,
        prune_end: float = 110 / 160,
        drop_fraction: float | Curve = 0.5,
        growth: Score | Scorer = gradient,
        update_interval: Interval = 1000,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check("prune_end", prune_end, low_open=True)
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_callable("growth", growth, "gradient", optional=False)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        self._check_arrives(ramp)
        fraction = (
            drop_fraction
            if callable(drop_fraction)
            else cosine(drop_fraction, min(drop_fraction, 0.005))
        )
        if initial_density is None:
            end = structure.density if isinstance(structure, NM) else density
            end = 0.5 if end is None else end
            self._check("density", end, low_open=True)
            initial_density = max(0.5, end)
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=erk,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(
                drop(magnitude),
                exchange(drop(magnitude, but_not_last(fraction), rounding=math.ceil), grow(growth)),
            ),
            ramp=until(ramp, prune_end),
            initial_density=initial_density,
            observe=observed_by(growth),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    @property
    def only_prunes(self) -> bool:
        """Whether the density can only fall, so that it has to start at or above its end."""
        return True

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` if the densities asked for are out of reach, or fixed by layer."""
        super().check(layers)
        if self.distribution is not None and fixes_total(self.distribution):
            raise ValueError(
                f"GraNet(distribution={call_of(self.distribution)}): sets the density of each "
                "layer, and GraNet prunes over all layers; give a distribution such as erk, for "
                "the start, or use GMP."
            )

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Prune over all layers to the density of the moment, then exchange in each."""
        assert self.rule is not None
        way = dataclasses.replace(self._budget, given=global_by(magnitude))
        budget = way.on_the_way(layers, share, progress)
        live = [layer.live for layer in layers]
        return self.rule(layers, budget if sum(budget) < sum(live) else live, progress)
