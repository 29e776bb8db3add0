"""GSE: grow where the gradient is largest within a random subset of the free weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.apportion import apportion, fill
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Budget, Curve, Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.ops.selection import sample, top_n_per_group
from lightning_sparsity.rules import barring, chain, drop, grow
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import gradient, magnitude, random, without_gradient
from lightning_sparsity.structures import NM, Structure


@without_gradient
def er_of_links(layers: Layers, total: int) -> list[int]:
    r"""Erdős-Rényi, where the inputs of a convolution's neuron are all that its kernel sees.

    :math:`d_l \propto (n_{in} + n_{out}) / (n_{in} n_{out})`, with :math:`n_{in}` channels
    times kernel area: a layer has links in proportion to its neurons and their inputs.
    """
    views = [layer.layout.canonical(layer.weight).shape for layer in layers]
    sides = [(groups * outputs, inputs * kernel) for groups, outputs, inputs, kernel in views]
    raw = [(a + b) / (a * b) * layer.size for (a, b), layer in zip(sides, layers, strict=True)]
    capacity = [layer.live for layer in layers]
    return apportion(fill(raw, capacity, total), capacity, total)


@dataclass(frozen=True)
class explore:
    r"""Let only some free units of each layer grow in this update, drawn at random.

    They are :math:`\gamma` times as many as the layer's budget, rounded down, and at least as
    many as are to grow. Under an ``NM`` pattern every group draws its own.

    Args:
        fraction: :math:`\gamma`, at least 0.
    """

    fraction: float
    needs_gradient: ClassVar[bool] = False

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Bar all other free units."""
        return [self._explore(layer, count) for layer, count in zip(layers, budget, strict=True)]

    def _explore(self, layer: Layer, count: int) -> Layer:
        pattern = layer.structure
        if isinstance(pattern, NM):
            free = pattern.group(layer.free, layer.layout)
            live = pattern.group(layer.mask, layer.layout).count_nonzero(dim=1)
            room = (count // len(free) - live).clamp(min=self._size(count) // len(free))
            few = room.minimum(free.count_nonzero(dim=1))
            values = pattern.group(random(layer), layer.layout)
            drawn = pattern.ungroup(top_n_per_group(values, few, free), layer.shape, layer.layout)
        else:
            assert layer.generator is not None
            free = pattern.live(layer.free, layer.layout)
            size = min(max(self._size(count), count - layer.live), int(free.count_nonzero()))
            units = sample(free, size, layer.generator)
            drawn = pattern.expand(units, layer.shape, layer.layout)
        return dataclasses.replace(layer, barred=~drawn)

    def _size(self, count: int) -> int:
        return math.floor(round(self.fraction * count, 9))


class GSE(MaskCallback):
    r"""Guided Stochastic Exploration (Heddes et al., 2024, arXiv:2401.06898).

    At every update each layer loses the fraction
    :math:`f(t) = \frac{\alpha}{2}(1 + \cos(\pi t / T_{end}))` of its live weights, smallest
    magnitude first. Then :math:`\gamma` times as many of the weights that were not live as
    were live are drawn uniformly at random, and of these as many as were lost grow, where
    :math:`|\nabla L|` is largest. New weights start at zero. With :math:`\gamma` small this
    is SET, with :math:`\gamma` large RigL. Gradients of so few weights cost no more than the
    sparse layer itself; on dense storage, where autograd gives all of them anyway, what is
    left is the exploration.

    The defaults are those of the authors' code (200 epochs, the last updates after 120).
    That code ranks magnitudes and gradients over all layers together, so that their
    densities drift; it reads gradients from batches drawn for the purpose, draws with
    replacement and live weights too, so that fewer can grow, and lets every free weight of a
    layer compete whose density is at least a half. Here each layer keeps its density and the
    gradient is that of the optimizer step. Of the three ways to draw the subset this is the
    uniform one. The code also starts each neuron's weights by its live inputs, as
    ``weight_init=rescale_to_fan_in`` does.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default Erdős-Rényi over all links of a kernel.
        drop_fraction: :math:`\alpha`, in [0, 1], falling as a cosine to 0 at ``update_end``;
            or a schedule.
        candidate_fraction: :math:`\gamma`, at least 0; 0 draws only as many as grow.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: :math:`T_{end}`, a step (int) or a fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[GSE(density=0.02), DensityMonitor()])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.2,
        candidate_fraction: float = 1.0,
        update_interval: Interval = 1000,
        update_start: int | float = 0,
        update_end: int | float = 0.6,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_number("candidate_fraction", candidate_fraction, 0)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction)
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=er_of_links,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(
                barring(drop(magnitude, fraction)),
                explore(plain(candidate_fraction)),
                grow(gradient),
            ),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
