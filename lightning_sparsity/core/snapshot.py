"""Snapshot: the state of a training at one moment, to go back to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_sparsity.core.shards import distributed, is_sharded, reshard, whole


def take(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Copy weights, buffers, optimizer state and learning-rate schedules, to the CPU.

    Returns:
        Tensors and plain Python only, so that a checkpoint may hold it.
    """
    return {
        "module": copied(module.state_dict(keep_vars=True)),  # latent weights as they are
        "optimizers": [copied(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [
            copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
        ],
    }


def put_back(
    snapshot: Mapping[str, Any],
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    weights: bool = True,
    optimizers: bool = True,
) -> None:
    """Go back to a snapshot.

    Args:
        snapshot: From :func:`take`.
        trainer: The Trainer.
        module: The LightningModule.
        weights: Whether weights and buffers go back.
        optimizers: Whether optimizer state, learning rates and their schedules go back; other
            schedules than those of the snapshot are left alone.
    """
    if weights:
        reshard(module)
        now = module.state_dict(keep_vars=True)
        module.load_state_dict({key: _cut(t, now[key]) for key, t in snapshot["module"].items()})
    if optimizers:
        for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
            newer = [dict(group) for group in optimizer.param_groups]
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(_cut_state(copied(state), stepped))
            for group, options in zip(optimizer.param_groups, newer, strict=True):
                for name in options.keys() - group.keys():  # such as those of a later schedule
                    group[name] = options[name]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        kinds = [scheduler.state_dict().keys() for scheduler in schedulers]
        if kinds == [state.keys() for state in snapshot["schedulers"]]:
            for scheduler, state in zip(schedulers, snapshot["schedulers"], strict=True):
                scheduler.load_state_dict(copied(state))


def _cut_state(state: dict[str, Any], stepped: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer, cut as its parameters are."""
    kept = {
        index: {key: _cut(value, stepped[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}


def _cut(value: Any, like: Any) -> Any:
    """A whole tensor as a ``DTensor``, where that is what it stands for."""
    if isinstance(value, Tensor) and is_sharded(like) and value.shape == like.shape:
        return distributed(value, like)
    return value


def copied(value: Any) -> Any:
    """A copy whose tensors are whole, lie on the CPU and are shared with nothing."""
    if isinstance(value, Tensor):
        return whole(value).detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        made = {key: copied(item) for key, item in value.items()}
        return Counter(made) if isinstance(value, Counter) else made  # milestones of a schedule
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value
