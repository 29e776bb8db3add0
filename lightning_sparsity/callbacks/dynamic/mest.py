"""MEST: drop the least important weights, grow others at random, ever fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Curve, Distribution, Layer, Layers, Rule, Schedule, Verb
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval, epochs
from lightning_sparsity.distributions import fixes_total, uniform
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.schedules import step
from lightning_sparsity.scores import gradient, magnitude, random
from lightning_sparsity.structures import NM, Structure

_FIVE_EPOCHS = epochs(5)
_MILESTONES = {90 / 160: 0.5, 120 / 160: 0.0}


class MEST(MaskCallback):
    r"""Memory-economic sparse training (Yuan et al., 2021, arXiv:2110.14032).

    Every few epochs the weights of lowest importance :math:`|w| + \lambda |\nabla L|` die
    and others, drawn at random, come alive at zero. With the density :math:`d` and the
    mutation :math:`m`, which falls in steps,

    - elastic mutation (EM, the default) drops to :math:`(1 - m) d` and grows back to
      :math:`d`;
    - soft memory bound (EM&S, ``soft=True``) trains at :math:`(1 + m) d`; an update drops to
      :math:`d`, then grows again. When :math:`m` has come to 0 the density is :math:`d`.

    Only live weights are compared, each layer by itself. The paper gives :math:`m d` as a
    share of all weights: 0.02, 0.01 and 0 of them at :math:`d = 0.1` in the authors'
    scripts, half of that at :math:`d = 0.05`. Their :math:`\lambda` is 0 unless asked for,
    their counts miss by ties, and layers denser than 0.9 are skipped; here counts are exact
    and a layer that is dense stays so without being skipped.

    Args:
        density: Final live share of all sparse weights, in (0, 1]; without ``soft`` it may
            be left out when an earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default uniform. ``soft`` needs one that follows a density.
        mutation: :math:`m`, a share of the live weights in [0, 1], halved at 90/160 of the
            window and 0 from 120/160 on; or a schedule, such as ``cosine(0.2)``.
        soft: Train with more than ``density`` (EM&S).
        gradient_weight: :math:`\lambda`, at least 0.
        update_interval: ``epochs(n)``, "epoch", or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or ``soft`` has no density.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[MEST(density=0.1, soft=True)])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        mutation: float | Curve = 0.2,
        soft: bool = False,
        gradient_weight: float = 0.01,
        update_interval: Interval = _FIVE_EPOCHS,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_fraction("mutation", mutation)
        self._check_flag("soft", soft)
        self._check_number("gradient_weight", gradient_weight, 0)
        self.soft = soft
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        rate = mutation if callable(mutation) else step(mutation, _MILESTONES)
        least = drop(importance(plain(gradient_weight)), None if soft else rate)
        ramp = bounded_by(rate)
        target = structure.density if isinstance(structure, NM) else density
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(least, grow(random)),
            ramp=ramp if soft else None,
            initial_density=_first(ramp, target) if soft else 1.0,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def check(self, layers: Layers) -> None:
        """Raise if the asked density cannot be reached, or not be exceeded; see the base class."""
        super().check(layers)
        if self.soft and fixes_total(self._budget.distribution):
            raise ValueError(
                f"MEST(soft=True, distribution={self.distribution}): trains at more than the "
                "density, so the distribution must follow one, as uniform and erk do."
            )

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Drop and grow; with a soft bound, drop to the final density first."""
        if not self.soft:
            return super().update(layers, share, progress)
        assert isinstance(self.rule, chain)
        least, more = self.rule.rules
        bound = self._budget.on_the_way(layers, share, 1.0)
        above = self._budget.on_the_way(layers, share, progress)
        return more(least(layers, bound, progress), above, progress)


@dataclass(frozen=True)
class importance:
    r""":math:`|w| + \lambda |\nabla L|`.

    Args:
        gradient_weight: :math:`\lambda`, at least 0; 0 needs no gradient.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is below 0.
    """

    gradient_weight: float
    on_parts = True

    def __post_init__(self) -> None:
        value = self.gradient_weight
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"MEST(gradient_weight={value!r}): must be a number >= 0.")
        if not 0 <= value < float("inf"):
            raise ValueError(f"MEST(gradient_weight={value!r}): must be finite and >= 0.")

    @property
    def needs_gradient(self) -> bool:
        """Whether gradients count."""
        return self.gradient_weight > 0

    def __call__(self, layer: Layer) -> Tensor:
        """Score of ``layer``."""
        score = magnitude(layer)
        return score + self.gradient_weight * gradient(layer) if self.needs_gradient else score


@dataclass(frozen=True)
class bounded_by:
    """A ramp that ends at a density and lies above it by a share that changes.

    Args:
        excess: Share of the final density that is added, over progress.
    """

    excess: Schedule

    def __call__(self, start: float, end: float) -> Curve:
        """The schedule; ``start`` is not used."""
        return _Above(self.excess, end)


@dataclass(frozen=True)
class _Above(Curve):
    excess: Schedule
    end: float

    def __call__(self, progress: float) -> float:
        return self.end if progress >= 1 else min(1.0, self.end * (1 + self.excess(progress)))


def _first(ramp: bounded_by, target: float | None) -> float:
    """Where the ramp to a density begins; what is no density the base class refuses."""
    if not isinstance(target, int | float) or not 0 < target <= 1:
        return 1.0
    return ramp(1.0, target)(0.0)
