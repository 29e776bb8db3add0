"""STR: soft-threshold weights, with thresholds that are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask, sgd
from lightning_sparsity.callbacks.thresholds import (
    Granularity,
    check_granularity,
    spread,
    thresholds,
)
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.numbers import plain


class STR(LearnedMask):
    r"""Soft Threshold Weight Reparameterization (Kusupati et al., 2020, arXiv:2002.03231).

    Layers compute with :math:`\operatorname{sign}(w) \max(|w| - \sigma(s), 0)` (Sec. 3), where
    :math:`\sigma` is the sigmoid and :math:`s` is trained with the weights, by the same
    gradient: every layer learns its threshold, and with it its density. What the layer
    computed with last, shrunk by the threshold, is the weight that stays.

    **The density cannot be asked for.** It follows from ``s_init`` and from the weight decay of
    :math:`s`: far below 0 threshold and gradient are exactly 0, and nothing but weight decay
    moves :math:`s`. It multiplies :math:`s` by :math:`1 - \eta\lambda / (1 - \mu)` in every
    step (learning rate :math:`\eta`, weight decay :math:`\lambda`, momentum :math:`\mu`);
    weights die from about :math:`s = -10` on. More decay or an ``s_init`` nearer to 0 begins
    earlier and ends sparser.

    Departures from the authors' program: :math:`s` is trained by SGD also where the weights
    are not (with the small learning rates of Adam, give a larger ``weight_decay``); one
    threshold per neuron or filter is an option of ours.

    Args:
        s_init: Where :math:`s` starts, below 0; the paper has -3200 for ResNet-50 and -12800
            for MobileNet on ImageNet. Shorter trainings need less.
        weight_decay: :math:`\lambda` of :math:`s`, above 0; None: that of the weight, as its
            optimizer has it in the step.
        granularity: What shares one threshold: "layer" (the paper's), or "output" for the
            weights of one neuron or filter.
        momentum: :math:`\mu`, of the SGD that trains :math:`s`, in [0, 1).
        update_start: First step (int) or fraction of training (float); before it weights are
            dense and :math:`s` waits.
        update_end: Where the thresholds stop, and the mask is kept from then on: a step (int)
            or a fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        seed: Unused: nothing is drawn.

    Raises:
        ValueError: If an argument is out of range, or if neither ``weight_decay`` nor the
            optimizers have any weight decay.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[STR(s_init=-100, weight_decay=5e-4), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("s",)
    derived: ClassVar[bool] = True
    dense_gradients: bool = True  # they are zero off the mask as they come

    def __init__(
        self,
        *,
        s_init: float = -3200.0,
        weight_decay: float | None = None,
        granularity: Granularity = "layer",
        momentum: float = 0.875,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        seed: int | None = None,
    ) -> None:
        self._check_number("s_init", s_init, -math.inf, 0, inside=True)
        if weight_decay is not None:
            self._check_number("weight_decay", weight_decay, 0, inside=True)
        check_granularity("STR", granularity)
        self._check_momentum(momentum)
        self.s_init = plain(s_init)
        self.weight_decay = plain(weight_decay)
        self.granularity = granularity
        self.momentum = plain(momentum)
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            seed=seed,
            single_weights=True,
        )

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` if no weight decay would ever move a threshold."""
        super().check(layers)
        if not any(self._decay(layer) for layer in layers):
            raise ValueError(
                f"STR(weight_decay=None): the optimizer has no weight decay for {layers[0].name} "
                f"or any other sparse weight, so thresholds would stay at sigmoid({self.s_init:g}) "
                "and prune nothing; give the optimizer weight_decay, or STR(weight_decay=1e-4)."
            )

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """``s``: float32, 0-dim or one per output unit."""
        return {"s": thresholds(layer, self.granularity, self.s_init)}

    def effective(self, layer: Layer) -> Tensor:
        """The soft-thresholded weight."""
        threshold = spread(layer.slots["s"].sigmoid(), layer)
        return layer.weight.sign() * (layer.weight.abs() - threshold).relu()

    def support(self, layer: Layer) -> Tensor:
        """Weights above their threshold."""
        return self.effective(layer) != 0

    def penalty(self, layer: Layer) -> Tensor:
        """The weight decay of ``s``."""
        return self._decay(layer) / 2 * layer.slots["s"].square().sum()

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum; weight decay is a penalty here."""
        return sgd(groups, momentum=self.momentum)

    def _decay(self, layer: Layer) -> float:
        return (layer.weight_decay or 0.0) if self.weight_decay is None else self.weight_decay
