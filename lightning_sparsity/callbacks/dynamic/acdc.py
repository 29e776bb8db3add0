"""AC/DC: train dense and compressed by turns, and end compressed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.files import save
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.shards import whole
from lightning_sparsity.core.window import Interval, Steps
from lightning_sparsity.distributions import global_by
from lightning_sparsity.ops.ranks import is_first_rank
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.schedules import Phases, alternating
from lightning_sparsity.scores import magnitude, random
from lightning_sparsity.structures import Structure

IMAGENET: Phases = (
    (0.10, 0.15),
    (0.20, 0.25),
    (0.30, 0.35),
    (0.40, 0.45),
    (0.50, 0.55),
    (0.60, 0.65),
    (0.70, 0.75),
    (0.85, 1.0),
)
"""Epochs 10 to 15, 20 to 25 and so on of 100, and from 85 to the end."""


class ACDC(MaskCallback):
    """Alternating compressed and decompressed training (Peste et al., 2021, arXiv:2106.12379).

    Training begins dense. Where a compressed phase begins, the weights of largest magnitude
    over all layers stay and the masks are fixed until it ends; then every weight is live
    again, those that were pruned from zero (Alg. 1). The last phase is compressed, so that
    training ends at the density, exact to the weight.

    A phase begins and ends with the first update at or after its fractions. Momentum of
    pruned weights is zero when they come back, and that of the others goes on; the authors'
    option to reset all of it is not included.

    Args:
        density: Live share of all sparse weights in compressed phases, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ``global_by(magnitude)``, ``uniform`` prunes every layer alike.
        compressed: Compressed phases, in order, as pairs of fractions of the window; the
            last ends at 1.0. Default the paper's for ImageNet in 100 epochs.
        dense_checkpoint: File for the ``state_dict`` of the dense network just before the
            last compression, the method's second result; None: it is not saved.
        update_interval: "epoch", ``epochs(n)``, or a number of optimizer steps.
        update_start: First step (int) or fraction of training (float).
        update_end: Step (int) or fraction of training (float) at which the window ends.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[ACDC(density=0.1, dense_checkpoint="dense.pt")])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        compressed: Phases = IMAGENET,
        dense_checkpoint: str | Path | None = None,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(dense_checkpoint, str | Path | None):
            raise TypeError(f"ACDC(dense_checkpoint={dense_checkpoint!r}): must be a path or None.")
        self.dense_checkpoint = dense_checkpoint
        self._network: tuple[pl.LightningModule, Masks] | None = None
        self.phases = alternating(_checked(compressed))
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=chain(drop(magnitude), grow(random)),
            ramp=self.phases,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Compress or decompress, whichever is due; save the last dense network."""
        if self.dense_checkpoint is not None and self.phases.are_over(progress):
            self._save(share)
        return super().update(layers, share, progress)

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """Have the folder ready where the dense network will be saved."""
        super().on_masks_ready(trainer, pl_module, keeper)
        if self.dense_checkpoint is not None and keeper.masks is not None:
            self._network = (pl_module, keeper.masks)
            Path(self.dense_checkpoint).parent.mkdir(parents=True, exist_ok=True)
        steps = next((run.steps for run in keeper.runs if id(run.method) == id(self)), None)
        if steps is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_phases(steps, trainer)

    def _check_phases(self, steps: Steps, trainer: pl.Trainer) -> None:
        """Warn if updates are so rare that phases run into each other."""
        total, epochs = float(trainer.estimated_stepping_batches), trainer.max_epochs or 0
        each: float = steps.every if isinstance(steps.every, int) else 0
        if not isinstance(steps.every, int) and epochs > 0 and math.isfinite(total):
            each = total / epochs * (1 if steps.every == "epoch" else steps.every.number)
        if not each:
            return
        first = steps.start if isinstance(steps.every, int) else 0
        updates = [first + k * each for k in range(int((steps.end - first) / each + 1e-9) + 1)]
        times = sorted({0.0, *(time for phase in self.phases.compressed for time in phase)})
        wanted = self._changes((a + b) / 2 for a, b in zip(times, times[1:], strict=False))
        made = self._changes(steps.progress(round(step)) for step in updates)
        if made < wanted:
            rank_zero_warn(
                f"ACDC: the phases change {made} times in this training, not {wanted} times as "
                f"asked, since updates are too rare (every {steps.every}). Update more often, with "
                "update_interval in steps, or give fewer phases, with compressed=."
            )

    def _changes(self, times: Iterable[float]) -> int:
        """How often the network is compressed or decompressed at these times, from dense."""
        course = [1.0, *map(self.phases(1.0, 0.5), times)]
        return sum(a != b for a, b in zip(course, course[1:], strict=False))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._network = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the model."""
        self._network = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model."""
        return {**super().__getstate__(), "_network": None}

    def _save(self, share: Share) -> None:
        """Save the network, if no layer is compressed yet; a whole file or none."""
        if self._network is None or self.dense_checkpoint is None:
            return
        module, masks = self._network
        if all(masks[name].is_dense for name in share.names):
            weights = {  # those that lie in parts are gathered, on all processes
                name: whole(value) if isinstance(value, Tensor) else value
                for name, value in module.state_dict().items()
            }
            if is_first_rank():
                save(weights, Path(self.dense_checkpoint))


def _checked(compressed: Phases) -> Phases:
    where = f"ACDC(compressed={compressed!r})"
    try:
        phases = tuple((plain(begin), plain(end)) for begin, end in compressed)
        if not all(type(time) in (int, float) for phase in phases for time in phase):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(
            f"{where}: must be pairs of fractions, such as [(0.1, 0.5), (0.8, 1.0)]."
        ) from None
    times = [time for phase in phases for time in phase]
    rising = all(a < b for a, b in zip(times, times[1:], strict=False))
    if not (times and rising and times[0] >= 0 and times[-1] == 1):
        raise ValueError(
            f"{where}: fractions must rise from phase to phase, lie in [0, 1] and end with 1.0, "
            "as training ends compressed."
        )
    return phases
