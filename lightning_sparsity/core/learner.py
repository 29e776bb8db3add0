"""Learner: a method that learns its masks by gradient, at work on its parameters.

A step of it: the layers compute with effective weights, so their gradients arrive at the
latent weights (:mod:`~lightning_sparsity.core.effective`). Before the optimizer steps, the
method turns them into gradients of the latent weights and of its own trained tensors; after
the step the private optimizer moves the latter, and the effective weights are made anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Protocol, runtime_checkable

from lightning_sparsity.core.effective import EffectiveWeight
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.method import Role, Share
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.ops.masked import apply_gate, gated


@runtime_checkable
class LearnedMethod(Protocol):
    """What the engine asks of a method that learns masks, beside what it asks of all.

    Attributes:
        trained: Slots that the private optimizer trains.
        derived: Whether weight and mask are functions of the latent weight and the slots. If
            not, the mask is stored, and the layer computes with the latent weight times it.
        dense_gradients: Whether latent weights off the mask get a gradient.
        latent: Whether layers compute with other weights than their parameters. If not, the
            method turns gradients, and is in place.
        role: A "reparametrization" is derived, but for the mask, which others store.
    """

    role: Role
    trained: Sequence[str]
    derived: bool
    dense_gradients: bool
    latent: bool

    def effective(self, layer: Layer) -> Tensor:
        """Of a derived method: what the layer computes with in training."""
        ...

    def evaluated(self, layer: Layer) -> Tensor:
        """Of a derived method: what it computes with in validation, and what files get."""
        ...

    @property
    def evaluates_apart(self) -> bool:
        """Whether validation computes with another weight than training."""
        ...

    def support(self, layer: Layer) -> Tensor:
        """Of a derived method: where :meth:`evaluated` is not zero by design; bool."""
        ...

    def together(self, layers: Iterable[Layer]) -> Iterable[Layer]:
        """Look at all layers of a step before :meth:`gradients` takes them one by one.

        Args:
            layers: Those of one optimizer that have a gradient, as :meth:`gradients` gets them.

        Returns:
            As many, in the same order; they may be changed, the model is not.
        """
        ...

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Gradients of the trained slots by name, and of "weight" if it is not ``layer.grad``.

        Args:
            layer: With the gradient of the loss by the effective weight.

        Returns:
            None under "weight" lets the optimizer pass over the parameter in this step.
        """
        ...

    def frozen(self, layer: Layer) -> Tensor | None:
        """Latent weights that the optimizer's step must not move, bool; None: it may move all."""
        ...

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Slots to replace after a step, such as a temperature; trained ones in place only."""
        ...

    def learning_rate(self, lr: float, progress: float) -> float:
        """Of the private optimizer, from that of the weights in the same step."""
        ...

    def bake(self, layers: Layers, share: Share) -> Layers:
        """Weights and masks to stay when the method ends, in place.

        Args:
            layers: The layers of one optimizer, with latent weights.
            share: What part of the whole they are.
        """
        ...

    def is_done(self, layers: Layers, share: Share) -> bool:
        """Whether the method ends after the update that was just made, before its window."""
        ...

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The private optimizer of the trained slots, one group per layer."""
        ...


