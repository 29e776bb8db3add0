"""Stand-ins: a layer that computes with something else than its parameter.

The layer object gets a subclass in which the parameter is a property. The parameter keeps its
name, its place and its identity, so optimizers and files see nothing new: files get the weight
that validation computes with, under the parameter's name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

_PLACE = "_stand_ins"

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Replaces the ``forward`` of a layer."""


class StandIn:
    """What layers compute with in the place of one parameter.

    Args:
        parameter: The parameter.
    """

    loads: ClassVar[bool] = False
    """Whether a weight that is loaded into the layer goes to :meth:`load`."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._places: list[tuple[nn.Module, str]] = []
        self._copy: weakref.ref[nn.Parameter] | None = None
        self._copied_at: object = None

    def seen(self, training: bool) -> Tensor:
        """What somebody gets who reads the parameter of a layer; differentiable."""
        raise NotImplementedError

    def evaluated(self) -> Tensor:
        """The weight of validation and files, detached."""
        raise NotImplementedError

    def version(self) -> object:
        """Something that differs when :meth:`evaluated` may."""
        raise NotImplementedError

    def copied(self) -> nn.Parameter:
        """The weight of validation as a parameter; for all layers of one copy the same."""
        copy = self._copy() if self._copy is not None else None
        now = self.version()
        if copy is None or self._copied_at != now:
            needs_grad = self.parameter.requires_grad
            copy = nn.Parameter(self.evaluated().clone(), requires_grad=needs_grad)
            self._copy, self._copied_at = weakref.ref(copy), now
        return copy

    def load(self, weight: Tensor) -> None:
        """Take a weight from a ``state_dict``."""
        raise NotImplementedError

    def forward_of(self, plain: type[nn.Module]) -> Forward | None:
        """The ``forward`` of layers of a class; None: their own, which reads :meth:`seen`."""
        return None

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
            _dress(module)

    def remove(self) -> None:
        """Give every module its own class back."""
        for module, key in self._places:
            del vars(module)[_PLACE][key]
            _dress(module)
        self._places = []


def dense_weight(module: nn.Module, key: str) -> Tensor:
    """A parameter of a layer as validation computes with it, dense and detached."""
    stand_in: StandIn | None = vars(module).get(_PLACE, {}).get(key)
    if stand_in is not None:
        return stand_in.evaluated()
    held = module._parameters[key]
    assert held is not None
    return held.detach()


def _dress(module: nn.Module) -> None:
    """Give a module the class that its stand-ins ask for."""
    there: dict[str, StandIn] = vars(module)[_PLACE]
    plain: type[nn.Module] = getattr(module, "_plain_class", type(module))
    if not there:
        del vars(module)[_PLACE]
        module.__class__ = plain
        return
    forwards = [f for s in there.values() if (f := s.forward_of(plain)) is not None]
    module.__class__ = _with_properties(plain, tuple(sorted(there)), next(iter(forwards), None))


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module without anything in it, for pickle and deepcopy to fill."""
    return kind.__new__(kind)


_classes: dict[tuple[type[nn.Module], tuple[str, ...], Forward | None], type[nn.Module]] = {}


def _with_properties(
    plain: type[nn.Module], keys: tuple[str, ...], forward: Forward | None
) -> type[nn.Module]:
    """The subclass for these parameters, made once: compiled code is kept by class."""
    if (plain, keys, forward) not in _classes:
        _classes[plain, keys, forward] = _subclass(plain, keys, forward)
    return _classes[plain, keys, forward]


def _subclass(
    plain: type[nn.Module], keys: tuple[str, ...], forward: Forward | None
) -> type[nn.Module]:
    """A subclass that computes with stand-ins in the place of some parameters."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # A copy is a plain layer with the weights of now: it has no part in the training.
        state = dict(vars(self))
        own = dict(self._parameters)
        for key, stand_in in state.pop(_PLACE).items():
            if own[key] is stand_in.parameter:  # and nobody has put another one there
                own[key] = stand_in.copied()
        state["_parameters"] = own
        return _bare, (plain,), state

    def save(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)
        for key, stand_in in vars(self)[_PLACE].items():
            mine = self._parameters[key] is stand_in.parameter
            if mine and (not keep_vars or stand_in.loads):
                destination[prefix + key] = stand_in.evaluated()

    def load(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        there = vars(self)[_PLACE].items()
        taking = {k: s for k, s in there if s.loads and self._parameters[k] is s.parameter}
        held = {key: self._parameters[key] for key in taking}
        for key, stand_in in taking.items():  # what is checked and written has a dense shape
            self._parameters[key] = nn.Parameter(stand_in.evaluated(), requires_grad=False)
        try:
            plain._load_from_state_dict(self, state_dict, prefix, *args)
            for key, stand_in in taking.items():
                loaded = self._parameters[key]
                assert loaded is not None
                stand_in.load(loaded.detach())
        finally:
            self._parameters.update(held)

    def property_of(key: str) -> property:
        def read(self: nn.Module) -> Tensor:
            stand_in: StandIn = self.__dict__[_PLACE][key]
            held = self._parameters[key]
            if held is not None and held is not stand_in.parameter:  # of a functional call
                return held
            return stand_in.seen(self.training)

        return property(read)

    contents: dict[str, Any] = {key: property_of(key) for key in keys}
    contents |= {"forward": forward} if forward is not None else {}
    contents |= {
        "_plain_class": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduce,
        "_save_to_state_dict": save,
        "_load_from_state_dict": load,
    }
    return type(plain.__name__, (plain,), contents)
