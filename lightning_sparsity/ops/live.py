"""Live tensors: dense in shape, kept as the values at the live positions.

Rules see them as the weights of compressed layers. Functions of one number that map zero to
zero, such as ``abs``, are computed on the values alone; for every other one the dense tensor is
formed, and freed when its work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparsity.ops.compressed import spread

_ATEN = torch.ops.aten
_ZERO_TO_ZERO = {
    _ATEN.abs.default,
    _ATEN.neg.default,
    _ATEN.sgn.default,
    _ATEN.sign.default,
    _ATEN.sqrt.default,
    _ATEN._to_copy.default,
}


class Formed(Tensor):
    """A tensor that is formed anew whenever somebody computes with it.

    Args:
        form: Makes the dense tensor.
        shape: Its shape.
        like: A tensor of its dtype and device.
    """

    _form: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, form: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> Formed:
        """A tensor without memory."""
        strides = like.stride() if tuple(like.shape) == tuple(shape) else None
        made: Formed = Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides, dtype=like.dtype, device=like.device
        )
        made._form = form
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def formed(self) -> Tensor:
        """The dense tensor."""
        return self._form()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with what is formed."""
        named = dict(kwargs or {})
        if function is _ATEN.detach.default:
            return args[0]
        first = args[0] if args else None
        if any(isinstance(written, Formed) for written in _written(function, args, named)):
            raise RuntimeError(f"{function}: a rule returns changed copies; it never writes.")
        if isinstance(first, Live) and function in _ZERO_TO_ZERO and "layout" not in named:
            return first._map(lambda values: function(values, *args[1:], **named))
        args = [a.formed() if isinstance(a, Formed) else _within(a) for a in args]
        named = {key: a.formed() if isinstance(a, Formed) else a for key, a in named.items()}
        made = function(*args, **named)
        return _sealed(made) if _is_view(function) and isinstance(first, Formed) else made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


class Live(Formed):
    """A tensor that is zero but at its live positions.

    Args:
        values: Gives what stands there, ``(live,)``.
        positions: Gives the flat row-major indices, in order, ``(live,)`` int64.
        shape: Of the dense tensor.
        like: A tensor of its dtype and device.
    """

    _values: Callable[[], Tensor]
    _positions: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], Tensor],
        positions: Callable[[], Tensor],
        shape: Sequence[int],
        like: Tensor,
    ) -> Live:
        """A tensor without memory."""
        made = Formed.__new__(cls, lambda: spread(values(), positions(), shape), shape, like)
        assert isinstance(made, Live)
        made._values, made._positions = values, positions
        return made

    @property
    def values_there(self) -> Tensor:
        """What stands at the live positions, ``(live,)``."""
        return self._values()

    @property
    def positions(self) -> Tensor:
        """The live positions, flat, in order, ``(live,)`` int64."""
        return self._positions()

    def _map(self, function: Callable[[Tensor], Tensor]) -> Live:
        values = function(self.values_there)
        return Live(lambda: values, self._positions, self.shape, values)


def _is_view(function: Any) -> bool:
    """Whether what an operation gives shares memory with its argument."""
    aliases = [made.alias_info is not None for made in function._schema.returns]
    return bool(aliases) and all(aliases) and not function._schema.is_mutable


def _sealed(made: Any) -> Any:
    """Views that let nobody write: it would be lost."""
    if isinstance(made, list | tuple):
        return type(made)(map(_sealed, made))
    return made if isinstance(made, Formed) else Formed(lambda: made, made.shape, made)


def _written(function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    if not function._schema.is_mutable:
        return []
    places = enumerate(function._schema.arguments)
    written = [(i, a.name) for i, a in places if a.alias_info is not None and a.alias_info.is_write]
    given = [args[i] if i < len(args) else named.get(name) for i, name in written]
    return [t for one in given for t in (one if isinstance(one, list | tuple) else [one])]


def _within(argument: Any) -> Any:
    """An argument whose tensors are formed, if it is a list of some."""
    if isinstance(argument, list | tuple):
        return type(argument)(a.formed() if isinstance(a, Formed) else a for a in argument)
    return argument
