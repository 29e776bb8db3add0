"""Masked operations in place: exactly +0 off the mask, whatever stood there.

Multiplying by a mask keeps NaN and turns negative numbers into -0. A *gate* is the mask
as integers as wide as the weights, all bits set where live: a bitwise *and* with it
gives +0 off the mask and runs at memory speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def gate(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as integers with all bits set where it is True.

    Args:
        mask: Bool tensor.
        like: Tensor of the same shape, whose item size, strides and device the gate takes
            (items of more than 8 bytes have no such integer and get int8).

    Returns:
        Integer tensor: -1 where the mask is True, 0 elsewhere.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> gate(torch.tensor([True, False]), like=torch.zeros(2))
        tensor([-1,  0], dtype=torch.int32)
    """
    _check_shape(like, mask)
    dtype = _INTEGERS.get(like.element_size(), torch.int8)
    return torch.empty_like(like, dtype=dtype).copy_(mask).neg_()


@torch.no_grad()
def apply_gate(tensors: Sequence[Tensor], gates: Sequence[Tensor]) -> None:
    """Set each tensor to +0 where its gate is 0, in place and unseen by autograd.

    Args:
        tensors: Parameters, gradients, optimizer state; any dtype, but fastest where the
            item size is that of the gate.
        gates: One gate per tensor, of the same shape, from :func:`gate`.

    Raises:
        ValueError: If the numbers or shapes differ.

    Example:
        >>> weight = torch.tensor([1.0, float("nan"), -3.0])
        >>> apply_gate([weight], [gate(torch.tensor([True, False, False]), like=weight)])
        >>> weight
        tensor([1., 0., 0.])
    """
    for tensor, bits in zip(tensors, gates, strict=True):
        _check_shape(tensor, bits)
        if tensor.element_size() == bits.element_size() and not tensor.is_complex():
            tensor.detach().view(bits.dtype).bitwise_and_(bits)
        else:
            tensor.detach().masked_fill_(bits == 0, 0)


@torch.no_grad()
def gated(tensor: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """Write a tensor, +0 where its gate is 0, to another one of its shape and dtype.

    Args:
        tensor: Any dtype.
        bits: From :func:`gate`, of the same shape.
        out: Where the result goes; its version rises, so that autograd sees the change.

    Returns:
        ``out``.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> weight = torch.tensor([1.0, float("nan")])
        >>> bits = gate(torch.tensor([True, False]), like=weight)
        >>> gated(weight, bits, out=torch.empty(2))
        tensor([1., 0.])
    """
    _check_shape(tensor, bits)
    _check_shape(out, bits)
    if tensor.element_size() == bits.element_size() and not tensor.is_complex():
        torch.bitwise_and(tensor.detach().view(bits.dtype), bits, out=out.detach().view(bits.dtype))
    else:
        out.copy_(tensor.detach().masked_fill(bits == 0, 0))
    return out


@torch.no_grad()
def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set each tensor to +0 where its bool mask is False: :func:`apply_gate` for rare use.

    Args:
        tensors: Tensors of any dtype, changed in place and unseen by autograd.
        masks: One bool tensor per tensor, of the same shape.

    Raises:
        ValueError: If the numbers or shapes differ.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> mask_([weight], [torch.tensor([False, True])])
        >>> weight
        tensor([0., 2.])
    """
    for tensor, mask in zip(tensors, masks, strict=True):
        _check_shape(tensor, mask)
        tensor.detach().masked_fill_(~mask, 0)


def _check_shape(tensor: Tensor, mask: Tensor) -> None:
    if tensor.shape != mask.shape:
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}, mask of {tuple(mask.shape)}.")
