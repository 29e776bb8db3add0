"""Trainings of every method, in one process or on weights in parts.

``python sharded_training.py OUTPUT`` is run by ``test_sharded_methods.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from doubles import doubles
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from methods import APART, METHODS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparsity import SparseCompute
from lightning_sparsity.testing import TinyModel, fit

EVERY = {**METHODS, **APART}
CUTS = {"fsdp": (2, 1), "tp": (1, 2)}


class Model(TinyModel):
    """A convolution and two linear layers in float64, cut as the strategy says."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128, 16),
                nn.ReLU(),
                nn.Linear(16, 4),
            )
        )
        self.double()

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self.net[4].weight, DTensor):
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            across = {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], across)
        else:
            mesh = self.device_mesh["data_parallel"]
            for index in (0, 4, 6):
                fully_shard(self.net[index], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


def train(name: str, cut: str | None = None, *others: Callback) -> dict[str, Any]:
    """The masks after every batch, and the weights at the end.

    Args:
        name: Of the method.
        cut: How the weights are cut; None: they are whole, in one process.
        *others: More callbacks.
    """
    options: dict[str, Any] = {}
    if cut is not None:
        data, tensor = CUTS[cut]
        strategy = ModelParallelStrategy(data, tensor, save_distributed_checkpoint=False)
        options = {"strategy": strategy, "devices": 2}
    result = fit([EVERY[name](), *others], Model, data=doubles(), **options)
    return {"history": result.history, "weights": result.weights}


def outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What comes of it, or how it is refused."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(output: Path) -> None:
    found: dict[str, Any] = {}
    for cut in CUTS:
        for name in EVERY:
            found[f"{name} {cut}"] = outcome(partial(train, name, cut))
        found[f"compressed {cut}"] = outcome(partial(train, "RigL", cut, SparseCompute("csr")))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(found, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
