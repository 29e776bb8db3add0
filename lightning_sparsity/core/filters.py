"""Filters: which parameters are sparse."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lightning_sparsity.core.layer import call_of
from lightning_sparsity.structures import Layout

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One parameter that a filter may choose.

    Args:
        name: Plain name, wrapper prefixes removed.
        module: The module that holds it (the first one, if it is shared).
        parameter: The parameter.
        index: Place among the weights of linear and convolutional layers, in the
            order of the model; -1 for all other parameters.
        total: Number of such weights in the model.
        aliases: Every name under which the model's ``state_dict`` holds it.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    index: int
    total: int
    aliases: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every plain name; more than one if the parameter is tied."""
        return tuple(plain_name(alias) for alias in self.aliases)

    @property
    def layout(self) -> Layout:
        """Where the outputs and inputs of the parameter lie."""
        if isinstance(self.module, _CONVOLUTIONS):
            return Layout(groups=self.module.groups)
        if isinstance(self.module, _TRANSPOSED):
            return Layout(groups=self.module.groups, transposed=True)
        return Layout()


class ParameterFilter(Protocol):
    """True for parameters that it chooses."""

    def __call__(self, candidate: Candidate, /) -> bool:
        """Whether ``candidate`` is chosen."""
        ...


# Strings come last, so that a command line takes import paths for what they are.
_One = type[nn.Module] | ParameterFilter | str
Selection = _One | Sequence[_One]
"""A callable, a module type, a name or pattern, or several of these."""


def linear_and_conv(candidate: Candidate) -> bool:
    """Weights of linear and convolutional layers, of any dimension."""
    return candidate.index >= 0


def first_layer(candidate: Candidate) -> bool:
    """The first linear or convolutional layer of the model."""
    return candidate.index == 0


def last_layer(candidate: Candidate) -> bool:
    """The last linear or convolutional layer of the model."""
    return candidate.index == candidate.total - 1 and candidate.index >= 0


def plain_name(name: str) -> str:
    """``name`` without the prefixes of wrappers such as ``torch.compile``.

    Example:
        >>> plain_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return _WRAPPERS.sub("", name).lstrip(".")


def candidates(model: nn.Module) -> list[Candidate]:
    """Every parameter of ``model`` once, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((plain_name(key), module, parameter))
    elsewhere = {  # tied to an embedding, say: a layer's weight only where all its uses are
        id(parameter)
        for prefix, module in model.named_modules()
        for key, parameter in module.named_parameters(prefix, recurse=False)
        if not _is_layer_weight(key, module)
    }
    weights = [
        id(p) for name, m, p in found if _is_layer_weight(name, m) and id(p) not in elsewhere
    ]
    return [
        Candidate(
            name=name,
            module=module,
            parameter=parameter,
            index=weights.index(id(parameter)) if id(parameter) in weights else -1,
            total=len(weights),
            aliases=tuple(names[id(parameter)]),
        )
        for name, module, parameter in found
    ]


def select(
    pool: Iterable[Candidate], include: Selection, exclude: Selection = ()
) -> list[Candidate]:
    """The candidates that ``include`` chooses and ``exclude`` does not.

    Weights that need no gradient are chosen only if a name without wildcards names them.

    Raises:
        ValueError: If a name, pattern or type matches no parameter, or nothing is left.
        TypeError: If a selection is of none of the allowed kinds.
    """
    pool = list(pool)
    chosen = _matches(pool, include, "include")
    dropped = {id(c) for c in _matches(pool, exclude, "exclude")}
    left = [c for c in chosen if id(c) not in dropped]
    if not left:
        still = [c for c in pool if linear_and_conv(c) and not c.parameter.requires_grad]
        frozen = f" Without a gradient, and passed over: {_names(still)}." if still else ""
        raise ValueError(
            f"include={call_of(include)}, exclude={call_of(exclude)} leaves no parameter of the "
            f"model; linear and convolutional weights are {_names(filter(linear_and_conv, pool))}."
            f"{frozen}"
        )
    return left


def _matches(pool: list[Candidate], selection: Selection, argument: str) -> list[Candidate]:
    usable = [c for c in pool if c.parameter.requires_grad or argument == "exclude"]
    if isinstance(selection, str):
        if any(sign in selection for sign in "*?["):
            found = [c for c in usable if linear_and_conv(c) and _fits(c, selection)]
        else:
            found = [c for c in pool if selection in c.names]
            found = found or [c for c in pool if f"{selection}.weight" in c.names]
            found = found or [
                c for c in pool if linear_and_conv(c) and c.name.startswith(f"{selection}.")
            ]
        missed = [c for c in pool if selection and _fits(c, selection)]
        if not found and missed:
            raise ValueError(
                f"{argument}={selection!r} matches only parameters that patterns do not select, "
                f"{_names(missed)}; give their full names, or a function of the candidate."
            )
        if not found:
            raise ValueError(
                f"{argument}={selection!r} names no parameter of the model; linear and "
                f"convolutional weights are {_names(filter(linear_and_conv, pool))}."
            )
        return found
    if isinstance(selection, type):
        weights = [c for c in usable if c.name.rpartition(".")[2] == "weight"]
        found = [c for c in weights if isinstance(c.module, selection)]
        if not found:
            raise ValueError(
                f"{argument}={selection.__name__} names no parameter of the model; the weights of "
                f"its modules are {_names(weights)}."
            )
        return found
    if isinstance(selection, nn.Module):
        raise TypeError(
            f"{argument}={type(selection).__name__}(...) is a module; give its name, or the class "
            f"{type(selection).__name__} for all of its kind."
        )
    if callable(selection):
        return [c for c in usable if selection(c)]
    if isinstance(selection, Sequence):
        hit = {id(c) for part in selection for c in _matches(pool, part, argument)}
        return [c for c in pool if id(c) in hit]
    raise TypeError(
        f"{argument}={selection!r} must be a parameter name or pattern, a module type, a "
        "callable that takes a Candidate, or a sequence of these."
    )


def _fits(candidate: Candidate, pattern: str) -> bool:
    modules = [name.rpartition(".")[0] for name in candidate.names]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (*candidate.names, *modules))


def _is_layer_weight(name: str, module: nn.Module) -> bool:
    kinds = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    return isinstance(module, kinds) and name.rpartition(".")[2] == "weight"


def _names(found: Iterable[Candidate]) -> str:
    names = [c.name for c in found]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
