"""Packing: masks at one bit per entry, for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(mask: Tensor) -> Tensor:
    """Pack a mask, 8 entries per byte, in row-major order, lowest bit first.

    Args:
        mask: Bool tensor of any shape.

    Returns:
        ``(ceil(numel / 8),)`` uint8; unused bits of the last byte are zero.

    Raises:
        TypeError: If the mask is not bool.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; torch.bool is needed.")
    bits = mask.reshape(-1).view(torch.uint8)
    bits = pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = bits[:, 0].clone()
    for i in range(1, 8):
        packed |= bits[:, i] << i
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: 1-D uint8, as returned by :func:`pack`.
        shape: Shape of the mask.

    Returns:
        Bool tensor of ``shape``, contiguous.

    Raises:
        ValueError: If the length of ``packed`` does not fit ``shape``.
        TypeError: If ``packed`` is not uint8.

    Example:
        >>> unpack(torch.tensor([5], dtype=torch.uint8), (1, 3))
        tensor([[ True, False,  True]])
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed is {packed.dtype}; torch.uint8 is needed.")
    numel = math.prod(shape)
    if packed.shape != (-(-numel // 8),):
        raise ValueError(
            f"packed of shape {tuple(packed.shape)} does not fit a mask of shape {tuple(shape)}: "
            f"{numel} entries take {-(-numel // 8)} bytes."
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.view(-1, 1) >> shifts).bitwise_and_(1)
    return bits.view(torch.bool).view(-1)[:numel].view(tuple(shape))
