"""Starts: rules that place the first live weights, and give them their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_sparsity.core.layer import Budget, Layer, Layers, Verb
from lightning_sparsity.ops.selection import sample
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import random, without_gradient
from lightning_sparsity.structures import Unstructured


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
    """Draw the places of each layer's live units at random; their number stays.

    A control for methods that choose places by a score (Frankle et al., 2021).
    """

    def shuffled(layer: Layer) -> Layer:
        whole = dataclasses.replace(layer, mask=torch.ones_like(layer.mask))
        return drop(random)([whole], [layer.live], 0.0)[0]

    return [layer if layer.live == layer.size else shuffled(layer) for layer in layers]


@without_gradient
def redraw(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Deal the values of each layer that has zeros out anew, over all of its weights.

    A control (Frankle et al., 2021): another draw from the distribution of its start values.
    """

    def dealt(layer: Layer) -> Layer:
        order = torch.randperm(layer.weight.numel(), generator=layer.generator)
        values = layer.weight.reshape(-1)[order.to(layer.weight.device)]
        return dataclasses.replace(layer, weight=values.reshape(layer.shape))

    return [layer if layer.live == layer.size else dealt(layer) for layer in layers]


def _spread(layer: Layer, count: int) -> Layer:
    generator = layer.generator
    assert generator is not None
    if layer.structure != Unstructured() or layer.live < layer.size or count == layer.size:
        return drop(random)([layer], [count], 0.0)[0]
    groups, outputs, inputs, kernel = layer.layout.canonical(layer.mask).shape
    neurons, links = groups * outputs, inputs * kernel
    each, more = divmod(count, neurons)
    richer = sample(torch.ones(neurons, dtype=torch.bool), more, generator)
    mask = torch.zeros(neurons, links, dtype=torch.bool)
    for chosen, parts in ((~richer, each), (richer, each + 1)):
        edges = torch.arange(parts + 1) * links // max(parts, 1)
        draw = torch.rand(int(chosen.sum()), parts, generator=generator, dtype=torch.float64)
        place = edges[:-1] + (draw * edges.diff()).long()
        mask[chosen] = mask[chosen].scatter(1, place, True)
    view = mask.reshape(groups, outputs, inputs, kernel).to(layer.mask.device)
    return dataclasses.replace(layer, mask=layer.layout.restore(view, layer.shape).contiguous())


def _per_output(layer: Layer, scale: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``scale(inputs, live inputs)`` of every output unit, in the weight's shape."""
    view = layer.layout.canonical(layer.mask)
    live = view.sum((2, 3), keepdim=True).clamp(min=1).to(layer.weight.dtype)
    total = view.shape[2] * view.shape[3]
    return layer.layout.restore(scale(total, live).expand(view.shape), layer.shape)
