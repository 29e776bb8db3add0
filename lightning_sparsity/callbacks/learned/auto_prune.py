"""AutoPrune: prune by scores that are trained apart from the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, softplus
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask, sgd, slope_of
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.numbers import plain

_SURROGATES = {"leaky_relu": leaky_relu, "softplus": softplus}


class AutoPrune(LearnedMask):
    r"""AutoPrune (Xiao et al., 2019, NeurIPS).

    Every weight has a score and is there while the score is positive: layers compute with
    :math:`w \odot h(s)`, :math:`h` the unit step. In the gradient the slope of the step is that of
    a surrogate, Leaky ReLU or Softplus, and the score's gradient has the sign of the weight in
    place of the weight, so that small weights are heard as well as large ones:

    .. math:: \frac{\partial L}{\partial s} = \operatorname{sign}(w) \,
        \frac{\partial L}{\partial (w \odot h(s))} \, h'(s) + \mu h'(s)

    The last term is the penalty :math:`\mu \sum h(s)`. It prunes; the loss brings back. Weights
    that are not there keep their values, as far as weight decay and momentum do. Scores and
    weights are trained in alternate steps; biases and normalisation are in all of them.

    **The density is not set.** ``mu`` decides it, together with the learning rate and the length
    of training: without any other gradient a score falls by :math:`\eta \mu / (1 - \beta)` in each
    of its steps, :math:`\beta` being the momentum.

    There is no program of the authors to compare with. The paper trains scores on data that are
    held out; here both see the batches of one loader. ``mu``, ``initial_score`` and the
    optimizer are our choice. Masks that an earlier callback made are never left.

    Args:
        mu: :math:`\mu`, at least 0.
        initial_score: Where all scores begin, above 0: dense.
        surrogate: "leaky_relu" (slope 1 above 0, 0.01 below) or "softplus" (slope
            :math:`\sigma(s)`).
        grad: What the score's gradient has of the weight: "sign", or "weight" as in other methods.
        alternate: Whether weights and scores are trained in turns, weights first; False: both
            in every step.
        lr_scale: Learning rate of the scores over that of the weight in the same step, above 0.
        momentum: Of the scores' SGD, in [0, 1).
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float); after it the mask stays and
            the weights are trained as they are.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        seed: Unused; there are no random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[AutoPrune(mu=1e-3), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("score",)
    derived: ClassVar[bool] = True

    def __init__(
        self,
        *,
        mu: float = 1e-3,
        initial_score: float = 0.1,
        surrogate: Literal["leaky_relu", "softplus"] = "leaky_relu",
        grad: Literal["sign", "weight"] = "sign",
        alternate: bool = True,
        lr_scale: float = 1.0,
        momentum: float = 0.9,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        seed: int | None = None,
    ) -> None:
        self._check_number("mu", mu, 0)
        self._check_number("initial_score", initial_score, 0, inside=True)
        if surrogate not in tuple(_SURROGATES):
            raise ValueError(
                f'AutoPrune(surrogate={surrogate!r}): must be "leaky_relu" or "softplus".'
            )
        if grad not in ("sign", "weight"):
            raise ValueError(f'AutoPrune(grad={grad!r}): must be "sign" or "weight".')
        self._check_flag("alternate", alternate)
        self._check_number("lr_scale", lr_scale, 0, inside=True)
        self._check_momentum(momentum)
        self.mu = plain(mu)
        self.initial_score = plain(initial_score)
        self.surrogate = surrogate
        self.grad = grad
        self.alternate = alternate
        self.lr_scale = plain(lr_scale)
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

    # ------------------------------------------------------------------------- the mask

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores: float32, shape of the weight; and whose turn it was."""
        score = torch.full_like(layer.weight, self.initial_score, dtype=torch.float32)
        return {"score": score, "turn": score.new_ones((), dtype=torch.bool)}

    def effective(self, layer: Layer) -> Tensor:
        """The weight where its score is positive."""
        slope = slope_of(self._surrogate(layer.slots["score"])).to(layer.weight.dtype)
        weight = layer.weight.detach()
        heard = weight.sign() if self.grad == "sign" else weight
        return layer.weight * self.support(layer) + heard * slope

    def support(self, layer: Layer) -> Tensor:
        """Weights of positive score."""
        return layer.slots["score"] > 0

    def penalty(self, layer: Layer) -> Tensor:
        r"""The term :math:`\mu \sum h(s)`, with the surrogate's slope."""
        return self.mu * self._surrogate(layer.slots["score"]).sum()

    def _surrogate(self, score: Tensor) -> Tensor:
        return _SURROGATES[self.surrogate](score)

    # -------------------------------------------------------------------------- training

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Pass the turn on: False to the weights, True to the scores."""
        return {"turn": ~layer.slots["turn"]}

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Of the weight and the score, or of the one whose turn it is."""
        found = super().gradients(layer)
        if not self.alternate:
            return found
        still = "weight" if layer.slots["turn"] else "score"
        return {**found, still: None}

    def learning_rate(self, lr: float, progress: float) -> float:
        """That of the weight, scaled."""
        return lr * self.lr_scale

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum, without weight decay."""
        return sgd(groups, momentum=self.momentum)
