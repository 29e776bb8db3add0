"""IHT: threshold, fine-tune what is left, let everything live again, and so on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.schedules import alternating
from lightning_sparsity.scores import magnitude, random
from lightning_sparsity.structures import Structure

_TURN = "turn"


class IHT(MaskCallback):
    """Iterative hard thresholding (Jin et al., 2016, arXiv:1607.05423).

    By turns, the weights of largest magnitude stay and are trained alone for
    ``sparse_intervals`` update intervals; then every weight is live again, those that were
    pruned from zero and without momentum, for ``dense_intervals``. The first threshold falls
    with the first update, the last at ``update_end``, from where the network stays sparse, at
    the density to the weight.

    :class:`ACDC` alternates in the same way, with phases given as fractions of training. The
    raising of the sparsity from turn to turn is not included.

    Args:
        density: Live share of all sparse weights in sparse phases, in (0, 1].
        sparse_intervals: Length of a sparse phase in update intervals, at least 1.
        dense_intervals: Length of a dense phase in update intervals, at least 1.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ``global_by(magnitude)``, ``uniform`` prunes every layer alike.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float); the network is dense
            before it.
        update_end: Step (int) or fraction of training (float) of the last threshold.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[IHT(density=0.1, sparse_intervals=5, dense_intervals=5)])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        sparse_intervals: int = 1,
        dense_intervals: int = 1,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 0.75,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("sparse_intervals", sparse_intervals)
        self._check_count("dense_intervals", dense_intervals)
        self.sparse_intervals = int(sparse_intervals)
        self.dense_intervals = int(dense_intervals)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=chain(drop(magnitude), grow(random)),
            ramp=alternating(),
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Threshold, let everything live, or leave the masks, whichever it is the turn of."""
        turn = max(int(layer.slots.get(_TURN, 0)) for layer in layers)
        place = turn % (self.sparse_intervals + self.dense_intervals)
        is_sparse = place < self.sparse_intervals or progress >= 1
        counted = {_TURN: torch.tensor(turn + 1)}
        return [
            dataclasses.replace(layer, slots={**layer.slots, **counted})
            for layer in super().update(layers, share, float(is_sparse))
        ]
