"""Shards: weights that lie in parts on several processes, as FSDP2 and tensor parallelism do.

Rules see the whole weight, which every process gathers for as long as it computes with it, one
layer after the other; so all choose the same masks as one process would. What is written goes
to the part that a process has. Everything that gathers is to be called on all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sparsity.core.live import Formed


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on several processes."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, detached; a whole one as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    part: Tensor = sharded.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached, gathered if it is sharded."""
    sharded: Any = tensor.detach()
    everything: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return everything


def formed(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered whenever somebody computes with it."""
    return Formed(lambda: whole(tensor), tensor.shape, local(tensor))


@torch.no_grad()
def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of another one.

    Args:
        tensor: The same on every process.
        like: Says how it is cut.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = everywhere.redistribute(placements=placements).to_local()
    return part
