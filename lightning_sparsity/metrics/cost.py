"""Metrics of what a pass costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_sparsity.core.filters import candidates, linear_and_conv
from lightning_sparsity.core.shards import is_sharded
from lightning_sparsity.flops import FlopCounter, is_compiled
from lightning_sparsity.metrics.base import MaskMetric, share
from lightning_sparsity.metrics.sources import dense_of, masks_of


class FLOPs(MaskMetric):
    r"""Forward FLOPs per sample at the densities of now, as :mod:`lightning_sparsity.flops` counts.

    An update lets the model compute once, in evaluation mode and without gradients. The mean
    over updates counts. What scoring weights before training costs is not part of it.

    Args:
        relative: Whether to divide by the FLOPs with every weight live.
        kwargs: As for any ``torchmetrics.Metric``.

    Raises:
        TypeError: If ``relative`` is not True or False.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 1), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        >>> inputs = torch.ones(32, 4)
        >>> FLOPs()(model, inputs), FLOPs(relative=True)(model, inputs)
        (tensor(2.), tensor(0.2500))
    """

    flops: Tensor
    dense: Tensor
    updates: Tensor

    def __init__(self, *, relative: bool = False, **kwargs: Any) -> None:
        if not isinstance(relative, bool):
            raise TypeError(f"FLOPs(relative={relative!r}): must be True or False.")
        super().__init__(**kwargs)
        self.relative = relative
        self.add_state("flops", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("dense", torch.zeros(()), dist_reduce_fx="sum")
        self._add_counts("updates")

    def update(self, model: nn.Module, inputs: Any) -> None:
        """Let a model compute.

        Args:
            model: With a ``forward``.
            inputs: What it is called with, or a tuple of that; samples lie along the first
                dimension of the first tensor.

        Raises:
            ValueError: If there is no tensor in ``inputs``.
            RuntimeError: If FLOPs cannot be counted; the message says why.
        """
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors or not tensors[0].ndim:
            raise ValueError("FLOPs: inputs need a tensor with samples along its first dimension.")
        pool = [c for c in candidates(model) if linear_and_conv(c)]
        if is_compiled(model) or any(is_sharded(c.parameter) for c in pool):
            raise RuntimeError(
                "FLOPs are not known: the model is compiled or its weights lie in parts on "
                "several processes. Count those of the plain model."
            )
        weights = {c.name: dense_of(c) for c in pool}  # also where they are kept compressed
        counter = FlopCounter(weights)
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        with torch.no_grad(), _evaluating(model), counter:
            functional_call(model, {c.aliases[0]: weights[c.name] for c in pool}, given)
        found = counter.per_sample(len(tensors[0]))
        if found.unknown:
            raise RuntimeError(f"FLOPs are not known: {found.unknown}.")
        masks = masks_of(model)
        densities = dict.fromkeys(weights, 1.0)
        densities |= {n: int(m.count_nonzero()) / max(m.numel(), 1) for n, m in masks.items()}
        self.flops += found.inference(densities)
        self.dense += found.dense
        self.updates += 1

    def compute(self) -> Tensor:
        """FLOPs per sample, or a share; 1 if there are none."""
        if self.relative:
            return share(self.flops, self.dense, empty=1.0)
        return self.flops / self.updates.clamp(min=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; in the end every module has its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
