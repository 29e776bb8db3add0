"""A loader like the one in training, to read the same data without disturbing it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

_READING = ("__iter__", "_get_iterator")  # what a loader of another kind may do otherwise


def fresh_loader(trainer: pl.Trainer, seed: int) -> DataLoader[Any]:
    """A loader like the Trainer's, with an iterator and an order of its own.

    It has workers where that one has, so that data sets are used where they are in training.
    Under several processes, each gets its own part.

    Args:
        trainer: In training.
        seed: Of the order and of the workers, the same on every process.

    Raises:
        MisconfigurationException: If there is no telling how to read the data without disturbing
            training.
    """
    loader: Any = trainer.train_dataloader
    plain = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler)
        and _reads_as_torch(loader)
    )
    if not plain:
        raise MisconfigurationException(
            f"the training data is a {type(loader).__name__} of a kind that cannot be read "
            "without disturbing training (an iterable data set, a sampler of its own, several "
            "loaders, or no DataLoader); give data=, batches or a loader just for scoring."
        )
    in_order = isinstance(loader.sampler, SequentialSampler)
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset,
        **(trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}),
        shuffle=getattr(loader.sampler, "shuffle", not in_order),
        seed=seed % 2**31,
    )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        generator=torch.Generator().manual_seed(seed),
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        timeout=loader.timeout,
    )


def beside(data: Iterable[Any]) -> Iterable[Any]:
    """A loader that reads what a loader does, with workers of its own; anything else as it is.

    Args:
        data: Batches, or a loader that somebody else may be reading.
    """
    if not isinstance(data, DataLoader) or not _reads_as_torch(data):
        return data
    reader = copy.copy(data)
    vars(reader).update(_iterator=None, persistent_workers=False)  # it refuses to be changed
    return reader


def _reads_as_torch(loader: DataLoader[Any]) -> bool:
    return all(getattr(type(loader), name) is getattr(DataLoader, name) for name in _READING)
