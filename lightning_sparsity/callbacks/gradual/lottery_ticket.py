"""Lottery tickets: train, prune, go back to an early moment, train again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv, plain_name
from lightning_sparsity.core.keeper import MaskKeeper, nobody
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.core.snapshot import put_back, take
from lightning_sparsity.core.window import Asked
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import exponential
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure

_TREATMENTS = ("rewind", "learning_rate", "reinitialize", "fine_tune")


class LotteryTicket(MaskCallback):
    r"""Iterative magnitude pruning with rewinding (Frankle and Carbin, 2019, arXiv:1803.03635).

    One ``fit`` is ``rounds + 1`` trainings. After each but the last, when it has been validated
    and saved, the weights of smallest magnitude of the whole network are pruned, every time
    the same share of what is left, so that the last training has the density asked for. Then,
    by ``treatment``,

    - "rewind": weights, buffers, optimizer state and the schedule of the learning rate go back
      to what they were after ``rewind_to`` epochs of the first training (0: the original
      lottery ticket; later: Frankle et al., 2020, arXiv:1912.05671);
    - "learning_rate": weights stay, the optimizer and its schedule go back (Renda et al., 2020,
      arXiv:2003.02389);
    - "reinitialize": as "rewind" to the start, but the start values of each layer are dealt out
      anew over its weights (Liu et al., 2019, arXiv:1810.05270), a control;
    - "fine_tune": nothing goes back.

    The first training has ``round_epochs`` epochs; the others go on from epoch ``rewind_to`` and
    have that many less. So a schedule of the learning rate must span one round (with "fine_tune",
    the whole ``fit``); one that is put in its place on the way, as by weight averaging, is left
    alone. Data go on: a later round sees other shuffles than the first. Whatever else looks at
    the whole ``fit`` goes on too: running averages of the weights, the patience of
    ``EarlyStopping``, and ``ModelCheckpoint(monitor=...)``, which may find the best epoch in a
    denser round. To go back to a step in the middle of an epoch, use
    :func:`~lightning_sparsity.lottery.run_imp`. There is one ticket per Trainer.

    Args:
        density: Live share of all sparse weights in the last round, in (0, 1].
        rounds: Prunings, at least 1; 1 is one-shot pruning.
        round_epochs: Epochs of the first training, at least 1. ``Trainer(max_epochs=...)`` must
            be ``round_epochs + rounds * (round_epochs - rewind_to)``.
        rewind_to: Epochs of the first training to go back to, from 0 to ``round_epochs - 1``.
        treatment: "rewind", "learning_rate", "reinitialize" or "fine_tune".
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: all layers are ranked together.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of start values that are dealt out anew, and of distributions with random choices;
            default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        ticket = LotteryTicket(density=0.1, rounds=5, round_epochs=10, rewind_to=1)
        Trainer(max_epochs=10 + 5 * 9, callbacks=[ticket])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        rounds: int = 1,
        round_epochs: int = 1,
        rewind_to: int = 0,
        treatment: Literal["rewind", "learning_rate", "reinitialize", "fine_tune"] = "rewind",
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("rounds", rounds)
        self._check_count("round_epochs", round_epochs)
        self._check_count("rewind_to", rewind_to, least=0)
        if treatment not in _TREATMENTS:
            raise ValueError(
                f"LotteryTicket(treatment={treatment!r}): must be one of {', '.join(_TREATMENTS)}."
            )
        if rewind_to >= round_epochs:
            raise ValueError(
                f"LotteryTicket(rewind_to={rewind_to!r}, round_epochs={round_epochs!r}): must be "
                f"an epoch of the first round, from 0 to {round_epochs - 1}."
            )
        if treatment in ("reinitialize", "fine_tune") and rewind_to:
            goes = (
                "weights drawn anew start at 0"
                if treatment == "reinitialize"
                else "nothing goes back"
            )
            raise ValueError(
                f"LotteryTicket(treatment={treatment!r}, rewind_to={rewind_to!r}): {goes}; leave "
                "rewind_to out."
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
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        self.window = Asked()

    def _forget(self) -> None:
        self._begun = 0
        self._snapshot: dict[str, Any] | None = None
        self._model: Callable[[], pl.LightningModule | None] = nobody
        self._trainer: Callable[[], pl.Trainer | None] = nobody

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
        budget = self._budget.on_the_way(layers, share, self._begun / self.rounds)
        return self.rule(layers, budget, progress)

    # ------------------------------------------------------------------------- rounds

    @property
    def _later(self) -> int:
        """Epochs of every round but the first."""
        return self.round_epochs - self.rewind_to

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the rounds fill the training, and forget another one."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and (self._model() is not pl_module or self._trainer() is not trainer):
            self._forget()
            self._model, self._trainer = weakref.ref(pl_module), weakref.ref(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, LotteryTicket) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "LotteryTicket: the Trainer has two, and each would send the whole model back. Use "
                "one, which may give layers densities of their own, with distribution=."
            )
        needed = self.round_epochs + self.rounds * self._later
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if stage == "fit" and trainer.max_epochs != needed and not dev_run:
            raise MisconfigurationException(
                f"LotteryTicket(rounds={self.rounds}, round_epochs={self.round_epochs}, "
                f"rewind_to={self.rewind_to}) trains {self.round_epochs} epochs and then "
                f"{self.rounds} times {self._later}: give Trainer(max_epochs={needed}), not "
                f"{trainer.max_epochs}."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember where to rewind to; begin the next round, when the last one was validated.

        Not at the start of an epoch, which a run that is resumed there does not see.

        Raises:
            MisconfigurationException: If training goes on from a dense one that was past the
                epoch to go back to.
        """
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        epoch = trainer.current_epoch
        turn = max(0, 1 + (epoch - self.round_epochs) // self._later)
        if self._snapshot is None and self.treatment != "fine_tune" and epoch >= self.rewind_to:
            if epoch > self.rewind_to or batch_idx > 0:
                raise MisconfigurationException(
                    f"LotteryTicket(rewind_to={self.rewind_to}): training goes on in epoch "
                    f"{epoch} with batch {batch_idx}, and what it was as epoch {self.rewind_to} "
                    "began is not known. Begin anew, or go back to a later epoch."
                )
            self._snapshot = take(trainer, pl_module)
        if turn <= self._begun:
            return
        self._begun = turn
        keeper.update(self)
        if self._snapshot is not None:
            start = self._snapshot
            if self.treatment == "reinitialize":
                start = {**start, "module": self._dealt(start["module"], keeper)}
            put_back(start, trainer, pl_module, weights=self.treatment != "learning_rate")
        for optimizer in trainer.optimizers:
            keeper.masks.enforce(keeper.masks, optimizer)

    def _dealt(self, weights: Mapping[str, Tensor], keeper: MaskKeeper) -> dict[str, Tensor]:
        """A ``state_dict`` in which the values of each sparse weight lie in other places.

        Zeros stay: they were pruned before the start.
        """
        dealt = dict(weights)
        by_name = {plain_name(key): key for key in weights}
        seed = keeper.seed if self.seed is None else self.seed
        for kept in keeper.masks or ():
            if any(kept.name in run.names for run in keeper.runs if id(run.method) == id(self)):
                keys = [by_name[alias] for alias in kept.aliases if alias in by_name]
                draw = generator(seed, "LotteryTicket", kept.name, self._begun)
                start = weights[keys[0]]
                values = start[start != 0]
                values = values[torch.randperm(len(values), generator=draw)]
                dealt |= dict.fromkeys(keys, start.masked_scatter(start != 0, values))
        return dealt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that training was stopped before the last pruning, as by EarlyStopping."""
        keeper = MaskKeeper.of(trainer)
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if dev_run or keeper is None or keeper.masks is None:
            return
        if self._begun < self.rounds:
            mine = [run for run in keeper.runs if id(run.method) == id(self)]
            when = f"after {self._begun} of {self.rounds} prunings"
            self._warn_of_stop(keeper.masks, mine, when)

    # -------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The round, and what later rounds go back to."""
        return {"begun": self._begun, "snapshot": self._snapshot, "plan": self._plan}

    @property
    def _plan(self) -> dict[str, Any]:
        names = ("rounds", "round_epochs", "rewind_to", "treatment")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            MisconfigurationException: If it is one of other rounds.
        """
        if (then := state_dict["plan"]) != self._plan:
            raise MisconfigurationException(
                f"LotteryTicket: the checkpoint was made with {then}, and goes on with those "
                f"alone, not with {self._plan}."
            )
        self._begun, self._snapshot = state_dict["begun"], state_dict["snapshot"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as new: where it rewinds to belongs to a model that does not come along."""
        fresh = {"_begun": 0, "_snapshot": None, "_model": nobody, "_trainer": nobody}
        return {**super().__getstate__(), **fresh}
