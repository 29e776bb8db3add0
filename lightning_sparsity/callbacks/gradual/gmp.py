"""GMP: prune by magnitude, a little more at every update."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Ramp, Score, Scorer
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import cubic
from lightning_sparsity.scores import magnitude, observed_by
from lightning_sparsity.structures import Structure


class GMP(MaskCallback):
    r"""Gradual magnitude pruning (Zhu and Gupta, 2017, arXiv:1710.01878).

    Sparsity rises as :math:`s_t = s_f + (s_i - s_f)(1 - x)^3`, :math:`x` from 0 to 1 over
    the window (Eq. 1); at every update each layer keeps its live weights of largest
    magnitude. Pruned weights do not come back. At ``update_end`` the density is reached
    to the weight. With ``score=random`` or ``score=saliency`` it is the gradual random or
    gradual saliency pruning of later comparisons, with ``score=taylor(0.9)`` and
    ``structure=Rows()`` that of filters by Molchanov et al. (2019, arXiv:1906.10771).

    The paper prunes every layer alike and keeps no layer dense by default; Gale et al.
    (2019) keep the first convolution dense (``exclude=first_layer``).

    Args:
        density: Final live share of all sparse weights, in (0, 1].
        distribution: How the density is split over layers, or densities by name pattern;
            default uniform, ``global_by(magnitude)`` ranks across layers.
        score: What stays: ``magnitude`` (default), ``random``, ``saliency``, ``taylor(0.9)`` or
            any other score.
        initial_density: Density at ``update_start``, in (0, 1]; masks that an earlier
            callback made come before it.
        ramp: ``ramp(initial_density, density)`` gives the schedule, such as ``linear``,
            ``cosine``, ``exponential`` or ``sigmoid``; default ``cubic``.
        update_interval: Optimizer steps between prunings, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Step (int) or fraction of training (float) at which ``density`` holds.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of random choices, which magnitude has none of.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[GMP(density=0.1, distribution=global_by(magnitude))])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        score: Score | Scorer = magnitude,
        initial_density: float = 1.0,
        ramp: Ramp = cubic,
        update_interval: Interval = 100,
        update_start: int | float = 0.0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        if ramp is None:
            raise TypeError("GMP(ramp=None): must be a ramp between two densities, such as cubic.")
        self._check_callable("score", score, "magnitude", optional=False)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=drop(magnitude),
            update=drop(score),
            observe=observed_by(score),
            ramp=ramp,
            initial_density=initial_density,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
