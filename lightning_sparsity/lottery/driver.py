"""The rounds of a call, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.files import is_whole, save, whole
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.isolation import seed_all
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Distribution, call_of
from lightning_sparsity.core.plan import assign
from lightning_sparsity.core.randomness import default_seed, generator, rng_state, set_rng_state
from lightning_sparsity.core.shards import whole as gathered
from lightning_sparsity.core.snapshot import copied
from lightning_sparsity.core.state import mask_weights, replace_masks
from lightning_sparsity.core.window import check_moment
from lightning_sparsity.lottery.imp import IMP
from lightning_sparsity.lottery.saver import Saver
from lightning_sparsity.lottery.ticket import Round, Ticket
from lightning_sparsity.structures import Structure

Treatment = Literal["rewind", "learning_rate", "reinitialize"]

_TREATMENTS = ("rewind", "learning_rate", "reinitialize")


def run_imp(
    make_trainer: Callable[[], pl.Trainer],
    make_module: Callable[[], pl.LightningModule],
    data: Any = None,
    *,
    directory: str | Path,
    rounds: int | None = None,
    density: float | Sequence[float] | None = None,
    drop_fraction: float | None = None,
    treatment: Treatment = "rewind",
    rewind_to: int | float = 0,
    save_every: int | Literal["epoch"] = "epoch",
    distribution: Mapping[str, float] | Distribution | None = None,
    include: Selection = linear_and_conv,
    exclude: Selection = (),
    structure: Structure | None = None,
    seed: int | None = None,
) -> list[Round]:
    r"""Iterative magnitude pruning (Frankle and Carbin, 2019, arXiv:1803.03635).

    Round 0 trains the dense network. After each round but the last, the weights of smallest
    magnitude are pruned: the share ``drop_fraction`` of what is left, or what it takes to arrive
    at ``density``, in equal shares or as it says. What is left is sent back, and is the *ticket*
    that the next round trains:

    - "rewind": to the weights of round 0 after ``rewind_to`` steps (0: the original lottery
      ticket; later: Frankle et al., 2020, arXiv:1912.05671);
    - "learning_rate": the weights stay (Renda et al., 2020, arXiv:2003.02389);
    - "reinitialize": to weights drawn anew (Liu et al., 2019, arXiv:1810.05270), a control.

    Every round goes on from that step of round 0 in all other respects: optimizer state,
    learning rates, epochs, random numbers and, as far as the loader can resume, the order of
    the data. So a schedule of the learning rate spans one round, and with ``rewind_to`` above 0
    later rounds are that much shorter than round 0. Biases and buffers go back with the weights.

    Everything is in ``directory``: a folder per round with ``ticket.pt`` and, when the round
    is finished, ``trained.pt``, which bare PyTorch reads. A driver that was stopped goes on when
    it is called again with the same arguments: finished rounds are read, the one that it was in
    goes on from its last resume point, and the tickets are the same, to the last bit, as far as
    Lightning itself can resume. Files appear whole or not at all.

    Under several processes every one of them calls the driver, and all must see the folder.

    Args:
        make_trainer: Makes a new Trainer for each round, without mask methods of its own.
        make_module: Makes the module anew.
        data: Data module or training loader, as for ``Trainer.fit``; None: the module's own.
        directory: Where all is kept. One folder is for one call and its arguments.
        rounds: Prunings, at least 1; there is one training more than that. May be left out if
            ``density`` has one number for each.
        density: Live share of all sparse weights in the last round, in (0, 1]; or in every round
            after the dense one, falling, such as ``[0.5, 0.2, 0.1]``.
        drop_fraction: Share of the live weights that each pruning removes, in (0, 1), rounded
            up to whole weights; default 0.2 if nothing says the density.
        treatment: "rewind", "learning_rate" or "reinitialize".
        rewind_to: Optimizer step of round 0 (int), or fraction of it (float in [0, 1)).
        save_every: Time between resume points inside a round: "epoch", or optimizer steps.
        distribution: How live weights are split over layers, or densities by name pattern;
            default: all layers are ranked together; ``uniform`` prunes every layer alike.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of weights drawn anew, and of distributions with random choices; default that of
            ``seed_everything``.

    Returns:
        The rounds, first to last.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.
        MisconfigurationException: If ``directory`` belongs to a call with other arguments, or a
            Trainer has a mask method.

    Example::

        rounds = run_imp(
            lambda: Trainer(max_epochs=20, callbacks=[DensityMonitor()]),
            Classifier,
            data,
            directory="runs/imp",
            rounds=5,
            rewind_to=0.05,
        )
        ticket = rounds[-1].ticket
        module = Classifier()
        module.load_state_dict(ticket.weights)
        Trainer(max_epochs=20, callbacks=[StaticSparse()]).fit(module, data)
    """
    callback = IMP(
        rounds=rounds,
        density=density,
        drop_fraction=drop_fraction,
        distribution=distribution,
        include=include,
        exclude=exclude,
        structure=structure,
        seed=seed,
    )
    check_moment(f"run_imp(rewind_to={rewind_to!r})", rewind_to)
    if treatment not in _TREATMENTS:
        raise ValueError(
            f"run_imp(treatment={treatment!r}): must be one of {', '.join(_TREATMENTS)}."
        )
    if treatment == "reinitialize" and rewind_to != 0:
        raise ValueError(
            f'run_imp(treatment="reinitialize", rewind_to={rewind_to!r}): weights drawn anew start '
            "at step 0; leave rewind_to out."
        )
    if save_every != "epoch" and (
        isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1
    ):
        raise ValueError(
            f'run_imp(save_every={save_every!r}): must be "epoch" or a positive number of '
            "optimizer steps."
        )
    plan = {
        "rounds": callback.rounds,
        "density": density if callback.densities is None else callback.densities,
        "drop_fraction": callback.drop_fraction,
        "treatment": treatment,
        "rewind_to": rewind_to,
        "distribution": distribution,
        "include": include,
        "exclude": exclude,
        "structure": structure,
    }
    driver = _Driver(
        make_trainer, make_module, data, Path(directory), treatment, rewind_to, save_every, callback
    )
    driver.agree_on({name: _said(value) for name, value in plan.items()}, seed)
    return [driver.round(number) for number in range(callback.rounds + 1)]


@dataclass
class _Driver:
    """The rounds of one call of :func:`run_imp`, and their files.

    ``plan.json`` are the arguments; ``rewind.ckpt`` is the checkpoint of round 0 to go back to.
    In the folder of a round, ``start.ckpt`` is the checkpoint that it starts from, ``last.ckpt``
    its latest resume point; both are gone when it is finished.
    """

    make_trainer: Callable[[], pl.Trainer]
    make_module: Callable[[], pl.LightningModule]
    data: Any
    directory: Path
    treatment: Treatment
    rewind_to: int | float
    save_every: int | Literal["epoch"]
    callback: IMP
    seed: int = 0

    @property
    def rewind(self) -> Path:
        return self.directory / "rewind.ckpt"

    def folder(self, number: int) -> Path:
        return self.directory / f"round_{number:02}"

    # ---------------------------------------------------------------------- arguments

    def agree_on(self, plan: dict[str, str], seed: int | None) -> None:
        """Write down the arguments, or compare them with those that the folder belongs to."""
        path = self.directory / "plan.json"
        if not path.exists():
            self.seed = default_seed() if seed is None else seed
            with whole(path) as unfinished:
                unfinished.write_text(json.dumps({**plan, "seed": self.seed}, indent=2))
            return
        then = json.loads(path.read_text())
        self.seed = then["seed"]
        now = {**plan, "seed": self.seed if seed is None else seed}
        different = [name for name in now if now[name] != then.get(name)]
        if different:
            raise MisconfigurationException(
                f"run_imp(directory={str(self.directory)!r}) belongs to a call with other "
                "arguments:"
                + "".join(
                    f"\n  {name}: {then.get(name)} then, {now[name]} now" for name in different
                )
                + "\nGive another directory, or the same arguments to go on."
            )

    # ------------------------------------------------------------------------- rounds

    def round(self, number: int) -> Round:
        """Train a round, from wherever it is; or read what it has left."""
        if (finished := self._finished(number)) is not None:
            return finished
        trainer = self._trainer()
        start = self._start(number, trainer)
        saver = Saver(self.folder(number), self.rewind, self.rewind_to, self.save_every)
        trainer.callbacks.append(saver)  # type: ignore[attr-defined]
        module = self.make_module()
        trainer.fit(module, self.data, ckpt_path=start)
        if trainer.state.status != TrainerStatus.FINISHED:
            raise RuntimeError(
                f"run_imp: round {number} was interrupted; call run_imp again to go on."
            )
        self._finish(number, trainer, module)
        done = self._finished(number)
        assert done is not None
        rank_zero_info(
            f"run_imp: round {number} of {self.callback.rounds} is finished, with {done.live} live "
            f"weights (density {done.density:.4g})."
        )
        return done

    def _finished(self, number: int) -> Round | None:
        """What a round has left; None if it has yet to be finished."""
        path = self.folder(number) / "trained.pt"
        next_ticket = self.folder(number + 1) / "ticket.pt"
        is_last = number == self.callback.rounds
        if not (is_whole(path) and (is_last or is_whole(next_ticket))):
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Round(number, saved["live"], saved["density"], saved["metrics"], self.folder(number))

    def _trainer(self) -> pl.Trainer:
        """A fresh Trainer with our callback in front."""
        trainer = self.make_trainer()
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(f"run_imp: make_trainer() gave {trainer!r}; it must make a Trainer.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, IMP):
                raise ValueError(
                    "run_imp: make_trainer() gave the same Trainer, or the same callbacks, again; "
                    "it must make new ones for every round."
                )
            if isinstance(callback, MaskCallback):
                raise MisconfigurationException(
                    f"run_imp makes the masks itself; leave {type(callback).__name__} out of the "
                    "Trainer that make_trainer() makes."
                )
        callbacks.insert(0, self.callback)
        return trainer

    def _start(self, number: int, trainer: pl.Trainer) -> Path | None:
        """The checkpoint that a round goes on from; None: the very first begins afresh."""
        start, last = self.folder(number) / "start.ckpt", self.folder(number) / "last.ckpt"
        if is_whole(last) and is_whole(self.rewind):
            return last
        if not is_whole(start) and number > 0:
            if trainer.is_global_zero:
                self._send_back(number, trainer, start)
            trainer.strategy.barrier("run_imp")
        return start if number > 0 or is_whole(start) else None

    def _send_back(self, number: int, trainer: pl.Trainer, start: Path) -> None:
        """Write what a round starts from: round 0 at the moment to go back to, with a ticket."""
        ticket = Ticket.load(self.folder(number) / "ticket.pt")
        checkpoint = self._checkpoint()
        replace_masks(_kept(checkpoint), ticket.masks)
        if "current_model_state" in checkpoint:  # the weights are averaged
            checkpoint["current_model_state"] = dict(ticket.weights)
        if "current_model_state" not in checkpoint or self.treatment != "rewind":
            checkpoint["state_dict"] = dict(ticket.weights)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):  # its files are not those of round 0
                checkpoint["callbacks"].pop(callback.state_key, None)
        save(checkpoint, start)

    def _finish(self, number: int, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write what a round has trained and, before that, what comes of it."""
        here = self.folder(number)
        if not is_whole(self.rewind):
            raise ValueError(
                f"run_imp(rewind_to={self.rewind_to!r}): round 0 made {trainer.global_step} "
                "optimizer steps and never came there. Go back to an earlier step, in another "
                "directory."
            )
        if trainer.is_global_zero:
            weights = copied(module.state_dict())
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            ticket = Ticket.load(here / "ticket.pt")
            if number < self.callback.rounds:
                masks = self._pruned(number, module, ticket.masks)
                self._ticket(number + 1, masks, weights).save(self.folder(number + 1) / "ticket.pt")
            trained = {"live": ticket.live, "density": ticket.density, "metrics": metrics}
            save({**trained, "weights": weights}, here / "trained.pt")
            for name in ("start.ckpt", "last.ckpt"):
                (here / name).unlink(missing_ok=True)
        trainer.strategy.barrier("run_imp")

    # ------------------------------------------------------------------------ tickets

    def _pruned(
        self, number: int, module: pl.LightningModule, masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The masks of the next round."""
        _, parameters = assign(module, [self.callback])
        layers = []
        for kept in parameters:
            kept.set_mask(masks[kept.name])
            layers.append(kept.layer(generator=generator(self.seed, "run_imp", kept.name, number)))
        return {
            layer.name: gathered(layer.mask).cpu().clone()
            for layer in self.callback.prune(layers, number + 1)
        }

    def _ticket(
        self, number: int, masks: dict[str, Tensor], trained: Mapping[str, Tensor]
    ) -> Ticket:
        """The weights that a round starts from, zero off its masks."""
        checkpoint = self._checkpoint()
        if self.treatment == "learning_rate":
            weights = dict(trained)
        elif self.treatment == "reinitialize":
            weights = self._redrawn(number)
        else:
            weights = dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
        replace_masks(_kept(checkpoint), masks)
        mask_weights(_kept(checkpoint), weights)
        return Ticket(masks, weights)

    def _redrawn(self, number: int) -> dict[str, Tensor]:
        """Weights of a new module, which depend on the seed and the round alone."""
        state = rng_state()
        try:
            seed_all(generator(self.seed, "run_imp", number).initial_seed())
            module = self.make_module()
            module.configure_model()
        finally:
            set_rng_state(state)
        weights: dict[str, Tensor] = copied(module.state_dict())
        return weights

    def _checkpoint(self) -> dict[str, Any]:
        """The checkpoint of round 0 to go back to."""
        found: dict[str, Any] = torch.load(self.rewind, map_location="cpu", weights_only=True)
        return found


def _kept(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The keeper's state in a checkpoint."""
    state: dict[str, Any] = checkpoint["callbacks"][MaskKeeper().state_key]
    return state


def _said(value: object) -> str:
    """An argument in words, the same in every process."""
    if isinstance(value, Mapping):
        return str({key: _said(part) for key, part in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_said, value))}]"
    return call_of(value)
