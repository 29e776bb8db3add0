"""Top-KAST: compute with the largest weights, and train a few more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import drop, grow
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import NM, Structure


class TopKAST(LearnedMask):
    r"""Top-K always sparse training (Jayakumar et al., 2020, arXiv:2106.03517).

    Each layer computes with the set :math:`A` of its weights of largest magnitude, a share
    :math:`D` of them. Gradients reach a larger set :math:`B`, the share :math:`D + M`: its
    further weights learn what they would do, and enter :math:`A` when they have grown larger
    than one in it. Both sets are chosen anew after every step, so every forward pass has the
    largest weights of the moment. Weights outside :math:`B` stand still: no gradient, no weight
    decay, no momentum (their optimizer state is zero).

    The exploration penalty shrinks the further weights faster than the live ones, so that only
    those that the loss wants come in:

    .. math:: \lambda \sum_{i \in A} \rho(w_i) + \frac{\lambda}{D} \sum_{i \in B \setminus A}
        \rho(w_i), \qquad \rho(w) = \tfrac{1}{2} w^2 \text{ or } |w|.

    The paper calls it L2 and writes :math:`|w|`: ``penalty`` chooses. Its gradient is added to
    that of the loss, before clipping, and takes the place of weight decay: an optimizer's own
    would come on top, for all of :math:`B` alike. :math:`D` is that of the layer.

    A departure: a layer whose weights all live gets no penalty, where the formula still pulls
    at them; it has nothing to explore, and density 1 is plain training. ``exploration`` and
    ``decay`` have defaults of our own. Masks that an earlier callback made are never left. The
    counts are exact, where thresholds from quantiles keep or lose ties. Weights are dense in
    memory, and so are their gradients.

    Args:
        density: :math:`D`, live share of all sparse weights, in (0, 1].
        exploration: :math:`M`, in [0, 1]: the share of all weights, beyond those that live,
            that are trained too, rounded up (in an N:M pattern, to whole weights of a group).
            With 0 only live weights learn, and others enter as they were left.
        decay: :math:`\lambda`, at least 0.
        penalty: "l2" or "l1".
        distribution: How the density is split over layers, once, at the start, or densities
            by name pattern; default uniform.
        update_interval: Optimizer steps between choices, "epoch", or ``epochs(n)``; a larger
            interval saves the time of choosing.
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

        Trainer(callbacks=[TopKAST(density=0.1, exploration=0.1), DensityMonitor()])
    """

    dense_gradients = True

    def __init__(
        self,
        density: float | None = None,
        *,
        exploration: float = 0.1,
        decay: float = 1e-4,
        penalty: Literal["l2", "l1"] = "l2",
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check("exploration", exploration)
        self._check_number("decay", decay, 0)
        if penalty not in ("l2", "l1"):
            raise ValueError(f'TopKAST(penalty={penalty!r}): must be "l2" or "l1".')
        self.exploration = plain(exploration)
        self.decay = plain(decay)
        self.kind = penalty
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

    # ------------------------------------------------------------------------ both sets

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Choose A as the mask, and B around it."""
        return self._with_more(super().begin(layers, share))

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Choose both sets anew."""
        return self._with_more(super().update(layers, share, progress))

    def _with_more(self, layers: Layers) -> Layers:
        """The layers, with B in the slot "trained": the mask and the largest weights off it."""
        sizes = [min(layer.live + self._more(layer), layer.size) for layer in layers]
        free = [dataclasses.replace(layer, barred=layer.slots.get("barred")) for layer in layers]
        return [
            dataclasses.replace(layer, slots={**layer.slots, "trained": larger.mask})
            for layer, larger in zip(layers, grow(magnitude)(free, sizes, 0.0), strict=True)
        ]

    def _more(self, layer: Layer) -> int:
        groups = layer.size // layer.structure.m if isinstance(layer.structure, NM) else 1
        return math.ceil(round(self.exploration * layer.size / groups, 9)) * groups

    # ------------------------------------------------------------------------- training

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Those of the loss and of the penalty, in B."""
        assert layer.grad is not None
        scarcity = layer.mask.numel() / layer.mask.count_nonzero().clamp(min=1)  # 1 / D
        slope = layer.weight if self.kind == "l2" else layer.weight.sign()
        penalty = torch.where(layer.mask, slope, slope * scarcity) * self.decay * (scarcity > 1)
        return {"weight": torch.where(layer.slots["trained"], layer.grad + penalty, 0)}

    def frozen(self, layer: Layer) -> Tensor | None:
        """What lies outside B."""
        return ~layer.slots["trained"]
