"""Fingerprints: a number that tells whether two masks are the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK = 2**20
_FACTOR, _OFFSET = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # Knuth's MMIX generator


def fingerprint(mask: Tensor) -> int:
    """A 64-bit hash of a mask, in one pass that reads eight entries at a time.

    Masks that differ in one group of eight never agree; others do with a chance of about
    :math:`2^{-64}`. It guards against mistakes, not against those who look for collisions.

    Args:
        mask: Bool tensor of any shape.

    Returns:
        The same number on every device and in every memory format.

    Raises:
        TypeError: If the mask is not bool.

    Example:
        >>> a, b = torch.tensor([True, False]), torch.tensor([False, True])
        >>> fingerprint(a) == fingerprint(a.clone()), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; torch.bool is needed.")
    entries = mask.reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    for start in range(0, len(entries), 8 * _CHUNK):
        part = entries[start : start + 8 * _CHUNK]
        words = pad(part, (0, -len(part) % 8)).view(torch.int64)
        place = torch.arange(start // 8, start // 8 + len(words), device=mask.device)
        place.mul_(_FACTOR).add_(_OFFSET).bitwise_or_(1)  # odd, so that no bit is lost
        total += place.mul_(words).sum()
    return int(total) ^ len(entries)
