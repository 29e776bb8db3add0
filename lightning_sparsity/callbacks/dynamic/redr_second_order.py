"""The Redr algorithms that drop by predicted loss and let the other weights make up for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Budget, Curve, Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import global_by, in_proportion, uniform
from lightning_sparsity.ops.fisher import (
    add_outer,
    inverse_blocks,
    newton_step,
    obs_saliency,
    survivors_update,
    to_blocks,
)
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.rules import barring, chain, drop, exchange, forget, grow
from lightning_sparsity.schedules import cosine
from lightning_sparsity.scores import random, slot
from lightning_sparsity.starts import sparse_uniform, spread_inputs
from lightning_sparsity.structures import Structure

_SLOTS = ("positions", "fisher", "gradients", "gradient_sum")


@dataclass(frozen=True)
class fisher_blocks:
    """Gathers the outer products of gradients, over blocks of consecutive live weights.

    Keeps the slots "positions" (flat places of the live weights, in row-major order),
    "fisher" (sums of the products, ``(blocks, size, size)``), "gradients" (how many) and, for
    the mean, "gradient_sum" ``(blocks, size)``; in float32, or float64 for such weights. A
    gradient that is not finite, or whose square is not, is left out.

    Args:
        size: Weights in a block, at least 1.
        mean: Whether the mean gradient is wanted too.
    """

    size: int
    mean: bool = False

    def observe(self, layer: Layer) -> Mapping[str, Tensor]:
        """The slots with this step's gradient in them."""
        assert layer.grad is not None
        slots = layer.slots if self._has_begun(layer) else self._nothing(layer)
        grad = layer.grad.reshape(-1).index_select(0, slots["positions"])
        rows = to_blocks(grad.to(slots["fisher"].dtype), self.size)
        sound = rows.square().sum().isfinite()
        rows = torch.where(sound, rows, 0.0)
        new = {
            "positions": slots["positions"],
            "fisher": add_outer(slots["fisher"], rows),
            "gradients": slots["gradients"] + sound,
        }
        return {**new, "gradient_sum": slots["gradient_sum"] + rows} if self.mean else new

    def of(self, layer: Layer) -> Mapping[str, Tensor]:
        """What was gathered for the weights that live now; nothing, if others lived then."""
        begun = self._has_begun(layer)
        same = begun and torch.equal(layer.slots["positions"], _positions(layer))
        return layer.slots if same else self._nothing(layer)

    def _has_begun(self, layer: Layer) -> bool:
        wanted = _SLOTS if self.mean else _SLOTS[:-1]
        return (
            all(name in layer.slots for name in wanted)
            and layer.slots["fisher"].shape[-1] == self.size
        )

    def _nothing(self, layer: Layer) -> Mapping[str, Tensor]:
        positions = _positions(layer)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        rows = to_blocks(torch.zeros_like(positions, dtype=dtype), self.size)
        return {
            "positions": positions,
            "fisher": rows.new_zeros(*rows.shape, self.size),
            "gradients": positions.new_zeros(()),
            "gradient_sum": rows,
        }


def _positions(layer: Layer) -> Tensor:
    return layer.mask.reshape(-1).nonzero().squeeze(1)


@dataclass(frozen=True)
class drop_by_loss:
    """Drop the weights with the least predicted loss; those that stay make up for them.

    Weights of all layers are ranked together, and every layer keeps one. No more go than
    there are free places: what goes need not come back in the same update. The slots of the
    gatherer are emptied, since other weights will live in their positions.

    Args:
        gathered: What the gradients were gathered by.
        fraction: Of all live weights, rounded down, in [0, 1].
        damping: As for :func:`~lightning_sparsity.ops.fisher.inverse_blocks`.
        joint: As for :func:`~lightning_sparsity.ops.fisher.survivors_update`.
    """

    gathered: fisher_blocks
    fraction: float | Curve
    damping: float
    joint: bool = False
    needs_gradient: ClassVar[bool] = False

    def fraction_at(self, progress: float) -> float:
        """The fraction to drop at ``progress``."""
        return self.fraction(progress) if callable(self.fraction) else self.fraction

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop weights and update the others; ``budget`` is not used.

        Raises:
            NonFiniteScoreError: If a predicted loss is not finite.
        """
        live = sum(layer.live for layer in layers)
        free = sum(layer.size for layer in layers) - live
        spare = live - sum(layer.live > 0 for layer in layers)
        count = min(math.floor(round(self.fraction_at(progress) * live, 9)), free, spare)
        empty = forget(*_SLOTS)
        if count == 0:
            return empty(layers, budget, progress)
        scored = [self._scored(layer) for layer in layers]
        keep = global_by(slot("loss"))(scored, live - count)
        pruned = drop(slot("loss"))(scored, keep, progress)
        mended = [self._mended(old, new.mask) for old, new in zip(layers, pruned, strict=True)]
        return empty(mended, budget, progress)

    def _scored(self, layer: Layer) -> Layer:
        """The layer with the predicted loss of removing each live weight in a slot, float64."""
        positions, weight, inverse = self._blocks(layer)
        loss = obs_saliency(weight, inverse).reshape(-1)[: len(positions)]
        if not loss.isfinite().all():
            raise NonFiniteScoreError(f"the predicted loss of {layer.name} is not finite.")
        losses = torch.zeros(layer.mask.numel(), dtype=loss.dtype, device=loss.device)
        losses[positions] = loss
        slots = {**layer.slots, "loss": losses.reshape(layer.shape)}
        return dataclasses.replace(layer, slots=slots)

    def _mended(self, layer: Layer, mask: Tensor) -> Layer:
        """The layer under its new mask, after the update of what stays."""
        positions, weight, inverse = self._blocks(layer)
        removed = to_blocks(~mask.reshape(-1)[positions], self.gathered.size)
        weight += survivors_update(weight, removed, inverse, self.joint)
        values = layer.weight.reshape(-1).clone()
        values[positions] = weight.reshape(-1)[: len(positions)].to(values)
        new = values.reshape(layer.shape)
        return dataclasses.replace(layer, weight=new, mask=mask)

    def _blocks(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, weights (after the first-order step) and inverse curvature of what lives."""
        slots = self.gathered.of(layer)
        positions = slots["positions"]
        weight = to_blocks(layer.weight.reshape(-1)[positions].double(), self.gathered.size)
        inverse = inverse_blocks(slots["fisher"], slots["gradients"], self.damping)
        if self.gathered.mean:
            mean = slots["gradient_sum"].double() / slots["gradients"].clamp(min=1)
            weight = newton_step(weight, inverse, mean)
        return positions, weight, inverse


