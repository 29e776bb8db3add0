"""Compress: a copy of a sparse model whose layers hold, and compute with, live weights only."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from lightning_sparsity.core.filters import plain_name
from lightning_sparsity.core.randomness import rng_state, set_rng_state
from lightning_sparsity.export.layers import Compressed, LayoutError, made
from lightning_sparsity.export.report import Choice, Compression
from lightning_sparsity.export.timing import race
from lightning_sparsity.flops import is_compiled

LAYOUTS = ("csr", "bsr", "semi_structured")

Model = TypeVar("Model", bound=nn.Module)

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DENSE = 0.75  # a weight with more live entries is none to compress
_LESS_THAN_DENSE = 0.95  # the part of the dense time that another layout may take
_SECONDS = 0.1  # of measuring per layer and layout
_SHAPES = 4  # inputs of a layer that are measured, if it sees many
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_PLACE = "_compression"


def compress(model: Model, example: Any, layout: str | Mapping[str, str] = "auto") -> Model:
    """A copy of a sparse model, for inference, that skips the zeros where that is faster.

    Linear layers and convolutions of which a quarter or more is zero are replaced by layers
    that hold the live weights only. Which ones, and in which layout, is measured: every such
    layer runs on inputs of the shapes it gets in a forward pass on the example, dense and in
    each layout, and the fastest stays. So measure where the copy will work: on that machine and
    device, with that batch size, number of threads and autocast. :func:`compression_of` tells
    what was found.

    The model is not changed. The copy has its class, is in evaluation mode, needs no Trainer,
    and no parameter of it takes gradients.

    Args:
        model: Any module, a LightningModule too. Its zeros count, wherever they come from.
            Sharded weights are to be gathered first.
        example: Inputs of ``model``: a tensor, a tuple or list of positional arguments, or a
            dict of keyword arguments.
        layout: ``"auto"``, or what every sparse layer gets: ``"csr"`` (single weights, indices of
            32 bits), ``"bsr"`` (square blocks, as a mask of ``Block`` has them),
            ``"semi_structured"`` (``NM(2, 4)``: linear layers on CUDA, in half precision) or
            ``"dense"``. Or one of these by name of the layer; the others are ``"auto"``.

    Returns:
        The copy. Its outputs are those of the model, to rounding; only that an infinite input
        times a zero is not NaN, as nothing is computed there.

    Raises:
        ValueError: If a layout or a layer does not exist, if a layout is not possible for a
            layer, or if the model is compiled.
        TypeError: If the model is no module.

    These stay dense, with the reason in the report: weights that modules share, layers with
    hooks or parametrizations, subclasses, transposed convolutions, recurrent layers, the
    projections of ``MultiheadAttention``, layers that the example does not reach, and what torch
    cannot do on the device or in the dtype (half precision on a CPU). A model that is
    called in more ways than the example shows still works.

    What works: ``state_dict``, of plain dense tensors; ``load_state_dict`` into a model
    compressed to the same layouts, whatever is zero in it; ``copy.deepcopy`` and pickle;
    ``.to(device)``; ``torch.compile``; ``torch.export``, also saved and loaded where
    ``lightning_sparsity`` is imported. Under autocast products are computed in the dtype of the
    weights and returned in that of autocast.

    What does not: gradients, to weights or inputs; the state dict of the dense model; ONNX and
    other formats that know only torch's own operations (give them the model itself).
    ``"semi_structured"`` layers can neither be exported nor moved to another device.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> _ = model[0].weight.data.mul_(torch.rand(512, 512) < 0.02)
        >>> x = torch.randn(1, 512)
        >>> small = compress(model, x, layout="csr")
        >>> torch.allclose(small(x), model(x), atol=1e-5)
        True
        >>> compression_of(small).layouts
        {'0': 'csr'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress(model={type(model).__name__}): a torch module is needed.")
    if is_compiled(model):
        raise ValueError("compress(model): the model is compiled; compile what comes out instead.")
    _check_layout(layout, [name for name, layer in _named(model) if type(layer) in _KINDS])
    with _random_numbers_kept(), torch.inference_mode(False), torch.no_grad():
        twin = _copied(model, {id(p): p for p in model.parameters() if not is_lazy(p)}).eval()
        choices, instead = _replacements(model, twin, _calls(twin, example), layout)
        small = _copied(model, dict(instead)).eval()
        small.requires_grad_(False)
        timed = [twin, _copied(small, {})] if instead else [twin]
        times = race([partial(_run, it, example) for it in timed], _device(model), 5 * _SECONDS)
    vars(small)[_PLACE] = Compression(tuple(choices), times[0], times[-1])
    return small


def compression_of(model: nn.Module) -> Compression:
    """What :func:`compress` chose for each layer, and the times that it measured.

    Args:
        model: What :func:`compress` returned, or a copy.

    Raises:
        ValueError: If the model does not come from :func:`compress`.
    """
    found: Compression | None = vars(model).get(_PLACE)
    if found is None:
        raise ValueError(
            f"compression_of({type(model).__name__}): the model does not come from compress; "
            "give what compress returned."
        )
    return found


class _Input(NamedTuple):
    """What is kept of an input of a layer: enough to make another one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.normal_()


@dataclass
class _Calls:
    """How a layer was called in one forward pass."""

    inputs: Counter[_Input] = field(default_factory=Counter)
    problem: str = "the example does not reach it, or a fused operation reads its weight"

    def watched(self, layer: nn.Module) -> Callable[..., Any]:
        """The forward method of a layer, told to note its inputs."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            (x,) = args or kwargs.values()
            self._note(x)
            return type(layer).forward(layer, x)

        return forward

    def _note(self, x: Tensor) -> None:
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            self.problem = f"its input is a {type(x).__name__} with layout {x.layout}"
            return
        stride = torch.empty_like(x, device="meta").stride()
        self.inputs[_Input(tuple(x.shape), stride, x.dtype, x.device)] += 1
        self.problem = ""


def _calls(twin: nn.Module, example: Any) -> dict[int, _Calls]:
    """Run the twin; how its layers were called, by id."""
    layers = [layer for layer in twin.modules() if type(layer) in _KINDS]
    calls = {id(layer): _Calls() for layer in layers}
    watched = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in watched:  # not by hooks: fused paths of torch look for these and give way
        vars(layer)["forward"] = calls[id(layer)].watched(layer)
    _run(twin, example)
    for layer in watched:
        del vars(layer)["forward"]
    return calls


def _replacements(
    model: nn.Module, twin: nn.Module, calls: dict[int, _Calls], layout: str | Mapping[str, str]
) -> tuple[list[Choice], dict[int, Compressed]]:
    """What becomes of every sparse weight, and what stands in the place of layers, by their id."""
    by_name = {} if isinstance(layout, str) else layout
    for_all = layout if isinstance(layout, str) else "auto"
    choices: list[Choice] = []
    instead: dict[int, Compressed] = {}
    layer: Any
    for (name, layer), its_twin in zip(_named(model), twin.modules(), strict=True):
        if type(layer) not in _KINDS:
            choices += _never_replaced(name, layer)
        elif name in by_name or _is_sparse(layer.weight):
            seen = calls[id(its_twin)]
            why_not = _obstacle(layer, model) or seen.problem
            choice, other = _chosen(name, its_twin, seen, by_name.get(name, for_all), why_not)
            choices.append(choice)
            if other is not None:
                instead[id(layer)] = other
    _check_refusals(layout, choices)
    return choices, instead


def _chosen(
    name: str, layer: Any, calls: _Calls, asked: str, why_not: str
) -> tuple[Choice, Compressed | None]:
    """What becomes of a layer, and what stands in its place, if anything."""
    weight = layer.weight
    size = weight.numel() * weight.element_size()
    dense = Choice(name, tuple(weight.shape), _density(weight), size, "dense", size, reason=why_not)
    if why_not or asked == "dense":
        return dense, None
    most_work = sorted(calls.inputs, key=lambda i: -math.prod(i.shape) * calls.inputs[i])
    inputs = most_work[:_SHAPES]
    others: dict[str, Compressed] = {}
    refused: dict[str, str] = {}
    for layout in LAYOUTS if asked == "auto" else (asked,):
        try:
            others[layout] = _checked(layer, made(layer, layout), inputs)
        except (LayoutError, RuntimeError, NotImplementedError) as error:
            refused[layout] = str(error).partition("\n")[0].rstrip(".")
    seconds = dict.fromkeys(["dense", *others], 0.0) if others else {}
    for given in inputs if others else ():
        x = given.make()
        runs = [partial(it, x) for it in (layer, *others.values())]
        for key, time in zip(seconds, race(runs, weight.device, _SECONDS), strict=True):
            seconds[key] += calls.inputs[given] * time
    dense = replace(dense, seconds=seconds, refused=refused)
    fastest = min(others, key=seconds.__getitem__, default=None)
    if fastest is None or (
        asked == "auto" and seconds[fastest] > _LESS_THAN_DENSE * seconds["dense"]
    ):
        return dense, None
    best = others[fastest]
    return replace(dense, layout=fastest, bytes=best.weight_bytes), best


def _checked(layer: nn.Module, other: Compressed, inputs: list[_Input]) -> Compressed:
    """The other layer, if it computes the same as the layer.

    Raises:
        LayoutError: If it does not.
    """
    for given in inputs:
        x = given.make()
        expected, found = layer(x), other(x)
        tolerance = _TOLERANCE.get(found.dtype, 5e-2)
        scale = expected.abs().max() if expected.numel() else 1.0
        if found.dtype != expected.dtype or not bool(
            ((found - expected).abs() <= tolerance * scale).all()
        ):
            raise LayoutError("torch computes something else with it here")
    return other


def _is_sparse(weight: Tensor) -> bool:
    is_plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    return is_plain and weight.numel() > 0 and _density(weight) <= _DENSE


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / max(1, weight.numel())


def _obstacle(layer: nn.Module, model: nn.Module) -> str:
    """Why a layer cannot be replaced, whatever its zeros; empty if it can."""
    weight: Any = layer.weight
    if set(layer._parameters) != {"weight", "bias"}:
        return "its weight is computed by a hook (after pruning with torch, prune.remove ends that)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if any(found for key, found in vars(layer).items() if "_hooks" in key):
        return "it has hooks"
    if "forward" in vars(layer):
        return "its forward method was replaced"
    held = [
        plain_name(f"{name}.{key}")
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is weight
    ]
    return f"{' and '.join(held)} are one weight" if len(held) > 1 else ""


def _never_replaced(name: str, module: nn.Module) -> list[Choice]:
    """The sparse weights of a module that is no layer of the kinds that are replaced."""
    kinds = ", ".join(kind.__name__ for kind in _KINDS)
    return [
        Choice(
            plain_name(f"{name}.{key}").lstrip("."),
            tuple(weight.shape),
            _density(weight),
            size := weight.numel() * weight.element_size(),
            "dense",
            size,
            reason=f"{type(module).__name__} is none of {kinds}",
        )
        for key, weight in module._parameters.items()
        if weight is not None and weight.ndim > 1 and _is_sparse(weight)
    ]


def _check_layout(layout: str | Mapping[str, str], layers: list[str]) -> None:
    allowed = ("auto", "dense", *LAYOUTS)
    if not isinstance(layout, str | Mapping):
        raise TypeError(f"compress(layout={layout!r}): a layout, or a dict of layouts by layer.")
    for given in [layout] if isinstance(layout, str) else layout.values():
        if given not in allowed:
            raise ValueError(f"compress(layout={given!r}): layouts are {', '.join(allowed)}.")
    unknown = [name for name in ([] if isinstance(layout, str) else layout) if name not in layers]
    if unknown:
        raise ValueError(
            f"compress(layout={{{unknown[0]!r}: ...}}): there is no such linear or convolutional "
            f"layer; there are {', '.join(layers) or 'none'}."
        )


def _check_refusals(layout: str | Mapping[str, str], choices: list[Choice]) -> None:
    """Raise ``ValueError`` if a layer did not get what it was asked to have."""
    failed = []
    for choice in choices:
        if isinstance(layout, str):
            why = choice.refused.get(layout)
        else:
            asked = layout.get(choice.name, "auto")
            named = asked not in ("auto", "dense")
            why = choice.refused.get(asked) or choice.reason if named else ""
        if why:
            failed.append(f"{choice.name or 'the model'}: {why}")
    if failed:
        raise ValueError(
            f"compress(layout={layout!r}) is not possible for {len(failed)} of the layers; give "
            'these another layout by name, such as layout={"fc": "auto"}.\n' + "\n".join(failed)
        )


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, by its plain name."""
    return [(plain_name(name), module) for name, module in model.named_modules()]


def _copied(model: Model, memo: dict[int, Any]) -> Model:
    """A deep copy, with some objects replaced by others, by id."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # these do not copy
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _run(model: nn.Module, example: Any) -> Any:
    inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
