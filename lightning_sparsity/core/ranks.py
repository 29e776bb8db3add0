"""Ranks: what every process must agree on before masks are chosen."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same bits on each."""
    total = sum_over_ranks(tensor)
    return tensor if total is tensor else total / dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same bits on each; itself if there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total
