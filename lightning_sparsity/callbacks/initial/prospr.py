"""ProsPr: prune what matters least to the loss after the first steps of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import LossFunction, Pass
from lightning_sparsity.ops.ranks import mean_over_ranks
from lightning_sparsity.structures import Structure


class ProsPr(ScoredStart):
    r"""Prospect pruning (Alizadeh et al., 2022, arXiv:2202.08132).

    With a mask :math:`c` of ones, :math:`\theta_0 = c \, w` is trained by k steps of SGD to
    :math:`\theta_k`, and the score of a weight is the meta-gradient
    :math:`|\partial L(\theta_k) / \partial c|`, taken through the steps; the largest over
    all layers stay. ``first_order`` holds the gradients of the steps for constants, and
    needs the memory of one step instead of k + 1. Without steps it is SNIP.

    As in the authors' program all parameters take the steps, biases and norms too, without
    weight decay, and the momentum begins as a constant, so that with momentum the first
    step has no second derivatives. Frozen parameters and pruned weights stay as they are.
    Under several processes each takes steps of its own, and the meta-gradients are averaged.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together, and each keeps at least
            one unit.
        inner_steps: k, at least 0.
        inner_lr: Learning rate of the steps, above 0.
        inner_momentum: Their momentum, in [0, 1].
        first_order: Leave out second derivatives.
        batches: How many batches the steps and the last loss take in turn; None: one for
            each. 1: all have the same.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "train" (the authors') or "eval": of all modules while scoring.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[ProsPr(density=0.05)])
    """

    by_gradients = False  # it takes steps of training

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        inner_steps: int = 3,
        inner_lr: float = 0.5,
        inner_momentum: float = 0.9,
        first_order: bool = False,
        batches: int | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        mode: Literal["train", "eval"] = "train",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("inner_steps", inner_steps, least=0)
        self._check_positive("inner_lr", inner_lr)
        self._check("inner_momentum", inner_momentum)
        self._check_flag("first_order", first_order)
        super().__init__(
            density,
            distribution=distribution,
            batches=inner_steps + 1 if batches is None else batches,
            data=data,
            loss_fn=loss_fn,
            mode=mode,
            shuffle=shuffle,
            reinitialize=reinitialize,
            weight_init=weight_init,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        self.inner_steps = plain(inner_steps)
        self.inner_lr = plain(inner_lr)
        self.inner_momentum = plain(inner_momentum)
        self.first_order = first_order

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The meta-gradient of every weight."""
        weights = opened.weights
        gates = {x.name: torch.ones_like(weights[x.name]).requires_grad_() for x in layers}
        theta = weights | {name: weights[name] * gate for name, gate in gates.items()}
        momentum: dict[str, Tensor] = {}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions cannot be derived twice
            for k in range(self.inner_steps):
                opened.use(theta)
                loss = opened.loss(batches[k % len(batches)], self.loss_fn)
                theta |= self._step(opened, theta, momentum, loss)
            opened.use(theta)
            loss = opened.loss(batches[self.inner_steps % len(batches)], self.loss_fn)
            grads = torch.autograd.grad(loss, [*gates.values()], materialize_grads=True)
        opened.use(weights)
        return {n: mean_over_ranks(g).abs() for n, g in zip(gates, grads, strict=True)}

    def _step(
        self,
        opened: Pass,
        theta: Mapping[str, Tensor],
        momentum: dict[str, Tensor],
        loss: Tensor,
    ) -> dict[str, Tensor]:
        """The trained parameters after one step of SGD, with their graphs."""
        names = [name for name in theta if name in opened.trained]
        found = torch.autograd.grad(
            loss,
            [theta[name] for name in names],
            create_graph=not self.first_order,
            allow_unused=True,
        )
        stepped = {}
        for name, grad in zip(names, found, strict=True):
            if grad is None:
                continue
            if name in opened.masks:
                grad = grad * opened.masks[name]
            if self.inner_momentum:
                before = momentum.get(name)
                grad = grad.detach() if before is None else self.inner_momentum * before + grad
                momentum[name] = grad
            stepped[name] = theta[name] - self.inner_lr * grad
        return stepped
