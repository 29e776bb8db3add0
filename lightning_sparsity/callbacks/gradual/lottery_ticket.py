"""Lottery tickets: train, prune, go back to an early moment, train again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper, nobody
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.snapshot import put_back, take
from lightning_sparsity.core.window import check_moment, epochs
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import exponential
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure

_TREATMENTS = ("rewind", "learning_rate", "fine_tune")


class LotteryTicket(MaskCallback):
    r"""Iterative magnitude pruning with rewinding (Frankle and Carbin, 2019, arXiv:1803.03635).

    One ``fit`` is ``rounds + 1`` trainings of ``round_epochs`` epochs each. After each but the
    last, the weights of smallest magnitude of the whole network are pruned, every time the
    same share of what is left, so that the last training has the density asked for. Then,
    by ``treatment``,

    - "rewind": weights, buffers, optimizer state and the schedule of the learning rate go back
      to what they were after ``rewind_to`` steps of the first training (0: the original
      lottery ticket; later: Frankle et al., 2020, arXiv:1912.05671);
    - "learning_rate": weights stay, the optimizer and its schedule go back (Renda et al., 2020);
    - "fine_tune": nothing goes back.

    A schedule of the learning rate must span one round, not the whole ``fit``; one that is put
    in its place on the way, as by weight averaging, is left alone. Data go on: a later round
    sees other shuffles than the first.

    Args:
        density: Live share of all sparse weights in the last round, in (0, 1].
        rounds: Prunings, at least 1; 1 is one-shot pruning.
        round_epochs: Epochs of one training, at least 1. ``Trainer(max_epochs=...)`` must be
            ``(rounds + 1) * round_epochs``.
        rewind_to: Optimizer step of the first training (int), or fraction of a round
            (float in [0, 1)).
        treatment: "rewind", "learning_rate" or "fine_tune".
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: all layers are ranked together.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by magnitude; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=60, callbacks=[LotteryTicket(density=0.1, rounds=5, round_epochs=10)])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        rounds: int = 1,
        round_epochs: int = 1,
        rewind_to: int | float = 0,
        treatment: Literal["rewind", "learning_rate", "fine_tune"] = "rewind",
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("rounds", rounds)
        self._check_count("round_epochs", round_epochs)
        check_moment(f"LotteryTicket(rewind_to={rewind_to!r})", plain(rewind_to))
        if treatment not in _TREATMENTS:
            raise ValueError(
                f"LotteryTicket(treatment={treatment!r}): must be one of {', '.join(_TREATMENTS)}."
            )
        self.rounds = plain(rounds)
        self.round_epochs = plain(round_epochs)
        self.rewind_to = plain(rewind_to)
        self.treatment = treatment
        self._forget()
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=drop(magnitude),
            ramp=exponential,
            update_interval=epochs(round_epochs),
            update_end=1.0,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def _forget(self) -> None:
        self._begun = 0
        self._snapshot: dict[str, Any] | None = None
        self._model: Callable[[], pl.LightningModule | None] = nobody

    # ------------------------------------------------------------------------ pruning

    @property
    def ramps(self) -> bool:
        """No: the density changes from round to round, whatever the steps in them."""
        return False

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Begin dense, or with the masks that were found; see the base class."""
        self._budget.check_found(layers, share)
        return layers

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Prune to the density of the next round."""
        assert self.rule is not None
        turn = min(self._begun + 1, self.rounds)
        budget = self._budget.on_the_way(layers, share, turn / self.rounds)
        return self.rule(layers, budget, progress)

    # ------------------------------------------------------------------------- rounds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the rounds fill the training."""
        super().setup(trainer, pl_module, stage)
        if self._model() is not pl_module:
            self._forget()
            self._model = weakref.ref(pl_module)
        needed = (self.rounds + 1) * self.round_epochs
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if stage == "fit" and trainer.max_epochs != needed and not dev_run:
            raise MisconfigurationException(
                f"LotteryTicket(rounds={self.rounds}, round_epochs={self.round_epochs}) trains "
                f"{self.rounds + 1} times {self.round_epochs} epochs: give "
                f"Trainer(max_epochs={needed}), not {trainer.max_epochs}."
            )

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """Remember where to rewind to, if that is the start."""
        super().on_masks_ready(trainer, pl_module, keeper)
        self._remember(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Remember where to rewind to, if this is it."""
        self._remember(trainer, pl_module)

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._snapshot is not None or self._begun or self.treatment == "fine_tune":
            return
        moment = self.rewind_to
        if isinstance(moment, float):
            moment = round(moment * trainer.estimated_stepping_batches / (self.rounds + 1))
        if trainer.global_step >= moment:
            self._snapshot = take(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Begin the next round at its first batch: go back, and zero what was pruned.

        Not at the start of its epoch, which a run that is resumed there does not see.
        """
        turn = trainer.current_epoch // self.round_epochs
        keeper = MaskKeeper.of(trainer)
        if turn <= self._begun or keeper is None or keeper.masks is None:
            return
        self._begun = turn
        if self._snapshot is not None:
            rewinds = self.treatment == "rewind"
            put_back(self._snapshot, trainer, pl_module, weights=rewinds)
        for optimizer in trainer.optimizers:
            keeper.masks.enforce(keeper.masks, optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that training was stopped before the last pruning, as by EarlyStopping."""
        keeper = MaskKeeper.of(trainer)
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if dev_run or keeper is None or keeper.masks is None:
            return
        mine = [run for run in keeper.runs if id(run.method) == id(self) and run.owner.optimizer]
        # a round of few steps may end without one, and the next prunes for both
        pruned = max(self._begun, min((run.updates for run in mine), default=self.rounds))
        if pruned < self.rounds:
            when = f"after {pruned} of {self.rounds} prunings"
            self._warn_of_stop(keeper.masks, mine, when)

    # -------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The round, and what later rounds go back to."""
        return {"begun": self._begun, "snapshot": self._snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._begun, self._snapshot = state_dict["begun"], state_dict["snapshot"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as new: where it rewinds to belongs to a model that does not come along."""
        fresh = {"_begun": 0, "_snapshot": None, "_model": nobody}
        return {**super().__getstate__(), **fresh}
