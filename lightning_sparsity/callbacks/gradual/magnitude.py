"""Magnitude: one-shot magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import is_time
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import linear
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure


class Magnitude(MaskCallback):
    r"""One-shot pruning by :math:`|w|` (Han et al., 2015, arXiv:1506.02626).

    At one moment the weights of largest magnitude stay, and training goes on with them.
    Whole units are ranked by the sum of :math:`|w|` (filters: Li et al., 2017).

    Han et al. find a threshold per layer by hand; here the count is exact, ranked over
    the whole model (default) or as ``distribution`` says.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        at: When: 0 is before the first step, an int an optimizer step, a float a fraction
            of training.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ``global_by(magnitude)``, ``uniform`` prunes every layer alike.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()`` or ``NM(2, 4)``.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[Magnitude(density=0.2, at=0.5, structure=Rows())])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        at: int | float = 0,
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        at = plain(at)
        if not is_time(at) or at is True or (isinstance(at, int) and at == 1):
            raise ValueError(
                f"Magnitude(at={at!r}): must be 0 (before the first step), a larger optimizer step "
                "(int >= 2), or a fraction of training (float in [0, 1]); for the end write 1.0."
            )
        later = at > 0
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=drop(magnitude) if later else None,
            ramp=linear if later else None,
            update_interval=1,
            update_start=at,
            update_end=at,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            role="updater" if later else "initial",
        )
