"""MaskKeeper: the engine at work inside a Trainer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_sparsity.core.engine import Engine
from lightning_sparsity.core.filters import candidates, plain_name, select
from lightning_sparsity.core.intact import Checked
from lightning_sparsity.core.layer import errors_of
from lightning_sparsity.core.learner import LearnedMethod
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.plan import Assignment, assign
from lightning_sparsity.core.randomness import default_seed, set_rng_state
from lightning_sparsity.core.run import Run
from lightning_sparsity.core.shards import local, reshard
from lightning_sparsity.core.state import mask_weights
from lightning_sparsity.core.storage import IGNORED_BY_DDP, Storage, StoragePolicy
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.ops.masked import apply_gate

_REFUSED_STRATEGIES = {"FSDPStrategy", "DeepSpeedStrategy"}


class MaskKeeper(Callback):
    """Added to the Trainer by the first sparsity callback; one per Trainer, the last of ours.

    It alone masks gradients, registers hooks on optimizers, saves and restores: all state
    is in the checkpoint under plain parameter names. When masks are ready, before the first
    step, it calls ``on_masks_ready(trainer, pl_module, keeper)`` on every callback that has it.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._restored: dict[str, Any] = {}
        self._rng_is_due = False
        self._model: Callable[[], pl.LightningModule | None] = nobody
        self._changes = 0
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
        Checked.add(trainer)
        return keeper

    @property
    def masks(self) -> Masks | None:
        """Masks of the model being fitted; None outside ``fit``."""
        return None if self._engine is None else self._engine.masks

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every method at work, once per optimizer; read only."""
        return () if self._engine is None else tuple(self._engine.runs)

    def update(self, method: Callback) -> None:
        """Run an update of a method whose window is :class:`~.core.window.Asked`.

        Args:
            method: The callback, which may ask before a batch, in ``on_train_batch_start``.

        Raises:
            NonFiniteScoreError: If a score is not finite; the masks of that optimizer stay.
        """
        if (model := self._model()) is not None:
            reshard(model)  # the validation was a pass
        self._running.update(method)

    @property
    def seed(self) -> int:
        """Of random choices in this training, the same on every process."""
        return self._running.seed

    # ------------------------------------------------------------------ start and end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters, group them by optimizer, register the step hooks."""
        self._release()
        if self._model() is not pl_module:
            self._restored = {}
        self._model = weakref.ref(pl_module)
        _refuse(trainer)
        assignments, parameters = assign(pl_module, _callbacks(trainer))
        _refuse_shards(assignments, parameters)
        self._engine = Engine(
            assignments,
            parameters,
            optimizers=lambda: trainer.optimizers,
            hook=self._after_step,
            trusted=_only_we_touch_gradients(pl_module),
            warn=self._warn_once,
            modules=list(pl_module.modules()),
            loss_scale=partial(_loss_scale, trainer),
            is_manual=not pl_module.automatic_optimization,
            averages=partial(_averages, trainer),
            record_scale=partial(_record_scale, trainer),
        )
        self._prepare_storage(trainer, pl_module)
        if self._restored:
            self._engine.compare(self._restored)
            if self._rng_is_due:
                set_rng_state(self._restored["rng"])
                _forget_early_data(trainer)
        self._rng_is_due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the masks, or make them, and set the weights to zero off them."""
        engine = self._running
        reshard(pl_module)  # the sanity check was a pass
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        engine.open_windows(
            trainer.estimated_stepping_batches, trainer.max_epochs or -1, strict=not dev_run
        )
        storage = self._restored.get("storage", {})
        if self._restored:
            engine.restore(self._restored)
            self._put_averages_back(trainer)
            self._restored = {}
        else:  # steps lie behind where a dense training goes on
            steps = trainer.global_step // max(len(trainer.optimizers), 1)
            seed = int(trainer.strategy.broadcast(default_seed()))
            view = ModelView(trainer, pl_module, seed=seed)
            engine.begin(seed, steps, strict=not dev_run, view=view)
            if not dev_run:
                engine.warn_of_idle_methods()
        engine.enforce()
        self._mask_averages(trainer)
        if engine.storage is not None:
            engine.storage.start(storage)
        for callback in _callbacks(trainer):
            if callable(announce := getattr(callback, "on_masks_ready", None)):
                announce(trainer, pl_module, self)

    def _prepare_storage(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the callback that compresses weights."""
        policies = [c for c in _callbacks(trainer) if isinstance(c, StoragePolicy)]
        if not policies:
            return
        pool = candidates(pl_module)
        with errors_of("SparseCompute"):
            chosen = select(pool, policies[0].include, policies[0].exclude)
        self._running.storage = Storage(
            policies[0],
            self._running.masks,
            modules=list(pl_module.modules()),
            optimizers=lambda: trainer.optimizers,
            chosen={c.name for c in chosen},
            broadcast=trainer.strategy.broadcast,
            is_busy=self._running.is_learned,
        )
        self._running.storage.share(getattr(pl_module, IGNORED_BY_DDP, ()))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hand everything back. The state stays, for another ``fit`` of the same model."""
        self._release()
        Checked.remove(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Hand everything back; what lies in parts is lost, as other processes may be elsewhere."""
        if self._engine is not None and any(p.is_sharded for p in self._engine.masks):
            self._engine.has_begun, self._restored = False, {}
        self._release()
        Checked.remove(trainer)

    def _release(self) -> None:
        self._restored = self.state_dict()
        if self._engine is not None:
            self._engine.release()
        self._engine = None
        self._warned = set()

    @property
    def _running(self) -> Engine:
        assert self._engine is not None, "only inside fit"
        return self._engine

    # ---------------------------------------------------------------------- each step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Optimizer steps count as training from here."""
        last = trainer.is_last_batch
        self._running.start_batch(trainer.current_epoch, last, last or _nears_last_step(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read what the methods need from the dense gradients, then mask them."""
        if self._running.storage is not None:
            self._running.storage.average(optimizer)
        self._running.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: mask what the step wrote, then run the updates that are due."""
        self._running.after_step(optimizer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Optimizer steps outside a batch are not training."""
        self._running.end_batch()
        if self._running.masks.changes != self._changes:
            self._mask_averages(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Updates that the epoch owes wait for the next step."""
        self._running.end_epoch(trainer.current_epoch)

    # --------------------------------------------- copies of the weights made by others

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback has put in place."""
        self._enforce_weights()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See the weights that an averaging callback has put back."""
        self._enforce_weights()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback put in place; say what did not finish."""
        self._enforce_weights()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._running.warn_of_unfinished_ramps()
            self._running.warn_of_dead_layers()
        if self._running.storage is not None:
            self._running.storage.finish()

    def _mask_averages(self, trainer: pl.Trainer) -> None:
        """Mask the running averages of averaging callbacks, when the masks have changed.

        What an average kept at a dropped position would come back with the weight, and
        would be missing in a resumed run.
        """
        masks = self._running.masks
        self._changes = masks.changes
        for weights in _averages(trainer):
            sparse = [p for p in masks if p.name in weights and not p.is_latent and not p.is_dense]
            apply_gate([local(weights[p.name]) for p in sparse], [p.gate for p in sparse])

    @torch.no_grad()
    def _put_averages_back(self, trainer: pl.Trainer) -> None:
        """Give averages of latent weights, of which a file shows effective ones, their values."""
        for weights in _averages(trainer):
            for name, latent in self._restored.get("averages", {}).items():
                if name in weights:
                    weights[name].copy_(latent)

    def _enforce_weights(self) -> None:
        model = self._model()
        if self._engine is not None and model is not None:
            reshard(model)
            self._engine.enforce_weights()

    # -------------------------------------------------------------------------- state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write zeros off the masks, also where the file holds averaged weights."""
        if self._model() is not pl_module:
            return
        weights = checkpoint.get("state_dict", {})
        if self._engine is not None and self._engine.has_begun:
            averaged = "current_model_state" in checkpoint
            if averaged:
                mine = checkpoint["callbacks"][self.state_key]
                mine["averages"] = self._engine.latent_among(weights)
            self._engine.mask_weights(weights, averaged)
        else:
            mask_weights(self.state_dict(), weights)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember which model the state belongs to."""
        self._model = weakref.ref(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; empty before masks exist."""
        if self._engine is None or not self._engine.has_begun:
            return self._restored
        return self._engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only store: the state is compared and applied when training starts.

        In mid-training it is applied: a search for a learning rate puts back what it found.
        """
        if self._engine is not None and self._engine.has_begun:
            storage = self._engine.storage
            if storage is not None:
                storage.release()
            self._engine.restore(state_dict)
            if storage is not None:
                storage.start(state_dict.get("storage", {}))
            return
        self._restored = dict(state_dict)
        self._rng_is_due = True

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as new: what it keeps belongs to a model that does not come along."""
        return MaskKeeper().__dict__

    # ------------------------------------------------------------------------ helpers

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            rank_zero_warn(message)


def nobody() -> None:
    """Stands for a model that is gone."""


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _averages(trainer: pl.Trainer) -> list[dict[str, torch.nn.Parameter]]:
    """The running averages that callbacks keep of the model, by plain name."""
    models = [getattr(callback, "_average_model", None) for callback in _callbacks(trainer)]
    return [
        {plain_name(name): p for name, p in getattr(m, "module", m).named_parameters()}
        for m in models
        if isinstance(m, torch.nn.Module)
    ]


def _nears_last_step(trainer: pl.Trainer) -> bool:
    """Whether the batch is accumulated for the last step of the epoch, where that is known."""
    batches, together = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not math.isfinite(batches):
        return False
    return trainer.fit_loop.batch_idx >= (int(batches) - 1) // together * together


def _forget_early_data(trainer: pl.Trainer) -> None:
    """Have the training data set up again, now that the random numbers are restored.

    A model that asks for ``estimated_stepping_batches`` in ``configure_optimizers`` sets its
    loader up before anything is restored: shuffling would begin elsewhere, and the state of a
    stateful loader would be lost.
    """
    if getattr(trainer.fit_loop, "_combined_loader", None) is not None:
        trainer.fit_loop._combined_loader = None


def _refuse(trainer: pl.Trainer) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "Sparse training with LBFGS is not possible: its line search and history move "
                "weights off the mask. Use a first-order optimizer such as AdamW."
            )
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    for name in names & _REFUSED_STRATEGIES:
        raise MisconfigurationException(
            f"Sparse training under {name} is not supported, as it flattens the weights. Use "
            'Trainer(strategy="ddp"), or ModelParallelStrategy (FSDP2) for large models.'
        )


def _refuse_shards(
    assignments: Sequence[Assignment], parameters: Sequence[SparseParameter]
) -> None:
    """Refuse methods that cannot work on weights which lie in parts on several processes."""
    sharded = {kept.name for kept in parameters if kept.is_sharded}
    across = {kept.name for kept in parameters if kept.has_parts_of_activations}
    for a in assignments:
        if a.method.statistics and (there := across & set(a.names)):
            raise MisconfigurationException(
                f"{a.key} looks at activations, and under tensor parallelism every process has "
                f"some of the units of {min(there)}. Use FSDP2 alone, "
                'Trainer(strategy="ddp"), or leave the layer out with exclude=.'
            )
        mine = sharded & set(a.names)
        if mine and isinstance(a.method, LearnedMethod):
            raise MisconfigurationException(
                f"{a.key} learns masks of whole weights, and {min(mine)} lies in parts on several "
                'processes. Use Trainer(strategy="ddp"), or a method whose weights are zero off '
                "the mask, such as GMP."
            )


def _loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The factor that a GradScaler leaves in the gradients: fused optimizers take it out."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return _record_scale(trainer) if fused else 1.0


def _record_scale(trainer: pl.Trainer) -> float:
    """The factor that a GradScaler leaves in the gradients of activations."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _only_we_touch_gradients(module: pl.LightningModule) -> bool:
    """Whether no hook of the user's stands between our masking and the optimizer."""
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    return all(getattr(type(module), h) is getattr(pl.LightningModule, h) for h in hooks)
