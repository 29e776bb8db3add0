"""EdgePopup: choose a subnetwork of random weights that are never trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import LearnedMask, sgd
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import chain, drop
from lightning_sparsity.scores import slot
from lightning_sparsity.structures import Structure


class EdgePopup(LearnedMask):
    r"""What's Hidden in a Randomly Weighted Neural Network? (Ramanujan et al., 2020).

    arXiv:1911.13299. Weights keep their random start values; every weight has a score, and each
    layer computes with the weights of largest :math:`|s|`, chosen anew after every step. The
    gradient passes the choice unchanged, for chosen weights and others alike, so that scores
    learn by :math:`\partial L / \partial s = \operatorname{sign}(s) \, w \, \partial L / \partial
    (w \odot m)`; the sign is the slope of :math:`|s|`, as in the authors' program. Scores begin
    as :math:`U(-1/\sqrt{n}, 1/\sqrt{n})`, :math:`n` the inputs of a neuron, and are trained
    by SGD with weight decay.

    Only sparse weights are frozen, and they stay in the model's optimizer, whose learning rate
    the scores follow. The paper trains nothing else: freeze biases and normalisation as in the
    example to have that. The weights' own scale counts, as nothing else sets it:
    ``weight_init=signed_constant()`` is the paper's choice. When the window ends before
    training, the weights found are trained.

    Departures from the authors' program: the density is exact over all layers; its argument
    ``prune_rate`` is what is kept, as ``density`` here, and where it scales the start values by
    one minus that, ``signed_constant("live_fan_in")`` scales by the density, as the paper says.

    Args:
        density: Live share of all sparse weights, in (0, 1]; None: that of an earlier callback.
        lr_scale: Learning rate of the scores over that of the weight in the same step, above 0.
        momentum: Of the scores' SGD, in [0, 1).
        weight_decay: Of the scores, at least 0; the authors use 1e-4 for CIFAR-10.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the same in every layer.
        update_interval: Optimizer steps between masks, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float); before it the weights
            are dense and trained.
        update_end: Last step (int) or fraction of training (float); after it the mask stays and
            the weights are trained.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the values of the weights,
            such as ``signed_constant()``; None keeps the model's own.
        seed: Of the scores' start; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim > 1)  # neither biases nor normalisation
        Trainer(callbacks=[EdgePopup(density=0.5, weight_init=signed_constant())])
    """

    trained: ClassVar[Sequence[str]] = ("score",)

    def __init__(
        self,
        density: float | None = 0.5,
        *,
        lr_scale: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("lr_scale", lr_scale, 0, inside=True)
        self._check_momentum(momentum)
        self._check_number("weight_decay", weight_decay, 0)
        self._check_callable("weight_init", weight_init, "signed_constant()")
        self.lr_scale = plain(lr_scale)
        self.momentum = plain(momentum)
        self.weight_decay = plain(weight_decay)
        best = drop(slot("score"))
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(best, weight_init) if weight_init else best,
            update=best,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Random scores, float32, shape of the weight."""
        inputs = layer.layout.by_neuron(layer.mask).shape[1]
        draw = 2 * torch.rand(layer.shape, generator=layer.generator) - 1
        return {"score": draw.div_(inputs**0.5).to(layer.weight.device)}

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Of the score; none for the weight, which the optimizer passes over."""
        assert layer.grad is not None
        score = layer.slots["score"]
        return {"score": layer.grad.float() * layer.weight * score.sign(), "weight": None}

    def learning_rate(self, lr: float, progress: float) -> float:
        """That of the weight, scaled."""
        return lr * self.lr_scale

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum and weight decay."""
        return sgd(groups, momentum=self.momentum, weight_decay=self.weight_decay)
