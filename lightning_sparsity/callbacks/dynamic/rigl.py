"""RigL: grow where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Curve, Distribution, Rule, Score, Scorer, Verb
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import erk
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import gradient, magnitude, observed_by, random
from lightning_sparsity.structures import Structure


class RigL(MaskCallback):
    r"""Rigging the Lottery (Evci et al., 2020, arXiv:1911.11134).

    At every update each layer loses the fraction
    :math:`f(t) = \frac{\alpha}{2}(1 + \cos(\pi t / T_{end}))` of its live weights,
    smallest magnitude first, and regrows as many where :math:`|\nabla L|` is largest
    (Sec. 3, items 2 to 4). Regrown weights start at zero.

    The official code replaces the optimizer step by the update on update steps; here the
    optimizer steps first, on the old mask, so that no batch is lost. A weight that is
    dropped and regrown by one update keeps its value and its momentum, as in that code.

    In-Time Over-Parameterization (Liu et al., 2021, arXiv:2102.02887) is a setting:
    ``drop_fraction=cosine(0.5, 0.005), update_interval=4000, update_end=1.0``; the share of
    weights ever live, :math:`R_s`, is logged by ``DensityMonitor``.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ERK.
        drop_fraction: :math:`\alpha`, in [0, 1], falling as a cosine to 0 at ``update_end``;
            or a schedule, such as ``cosine(0.5, 0.005)``.
        growth: What grows: ``gradient`` (default), ``random``, ``momentum(0.9)``,
            ``drawn_by(nearby(0.1))`` or any other score.
        update_interval: :math:`\Delta T`, in optimizer steps, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: :math:`T_{end}`, a step (int) or a fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``NM(2, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as
            ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random start masks; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[RigL(density=0.1), DensityMonitor()])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.3,
        growth: Score | Scorer = gradient,
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
        self._check_callable("growth", growth, "gradient", optional=False)
        fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=erk,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(drop(magnitude, fraction), grow(growth)),
            observe=observed_by(growth),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
