"""MaskKeeper: the one owner of masks in training. Enforces, updates, saves and restores."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_sparsity.core import state
from lightning_sparsity.core.capture import Capture
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.plan import Assignment, assign, check_order, check_windows
from lightning_sparsity.core.randomness import default_seed, generator, set_rng_state
from lightning_sparsity.core.run import Owner, Run, by_optimizer, carry_over, census
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.scores import needs_gradient

_REFUSED_STRATEGIES = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class MaskKeeper(Callback):
    """Added to the Trainer by the first sparsity callback; one per Trainer, the last of ours.

    It masks gradients before the optimizer steps, runs the due rules right after a real
    step, commits what they return, and saves all state under plain parameter names.

    When masks are ready, before the first step, it calls
    ``on_masks_ready(trainer, pl_module, keeper)`` on every callback that has it.

    Attributes:
        masks: Masks of the model being fitted; None outside ``fit``.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._assignments: list[Assignment] = []
        self._owners: list[Owner] = []
        self._runs: list[Run] = []
        self._handles: list[Any] = []
        self._restored: dict[str, Any] = {}
        self._model: Callable[[], pl.LightningModule | None] = _nobody
        self._trainer: pl.Trainer | None = None
        self._census: list[tuple[int, int]] = []
        self._rng_is_due = False
        self._seed = 0
        self._total = float("inf")
        self._in_batch = False
        self._gradients_stay_masked = False
        self._warned: set[str] = set()

    @classmethod
    def of(cls, trainer: pl.Trainer) -> MaskKeeper | None:
        """The keeper of a Trainer, if a sparsity callback has added one."""
        return next((c for c in _callbacks(trainer) if isinstance(c, cls)), None)

    @classmethod
    def ensure(cls, trainer: pl.Trainer) -> MaskKeeper:
        """The keeper of a Trainer, put before its checkpoint callbacks if it has none."""
        keeper = cls.of(trainer)
        if keeper is None:
            keeper = cls()
            saving = [isinstance(c, Checkpoint) for c in _callbacks(trainer)]
            place = saving.index(True) if any(saving) else len(saving)
            _callbacks(trainer).insert(place, keeper)
        return keeper

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every method at work, once per optimizer; read only."""
        return tuple(self._runs)

    # ------------------------------------------------------------------ start and end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters, group them by optimizer, register the step hooks."""
        self._release()
        if self._model() is not pl_module:
            self._restored = {}
        self._model = weakref.ref(pl_module)
        self._trainer = trainer
        _refuse(trainer)
        self._assignments, parameters = assign(pl_module, _callbacks(trainer))
        self._gradients_stay_masked = _only_we_touch_gradients(pl_module)
        self.masks = Masks(parameters)
        self._group()
        if self._restored:
            self._compare(self._restored)
            if self._rng_is_due:
                set_rng_state(self._restored["rng"])
        self._rng_is_due = False

    def _group(self) -> None:
        """Group the parameters by optimizer, and let methods go on where they were."""
        assert self.masks is not None
        assert self._trainer is not None
        owners, runs = self._owners, self._runs
        for owner in owners:
            owner.forget()
        for handle in self._handles:
            handle.remove()
        optimizers = self._trainer.optimizers
        self._census = census(optimizers)
        self._owners = by_optimizer(list(self.masks), optimizers)
        for place, owner in enumerate(self._owners):
            twins = [o for o in owners if o.optimizer is owner.optimizer] or owners[place:]
            owner.steps = twins[0].steps if twins else 0
        self._runs = [
            Run(a.key, a.method, owner, size)
            for a in self._assignments
            for owner in self._owners
            if (size := {p.name: p.size for p in owner.parameters if p.name in a.names})
        ]
        if runs:
            carry_over(runs, self._runs)
        self._handles = [
            owner.optimizer.register_step_post_hook(self._after_step)
            for owner in self._owners
            if owner.optimizer is not None
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the masks, or make them, and set the weights to zero off them."""
        assert self.masks is not None
        self._open_windows(trainer)
        if self._restored:
            self._compare(self._restored)
            self._seed = self._restored["seed"]
            state.restore(self._restored, self.masks, self._owners, self._runs)
            self._restored = {}
        else:
            for owner in self._owners:  # more than 0 where a dense training goes on
                owner.steps = trainer.global_step // max(len(trainer.optimizers), 1)
            self._seed = int(trainer.strategy.broadcast(default_seed()))
            self._begin_all()
        for owner in self._owners:
            self.masks.enforce(owner.stepping, owner.optimizer)
        if not _is_dev_run(trainer):
            self._warn_of_idle_methods()
        for callback in _callbacks(trainer):
            if callable(announce := getattr(callback, "on_masks_ready", None)):
                announce(trainer, pl_module, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hand everything back. The state stays, for another ``fit`` of the same model."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Hand everything back."""
        self._release()

    def _release(self) -> None:
        if self.masks is not None:
            self._restored = self.state_dict()
        for handle in self._handles:
            handle.remove()
        for owner in self._owners:
            owner.forget()
        self._handles, self._owners, self._runs, self._assignments = [], [], [], []
        self._trainer = self.masks = None
        self._in_batch = False
        self._warned = set()

    def _open_windows(self, trainer: pl.Trainer) -> None:
        total = trainer.estimated_stepping_batches
        self._total = float(total) if total > 0 else float("inf")
        windows = []
        for a in self._assignments:
            if a.method.rule is None:
                continue
            try:
                steps = a.method.window.resolve(self._total, arrives=a.method.ramps)
            except ValueError as error:
                raise MisconfigurationException(f"{a.key}: {error}") from None
            if steps.start > steps.end and not _is_dev_run(trainer):
                raise MisconfigurationException(
                    f"{a.key}: update_end={a.method.window.end!r} is step {steps.end} of "
                    f"{self._total:g} and comes before update_start={a.method.window.start!r}, "
                    f"step {steps.start}. Give both as steps or both as fractions."
                )
            windows.append((a.key, steps, frozenset(a.names)))
            for run in self._runs:
                run.steps = steps if run.key == a.key else run.steps
        check_windows(windows)

    def _warn_of_idle_methods(self) -> None:
        for run in self._runs:
            if run.steps is not None and not run.steps.opens(self._total):
                self._warn_once(
                    f"{run.key} makes no update: training has {self._total:g} optimizer steps, and "
                    f"its window is steps {run.steps.start} to {run.steps.end}, every "
                    f"{run.steps.every}. Lower update_start or update_interval."
                )

    def _begin_all(self) -> None:
        """Begin every initial method, then the first updater on each parameter.

        Nothing is written before all of them have succeeded.
        """
        assert self.masks is not None
        layers = {layer.name: layer for run in self._runs for layer in self._layers(run)}
        made: dict[str, tuple[str, float]] = {}  # who acted last, and the density it leaves
        taken: set[str] = set()
        shares: list[tuple[Run, Share]] = []
        for a in self._assignments:
            names = set(a.names)
            check_order(a, made)
            if a.method.role == "initial" or not names & taken:
                found = bool(names & made.keys())
                mine = [run for run in self._runs if run.key == a.key]
                shares += [(run, self._begin(run, layers, found)) for run in mine]
            taken |= names if a.method.role == "updater" else set()
            units = [layers[name] for name in a.names]
            real = sum(layer.live for layer in units) / sum(layer.size for layer in units)
            made |= dict.fromkeys(a.names, (a.key, a.method.density or real))
        self.masks.commit(list(layers.values()), self._optimizers)
        for run, share in shares:
            run.share = share

    def _begin(self, run: Run, layers: dict[str, Layer], found: bool) -> Share:
        """Let a method take over; ``layers`` are replaced by what it makes of them."""
        mates = [r for r in self._runs if r.key == run.key]
        share = Share(
            names=next(a.names for a in self._assignments if a.key == run.key),
            sizes=tuple(sum(mate.size.values()) for mate in mates),
            index=mates.index(run),
            found=found,
        )
        mine = [
            dataclasses.replace(layers[fresh.name], generator=fresh.generator)
            for fresh in self._layers(run)
        ]
        begun = run.method.begin(mine, share)
        layers |= {layer.name: layer for layer in begun}
        return dataclasses.replace(share, start={layer.name: layer.live for layer in begun})

    def _layers(self, run: Run) -> Layers:
        assert self.masks is not None
        seed = self._seed if run.method.seed is None else run.method.seed
        return [
            self.masks[name].layer(
                grad=run.owner.kept.get(name),
                generator=generator(seed, run.key, name, run.updates),
                statistics=run.owner.capture.of(name) if run.owner.capture else None,
            )
            for name in run.names
        ]

    # ---------------------------------------------------------------------- each step

    def on_train_batch_start(self, *args: Any) -> None:
        """Optimizer steps count as training from here; record activations if asked to."""
        assert self.masks is not None
        self._in_batch = True
        self._follow_optimizers()
        for owner in self._owners:
            if owner.touched():
                self.masks.enforce(owner.stepping)
                owner.remember()
        ending = self._ending_epoch()
        for run in self._runs:
            if run.method.statistics and run.due(ending, self._total, ahead=1):
                self._capture(run.owner)

    def _capture(self, owner: Owner) -> None:
        if owner.capture is None:
            wanted = {s for run in self._runs if run.owner is owner for s in run.method.statistics}
            owner.capture = Capture(owner.parameters, wanted)

    def on_train_batch_end(self, *args: Any) -> None:
        """Count the steps that were skipped; those outside a batch are not training."""
        for owner in self._owners:
            if owner.masked:
                self._skip(owner)
        self._in_batch = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read what the methods need from the dense gradients, then mask them."""
        assert self.masks is not None
        self._follow_optimizers()
        owner = self._owner(optimizer)
        if owner is not None:
            if owner.touched():
                self.masks.enforce(owner.stepping)
            self._keep_gradients(owner, copy=True)
            self.masks.enforce_gradients(owner.stepping)
            owner.masked = True

    def _follow_optimizers(self) -> None:
        """See new optimizers, and parameters that joined one in training."""
        assert self._trainer is not None
        if census(self._trainer.optimizers) != self._census:
            self._group()

    def _keep_gradients(self, owner: Owner, copy: bool) -> None:
        """Show dense gradients to the methods that observe, keep them for due updates."""
        assert self.masks is not None
        ending = self._ending_epoch()
        dense = {
            p.name: p.parameter.grad.detach()
            for p in owner.parameters
            if p.parameter.grad is not None
        }
        runs = [run for run in self._runs if run.owner is owner]
        for run in runs:
            if run.method.observe is not None and run.share is not None:
                owner.kept = dense
                for layer in self._layers(run):
                    if layer.grad is not None:
                        self.masks[layer.name].slots.update(run.method.observe(layer))
        wanted = {
            name
            for run in runs
            if run.due(ending, self._total, ahead=1) and needs_gradient(run.method.rule)
            for name in run.names
        }
        owner.kept = {
            name: grad.clone() if copy else grad for name, grad in dense.items() if name in wanted
        }

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: mask what the step wrote, then run the updates that are due."""
        owner = self._owner(optimizer)
        if owner is None or not self._in_batch or not owner.stepped():
            return
        assert self.masks is not None
        if not owner.masked:  # a raw optimizer: its gradients are still dense
            self._keep_gradients(owner, copy=False)
        if not (owner.masked and self._gradients_stay_masked and owner.keeps_zeros()):
            self.masks.enforce(owner.stepping, optimizer)
        owner.steps += 1
        ending = self._ending_epoch()
        for run in self._runs:
            if run.owner is owner and run.due(ending, self._total):
                self._update(run)
        owner.forget()
        owner.remember()

    def _skip(self, owner: Owner) -> None:
        """A step that a GradScaler or an empty loss took away: time passes, updates wait."""
        ending = self._ending_epoch()
        for run in self._runs:
            if run.owner is owner:
                run.pending |= run.due(ending, self._total, ahead=1)
        owner.steps += 1
        owner.forget()

    def _update(self, run: Run) -> None:
        assert self.masks is not None
        run.updates += 1
        layers = {layer.name: layer for layer in self._layers(run)}
        try:
            share = run.share or self._begin(run, layers, found=True)
            ready = self._with_gradient(run, list(layers.values()))
            if ready:
                changed = run.method.update(ready, share, run.progress)
                layers |= {layer.name: layer for layer in changed}
        except NonFiniteScoreError as error:
            run.updates -= 1
            run.pending = True
            self._warn_once(
                f"{run.key}: {error} The update waits for the next step with finite scores.",
                about=f"{run.key} waits",
            )
            return
        self.masks.commit(list(layers.values()), self._optimizers)
        run.share = share
        run.pending = False
        run.last_epoch = self._epoch()

    def _with_gradient(self, run: Run, layers: Layers) -> Layers:
        if not needs_gradient(run.method.rule):
            return layers
        for layer in layers:
            if layer.grad is None:
                self._warn_once(
                    f"{run.key}: {layer.name} got no gradient in an update step and is left as "
                    "it is."
                )
        return [layer for layer in layers if layer.grad is not None]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch whose last batch made no real step owes its update to the next step."""
        for run in self._runs:
            if run.steps is not None and run.steps.every == "epoch":
                inside = max(run.steps.start, 1) <= run.owner.steps < run.steps.end
                run.pending |= inside and run.last_epoch != trainer.current_epoch

    # --------------------------------------------- copies of the weights made by others

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback has put in place."""
        self._enforce_weights()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback put in place; say what did not finish."""
        self._enforce_weights()
        for run in self._runs:
            if run.unfinished and run.steps and not _is_dev_run(trainer):
                layers = self._layers(run)
                density = sum(layer.live for layer in layers) / sum(layer.size for layer in layers)
                self._warn_once(
                    f"{run.key}: training ended at step {run.owner.steps}, before update_end "
                    f"(step {run.steps.end}); the density is {density:.4g}, not "
                    f"{run.method.density or 'the final one'}."
                )

    def _enforce_weights(self) -> None:
        if self.masks is not None:
            self.masks.enforce(self.masks)

    # -------------------------------------------------------------------------- state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write zeros off the masks, also where the file holds averaged weights."""
        weights = checkpoint.get("state_dict", {})
        for kept in self.masks or ():
            for name in kept.aliases:
                if name in weights and not kept.is_dense:
                    off = ~kept.mask.to(weights[name].device)
                    weights[name] = weights[name].masked_fill(off, 0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember which model the state belongs to."""
        self._model = weakref.ref(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; empty before masks exist."""
        if self.masks is None or not any(run.share for run in self._runs):
            return self._restored
        return state.save(self.masks, self._assignments, self._owners, self._runs, self._seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only store: the state is compared and applied when training starts."""
        self._restored = dict(state_dict)
        self._rng_is_due = True

    def _compare(self, saved: dict[str, Any]) -> None:
        assert self.masks is not None
        if found := state.differences(
            saved, self.masks, self._assignments, self._owners, self._runs
        ):
            raise MisconfigurationException(
                "The checkpoint was made by another sparse training, and nothing was restored:\n  "
                + "\n  ".join(found)
                + "\nUse the callbacks and the model it was made with, or load only its weights."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Pickles its state, without the Trainer and the model."""
        return {**MaskKeeper().__dict__, "_restored": self.state_dict()}

    # ------------------------------------------------------------------------ helpers

    def _epoch(self) -> int:
        assert self._trainer is not None
        return self._trainer.current_epoch

    def _ending_epoch(self) -> int | None:
        """The epoch of which this is the last batch, or None."""
        assert self._trainer is not None
        return self._trainer.current_epoch if self._trainer.is_last_batch else None

    def _owner(self, optimizer: Optimizer) -> Owner | None:
        return next((o for o in self._owners if o.optimizer is optimizer), None)

    @property
    def _optimizers(self) -> list[Optimizer]:
        assert self._trainer is not None
        return self._trainer.optimizers

    def _warn_once(self, message: str, about: str | None = None) -> None:
        if (about or message) not in self._warned:
            self._warned.add(about or message)
            rank_zero_warn(message)


def _nobody() -> None:
    """Stands for a model that is gone."""


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _refuse(trainer: pl.Trainer) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "Sparse training with LBFGS is not possible: its line search and history move "
                "weights off the mask. Use a first-order optimizer such as AdamW."
            )
    name = type(trainer.strategy).__name__
    if name in _REFUSED_STRATEGIES:
        raise MisconfigurationException(
            f"Sparse training under {name} is not supported, as it splits the weights over "
            'processes. Use Trainer(strategy="ddp").'
        )


def _only_we_touch_gradients(module: pl.LightningModule) -> bool:
    """Whether no hook of the user's stands between our masking and the optimizer."""
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    return all(getattr(type(module), h) is getattr(pl.LightningModule, h) for h in hooks)