def _size(layer: Layer) -> int:
    return layer.size


class RedrSecondOrder(MaskCallback):
    r"""What the Redr algorithms that predict the loss share (Eibensteiner).

    The curvature of the loss is estimated from the gradients :math:`g_i` of the N steps since
    the last update, in blocks of consecutive live weights of a layer:
    :math:`F = \lambda I + \frac{1}{N} \sum_i g_i g_i^\top`. After every epoch until three
    quarters of training the share :math:`\frac{\alpha}{2}(1 + \cos \pi x)` of all live
    weights goes, least predicted loss first and all layers ranked together; the others get
    the update that makes up for them. As many new ones, of value zero, grow at random,
    shared out by the size of the layers.

    The text leaves open what happens at the edges. Here every layer keeps one weight; what an
    update removes does not grow back in it, nor is more removed than there are free places;
    what does not fit into one layer grows in the others. A layer without
    any gradient since the last update is left as it is.

    Args:
        density: Live share of all sparse weights, in (0, 1]; may be left out when an
            earlier callback made the masks.
        distribution: How ``density`` is split over layers at first, or densities by name
            pattern; default uniform. ``fan_in`` gives all neurons of a layer exactly as many
            inputs.
        drop_fraction: :math:`\alpha`, in [0, 1], falling as a cosine to 0 at ``update_end``;
            or a schedule.
        block_size: Weights in a block, at least 1. Memory per live weight is as many floats.
        damping: :math:`\lambda`, above 0; None: the algorithm's own.
        joint: Give the survivors the best update for all that are removed together, instead
            of the sum of the updates for each alone.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: Refused, unless it is that of single weights.
        weight_init: Where this callback makes the masks: a rule for the start values, in the
            place of those that the model has; None keeps them (for a trained model, say).
        seed: Of the random choices; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or the weights are cut into other units.
        TypeError: If an argument is of the wrong type.
    """

    first_order: ClassVar[bool]
    own_damping: ClassVar[float]

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        drop_fraction: float | Curve = 0.5,
        block_size: int = 34,
        damping: float | None = None,
        joint: bool = False,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = sparse_uniform(),  # noqa: B008 (frozen)
        seed: int | None = None,
    ) -> None:
        self._check_fraction("drop_fraction", drop_fraction)
        self._check_callable("weight_init", weight_init, "sparse_uniform()")
        self._check_count("block_size", block_size)
        self._check_flag("joint", joint)
        if damping is None:
            damping = self.own_damping
        self._check_number("damping", damping, 0, inside=True)
        fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction)
        gathered = fisher_blocks(int(block_size), mean=self.first_order)
        self._lose = drop_by_loss(gathered, fraction, float(damping), joint)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=chain(spread_inputs, weight_init) if weight_init else spread_inputs,
            update=exchange(barring(self._lose), grow(random, share=in_proportion(_size))),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            observe=gathered.observe,
            single_weights=True,
        )

    def drop_fraction_at(self, progress: float) -> float:
        """Share of the live weights that an update at ``progress`` drops."""
        return self._lose.fraction_at(progress)


class RedrWoodfisher(RedrSecondOrder):
    r"""Redr-Woodfisher (Eibensteiner): drops by predicted loss, at a vanishing gradient.

    Removing :math:`w_q` costs :math:`w_q^2 / (2 [F^{-1}]_{qq})` and asks for the update
    :math:`-\frac{w_q}{[F^{-1}]_{qq}} F^{-1} e_q` of its block (Singh and Alistarh, 2020,
    arXiv:2004.14340); the updates for all removed weights are summed. Arguments as of
    :class:`RedrSecondOrder`; it works on single weights only.

    Example::

        Trainer(callbacks=[RedrWoodfisher(density=0.06)])
    """

    first_order = False
    own_damping = 1e-5


class RedrWoodtaylor(RedrSecondOrder):
    r"""Redr-Woodtaylor (Eibensteiner): as Redr-Woodfisher, with the first-order term.

    With the mean gradient :math:`\bar g` and :math:`u = F^{-1} \bar g`, removing :math:`w_q`
    costs :math:`(w_q - u_q)^2 / (2 [F^{-1}]_{qq}) - \bar g^\top u / 2` and asks for the update
    :math:`-u + \frac{u_q - w_q}{[F^{-1}]_{qq}} F^{-1} e_q` (WoodTaylor of Singh and Alistarh,
    2020). The gain :math:`\bar g^\top u / 2` is that of the whole net, as every weight takes
    part in the step :math:`-u`, so it does not rank; and the step is made once, however many
    weights go. It is up to :math:`1 / \lambda` times the gradient: the damping is 1, which the
    author found better on KMNIST. Arguments as of :class:`RedrSecondOrder`; it works on
    single weights only.

    Example::

        Trainer(callbacks=[RedrWoodtaylor(density=0.06)])
    """

    first_order = True
    own_damping = 1.0
