"""Sparse variational dropout: weights that drown in their own noise are pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

from lightning_sparsity.callbacks.examples import count_examples
from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import is_time
from lightning_sparsity.structures import Structure

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_LIMIT = 8.0  # of log alpha, as in the authors' program


class VariationalDropout(LearnedMask):
    r"""Sparse variational dropout (Molchanov et al., 2017, arXiv:1701.05369).

    Every weight is a normal distribution around the parameter :math:`w`, whose variance
    :math:`\sigma^2` is trained as its logarithm (Sec. 4.1). The loss gets the divergence from a
    log-uniform prior, which depends on :math:`\log\alpha = \log\sigma^2 - \log w^2` alone
    (Sec. 4.2): with :math:`r` rising from 0 to 1 and :math:`N` examples,

    .. math::
        \frac{r}{N} \sum \Big(k_1 - k_1 \sigma(k_2 + k_3 \log\alpha)
        + \tfrac12 \log(1 + \alpha^{-1})\Big).

    Where :math:`\log\alpha` reaches the ``threshold``, the noise has at least 20 times the power
    of the weight: it is zero in validation and files, and in the end pruned. Other weights
    count there without noise. The density is not asked for but emerges; ``kl_weight`` moves it.

    **Not the paper's estimator.** The authors draw noise anew for every example, in the layer's
    outputs (local reparametrization). Here the weights themselves get the noise, :math:`w +
    \sigma \varepsilon`, one draw per optimizer step for the whole batch and every rank. The
    expected gradient is the same; its variance is larger, and larger batches do not lower the
    part of the noise. Smaller learning rates and longer trainings make up for some of it.

    Further departures: the limits :math:`|\log\alpha| \le 8` are those of the authors' program,
    not of the paper; :math:`\log\sigma^2` has an Adam of its own. Start from a trained network
    or keep the warm-up: without either, weights are pruned before they have learned. Give the
    model's optimizer no weight decay for these weights: the divergence is their prior.

    Args:
        threshold: Value of :math:`\log\alpha` from which on weights are pruned, below 8.
        kl_weight: Factor of the divergence, at least 0; 1 is the variational bound.
        warmup: When :math:`r` begins to rise, and when it is 1: fractions of the window, in
            [0, 1]. The program has epochs 5 and 20 of 200.
        log_sigma2_init: :math:`\log\sigma^2` at the start.
        lr: Learning rate of :math:`\log\sigma^2`; None: in every step that of the weights, as
            in the program, which lets one Adam fall from 1e-3 to 0.
        examples: :math:`N`; None: the length of the training set.
        update_start: First step (int) or fraction of training (float); before it the weights are
            trained without noise.
        update_end: When the pruned weights are taken out, as for ``update_start``.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: Single weights only; anything else is refused.
        seed: Of the noise; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[VariationalDropout(), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("log_sigma2",)
    derived: ClassVar[bool] = True
    dense_gradients: bool = True  # means are trained past the threshold too

    def __init__(
        self,
        *,
        threshold: float = 3.0,
        kl_weight: float = 1.0,
        warmup: tuple[float, float] = (0.025, 0.1),
        log_sigma2_init: float = -10.0,
        lr: float | None = 1e-3,
        examples: int | None = None,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("threshold", threshold, -_LIMIT, _LIMIT, inside=True)
        self._check_number("kl_weight", kl_weight, 0)
        self._check_warmup(warmup)
        self._check_number("log_sigma2_init", log_sigma2_init, -math.inf)
        if lr is not None:
            self._check_number("lr", lr, 0)
        if examples is not None:
            self._check_count("examples", examples)
        self.threshold = plain(threshold)
        self.kl_weight = plain(kl_weight)
        self.warmup = (plain(warmup[0]), plain(warmup[1]))
        self.log_sigma2_init = plain(log_sigma2_init)
        self.lr = plain(lr)
        self.examples = plain(examples)
        self._n = examples or 1
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            single_weights=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the examples."""
        self._n = count_examples(trainer, self.examples, "VariationalDropout")

    # ----------------------------------------------------------------------------- noise

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """The log variances, float32, shape of the weight."""
        return {
            "log_sigma2": torch.full_like(layer.weight, self.log_sigma2_init, dtype=torch.float32)
        }

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Draw the noise of the next step, and say what the divergence counts in it."""
        noise = torch.randn(layer.shape, generator=layer.generator)
        return {
            "noise": noise.to(layer.weight.device),
            "kl_weight": torch.tensor(
                self.kl_weight * self._risen(progress), device=layer.weight.device
            ),
        }

    def _risen(self, progress: float) -> float:
        """The share of the divergence that counts: 0, then rising in a line to 1."""
        start, end = self.warmup
        if progress >= end:
            return 1.0
        return (progress - start) / (end - start) if progress > start else 0.0

    def effective(self, layer: Layer) -> Tensor:
        """The weight with noise."""
        weight = layer.weight.to(layer.slots["log_sigma2"].dtype)
        # Not the root of the variance, whose slope at a weight of 0 is infinite.
        sigma = (log_alpha(weight, layer.slots["log_sigma2"]) / 2).exp() * weight.abs()
        return layer.weight + (sigma * layer.slots["noise"]).to(layer.weight.dtype)

    def evaluated(self, layer: Layer) -> Tensor:
        """The weight, zero from the threshold on."""
        return layer.weight.masked_fill(~self.support(layer), 0)

    def support(self, layer: Layer) -> Tensor:
        """Where log alpha is below the threshold."""
        return log_alpha(layer.weight, layer.slots["log_sigma2"]) < self.threshold

    def penalty(self, layer: Layer) -> Tensor:
        """The divergence from the prior, per example of the training set."""
        weight = layer.weight.to(layer.slots["log_sigma2"].dtype)
        each = divergence(log_alpha(weight, layer.slots["log_sigma2"]))
        return each.sum() * layer.slots["kl_weight"] / self._n

    def learning_rate(self, lr: float, progress: float) -> float:
        """The one given, or that of the weights."""
        return lr if self.lr is None else self.lr

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Adam, as in the paper; no weight decay."""
        return Adam(groups, lr=0.0)

    # ---------------------------------------------------------------------------- checks

    def _check_warmup(self, warmup: object) -> None:
        wanted = "two fractions of the window in order, such as (0.025, 0.1)"
        if not isinstance(warmup, tuple | list) or len(warmup) != 2:
            raise TypeError(f"VariationalDropout(warmup={warmup!r}): must be {wanted}.")
        start, end = map(plain, warmup)
        if not (is_time(start) and is_time(end) and start <= end <= 1):
            raise ValueError(f"VariationalDropout(warmup={warmup!r}): must be {wanted}.")


def log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """Noise power over signal power, as a logarithm, between -8 and 8.

    Args:
        weight: Means.
        log_sigma2: Same shape, log variances.

    Example:
        >>> log_alpha(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, -3.0]))
        tensor([-3.,  8.])
    """
    size = weight.abs().clamp(min=torch.finfo(weight.dtype).tiny)  # log 0 has no gradient
    return (log_sigma2 - 2 * size.log()).clamp(-_LIMIT, _LIMIT)


def divergence(log_alpha: Tensor) -> Tensor:
    """The paper's approximation of the divergence from the prior, per weight; 0 at the end.

    Example:
        >>> divergence(torch.tensor([0.0, 8.0]))
        tensor([4.3124e-01, 1.6836e-04])
    """
    return _K1 - _K1 * (_K2 + _K3 * log_alpha).sigmoid() + softplus(-log_alpha) / 2
