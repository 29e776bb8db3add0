"""NeST: grow a sparse seed where gradients are large, then prune by magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Curve, Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import fixes_total, uniform
from lightning_sparsity.rules import chain, drop, forget, grow
from lightning_sparsity.scores import entrywise, magnitude, random, without_gradient
from lightning_sparsity.structures import NM, Structure


class NeST(MaskCallback):
    r"""Connection growth and pruning of NeST (Dai et al., 2019, arXiv:1711.02017).

    From a sparse random seed the density rises to a peak and falls to its end. On the way
    up, connections whose loss gradient, averaged over the steps since the update before,
    is largest in size come alive (gradient-based growth), at

    .. math:: w = -\eta\,\overline{\nabla L},

    one step of gradient descent with the learning rate of the moment. On the way down
    those of smallest magnitude die and do not come back (magnitude-based pruning).

    The paper grows a share of the dormant connections and prunes below thresholds until
    the accuracy suffers, with training in between; here the density goes straight up and
    down again, and seed and peak are ours. Growth and pruning of whole neurons and
    feature maps and the pruning of parts of convolutions are not included.

    Args:
        density: Final live share of all sparse weights, in (0, 1].
        distribution: How the density is split over layers; default uniform. It must follow
            a density, as the density changes.
        seed_density: Density of the seed, in (0, 1]; default ``density``. Masks that an
            earlier callback made come before it.
        peak_density: Largest density, in (0, 1], at least ``density`` and ``seed_density``;
            default twice the larger of them.
        growth_end: Share of the window, in (0, 1), at which the peak is reached.
        new_weight_scale: New weights start at so many gradient steps, at least 0; 0: they
            start at zero.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Step (int) or fraction of training (float) at which ``density`` holds.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(4, 4)``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as ``rescale_to_fan_in``; None keeps the model's own.
        seed: Of the random seed network; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[NeST(density=0.05, peak_density=0.2)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        seed_density: float | None = None,
        peak_density: float | None = None,
        growth_end: float = 0.5,
        new_weight_scale: float = 1.0,
        update_interval: Interval = 100,
        update_start: int | float = 0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        if isinstance(structure, NM):
            density = self._check_pattern(density, structure)
        elif density is not None:
            self._check("density", density, low_open=True)
        final = 1.0 if density is None else density  # the base class asks for one
        if seed_density is not None:
            self._check("seed_density", seed_density, low_open=True)
        first = final if seed_density is None else seed_density
        if peak_density is None:
            peak_density = min(1.0, 2 * max(first, final))
        self._check("peak_density", peak_density, low_open=True)
        if density is not None and peak_density < max(first, final):
            raise ValueError(
                f"NeST(peak_density={peak_density}): must be at least density ({final}) and "
                f"seed_density ({first})."
            )
        self._check("growth_end", growth_end, low_open=True)
        if growth_end == 1:
            raise ValueError("NeST(growth_end=1): must lie below 1, to leave time for pruning.")
        self._check_number("new_weight_scale", new_weight_scale, 0)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        start = drop(random)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(start, weight_init) if weight_init else start,
            update=chain(
                drop(magnitude),
                grow(mean_gradient, start=downhill(plain(new_weight_scale))),
                forget("mean_gradient", "gradient_count"),
            ),
            ramp=rise_and_fall(plain(peak_density), plain(growth_end)),
            initial_density=first,
            observe=average_gradient,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def check(self, layers: Layers) -> None:
        """Raise if the asked density cannot be reached, or not change; see the base class."""
        super().check(layers)
        if fixes_total(self._budget.distribution):
            raise ValueError(
                f"NeST(distribution={self.distribution}): the density rises and falls, so the "
                "distribution must follow one, as uniform and erk do."
            )


@dataclass(frozen=True)
class rise_and_fall:
    """A ramp that goes straight up to a peak and straight down to its end.

    Args:
        peak: Density at the peak.
        at: Progress at which it is reached, in (0, 1).
    """

    peak: float
    at: float

    def __call__(self, start: float, end: float) -> Curve:
        """The schedule."""
        return _Hill(start, self.peak, end, self.at)


@dataclass(frozen=True)
class _Hill(Curve):
    start: float
    peak: float
    end: float
    at: float

    def __call__(self, progress: float) -> float:
        if progress <= self.at:
            return self.peak + (self.start - self.peak) * (1 - progress / self.at)
        return self.end + (self.peak - self.end) * (1 - progress) / (1 - self.at)


@entrywise
def average_gradient(layer: Layer) -> Mapping[str, Tensor]:
    """The mean of the dense gradients since the latest update, and how many there were."""
    assert layer.grad is not None
    grad = layer.grad.to(torch.promote_types(layer.grad.dtype, torch.float32))
    sound = grad.isfinite().all()  # one infinity would stay in the mean
    count = layer.slots.get("gradient_count", torch.zeros((), device=grad.device)) + sound
    mean = layer.slots.get("mean_gradient", torch.zeros_like(grad))
    step = torch.where(sound, grad - mean, 0.0) / count.clamp(min=1)
    return {"mean_gradient": mean + step, "gradient_count": count}


@without_gradient
def mean_gradient(layer: Layer) -> Tensor:
    """Size of the mean gradient; 0 where the layer had none."""
    return layer.slots.get("mean_gradient", torch.zeros_like(layer.weight)).abs()


@dataclass(frozen=True)
class downhill:
    """Start values of new weights: a step down the mean gradient.

    Args:
        scale: Length of the step, in learning rates; 0: new weights start at zero.
    """

    scale: float

    def __call__(self, layer: Layer) -> Tensor:
        """Values for every weight of ``layer``."""
        mean = layer.slots.get("mean_gradient", torch.zeros_like(layer.weight))
        return -self.scale * (layer.lr or 0.0) * mean
