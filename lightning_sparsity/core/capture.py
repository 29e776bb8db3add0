"""Capture: what went into a layer and what came back to it, on the steps that need it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lightning_sparsity.core.parameter import SparseParameter

Statistic = Literal["inputs", "output_grads"]
"""``inputs``: first argument of the layer; ``output_grads``: gradient of the loss by its output."""


class Capture:
    """Records statistics of layers until it is closed, one tensor per micro-batch.

    Gradients are as autograd gives them: a GradScaler's factor is still in them.

    Args:
        parameters: The weights whose layers are recorded.
        statistics: What is recorded.
    """

    def __init__(self, parameters: Iterable[SparseParameter], statistics: Iterable[str]) -> None:
        self._wanted = frozenset(statistics)
        self._found: dict[str, dict[str, list[Tensor]]] = {}
        self._handles: list[Any] = []
        for kept in parameters:
            self._found[kept.name] = {statistic: [] for statistic in self._wanted}
            hook = partial(self._after_forward, kept.name)
            self._handles.append(kept.module.register_forward_hook(hook))

    def of(self, name: str) -> dict[str, tuple[Tensor, ...]]:
        """What was recorded for the parameter of this name."""
        return {key: tuple(tensors) for key, tensors in self._found.get(name, {}).items()}

    def close(self) -> None:
        """Stop recording and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        if not module.training or name not in self._found:
            return
        if "inputs" in self._wanted:
            self._found[name]["inputs"].append(args[0].detach())
        if "output_grads" in self._wanted and output.requires_grad:
            output.register_hook(partial(self._after_backward, name))

    def _after_backward(self, name: str, grad: Tensor) -> None:
        if name in self._found:
            self._found[name]["output_grads"].append(grad.detach())
