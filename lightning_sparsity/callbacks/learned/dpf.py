"""DPF: prune gradually, and let the pruned weights hear what the sparse network learns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Ramp
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import cubic
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure


class DPF(LearnedMask):
    r"""Dynamic model pruning with feedback (Lin et al., 2020, arXiv:2006.07253).

    The gradient is taken at the pruned weights and applied to the dense ones,

    .. math:: w_{t+1} = w_t - \gamma_t \, g(m_t \odot w_t),

    for live and pruned weights alike. The dense weights so gather the error of pruning, and a
    weight that was pruned too early comes back. Every 16 steps the mask becomes the weights of
    largest magnitude of the whole network, while the sparsity rises as :math:`s_t = s_f + (s_i -
    s_f)(1 - x)^3`, :math:`x` from 0 to 1 over the window.

    Weight decay and momentum act on all weights alike: they are those of the dense training.
    Gradient clipping sees the gradients of all weights. Masks that an earlier callback made are
    never left.

    At ``update_end`` the density is reached to the weight. With ``ramp=until(cubic, 0.5)`` it
    is reached halfway, and masks are still chosen anew in the second half.

    Args:
        density: Live share of all sparse weights at ``update_end``, in (0, 1].
        distribution: How the density is split over layers, or densities by name pattern;
            default ``global_by(magnitude)``, which ranks all weights together; ``uniform``
            prunes every layer alike.
        ramp: ``ramp(1.0, density)`` gives the schedule of the density, such as ``linear``;
            default ``cubic``.
        update_interval: Optimizer steps between masks, "epoch", or ``epochs(n)``.
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

        Trainer(callbacks=[DPF(density=0.1, ramp=until(cubic, 0.5)), DensityMonitor()])
    """

    dense_gradients = True

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        ramp: Ramp = cubic,
        update_interval: Interval = 16,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        if ramp is None:
            raise TypeError("DPF(ramp=None): must be a ramp between two densities, such as cubic.")
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=drop(magnitude),
            ramp=ramp,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Feedback: the dense weights take the gradient at the pruned ones as it is."""
        return {}
