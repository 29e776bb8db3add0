"""Supermask: learn the chances that random weights, which are never trained, are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask, sgd, slope_of
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer, Layers, Rule, Verb
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain


class Supermask(LearnedMask):
    r"""Deconstructing Lottery Tickets (Zhou et al., 2019, arXiv:1905.01067, Sec. 5).

    Weights keep their random start values; every weight has a score, and is there with the
    chance :math:`p = \sigma(s)`. Each optimizer step computes with a draw :math:`m \sim
    \mathrm{Bernoulli}(p)`, and scores learn by :math:`\partial L / \partial s = p (1 - p) \, w \,
    \partial L / \partial (w \odot m)`, as if the layer computed with :math:`p` (straight-through).
    With ``rescale``, the weights there are multiplied by :math:`n / \sum m`, :math:`n` being the
    number of weights of the layer (dynamic weight rescaling).

    **The density is not set.** It is the share of scores that end above 0. ``initial_probability``
    moves where they begin; no term of the loss asks for sparsity.

    Only sparse weights are frozen, and they stay in the model's optimizer, whose learning rate
    the scores follow. The paper trains nothing else: freeze biases and normalisation as in the
    example to have that. When the window ends before training, the weights found are trained.
    Masks that an earlier callback made are never left.

    Departures: validation and files have the weights of :math:`p > 1/2`, where the paper
    also evaluates draws; all passes of one optimizer step compute with one draw. Where the paper
    says nothing, ``lr_scale`` and ``initial_probability`` are our choice.

    Args:
        rescale: Whether weights are multiplied by the inverse of their layer's density.
        initial_probability: Of every weight, in (0, 1).
        lr_scale: Learning rate of the scores over that of the weight in the same step, above 0;
            what reaches a score is small, as it carries :math:`w` and :math:`p(1 - p)`.
        momentum: Of the scores' SGD, in [0, 1).
        update_start: First step (int) or fraction of training (float); before it the weights
            are dense and trained.
        update_end: Last step (int) or fraction of training (float); after it the mask stays and
            the weights are trained.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        weight_init: Where this callback makes the masks: a rule for the values of the weights,
            such as ``signed_constant("std")``, the paper's choice; None keeps the model's own.
        seed: Of the draws; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim > 1)  # neither biases nor normalisation
        Trainer(callbacks=[Supermask(rescale=True, weight_init=signed_constant("std"))])
    """

    trained: ClassVar[Sequence[str]] = ("score",)
    derived: ClassVar[bool] = True

    def __init__(
        self,
        *,
        rescale: bool = False,
        initial_probability: float = 0.5,
        lr_scale: float = 1000.0,
        momentum: float = 0.9,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_flag("rescale", rescale)
        self._check_number("initial_probability", initial_probability, 0, 1, inside=True)
        self._check_number("lr_scale", lr_scale, 0, inside=True)
        self._check_momentum(momentum)
        self._check_callable("weight_init", weight_init, "signed_constant()")
        self.rescale = rescale
        self.initial_probability = plain(initial_probability)
        self.lr_scale = plain(lr_scale)
        self.momentum = plain(momentum)
        self.weight_init = weight_init
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            seed=seed,
            single_weights=True,
        )

    # ------------------------------------------------------------------------- the mask

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make the scores, and give the weights other values if that was asked for."""
        begun = super().begin(layers, share)
        if self.weight_init is None or share.found:
            return begun
        return self._start(self.weight_init, begun, [layer.live for layer in begun])

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores: float32, shape of the weight."""
        score = math.log(self.initial_probability / (1 - self.initial_probability))
        return {"score": torch.full_like(layer.weight, score, dtype=torch.float32)}

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Draw the mask of the next step."""
        chance = layer.slots["score"].sigmoid()
        draw = torch.rand(layer.shape, generator=layer.generator).to(chance.device)
        return {"drawn": draw < chance}

    def effective(self, layer: Layer) -> Tensor:
        """The weights that were drawn."""
        drawn = layer.slots["drawn"]
        return self._scaled(layer.weight, drawn, drawn + slope_of(layer.slots["score"].sigmoid()))

    def evaluated(self, layer: Layer) -> Tensor:
        """The weights that are more likely there than not."""
        mask = self.support(layer)
        return self._scaled(layer.weight, mask, mask)

    def support(self, layer: Layer) -> Tensor:
        """Weights of positive score."""
        return layer.slots["score"] > 0

    def _scaled(self, weight: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
        scale = mask.numel() / mask.count_nonzero().clamp(min=1) if self.rescale else 1
        return weight * (factor * scale).to(weight.dtype)

    # -------------------------------------------------------------------------- training

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Of the scores; none for the weight, which the optimizer passes over."""
        return {**super().gradients(layer), "weight": None}

    def learning_rate(self, lr: float, progress: float) -> float:
        """That of the weight, scaled."""
        return lr * self.lr_scale

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum, without weight decay."""
        return sgd(groups, momentum=self.momentum)
