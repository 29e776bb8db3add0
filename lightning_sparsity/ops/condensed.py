"""Condensed weights: what a layer with a constant fan-in really holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Condensed(NamedTuple):
    """A weight whose live neurons have ``c`` inputs each.

    Args:
        neurons: ``(active,)`` int64, the output units that have inputs.
        indices: ``(active, c)`` int64, which inputs (flat over input and kernel), ascending.
        values: ``(active, c)``, their weights.
    """

    neurons: Tensor
    indices: Tensor
    values: Tensor


def condense(weight: Tensor, mask: Tensor) -> Condensed:
    """The live weights of a constant fan-in layer, such as SRigL leaves it, as two tables.

    The layer computes ``(x[:, indices] * values).sum(-1)`` for its neurons, and the bias
    alone for the others.

    Args:
        weight: ``(out, ...)``, output units first.
        mask: Same shape, bool, True = live.

    Returns:
        The neurons that have inputs, with their inputs and values.

    Raises:
        ValueError: If shapes differ, or live neurons have different numbers of inputs.
        TypeError: If the mask is not bool.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
        >>> neurons, indices, values = condense(weight, weight != 0)
        >>> neurons, indices
        (tensor([0, 2]), tensor([[1, 2],
                [0, 2]]))
        >>> x = torch.tensor([[1.0, 10.0, 100.0]])
        >>> (x[:, indices] * values).sum(-1), (x @ weight.T)[:, neurons]
        (tensor([[210., 403.]]), tensor([[210., 403.]]))
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; torch.bool is needed.")
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}.")
    rows = mask.reshape(len(mask), -1)
    fan_in = rows.count_nonzero(dim=1)
    neurons = fan_in.nonzero().squeeze(1)
    sizes = fan_in[neurons].unique().tolist()
    if len(sizes) > 1:
        raise ValueError(
            f"live neurons have {min(sizes)} to {max(sizes)} inputs; a condensed weight needs one "
            "number of inputs for all, such as SRigL keeps."
        )
    indices = rows.nonzero()[:, 1].reshape(len(neurons), -1 if sizes else 0)
    values = weight.reshape(len(mask), -1)[neurons].gather(1, indices)
    return Condensed(neurons, indices, values)
