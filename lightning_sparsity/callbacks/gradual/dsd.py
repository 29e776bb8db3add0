"""DSD: train dense, then pruned, then dense again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.window import Ends
from lightning_sparsity.distributions import uniform
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.schedules import alternating
from lightning_sparsity.scores import magnitude, random
from lightning_sparsity.structures import Structure


class DSD(MaskCallback):
    """Dense-sparse-dense training (Han et al., 2017, arXiv:1607.04381).

    A way to regularise: training ends with a dense network. At ``update_start`` every layer
    keeps its weights of largest magnitude, and the masks are fixed; at ``update_end`` all
    weights are live again, those that were pruned from zero and without momentum, and training
    goes on at a tenth of the learning rate (Alg. 1). The density is the one choice of the
    method: the paper prunes 25 to 50 % of every layer, mostly 30 %.

    The paper trains each phase as long as it needs; here they are parts of one training, a
    third each by default. The factor of the learning rate is multiplied into the optimizers and
    into the learning rates that schedulers start from, so that a schedule goes on below it; a
    floor that a schedule has of its own, such as ``eta_min``, stays.

    Args:
        density: Live share of all sparse weights in the sparse phase, in (0, 1].
        lr_factor: Of all learning rates in the last phase, above 0; 1: they stay.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default uniform, ``global_by(magnitude)`` ranks across layers.
        update_start: Where the sparse phase begins: step (int) or fraction of training (float);
            0: before the first step, for a network that is trained already.
        update_end: Where it ends: step (int) or fraction of training (float), below 1.0.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=90, callbacks=[DSD(density=0.7)])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        lr_factor: float = 0.1,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_start: int | float = 1 / 3,
        update_end: int | float = 2 / 3,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("lr_factor", lr_factor, 0)
        if lr_factor == 0:
            raise ValueError(
                "DSD(lr_factor=0): must be above 0, as the last phase trains; 1 leaves the "
                "learning rates as they are."
            )
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=drop(magnitude),
            update=chain(drop(magnitude), grow(random)),
            ramp=alternating(),
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        if isinstance(self.window.end, float) and self.window.end >= 1:
            raise ValueError(
                f"DSD(update_end={update_end}): must be below 1.0, as the dense network of the "
                "last phase has to train; to end sparse, use Magnitude(density, at=0.5)."
            )
        self.window = Ends(start=self.window.start, end=self.window.end)
        self.lr_factor = float(lr_factor)
        self._slowed = False

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Begin dense, or with the masks that were found; sparse if the window starts at 0."""
        layers = super().begin(layers, share)
        if self.window.start == 0:
            start = {layer.name: layer.live for layer in layers}
            layers = self.update(layers, dataclasses.replace(share, start=start), 0.0)
        return layers

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Compress where the window starts, decompress where it ends."""
        return super().update(layers, share, float(progress < 1))

    # ------------------------------------------------------------------ learning rates

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take it that optimizers are new; a checkpoint may say otherwise."""
        super().setup(trainer, pl_module, stage)
        self._slowed = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Lower the learning rates at the first batch of the last phase."""
        if self._slowed:
            return
        keeper = MaskKeeper.of(trainer)
        runs = [run for run in (keeper.runs if keeper else ()) if id(run.method) == id(self)]
        runs = [run for run in runs if run.owner.optimizer is not None]
        if runs and all(run.is_over for run in runs):
            self._slowed = True
            _scale_learning_rates(trainer, self.lr_factor)

    def state_dict(self) -> dict[str, Any]:
        """Whether the learning rates are those of the last phase."""
        return {"slowed": self._slowed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._slowed = state_dict["slowed"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as new: the optimizers do not come along."""
        return {**super().__getstate__(), "_slowed": False}


def _scale_learning_rates(trainer: pl.Trainer, factor: float) -> None:
    """Multiply the learning rates of all optimizers, and those that schedulers start from."""
    if factor == 1:
        return
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two: OneCycleLR
                if isinstance(group.get(name), torch.Tensor):
                    group[name].mul_(factor)
                elif name in group:
                    group[name] *= factor
    for config in trainer.lr_scheduler_configs:
        for scheduler in _parts(config.scheduler):
            for name in ("base_lrs", "max_lrs"):
                if hasattr(scheduler, name):
                    setattr(scheduler, name, [lr * factor for lr in getattr(scheduler, name)])


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)
