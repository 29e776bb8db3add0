"""DNW: compute with the largest weights, and train all of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure


class DNW(LearnedMask):
    r"""Discovering neural wirings (Wortsman et al., 2019, arXiv:1906.00586).

    Each layer computes with its weights of largest magnitude, :math:`\tilde w = w \odot m`.
    In the backward pass every weight, live or not, takes the gradient of its place in
    :math:`\tilde w` (straight-through), so a weight off the mask goes where the loss wants it,
    and comes in when it has grown larger than one on the mask. The mask is chosen anew after
    every step: every forward pass has the largest weights of the moment.

    Weight decay and momentum act on all weights alike, as in the authors' program. Gradient
    clipping sees the gradients of all weights. Masks that an earlier callback made are never
    left.

    This is the paper's training of sparse networks, not its search for wirings between single
    channels. The density is exact; the authors' program rounds what it drops down, layer by
    layer.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How the density is split over layers, once, at the start, or densities
            by name pattern; default uniform.
        update_interval: Optimizer steps between masks, "epoch", or ``epochs(n)``; 1 is the
            paper's.
        update_start: First step (int) or fraction of training (float); before it weights are
            dense.
        update_end: Step (int) or fraction of training (float) from which on the mask stays
            and the weights off it are zero.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[DNW(density=0.1), DensityMonitor()])
    """

    dense_gradients = True

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=drop(magnitude),
            update=drop(magnitude),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Straight-through: every weight takes the gradient of its place as it is."""
        return {}
