"""Isolation: use a model and its data, and leave them and all random numbers as they were."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_sparsity.core.randomness import rng_state, set_rng_state

_Holder = nn.Module | pl.LightningDataModule
_CONTAINERS = (list, tuple, dict, set, deque, OrderedDict, defaultdict, Counter)
_LEAVES = (str, bytes, int, float, complex, type(None), type, ModuleType, Tensor, pl.Trainer)
_LONG = 1000  # containers
_LARGE = 1_000_000  # tensors and arrays


@contextmanager
def isolated(model: nn.Module, data: Any, *, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Give a model copies of all that a pass could change, and in the end the originals.

    Copied are the parameters, buffers, tensors, arrays and built-in containers that modules
    and data modules have as attributes, also those of modules that only a list or an object
    holds; but what is large and reached from the data alone is data, and stays. Their other
    attributes, their hooks and children, the attributes of data sets and the states of random
    generators are put back. Objects of other classes, say a meter, are used as they are.

    Args:
        model: The model.
        data: Its data, for the data modules, modules, data sets and random generators in them.
        dtype: Of the copies of floating-point tensors; those that the data hold keep theirs.
        seed: Of the random numbers of torch, Python and NumPy. Generators that the model or
            the data hold go on from where they are.
    """
    reached = within_reach([model])
    of_model = {id(found) for found in reached}
    reached += [found for found in within_reach([data]) if id(found) not in of_model]
    modules = [m for m in reached if isinstance(m, nn.Module) and not _is_scripted(m)]
    scripted = [m for m in reached if isinstance(m, nn.Module) and _is_scripted(m)]
    holders: list[_Holder] = [*modules]
    holders += [found for found in reached if isinstance(found, pl.LightningDataModule)]
    kept = [(space, dict(space)) for holder in holders for space in _spaces(holder)]
    kept += [(vars(found), dict(vars(found))) for found in reached if isinstance(found, Dataset)]
    undo = [back for found in reached if (back := _rewinding(found)) is not None]
    undo += [_refilling(module) for module in scripted]
    state = rng_state()
    copies: dict[int, Any] = {}
    try:
        seed_all(seed)
        for holder in holders:
            own = {id(space) for space in _spaces(holder)}
            kind = dtype if id(holder) in of_model else None
            for name, value in list(vars(holder).items()):
                if id(value) not in own:
                    vars(holder)[name] = _copied(value, copies, kind)
            if isinstance(holder, nn.RNNBase):
                holder.flatten_parameters()  # cuDNN wants them in one block
        yield
    finally:
        for space, contents in kept:
            space.clear()
            space.update(contents)
        for back in undo:
            back()
        set_rng_state(state)


def within_reach(roots: Iterable[Any]) -> list[Any]:
    """What hangs on the roots by attributes, closures and short containers, each once."""
    found: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) not in found and not isinstance(value, _LEAVES):
            found[id(value)] = value
            waiting += _inside(value)
    return list(found.values())


def _inside(value: Any) -> list[Any]:
    if isinstance(value, _CONTAINERS):
        if len(value) > _LONG:  # that is data
            return []
        return list(value.values() if isinstance(value, dict) else value)
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of an empty one
                cells.append(cell.cell_contents)
        return cells
    return list(getattr(value, "__dict__", {}).values())


def _spaces(holder: _Holder) -> list[dict[str, Any]]:
    """The dicts of a module that keep their identity, as others point to them."""
    names = vars(holder)
    if not isinstance(holder, nn.Module):
        return [names]
    hooks = [v for k, v in names.items() if "_hooks" in k and isinstance(v, dict)]
    return [names, names["_modules"], *hooks]


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy (if imported)."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # or else the seed would wait for CUDA to start
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _rewinding(value: Any) -> Callable[[], Any] | None:
    """A call that gives a random generator back its present state; None for anything else."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _refilling(module: nn.Module) -> Callable[[], Any]:
    """A call that gives a scripted module, whose tensors stay, its present values and mode."""
    training = module.training
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def refill() -> None:
        module.training = training
        for tensor, values in kept:
            tensor.detach().copy_(values)

    return refill


def _is_large(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        return value.numel() > _LARGE
    if numpy is not None and isinstance(value, numpy.ndarray):
        return bool(value.size > _LARGE)
    return isinstance(value, _CONTAINERS) and len(value) > _LONG


def _copied(value: Any, copies: dict[int, Any], dtype: torch.dtype | None) -> Any:
    """A copy of a tensor, an array or a container, also of what is in it; else the value.

    Args:
        value: Anything.
        copies: Those that were made before, by the ``id`` of the original.
        dtype: Of copies of floating-point tensors; None: their own, and nothing large is copied.
    """
    if id(value) in copies:
        return copies[id(value)]
    if dtype is None and _is_large(value):
        return value
    numpy = sys.modules.get("numpy")
    made = value
    if isinstance(value, Tensor):
        made = value.detach().clone()
        made = made.to(dtype) if value.is_floating_point() and dtype is not None else made
        if isinstance(value, nn.Parameter):
            made = nn.Parameter(made, requires_grad=made.is_floating_point())
    elif numpy is not None and isinstance(value, numpy.ndarray):
        made = value.copy()
    elif isinstance(value, tuple):
        items = [_copied(item, copies, dtype) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            made = value._make(items) if hasattr(value, "_make") else tuple(items)
    elif type(value) in _CONTAINERS:
        made = copies[id(value)] = copy.copy(value)  # at once: it may hold itself
        if isinstance(made, dict | list | deque):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                made[key] = _copied(item, copies, dtype)
    if made is not value:
        copies[id(value)] = made
    return made
