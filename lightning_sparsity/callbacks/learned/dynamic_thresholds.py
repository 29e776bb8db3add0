"""Dynamic sparse training: trainable thresholds, and a step that lets gradients through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.numbers import plain

EMPTY = 0.01
"""A layer that keeps no more than this share of its weights gets its thresholds back to 0."""


class DynamicThresholds(LearnedMask):
    r"""Dynamic sparse training with trainable masked layers (Liu et al., 2020, arXiv:2005.06870).

    Layers compute with :math:`w \odot S(|w| - t)`, where :math:`S` is the unit step and the
    threshold :math:`t` of each neuron or filter is trained with the weights. The derivative of
    the step is taken to be the long-tailed

    .. math:: H(x) = 2 - 4|x| \text{ for } |x| \le 0.4, \quad
              0.4 \text{ for } 0.4 < |x| \le 1, \quad 0 \text{ beyond}

    so that the gradient :math:`g` reaches thresholds, as :math:`-\sum g\,w\,H`, and weights,
    pruned ones too, as :math:`g\,S + g\,|w|\,H` (Sec. 3). The loss gets
    :math:`\alpha \sum e^{-t}`, which raises the thresholds. A layer that keeps 1 % of its
    weights or fewer gets thresholds of 0 again.

    **The density cannot be asked for**: it follows from ``alpha``, the learning rate and the
    size of the weights, which :math:`H` measures in absolute terms.

    Departures from the authors' program: layers are looked after at the end of each step, not
    inside the forward pass, which comes to the same; thresholds are trained by SGD also where
    weights are not.

    Args:
        alpha: :math:`\alpha`, at least 0; the authors' settings are 1e-6 for CIFAR and 5e-4
            for MNIST.
        granularity: What shares one threshold: "output" for the weights of one neuron or
            filter (the paper's choice), or "layer".
        weight_decay: Of the thresholds, at least 0; None: that of the weight, as its optimizer
            has it in the step (so the authors).
        momentum: Of the SGD that trains thresholds, in [0, 1).
        update_start: First step (int) or fraction of training (float); before it weights are
            dense and thresholds 0.
        update_end: Where the thresholds stop, and the mask is kept from then on: a step (int)
            or a fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        seed: Unused: nothing is drawn.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[DynamicThresholds(alpha=5e-4), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("threshold",)
    derived: ClassVar[bool] = True
    dense_gradients: bool = True

    def __init__(
        self,
        *,
        alpha: float = 1e-6,
        granularity: Granularity = "output",
        weight_decay: float | None = None,
        momentum: float = 0.9,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        seed: int | None = None,
    ) -> None:
        self._check_number("alpha", alpha, 0)
        if weight_decay is not None:
            self._check_number("weight_decay", weight_decay, 0)
        check_granularity("DynamicThresholds", granularity)
        self._check_momentum(momentum)
        self.alpha = plain(alpha)
        self.granularity = granularity
        self.weight_decay = plain(weight_decay)
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

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Thresholds of 0: float32, one per output unit or 0-dim."""
        return {"threshold": thresholds(layer, self.granularity, 0.0)}

    def effective(self, layer: Layer) -> Tensor:
        """The weight where it is above its threshold."""
        return layer.weight * step(self._above(layer))

    def support(self, layer: Layer) -> Tensor:
        """Weights above their threshold."""
        return self._above(layer) > 0

    def penalty(self, layer: Layer) -> Tensor:
        """What raises the thresholds, and their weight decay."""
        threshold = layer.slots["threshold"]
        decay = layer.weight_decay or 0.0 if self.weight_decay is None else self.weight_decay
        return self.alpha * (-threshold).exp().sum() + decay / 2 * threshold.square().sum()

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Thresholds back to 0 where a layer is all but empty."""
        alive = self.support(layer).count_nonzero() > EMPTY * layer.weight.numel()
        layer.slots["threshold"].mul_(alive)
        return {}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum; weight decay is a penalty here."""
        return sgd(groups, momentum=self.momentum)

    def _above(self, layer: Layer) -> Tensor:
        return layer.weight.abs() - spread(layer.slots["threshold"], layer)


def step(x: Tensor) -> Tensor:
    """1 where ``x`` is above 0, else 0, with the long-tailed derivative.

    Example:
        >>> x = torch.tensor([-2.0, -0.5, 0.1], requires_grad=True)
        >>> step(x).sum().backward()
        >>> step(x).tolist(), x.grad
        ([0.0, 0.0, 1.0], tensor([0.0000, 0.4000, 1.6000]))
    """
    stepped: Tensor = _LongTail.apply(x)  # type: ignore[no-untyped-call]
    return stepped


class _LongTail(torch.autograd.Function):
    """The unit step and the derivative that stands for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        size = ctx.saved_tensors[0].abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, 0.4) * (size <= 1)
        return grads[0] * slope
