"""Ranks: what every process must agree on before masks are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same bits on each."""
    total = sum_over_ranks(tensor)
    return tensor if total is tensor else total / dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same bits on each; itself if there is one."""
    if not are_several():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def concatenated(tensor: Tensor) -> Tensor:
    """The tensors of all processes one after the other, first rank first.

    Args:
        tensor: 1-D, of any length, of the same dtype on every process.
    """
    if not are_several():
        return tensor
    lengths = [tensor.new_zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, tensor.new_tensor([len(tensor)], dtype=torch.int64))
    sizes = [int(length) for length in lengths]
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def gather_from_ranks(make: Callable[[], _T]) -> list[_T]:
    """What every process makes, first rank first; nothing is made if there is only one."""
    if not are_several():
        return []
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, make())
    return found


def is_first_rank() -> bool:
    """Whether this is the first process, or the only one."""
    return not are_several() or dist.get_rank() == 0


def are_several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