class Learner:
    """A method that learns masks, and the parameters that it is at work on.

    Args:
        method: The callback.
        modules: Every module of the model.
        draw: Makes the generator of a parameter's random numbers in a step, from its name
            and the number of steps.
    """

    def __init__(
        self,
        method: LearnedMethod,
        modules: Sequence[nn.Module],
        draw: Callable[[str, int], torch.Generator],
    ) -> None:
        self.method = method
        self.active: dict[str, SparseParameter] = {}
        self._modules = modules
        self._draw = draw
        self._optimizer: Optimizer | None = None
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------- start and end

    def begin(self, parameters: Sequence[SparseParameter], step: int, progress: float) -> None:
        """Let layers compute with effective weights from now on."""
        for kept in parameters:
            self._settle(kept, step, progress)
        self.start(parameters)

    def start(self, parameters: Iterable[SparseParameter]) -> None:
        """As :meth:`begin`, with slots that have settled."""
        for kept in parameters:
            if self.method.latent:
                self._install(kept)
            self.active[kept.name] = kept
            if self.method.trained:
                self._train([kept.slots[slot] for slot in self.method.trained], kept.name)

    def _install(self, kept: SparseParameter) -> None:
        effective = EffectiveWeight(
            kept.parameter,
            renew=partial(self._renew, kept),
            evaluate=partial(self._evaluated, kept),
            constant=not self.method.evaluates_apart,
        )
        effective.install(self._modules)
        in_place = self.method.role == "reparametrization"
        own = self.method.derived and not in_place
        support = partial(self._support, kept) if own else None
        kept.compute_with(effective, self.method.dense_gradients, support, in_place)

    def _train(self, tensors: list[Tensor], name: str) -> None:
        group: dict[str, Any] = {"params": tensors, "name": name}
        if self._optimizer is None:
            self._optimizer = self.method.make_optimizer([group])
        else:
            self._optimizer.add_param_group(group)

    @torch.no_grad()
    def hand_back(self, names: Iterable[str]) -> None:
        """Leave the weights of validation in the parameters, and the layers as they were."""
        names = [name for name in names if name in self.active]
        self.outdate(names)
        for name in names:
            kept = self.active.pop(name)
            if kept.effective is None:
                continue
            weight, mask = kept.effective.evaluated(), kept.mask
            kept.effective.remove()
            kept.compute_with(None)
            kept.set_mask(mask)
            kept.parameter.copy_(weight)
            apply_gate([kept.parameter], [kept.gate])
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            for group in groups:
                for tensor in group["params"] if group["name"] not in self.active else ():
                    self._optimizer.state.pop(tensor, None)
            groups[:] = [group for group in groups if group["name"] in self.active]
        if not self.active:
            self._optimizer = None

    # ----------------------------------------------------------------------- each step

    @torch.no_grad()
    def before_step(
        self, parameters: Iterable[SparseParameter], scale: float, decays: Mapping[int, float]
    ) -> None:
        """Turn the gradients of effective weights into those of latent ones and slots.

        Args:
            parameters: Those of one optimizer.
            scale: Factor of a GradScaler that is still in the gradients.
            decays: Weight decay of each parameter, by its ``id``.
        """
        moving = [(p, p.parameter.grad) for p in self._mine(parameters)]
        mine = [(kept, grad) for kept, grad in moving if grad is not None]
        if not mine:
            return
        layers = (self._with_gradient(kept, grad, scale, decays) for kept, grad in mine)
        for (kept, grad), layer in zip(mine, self.method.together(layers), strict=True):
            found = self.method.gradients(layer)
            self._pending[kept.name] = {
                slot: grad for slot, grad in found.items() if slot != "weight" and grad is not None
            }
            if "weight" in found:
                weight = found["weight"]
                kept.parameter.grad = (
                    None if weight is None else grad.copy_(weight if scale == 1 else weight * scale)
                )
            still = self.method.frozen(layer)
            if still is not None:
                self._held[kept.name] = (still, kept.parameter.detach().clone())

    def _with_gradient(
        self, kept: SparseParameter, grad: Tensor, scale: float, decays: Mapping[int, float]
    ) -> Layer:
        unscaled = grad.detach() / scale if scale != 1 else grad.detach()
        decay = decays.get(id(kept.parameter))
        dense = _off_barred(unscaled, kept.slots)
        return kept.layer(dense, weight_decay=decay, fresh=False)

    @torch.no_grad()
    def after_step(
        self,
        parameters: Iterable[SparseParameter],
        lrs: Mapping[int, float],
        step: int,
        progress: float,
    ) -> list[tuple[SparseParameter, Tensor]]:
        """Train the slots, after a real step of the optimizer.

        Returns:
            The parameters whose optimizer state should be zero somewhere, and where.
        """
        mine = self._mine(parameters)
        if self._optimizer is not None:
            groups = {group["name"]: group for group in self._optimizer.param_groups}
            for kept in mine:
                lr = lrs.get(id(kept.parameter), 0.0)
                groups[kept.name]["lr"] = self.method.learning_rate(lr, progress)
                for slot, grad in self._pending.get(kept.name, {}).items():
                    kept.slots[slot].grad = grad.to(kept.slots[slot].dtype)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        stopped = []
        for kept in mine:
            if kept.name in self._held:
                still, weight = self._held.pop(kept.name)
                kept.parameter.copy_(torch.where(still, weight, kept.parameter))
                stopped.append((kept, still))
            self._settle(kept, step, progress)
        self.skip(mine)
        return stopped

    def skip(self, parameters: Iterable[SparseParameter]) -> None:
        """Forget the gradients of a step that did not happen, or is over."""
        for kept in self._mine(parameters):
            self._pending.pop(kept.name, None)
            self._held.pop(kept.name, None)

    def outdate(self, names: Iterable[str]) -> None:
        """Latent weights, slots or masks changed: effective weights are to be made anew."""
        for name in names:
            kept = self.active.get(name)
            if kept is not None and kept.effective is not None:
                kept.outdate()
                kept.effective.is_stale = True

    def renew(self) -> None:
        """Make the effective weights anew that are outdated, before somebody computes with them."""
        for kept in self.active.values():
            _ = kept.computed

    @torch.no_grad()
    def _renew(self, kept: SparseParameter, value: Tensor) -> None:
        if self.method.derived:
            made = self.method.effective(kept.layer(fresh=False))
            value.copy_(_off_barred(made, kept.slots))
        else:
            gated(kept.parameter, kept.gate, out=value)

    def _settle(self, kept: SparseParameter, step: int, progress: float) -> None:
        layer = kept.layer(generator=self._draw(kept.name, step), fresh=False)
        kept.slots.update(self.method.settle(layer, progress))

    def _mine(self, parameters: Iterable[SparseParameter]) -> list[SparseParameter]:
        return [kept for kept in parameters if kept.name in self.active]

    @torch.no_grad()
    def _evaluated(self, kept: SparseParameter) -> Tensor:
        return _off_barred(self.method.evaluated(kept.layer(fresh=False)), kept.slots)

    @torch.no_grad()
    def _support(self, kept: SparseParameter) -> Tensor:
        return _off_barred(self.method.support(kept.layer(fresh=False)), kept.slots)

    @torch.no_grad()
    def evaluated(self, name: str, weight: Tensor) -> Tensor:
        """What files get, were ``weight`` the latent weight."""
        kept = self.active[name]
        if not self.method.derived:
            return weight.masked_fill(~kept.mask.to(weight.device), 0)
        latent = weight.to(kept.parameter.device)
        layer = dataclasses.replace(kept.layer(fresh=False), weight=latent)
        return _off_barred(self.method.evaluated(layer), kept.slots).to(weight)

    @torch.no_grad()
    def bake_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Turn averages of latent weights into those of what the parameters will be."""
        for name, average in averages.items():
            if name in self.active:
                average.copy_(self.evaluated(name, average))

    # --------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The latent weights and the private optimizer's state; slots are saved by others.

        Of weights in place only the names.
        """
        return {
            "latent": {
                name: kept.parameter.detach().to("cpu", copy=True) if self.method.latent else None
                for name, kept in self.active.items()
            },
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any], parameters: Mapping[str, SparseParameter]) -> None:
        """Go on from a saved state, with the slots back in place.

        Weights that are not what the saved ones made of the latent weights were written since
        then, and are the latent ones now.
        """
        self.hand_back(list(self.active))
        mine = [parameters[name] for name in state["latent"]]
        if not self.method.latent:
            self.start(mine)
            return
        found = [kept.parameter.detach().clone() for kept in mine]
        for kept in mine:
            kept.parameter.copy_(state["latent"][kept.name])
        self.start(mine)
        for kept, weight in zip(mine, found, strict=True):
            known = weight == kept.weight
            if self.method.derived:  # the same but for rounding, on another device
                known = torch.isclose(weight, kept.weight, rtol=1e-3)
            kept.parameter.copy_(torch.where(known, kept.parameter, weight))
        self.outdate(self.active)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


def _off_barred(tensor: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
    """The tensor, zero where an earlier method's masks bar weights from coming to life."""
    barred = slots.get("barred")
    return tensor if barred is None else tensor.masked_fill(barred, 0)
