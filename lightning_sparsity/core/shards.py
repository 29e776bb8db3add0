"""Shards: weights that lie in parts on several processes, as FSDP2 and tensor parallelism do.

Rules that say so work on :class:`~lightning_sparsity.ops.sharded.Sharded` layers; others see the
whole weight, which every process gathers for as long as it computes with it, one layer after the
other. Either way all choose the same masks as one process would. What is written goes to the
part that a process has. Everything that gathers is to be called on all processes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_sparsity.ops.live import Formed
from lightning_sparsity.ops.ranks import sum_over_ranks
from lightning_sparsity.ops.sharded import Gathered, Sharded, Split


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, cut over several processes."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, detached; a whole one as it is."""
    if isinstance(tensor, Sharded):
        return tensor.part
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    part: Tensor = sharded.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached, gathered if it is sharded."""
    if isinstance(tensor, Formed):
        return tensor.formed()
    sharded: Any = tensor.detach()
    everything: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return everything


def reshard(module: nn.Module) -> None:
    """Let FSDP2 free whole weights that a pass without a derivative has left behind.

    It would go on with them, whatever is written to the parts: call it before something is.
    """
    for inner in module.modules():
        free: Any = getattr(inner, "reshard", None)  # by name: the class has moved between releases
        if free is not None and hasattr(inner, "unshard"):
            free()


def sharded(tensor: Tensor) -> Sharded:
    """A ``DTensor`` as rules see it; they never write it."""
    return Sharded(local(tensor), Split.of(tensor))


def distributed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, as a ``DTensor``.

    Args:
        tensor: Of any device.
        like: A ``DTensor`` of the same shape: says how it is cut, and where it lies.
    """
    from torch.distributed.tensor import DTensor

    cut = Split.of(like)
    made: Tensor = DTensor.from_local(
        cut.part_of(tensor.to(like.device)),
        cut.mesh,
        cut.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made


def over_parts(tensor: Tensor, counts: Tensor) -> Tensor:
    """Counts of the part of a tensor here, summed over all parts; as they are if it is whole."""
    if not isinstance(tensor, Sharded):
        return counts
    return sum_over_ranks(counts * int(tensor.cut.is_owner))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that this process has of another one.

    Args:
        tensor: Sharded like ``like``, or whole and the same on every process.
        like: Says how it is cut.
    """
    tensor = tensor.gathered_from if isinstance(tensor, Gathered) else tensor
    if isinstance(tensor, Sharded):
        return tensor.part
    return Split.of(like).part_of(tensor) if is_sharded(like) else tensor
