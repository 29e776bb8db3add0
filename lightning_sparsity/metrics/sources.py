"""What metrics look at: models, masks by name, or the masks of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparsity.core.filters import Candidate, candidates, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.shards import is_sharded, sharded, whole
from lightning_sparsity.core.stand_in import dense_weight

Source = nn.Module | Mapping[str, Tensor] | Masks
"""A model, its masks by name (shape of the weight, bool), or the masks of a fit."""


def live_masks(source: Source) -> dict[str, Tensor]:
    """The masks of a model at this moment, as copies.

    Args:
        source: A model or its masks.

    Returns:
        Masks by plain parameter name, shape of the weight, bool.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 3.0]]))
        >>> live_masks(model)
        {'0.weight': tensor([[False,  True]])}
    """
    return {name: mask.clone() for name, mask in masks_of(source).items()}


def masks_of(source: Source) -> dict[str, Tensor]:
    """The masks of a source themselves, by name."""
    if isinstance(source, Mapping):
        for name, mask in source.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name} is {mask.dtype}; torch.bool is needed.")
        return dict(source)
    kept = kept_by(source)
    if kept is not None:
        return {one.name: whole(one.mask) for one in kept}
    assert isinstance(source, nn.Module)
    return {c.name: dense_of(c) != 0 for c in candidates(source) if linear_and_conv(c)}


def kept_by(source: nn.Module | Masks) -> Masks | None:
    """The masks of a fit, if there are any."""
    if isinstance(source, Masks):
        return source
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"{type(source).__name__} is no model; give a torch module, masks by name, or Masks."
        )
    trainer = trainer_of(source)
    keeper = MaskKeeper.of(trainer) if trainer is not None else None
    return keeper.masks if keeper is not None and keeper.masks else None


def trainer_of(source: object) -> pl.Trainer | None:
    """The Trainer that works on a LightningModule."""
    trainer = source._trainer if isinstance(source, pl.LightningModule) else None
    return trainer if trainer is not None and trainer.lightning_module is source else None


def dense_of(candidate: Candidate) -> Tensor:
    """A weight as validation computes with it, whole."""
    return whole(dense_weight(candidate.module, candidate.name.rpartition(".")[2]))


def weights_of(
    source: nn.Module | Masks,
) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...], Tensor]]:
    """Name, parameter, shape and mask of the sparse weights.

    A parameter that holds live values alone has another shape, which is that of the mask.
    """
    kept = kept_by(source)
    if kept is not None:
        for one in kept:
            mask = one.mask if one.compressed is None else one.parameter.new_ones(one.live).bool()
            yield one.name, one.parameter, one.shape, mask
        return
    assert isinstance(source, nn.Module)
    for c in filter(linear_and_conv, candidates(source)):
        weight = dense_weight(c.module, c.name.rpartition(".")[2])
        values = weight if weight.shape == c.parameter.shape else c.parameter.detach()
        mask = sharded(values) if is_sharded(values) else values
        yield c.name, c.parameter, tuple(weight.shape), mask != 0
