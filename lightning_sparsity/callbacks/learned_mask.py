"""LearnedMask: what every method shares that learns its masks by gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.layer import Budget, Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.distributions import uniform
from lightning_sparsity.scores import without_gradient


@without_gradient
def stay(layers: Layers, budget: Budget, progress: float) -> Layers:
    """The rule of derived methods, whose masks follow what they train: nothing to do."""
    return layers


def slope_of(tensor: Tensor) -> Tensor:
    """Zeros with the gradient of ``tensor``, for straight-through estimates.

    ``mask + slope_of(score)`` is the mask, and hands its gradient on to the score.
    """
    return tensor - tensor.detach()


EMERGENT: dict[str, Any] = {
    "density": None,
    "default_distribution": uniform,
    "initial": stay,
    "update": stay,
    "update_interval": "epoch",
}
"""Arguments of :class:`LearnedMask` for methods whose density nobody sets."""


def sgd(groups: list[dict[str, Any]], momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """SGD in a single pass over its tensors, on devices that have it.

    Args:
        groups: Of a private optimizer, one per layer; the learning rate is set in every step.
        momentum: In [0, 1).
        weight_decay: At least 0.
    """
    devices = {tensor.device.type for group in groups for tensor in group["params"]}
    single = devices <= {"cpu", "cuda"}
    return SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=single)


class LearnedMask(MaskCallback):
    """A method that turns the gradients of its weights into others before every step.

    In most, the weights that layers compute with are not the parameters either. Two kinds.
    *Straight-through* (``derived = False``): a mask is stored, layers compute with the weight
    times the mask, and the mask is chosen anew at every update, from all weights; those off the
    mask keep a latent value and may come back. *Derived*: layers compute with :meth:`effective`,
    and the mask is :meth:`support` (give ``update=stay``). What the method trains beside the
    weights are slots, never parameters of the model; a private optimizer trains them.

    Files get the effective weights. When the window ends (or at the end of training) they
    become the parameters, and the mask is stored.

    A method with ``latent = False`` is in place: layers compute with the parameters, which are
    zero off the mask, and all that it does beside choosing masks is to turn gradients.

    Attributes:
        trained: Slots that the private optimizer trains; :meth:`extras` gives their start.
        derived: Which of the two kinds.
        dense_gradients: Whether weights off the mask get a gradient (straight-through).
        latent: Whether layers compute with other weights than their parameters.
    """

    trained: ClassVar[Sequence[str]] = ()
    derived: ClassVar[bool] = False
    dense_gradients: bool = False
    latent: ClassVar[bool] = True

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """The slots that a layer begins with; trained ones in float32 at least.

        Args:
            layer: Its generator is the one of the method's start.
        """
        return {}

    def effective(self, layer: Layer) -> Tensor:
        """What the layer computes with in training; differentiable in weight and slots."""
        return layer.weight * layer.mask

    def evaluated(self, layer: Layer) -> Tensor:
        """What it computes with in validation, and what files get."""
        return self.effective(layer)

    @property
    def evaluates_apart(self) -> bool:
        """Whether :meth:`evaluated` is a function of its own, as where the other is random."""
        return type(self).evaluated is not LearnedMask.evaluated

    def support(self, layer: Layer) -> Tensor:
        """Where :meth:`evaluated` is not zero by design: bool, shape of the weight."""
        return layer.mask

    def penalty(self, layer: Layer) -> Tensor | None:
        """What the method adds to the loss, a scalar; differentiable in weight and slots."""
        return None

    def together(self, layers: Iterable[Layer]) -> Iterable[Layer]:
        """Look at all layers of a step before :meth:`gradients` takes them one by one.

        Here they pass as they are, and never lie in memory all at once.

        Args:
            layers: Those of one optimizer that have a gradient, as :meth:`gradients` gets them.

        Returns:
            As many, in the same order; they may be changed, the model is not.
        """
        return layers

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Gradients of the trained slots, and of the weight, from that of the effective one.

        Here: the chain rule through :meth:`effective`, and the gradient of the penalty.

        Args:
            layer: With the gradient of the loss by the effective weight.

        Returns:
            By slot, and under "weight" (left out: ``layer.grad``; None: the weight stays).
        """
        leaves = {"weight": layer.weight, **{slot: layer.slots[slot] for slot in self.trained}}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        slots = {**layer.slots, **{slot: leaves[slot] for slot in self.trained}}
        moving = dataclasses.replace(layer, weight=leaves["weight"], slots=slots)
        with torch.enable_grad():
            outputs = [self.effective(moving)]
            seeds: list[Tensor | None] = [layer.grad]
            if (penalty := self.penalty(moving)) is not None:
                outputs, seeds = [*outputs, penalty], [*seeds, None]
            found = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }

    def frozen(self, layer: Layer) -> Tensor | None:
        """Weights that the optimizer must not move in this step, bool; None: it moves all."""
        return None

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Slots to replace after a step, such as a temperature; trained ones in place only.

        Args:
            layer: Its generator is one of this step.
            progress: How much of the window has passed, in [0, 1].
        """
        return {}

    def learning_rate(self, lr: float, progress: float) -> float:
        """Of the private optimizer; here that of the weights in the same step.

        Args:
            lr: Of the weight.
            progress: How much of the window has passed, in [0, 1].
        """
        return lr

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The private optimizer; here SGD with momentum 0.9 and no weight decay.

        Args:
            groups: One per layer; :meth:`learning_rate` sets their rates in every step.
        """
        return sgd(groups)

    def bake(self, layers: Layers, share: Share) -> Layers:
        """Weights and masks to stay when the method ends: those of validation.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.
        """
        if not self.derived:
            return layers
        return [
            dataclasses.replace(
                layer,
                weight=self.evaluated(layer),
                mask=self.support(layer) & _all_alive(layer).mask,
            )
            for layer in layers
        ]

    def is_done(self, layers: Layers, share: Share) -> bool:
        """Whether the method ends after this update, before its window does."""
        return False

    def figures(self, layer: Layer) -> Mapping[str, float]:
        """Numbers that monitors log; here mean and standard deviation of what is trained."""
        spread = {slot: torch.std_mean(layer.slots[slot], unbiased=False) for slot in self.trained}
        return {
            f"{slot}_{what}": float(value)
            for slot, (std, mean) in spread.items()
            for what, value in (("mean", mean), ("std", std))
        }

    # ------------------------------------------------------------------------ masks

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make the slots, and the masks; masks that were found bar what they dropped.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.

        Returns:
            The layers as they should be.
        """
        begun = [
            dataclasses.replace(layer, slots={**layer.slots, **self.extras(layer)})
            for layer in layers
        ]
        if share.found and self.latent:
            begun = [
                dataclasses.replace(layer, slots={**layer.slots, "barred": ~layer.mask})
                for layer in begun
            ]
        return begun if self.derived else super().begin(begun, share)

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Choose a stored mask anew, from all weights that are not barred.

        A method in place, whose weights are zero off the mask, chooses as others do.

        Args:
            layers: The layers of one optimizer, after its step.
            share: What part of the whole they are.
            progress: How much of the window has passed, in [0, 1].

        Returns:
            The layers as they should be.
        """
        if self.derived:
            return layers
        if not self.latent:
            return super().update(layers, share, progress)
        everything = [_all_alive(layer) for layer in layers]
        if self.rule is not None and not self.ramps:  # as many as there are
            return self.rule(everything, [layer.live for layer in layers], progress)
        return super().update(everything, share, progress)

    # ----------------------------------------------------------------------- checks

    def _check_momentum(self, value: float) -> None:
        """Raise unless ``value`` lies in [0, 1)."""
        self._check_number("momentum", value, 0, 1)
        if value == 1:
            raise ValueError(f"{self._name}(momentum={value!r}): must be below 1; 0.9 is usual.")


def _all_alive(layer: Layer) -> Layer:
    barred = layer.slots.get("barred")
    mask = torch.ones_like(layer.mask) if barred is None else ~barred
    return dataclasses.replace(layer, mask=mask)
