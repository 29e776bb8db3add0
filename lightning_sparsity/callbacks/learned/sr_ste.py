"""SR-STE: learn an N:M pattern, and shrink the weights that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.core.filters import Selection, first_layer, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import NM, Structure


class SRSTE(LearnedMask):
    r"""Sparse-refined straight-through estimator (Zhou et al., 2021, arXiv:2102.04010).

    Layers compute with the N weights of largest magnitude of every M consecutive inputs,
    :math:`\tilde w = w \odot m`, chosen anew after every step: every forward pass has the
    largest weights of the moment. Every weight takes the gradient of its place
    (straight-through), and those off the mask also decay, so that they change places with live
    ones less often:

    .. math::
        w \leftarrow w - \gamma \left(\frac{\partial L}{\partial \tilde w}
        + \lambda_W (1 - m) \odot w\right).

    The optimizer's own weight decay and momentum act on all weights alike. Gradient clipping
    sees the gradients of all weights, with the decay. Masks that an earlier callback made are
    never left.

    The groups of a convolution run along its input channels, as in the authors' program. There
    the decay is added to gradients that mixed precision has scaled, and becomes too weak; here
    it is added after that.

    Args:
        density: Live share of all sparse weights, in (0, 1], for a structure other than
            ``NM``, which fixes it.
        decay: :math:`\lambda_W`, at least 0; 0 is the plain straight-through estimator.
        distribution: How a density is split over layers, once, at the start, or densities by
            name pattern; default uniform.
        update_interval: Optimizer steps between masks, "epoch", or ``epochs(n)``; 1 is the
            paper's.
        update_start: First step (int) or fraction of training (float); before it weights are
            dense.
        update_end: Step (int) or fraction of training (float) from which on the mask stays
            and the weights off it are zero.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense; default the first layer, as in the paper. Of
            the others, M must divide the inputs.
        structure: Default ``NM(2, 4)``. The same training of any other structure is
            ``SRSTE(density=0.1, structure=Unstructured())``.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SRSTE(structure=NM(2, 4)), DensityMonitor()])
    """

    dense_gradients = True

    def __init__(
        self,
        density: float | None = None,
        *,
        decay: float = 2e-4,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = first_layer,
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("decay", decay, 0)
        self.decay = plain(decay)
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
            structure=NM(2, 4) if structure is None else structure,
            seed=seed,
        )

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Straight-through, and the decay of the weights off the mask."""
        assert layer.grad is not None
        off = layer.weight.masked_fill(layer.mask, 0)
        return {"weight": torch.add(layer.grad, off, alpha=self.decay)}
