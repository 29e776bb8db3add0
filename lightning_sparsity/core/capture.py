"""Capture: what went into a layer and what came back to it, on the steps that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lightning_sparsity.core.parameter import SparseParameter

Statistic = Literal["inputs", "output_grads"]
"""``inputs``: first argument of the layer; ``output_grads``: gradient of the loss by its output."""


class Hook:
    """A hook of layers that copies and pickles as one that does nothing.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> Any:
        """A copy of the layer has no part in the training."""
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """Does nothing."""


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
            hook = Hook(partial(self._after_forward, kept.name))
            handle = kept.module.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)

    def of(self, name: str) -> dict[str, tuple[Tensor, ...]]:
        """What was recorded for the parameter of this name."""
        return {key: tuple(tensors) for key, tensors in self._found.get(name, {}).items()}

    def close(self) -> None:
        """Stop recording and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        output = out[0] if isinstance(out, tuple) else out
        # A pass that gets no gradient (validation, checkpointing's first) does not count.
        if given and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._after_backward, name, given[0].detach()))

    def _after_backward(self, name: str, given: Tensor, grad: Tensor) -> None:
        for statistic, tensor in (("inputs", given), ("output_grads", grad.detach())):
            if statistic in self._found.get(name, {}):
                self._found[name][statistic].append(tensor)
