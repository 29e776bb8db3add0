"""Starts: rules that place the first live weights, and give them their values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_sparsity.core.layer import Budget, Layer, Layers, Verb
from lightning_sparsity.core.numbers import settle
from lightning_sparsity.ops.selection import sample
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import random, without_gradient
from lightning_sparsity.structures import Unstructured

FOUND = "found"
"""Slot with the mask that an earlier method made; where there is none, all weights were live."""

_RECENT = 100


@without_gradient
def rescale_to_fan_in(layers: Layers, budget: Budget, progress: float) -> Layers:
    r"""Scale each output unit's weights by :math:`1/\sqrt{d}`, d its live share of inputs.

    Any dense initialisation whose variance is ``c / fan_in`` then has ``c / live fan_in``
    at every neuron: the sparse network starts with the signal strength of the dense one.
    """
    return [
        dataclasses.replace(
            layer, weight=layer.weight * _per_output(layer, lambda n, live: (n / live) ** 0.5)
        )
        for layer in layers
    ]


@without_gradient
def sparse_kaiming_normal(layers: Layers, budget: Budget, progress: float) -> Layers:
    r"""Draw live weights anew from :math:`N(0, 2 / \text{live fan-in})`, neuron by neuron.

    Gradient Flow in Sparse Neural Networks (Evci et al., 2022, Sec. 3.1).
    """

    def draw(layer: Layer) -> Tensor:
        values = torch.randn(layer.shape, generator=layer.generator).to(layer.weight)
        return values * _per_output(layer, lambda _, live: (2 / live) ** 0.5)

    return [dataclasses.replace(layer, weight=draw(layer)) for layer in layers]


@dataclass(frozen=True)
class sparse_uniform(Verb):
    r"""Draw weights from :math:`U(-1/k, 1/k)` and biases from :math:`U(-1/\sqrt k, 1/\sqrt k)`.

    :math:`k` is the number of live inputs of the neuron. The start of the Redr algorithms
    (Eibensteiner). Layers that are dense keep what the model gave them.

    Args:
        fan_in: ``"live"``, or ``"dense"``: :math:`k` counts all inputs of the neuron.

    Raises:
        ValueError: If ``fan_in`` is something else.
    """

    fan_in: Literal["live", "dense"] = "live"
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.fan_in not in ("live", "dense"):
            raise ValueError(f'{self}: fan_in must be "live" or "dense".')

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Draw the values of every layer that has zeros."""
        return [layer if layer.live == layer.size else self._draw(layer) for layer in layers]

    def _draw(self, layer: Layer) -> Layer:
        def inputs(total: int, live: Tensor) -> Tensor:
            return live if self.fan_in == "live" else torch.full_like(live, total)

        fan_in = _per_output(layer, inputs)
        weight = (2 * torch.rand(layer.shape, generator=layer.generator) - 1).to(layer.weight)
        bias = layer.bias
        if bias is not None:
            view = layer.layout.canonical(fan_in)
            draw = (2 * torch.rand(bias.shape, generator=layer.generator) - 1).to(bias)
            bias = draw / view[:, :, 0, 0].reshape(-1).to(bias).sqrt()
        return dataclasses.replace(layer, weight=weight / fan_in, bias=bias)


