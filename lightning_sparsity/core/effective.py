"""Effective weights: a layer that computes with another weight than its parameter.

The layer object gets a subclass whose ``weight`` is a property. The parameter keeps its name,
its place and its identity, so optimizers, averages and files see nothing new: files get the
effective weight, under the parameter's name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLACE = "_effective_weights"


class EffectiveWeight:
    """What a layer computes with in place of one parameter.

    The forward pass reads ``value``; its gradient goes to the parameter as it is. Whoever
    changes the parameter says so by ``is_stale``, and reads ``value`` before a compiled forward
    pass, which does not look there.

    Args:
        parameter: The latent weight.
        renew: Writes what training computes with to a tensor.
        evaluate: Gives the weight of validation and files.
        constant: Whether validation computes with ``value`` too.

    Attributes:
        is_stale: Whether ``value`` is to be made anew when somebody reads it.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        renew: Callable[[Tensor], None],
        evaluate: Callable[[], Tensor],
        constant: bool = True,
    ) -> None:
        self.parameter = parameter
        self.constant = constant
        self.is_stale = True
        self._value = parameter.detach().clone()
        self._renew = renew
        self._evaluate = evaluate
        self._places: list[tuple[nn.Module, str]] = []
        self._copy: weakref.ref[nn.Parameter] | None = None
        self._copied_at = 0

    def install(self, model_modules: Sequence[nn.Module]) -> None:
        """Take the parameter's place in every module that holds it.

        Raises:
            TypeError: If a module computes with its parameters in a way that would not see it.
        """
        places = [
            (module, key)
            for module in model_modules
            for key, held in module._parameters.items()
            if held is self.parameter
        ]
        for module, _ in places:
            if isinstance(module, nn.RNNBase):
                raise TypeError(
                    f"{type(module).__name__} hands its weights to one fused operation and cannot "
                    "compute with learned masks; leave it out with exclude=."
                )
        self._places = places
        for module, key in places:
            there = vars(module).setdefault(_PLACE, {})
            there[key] = self
            plain = _plain(type(module))
            module.__class__ = _with_properties(plain, tuple(sorted(there)))

    def remove(self) -> None:
        """Give every module its own class back."""
        for module, key in self._places:
            there = vars(module)[_PLACE]
            del there[key]
            plain = _plain(type(module))
            module.__class__ = _with_properties(plain, tuple(sorted(there))) if there else plain
            if not there:
                del vars(module)[_PLACE]
        self._places = []

    @property
    def value(self) -> Tensor:
        """What training computes with, shape of the parameter. Its identity never changes."""
        if self.is_stale:
            self.is_stale = False
            self._renew(self._value)
        return self._value

    def evaluated(self) -> Tensor:
        """The weight of validation and files, detached."""
        return self.value.detach() if self.constant else self._evaluate().detach()

    def copied(self) -> nn.Parameter:
        """The weight of validation as a parameter; for all layers of one copy the same."""
        copy = self._copy() if self._copy is not None else None
        if copy is None or self._copied_at != self.value._version:
            needs_grad = self.parameter.requires_grad
            copy = nn.Parameter(self.evaluated().clone(), requires_grad=needs_grad)
            self._copy, self._copied_at = weakref.ref(copy), self.value._version
        return copy

    def seen(self, training: bool) -> Tensor:
        """What the layer computes with; its gradient goes to the parameter."""
        if torch.compiler.is_compiling():  # the same in arithmetic, which needs no warning
            value = self._value if training or self.constant else self._evaluate()
            return value + (self.parameter - self.parameter.detach())
        value = self.value if training or self.constant else self._evaluate()
        through: Tensor = _Through.apply(self.parameter, value)  # type: ignore[no-untyped-call]
        return through


class _Through(torch.autograd.Function):
    """The second tensor, with a gradient that goes to the first one unchanged."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module without anything in it, for pickle and deepcopy to fill."""
    return kind.__new__(kind)


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    plain: type[nn.Module] = getattr(kind, "_plain_class", kind)
    return plain


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _with_properties(plain: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """The subclass for these parameters, made once: compiled code is kept by class."""
    if (plain, keys) not in _classes:
        _classes[plain, keys] = _subclass(plain, keys)
    return _classes[plain, keys]


def _subclass(plain: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that computes with effective weights in the place of some parameters."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # A copy is a plain layer with effective weights: it has no part in the training.
        state = dict(vars(self))
        own = dict(self._parameters)
        for key, effective in state.pop(_PLACE).items():
            own[key] = effective.copied()
        state["_parameters"] = own
        return _bare, (plain,), state

    def save(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)
        for key, effective in vars(self)[_PLACE].items():
            if not keep_vars:
                destination[prefix + key] = effective.evaluated()

    def property_of(key: str) -> property:
        def read(self: nn.Module) -> Tensor:
            effective: EffectiveWeight = self.__dict__[_PLACE][key]
            return effective.seen(self.training)

        return property(read)

    contents: dict[str, Any] = {key: property_of(key) for key in keys}
    contents |= {
        "_plain_class": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduce,
        "_save_to_state_dict": save,
    }
    return type(plain.__name__, (plain,), contents)
