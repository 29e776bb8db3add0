"""DEEP R: every weight has a sign, walks at random, and is rewired where the sign would flip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Budget, Curve, Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import er
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import needs_gradient, random
from lightning_sparsity.structures import Structure

START = 1e-12
"""What a new connection's parameter starts at, as in the authors' code."""


class DeepR(MaskCallback):
    r"""Deep rewiring (Bellec et al., 2018, arXiv:1711.05136).

    Every position has a fixed sign :math:`s` and, while it is live, a parameter
    :math:`\theta \ge 0`; the weight is :math:`w = s\,\theta`. After every optimizer step,
    which has moved the live weights down the gradient,

    .. math:: \theta \leftarrow \theta - \eta\,\alpha + \sqrt{2 \eta T}\,\nu, \qquad
              \nu \sim N(0, 1)

    (Alg. 1), with the learning rate :math:`\eta` of that step. Connections with
    :math:`\theta < 0` die, and as many of the dormant ones come alive at
    :math:`\theta = 10^{-12}`, drawn uniformly, in each layer or over all
    (``share=global_by(random, min_per_layer=0)``).

    The authors' code scales the noise with :math:`\eta` itself, not with its root: normal
    of deviation :math:`10^{-5}\,\eta`. The default does so too,
    :math:`T = \eta\,\alpha^2 / 2`. Their code draws the first positions with replacement;
    here they are distinct, so that the count is exact from the start. A connection that
    dies and is drawn again at once keeps its optimizer state. Layers that are dense at the
    start have nothing to rewire and get neither drift nor noise.

    Meant for SGD. Adam's steps have the size of :math:`\eta` however small the gradient is,
    so that weights near zero flip, and are rewired, far more often. Soft DEEP R, where
    dormant parameters go on walking below zero, is not included.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default Erdős-Rényi, which is near the authors' 0.01, 0.03 and 0.3 for
            784-300-100-10.
        l1: :math:`\alpha`, at least 0.
        temperature: :math:`T`, at least 0, or a schedule of it; default as above.
        share: How the connections that come alive are split over the layers; None: each
            layer gets back what it lost. With a share every layer keeps at least one.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``. Drift
            and noise act in updates only, so the method as published needs 1.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: Single weights only: other units have no sign.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[DeepR(density=0.05)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        l1: float = 1e-5,
        temperature: float | Curve | None = None,
        share: Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("l1", l1, 0)
        if callable(temperature) and not isinstance(temperature, type):
            self._check_schedule("temperature", temperature, 0)
        elif temperature is not None:
            self._check_number("temperature", temperature, 0)
        self._check_callable("share", share, "global_by(random, min_per_layer=0)")
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=er,
            initial=chain(start, weight_init) if weight_init else start,
            update=rewire(plain(l1), plain(temperature), share),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            single_weights=True,
            seed=seed,
        )

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make masks, or take over those that were found, and give every position its sign."""
        return [_with_sign(layer) for layer in super().begin(layers, share)]


@dataclass(frozen=True)
class rewire:
    r"""Move the live weights, drop those whose sign flips and grow as many at random.

    Works on the layers that have a slot "sign" (int8, 1 or -1), gives one to those that lack
    it, and leaves dense ones alone.

    Args:
        l1: :math:`\alpha`.
        temperature: :math:`T`, or a schedule of it; None: :math:`\eta\,\alpha^2 / 2`.
        share: How growth is split over the layers; None: each its own.
    """

    l1: float
    temperature: float | Curve | None = None
    share: Distribution | None = None

    @property
    def needs_gradient(self) -> bool:
        """Whether the share reads gradients."""
        return self.share is not None and needs_gradient(self.share)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Rewire; ``budget`` is not used."""
        layers = [layer if "sign" in layer.slots else _with_sign(layer) for layer in layers]
        signed = [layer for layer in layers if "sign" in layer.slots]
        alive = [self._drop(self._walk(layer, progress)) for layer in signed]
        full = grow(random, self.share)(alive, [layer.live for layer in signed], progress)
        done = {layer.name: _positive(layer) for layer in full}
        return [done.get(layer.name, layer) for layer in layers]

    def _walk(self, layer: Layer, progress: float) -> Layer:
        if layer.lr is None:
            raise ValueError(f"{layer.name}: drift and noise follow a learning rate, none is here.")
        deviation = layer.lr * self.l1
        if self.temperature is not None:
            now = self.temperature
            now = now(progress) if callable(now) else now
            deviation = math.sqrt(2 * layer.lr * now)
        theta = _theta(layer)[layer.mask] - layer.lr * self.l1
        noise = torch.randn(len(theta), generator=layer.generator).to(theta)
        weight = torch.zeros_like(layer.weight)
        weight[layer.mask] = (theta + deviation * noise) * layer.slots["sign"][layer.mask]
        return dataclasses.replace(layer, weight=weight)

    def _drop(self, layer: Layer) -> Layer:
        theta = _theta(layer)
        flipped = layer.mask & (theta < 0)
        if not flipped.any():
            return layer
        kept = layer.mask & ~flipped
        if self.share is not None and not kept.any():
            kept = top_k([theta], 1, [layer.mask])[0]
        return dataclasses.replace(layer, mask=kept)


def _with_sign(layer: Layer) -> Layer:
    """Signs of the live weights, and random ones elsewhere; a dense layer needs none."""
    if layer.live == layer.size:
        return layer
    drawn = 2 * torch.randint(2, layer.shape, generator=layer.generator, dtype=torch.int8) - 1
    own = layer.weight.sign().to(torch.int8)
    sign = torch.where(layer.mask & (own != 0), own, drawn.to(own.device))
    return dataclasses.replace(layer, slots={**layer.slots, "sign": sign})


def _theta(layer: Layer) -> Tensor:
    return layer.weight * layer.slots["sign"]


def _positive(layer: Layer) -> Layer:
    """New connections, and any that is kept although its sign has flipped, at the start value."""
    weight = _theta(layer).clamp(min=START) * layer.slots["sign"] * layer.mask
    return dataclasses.replace(layer, weight=weight)
