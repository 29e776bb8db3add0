"""How long a layer takes with dense and with compressed storage, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_sparsity.core.compressed import CompressedWeight
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.ops.compressed import Kernels

_ROUNDS, _SECONDS = (4, 20), 0.2
"""Least and most rounds of a measurement, and how long more than the least may take."""


@dataclass(frozen=True)
class Load:
    """What a layer was given in its first forward pass in training.

    Args:
        shape: Of the input.
        dtype: Of the input.
        needs_grad: Whether the input needs a gradient.
        autocast: Dtype of autocast; None: it was off.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool
    autocast: torch.dtype | None


def measure(kept: SparseParameter, load: Load, kernels: Kernels = "torch") -> tuple[float, float]:
    """Time a forward and backward pass of a layer with dense and with compressed storage.

    Args:
        kept: The weight.
        load: What the layer is given.
        kernels: What multiplies by the compressed weight.

    Returns:
        Milliseconds, dense and compressed: the fastest of several, taken in turn.
    """
    weight = kept.weight
    dense = _twin(kept.module, weight)
    packed = _twin(kept.module, weight)
    held = packed._parameters["weight"]
    assert held is not None
    compressed = CompressedWeight(held, kept.mask, kernels)
    with torch.no_grad():
        held.data = compressed.compress(held.detach())
    compressed.install([packed])
    device = weight.device
    inputs = torch.randn(load.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(device, load.dtype).requires_grad_(load.needs_grad)
    times: list[list[float]] = [[], []]
    while len(times[0]) < _ROUNDS[0] or (
        len(times[0]) < _ROUNDS[1] and sum(map(sum, times)) < _SECONDS
    ):
        for taken, twin in zip(times, (dense, packed), strict=True):
            taken.append(_time(twin, inputs, load.autocast))
    fastest, packed_fastest = (1000 * min(taken[1:]) for taken in times)  # the first warms up
    return fastest, packed_fastest


def _twin(module: nn.Module, weight: Tensor) -> nn.Module:
    """A layer without hooks that computes as another one, with its own gradients."""
    kind: type[nn.Module] = getattr(module, "_plain_class", type(module))
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    vars(twin).update(own)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        reversed_padding = module._reversed_padding_repeated_twice
        vars(twin)["_reversed_padding_repeated_twice"] = reversed_padding
    bias = module._parameters.get("bias")
    twin._parameters["weight"] = nn.Parameter(weight)
    twin._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach())
    return twin


def _time(layer: nn.Module, inputs: Tensor, autocast: torch.dtype | None) -> float:
    kind = inputs.device.type
    _wait(inputs)
    begin = time.perf_counter()
    with torch.enable_grad():
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            out: Tensor = layer(inputs)
        out.backward(torch.ones_like(out))
    _wait(inputs)
    taken = time.perf_counter() - begin
    for tensor in (inputs, *layer.parameters()):
        tensor.grad = None
    return taken


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
