"""Resume points of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparsity.core.files import is_whole, whole
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.randomness import rng_state, set_rng_state
from lightning_sparsity.core.shards import whole as gathered
from lightning_sparsity.core.snapshot import copied
from lightning_sparsity.core.window import resolve
from lightning_sparsity.lottery.ticket import Ticket


class Saver(Checkpoint):
    """Writes the resume points of a round and, in round 0, what later ones go back to.

    Args:
        directory: Of the round.
        rewind: The checkpoint that later rounds go back to.
        rewind_to: When that is; a step or a fraction of the round.
        every: Optimizer steps between resume points, or "epoch".
    """

    def __init__(
        self,
        directory: Path,
        rewind: Path,
        rewind_to: int | float,
        every: int | Literal["epoch"],
    ) -> None:
        self.directory = directory
        self.rewind = rewind
        self.rewind_to = rewind_to
        self.every = every
        self._moment = 0
        self._remembers = False
        self._latest = -1
        self._rng: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the random numbers before the loader draws some, which a resumed run does too."""
        self._rng = rng_state()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the very first round starts from."""
        start = self.directory / "start.ckpt"
        begun = is_whole(start) or trainer.ckpt_path is not None
        self._remembers = is_whole(self.rewind)
        if not self._remembers:
            try:
                self._moment = resolve(self.rewind_to, trainer.estimated_stepping_batches)
            except ValueError as error:
                raise MisconfigurationException(
                    f"run_imp(rewind_to={self.rewind_to!r}): {error}"
                ) from None
        if not begun:
            keeper = MaskKeeper.of(trainer)
            if trainer.is_global_zero and keeper is not None and keeper.masks is not None:
                masks = {kept.name: gathered(kept.mask).cpu().clone() for kept in keeper.masks}
                Ticket(masks, copied(pl_module.state_dict())).save(self.directory / "ticket.pt")
            self._save_before_data(trainer, start)
        self._latest = trainer.global_step
        if not self._remembers and self._moment == 0:
            self._save_before_data(trainer, self.rewind)
            self._remembers = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Keep what later rounds go back to; keep a resume point, if it is time."""
        self._remember(trainer)
        step = trainer.global_step
        if self.every == "epoch" or step == self._latest or step % self.every:
            return
        epochs = trainer.max_epochs or -1
        if not (trainer.is_last_batch and trainer.current_epoch + 1 == epochs):
            self._save_point(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a resume point, unless this was the last epoch."""
        if self.every == "epoch" and not trainer.fit_loop.done:
            self._save_point(trainer)

    def _save_point(self, trainer: pl.Trainer) -> None:
        self._latest = trainer.global_step
        if self._remembers:  # before that, a round begins again
            self._save(trainer, self.directory / "last.ckpt")

    def _remember(self, trainer: pl.Trainer) -> None:
        if not self._remembers and trainer.global_step >= self._moment:
            self._save(trainer, self.rewind)
            self._remembers = True

    def _save_before_data(self, trainer: pl.Trainer, path: Path) -> None:
        """Write a checkpoint of the moment before the loader has drawn anything."""
        now = rng_state()
        set_rng_state(self._rng)
        self._save(trainer, path)
        set_rng_state(now)

    @staticmethod
    def _save(trainer: pl.Trainer, path: Path) -> None:
        """Write a checkpoint; every process takes part."""
        with whole(path, here=trainer.is_global_zero) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)
        trainer.strategy.barrier("run_imp")
