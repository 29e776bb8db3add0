"""Lazy weights: sharded weights of a model that are gathered where a layer reads them.

A pass over the model has copies of the parts alone. The whole of a weight is made when a layer
asks for it, and again when its derivative is taken; derivatives come back to the parts, summed
over processes. So there is one whole weight at a time, whatever the model is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparsity.core.shards import is_sharded
from lightning_sparsity.ops.ranks import sum_over_ranks
from lightning_sparsity.ops.sharded import Sharded, Split


class LazyWeights(dict[str, Any]):
    """The parameters of a module, which gives those that lie in parts whole.

    Args:
        parameters: Parts, and whole parameters, by attribute.
        splits: How parts are cut.
    """

    def __init__(self, parameters: dict[str, Any], splits: dict[str, Split]) -> None:
        super().__init__(parameters)
        self._splits = splits

    def __getitem__(self, key: str) -> Any:
        """A parameter, whole."""
        value = super().__getitem__(key)
        if key not in self._splits or value is None:
            return value
        return self._whole(key, value)

    def items(self) -> Any:
        """Names and parameters, whole: a loss may add up all of them."""
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        """The parameters, whole."""
        return [self[key] for key in self]

    def _whole(self, key: str, value: Tensor) -> Tensor:
        whole: Tensor = _Gather.apply(value, self._splits[key])  # type: ignore[no-untyped-call]
        whole.regather = partial(self._splits[key].gather, value.detach())  # type: ignore[attr-defined]
        return whole


class _Gather(torch.autograd.Function):
    """Parts to the whole; its transpose is the sum over processes, cut into parts."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return split.gather(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Reduce.apply(grads[0], ctx.split), None  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    """The sum over processes, cut into parts; its transpose is to gather them."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return split.part_of(sum_over_ranks(whole))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], ctx.split), None  # type: ignore[no-untyped-call]


def make_lazy(modules: Sequence[nn.Module]) -> dict[int, Sharded]:
    """Let modules that hold sharded copies of parameters keep the parts, and give them whole.

    Hooks of ``torch.distributed``, which would gather and cut too, are taken off.

    Args:
        modules: All of a model, with copies in the place of parameters.

    Returns:
        By the id of each sharded copy: the same, as rules see it; ``part`` is what derivatives
        are taken by.
    """
    made: dict[int, Sharded] = {}
    for module in modules:
        held = vars(module)["_parameters"]
        splits = {key: Split.of(p) for key, p in held.items() if p is not None and is_sharded(p)}
        for key, split in splits.items():
            copied: Any = held[key]
            if id(copied) not in made:
                part = nn.Parameter(copied.detach().to_local(), copied.requires_grad)
                made[id(copied)] = Sharded(part, split, is_own=True)
        parts = {key: made[id(p)].part if key in splits else p for key, p in held.items()}
        if splits:
            vars(module)["_parameters"] = LazyWeights(parts, splits)
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[name]
            for number, hook in list(hooks.items()):
                if _home(hook).startswith("torch.distributed."):
                    del hooks[number]
    return made


@contextmanager
def gathered_again() -> Iterator[None]:
    """Derivatives gather weights once more, which nobody holds in the meantime."""

    def pack(tensor: Tensor) -> Any:
        whole = tensor if tensor._base is None else tensor._base
        regather: Callable[[], Tensor] | None = getattr(whole, "regather", None)
        if regather is None:
            return tensor
        return regather, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        regather, *place = packed
        whole: Tensor = regather()
        return whole.as_strided(*place)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _home(hook: Any) -> str:
    """The module that a hook is defined in."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__module__", "") or ""