@dataclass(frozen=True)
class signed_constant(Verb):
    r"""Give all weights of a layer one magnitude; signs stay.

    The start of networks whose weights are never trained (Zhou et al., 2019; Ramanujan et al.,
    2020). Weights off the mask get it too, as a method that learns masks may choose them later,
    and so do layers that are dense.

    Args:
        scale: The magnitude: ``"fan_in"`` :math:`\sqrt{2 / \text{fan-in}}`, ``"live_fan_in"``
            :math:`\sqrt{2 / (d \cdot \text{fan-in})}` with :math:`d` the density of the layer,
            or ``"std"`` the standard deviation of the weights that the layer has.

    Raises:
        ValueError: If ``scale`` is something else.
    """

    scale: Literal["fan_in", "live_fan_in", "std"] = "fan_in"
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale not in ("fan_in", "live_fan_in", "std"):
            raise ValueError(f'{self}: scale must be "fan_in", "live_fan_in" or "std".')

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Replace the weights of every layer."""
        return [
            dataclasses.replace(layer, weight=layer.weight.sign() * self._magnitude(layer))
            for layer in layers
        ]

    def _magnitude(self, layer: Layer) -> float:
        if self.scale == "std":
            return float(layer.weight.std(correction=0))
        density = max(layer.live, 1) / layer.size if self.scale == "live_fan_in" else 1.0
        return math.sqrt(2 / (density * layer.layout.by_neuron(layer.mask).shape[1]))


@dataclass(frozen=True)
class approximate_isometry(Verb):
    r"""Move live weights until layers keep the length of signals (Lee et al., 2020).

    A Signal Propagation Perspective for Pruning Neural Networks at Initialization
    (arXiv:1906.06307): gradient descent on
    :math:`\lVert (m_l \odot w_l)(m_l \odot w_l)^T - I \rVert_F` (not squared), layer by layer,
    without data; a convolution is a matrix of outputs by inputs times kernel positions. Layers
    that are dense, and biases, keep what the model gave them.

    What differs from the authors' program: where a layer has more outputs than inputs, the
    rows are the inputs, which has the same minimum and can come to 0; the best weights on the
    way are taken, as steps of constant length end in circles of that size around the minimum;
    and the descent stops when it gains no more.

    Args:
        steps: Most steps of the descent, at least 1.
        lr: Its learning rate, above 0.
        tolerance: It stops when 100 steps have lowered the penalty by less than this share of
            it; at least 0.
        orthogonal: Draw an orthogonal matrix to begin with, as the authors do; False: begin
            with the weights of the model, for which the mask may have been chosen.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """

    steps: int = 10_000
    lr: float = 0.1
    tolerance: float = 1e-4
    orthogonal: bool = False
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        settle(self, "steps", "lr", "tolerance")
        numbers = all(type(value) in (int, float) for value in (self.lr, self.tolerance))
        if type(self.steps) is not int or type(self.orthogonal) is not bool or not numbers:
            raise TypeError(
                f"{self}: steps must be an int, lr and tolerance numbers, orthogonal True or False."
            )
        if self.steps < 1 or not 0 < self.lr < math.inf or not 0 <= self.tolerance < math.inf:
            raise ValueError(
                f"{self}: needs steps >= 1, lr above 0 and tolerance >= 0, all finite numbers."
            )

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Move the values of every layer that has zeros."""
        return [layer if layer.live == layer.size else self._moved(layer) for layer in layers]

    def _moved(self, layer: Layer) -> Layer:
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        view = layer.layout.canonical(layer.weight)
        values, mask = view.to(dtype).flatten(2), layer.layout.canonical(layer.mask).flatten(2)
        if values.shape[1] <= values.shape[2]:
            found = self._descent(values, mask, layer.generator)
        else:
            found = self._descent(values.mT, mask.mT, layer.generator).mT
        weight = layer.layout.restore(found.reshape(view.shape), layer.shape)
        return dataclasses.replace(layer, weight=weight.to(layer.weight.dtype).contiguous())

    def _descent(self, rows: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """The best on the way; ``rows`` are ``(groups, fewer, more)``."""
        if self.orthogonal:
            draw = torch.randn(rows.mT.shape, generator=generator, dtype=rows.dtype)
            q, r = torch.linalg.qr(draw)
            rows = (q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).mT.to(rows.device)
        now = best = rows * mask
        eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        lowest: list[float] = []  # so far, at every step
        for step in range(self.steps + 1):
            excess = now @ now.mT - eye
            penalty = float(excess.norm())
            if not lowest or penalty < lowest[-1]:
                best = now
            lowest.append(min([penalty, *lowest[-1:]]))
            gain = lowest[step - _RECENT] - lowest[-1] if step >= _RECENT else math.inf
            if penalty == 0 or gain <= self.tolerance * lowest[-1]:
                break
            now = now - self.lr * mask * (2 / penalty) * (excess @ now)
        return best


@without_gradient
def spread_inputs(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Give every neuron equally many live inputs, spread evenly over all of them.

    The inputs of a neuron with c live weights are cut into c contiguous parts, whose sizes
    differ by at most one, and one weight is drawn uniformly in each (Eibensteiner's start).
    Where the budget of a layer is no multiple of its neurons, some neurons, drawn at
    random, have one more. A layer with a structure has its units drawn at random.
    """
    return [_spread(layer, count) for layer, count in zip(layers, budget, strict=True)]


@without_gradient
def shuffle_within_layers(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Draw the places of each layer's live units among all that were live; their number stays.

    A control for methods that choose places by a score (Frankle et al., 2021).
    """

    def shuffled(layer: Layer) -> Layer:
        before = dataclasses.replace(layer, mask=_found(layer))
        return drop(random)([before], [layer.live], 0.0)[0]

    return [layer if layer.live == layer.size else shuffled(layer) for layer in layers]


@without_gradient
def redraw(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Deal the values of each layer that has zeros out anew, over all weights that were live.

    A control (Frankle et al., 2021): another draw from the distribution of its start values.
    """

    def dealt(layer: Layer) -> Layer:
        before = _found(layer)
        values = layer.weight[before]
        order = torch.randperm(len(values), generator=layer.generator).to(values.device)
        return dataclasses.replace(layer, weight=layer.weight.masked_scatter(before, values[order]))

    return [layer if layer.live == layer.size else dealt(layer) for layer in layers]


def _found(layer: Layer) -> Tensor:
    """The weights that were live before the method at work pruned any."""
    found = layer.slots.get(FOUND)
    return torch.ones_like(layer.mask) if found is None else found


def _spread(layer: Layer, count: int) -> Layer:
    generator = layer.generator
    assert generator is not None
    if layer.structure != Unstructured() or layer.live < layer.size or count == layer.size:
        return drop(random)([layer], [count], 0.0)[0]
    neurons, links = layer.layout.by_neuron(layer.mask).shape
    each, more = divmod(count, neurons)
    richer = sample(torch.ones(neurons, dtype=torch.bool), more, generator)
    mask = torch.zeros(neurons, links, dtype=torch.bool)
    for chosen, parts in ((~richer, each), (richer, each + 1)):
        edges = torch.arange(parts + 1) * links // max(parts, 1)
        draw = torch.rand(int(chosen.sum()), parts, generator=generator, dtype=torch.float64)
        place = edges[:-1] + (draw * edges.diff()).long()
        mask[chosen] = mask[chosen].scatter(1, place, True)
    mask = mask.to(layer.mask.device)
    return dataclasses.replace(layer, mask=layer.layout.from_neurons(mask, layer.shape))


def _per_output(layer: Layer, scale: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``scale(inputs, live inputs)`` of every output unit, in the weight's shape."""
    view = layer.layout.canonical(layer.mask)
    live = view.sum((2, 3), keepdim=True).clamp(min=1).to(layer.weight.dtype)
    total = view.shape[2] * view.shape[3]
    return layer.layout.restore(scale(total, live).expand(view.shape), layer.shape)
