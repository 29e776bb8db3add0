"""MaskKeeper: the one owner of masks in training. Enforces, updates, saves and restores."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.core.layer import Layers
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Method, Share
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.plan import Assignment, assign, check_windows, owner_of
from lightning_sparsity.core.randomness import default_seed, generator, rng_state, set_rng_state
from lightning_sparsity.core.window import Steps
from lightning_sparsity.ops.packing import pack, unpack
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.scores import needs_gradient

# With these optimizers a weight whose value, gradient and state are zero stays zero, so
# masking the gradient is enough between updates. Every other one is masked after each step.
_ZERO_STAYS_ZERO = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
)
_REFUSED_STRATEGIES = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


@dataclass(eq=False)
class _Owner:
    """The sparse parameters that one optimizer steps, and its count of real steps."""

    optimizer: Optimizer | None
    parameters: list[SparseParameter]
    steps: int = 0
    masked: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """One method at work on the parameters of one optimizer."""

    key: str
    method: Method
    owner: _Owner
    names: list[str]
    steps: Steps | None = None
    share: Share | None = None
    updates: int = 0
    pending: bool = False
    last_epoch: int = -1

    def due(self, ending: int | None, total: float, ahead: int = 0) -> bool:
        """Whether an update follows the owner's latest real step, or one ``ahead``.

        Args:
            ending: The epoch of which this is the last batch, if it is.
            total: Optimizer steps in the whole training.
            ahead: Steps that are still to come.
        """
        step = self.owner.steps + ahead
        if self.method.rule is None or self.steps is None or self.owner.optimizer is None:
            return False
        if not self.method.ramps and step >= total:
            return False
        last_of_epoch = ending is not None and ending != self.last_epoch
        return self.pending or self.steps.due(step, last_of_epoch)


class MaskKeeper(Callback):
    """Added to the Trainer by the first sparsity callback; one per Trainer, the last of ours.

    It masks gradients before the optimizer steps, runs the due rules right after a real
    step, commits what they return, and saves all state under plain parameter names.

    Attributes:
        masks: Masks of the model being fitted; None outside ``fit``.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._assignments: list[Assignment] = []
        self._owners: list[_Owner] = []
        self._runs: list[_Run] = []
        self._handles: list[Any] = []
        self._restored: dict[str, Any] = {}
        self._model: Callable[[], pl.LightningModule | None] = lambda: None
        self._trainer: pl.Trainer | None = None
        self._seed = 0
        self._total = float("inf")
        self._in_batch = False
        self._gradients_stay_masked = False
        self._warned: set[str] = set()

    @classmethod
    def of(cls, trainer: pl.Trainer) -> MaskKeeper | None:
        """The keeper of a Trainer, if a sparsity callback has added one."""
        return next((c for c in trainer.callbacks if isinstance(c, cls)), None)

    @classmethod
    def ensure(cls, trainer: pl.Trainer) -> MaskKeeper:
        """The keeper of a Trainer, put before its checkpoint callbacks if it has none."""
        keeper = cls.of(trainer)
        if keeper is None:
            keeper = cls()
            saving = [isinstance(c, Checkpoint) for c in trainer.callbacks]
            place = saving.index(True) if any(saving) else len(saving)
            trainer.callbacks.insert(place, keeper)
        return keeper

    # ------------------------------------------------------------------ start and end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters, group them by optimizer, register the step hooks."""
        self._release()
        if self._model() is not pl_module:
            self._restored = {}
        self._model = weakref.ref(pl_module)
        self._trainer = trainer
        _refuse(trainer)
        if rng := self._restored.pop("rng", None):
            set_rng_state(rng)
        self._assignments, parameters = assign(pl_module, trainer.callbacks)
        self._owners = _by_optimizer(parameters, trainer.optimizers)
        self._runs = [
            _Run(a.key, a.method, owner, names)
            for a in self._assignments
            for owner in self._owners
            if (names := [p.name for p in owner.parameters if p.name in a.names])
        ]
        self._gradients_stay_masked = _only_we_touch_gradients(pl_module)
        for owner in self._owners:
            if owner.optimizer is not None:
                hook = owner.optimizer.register_step_post_hook(self._after_step)
                self._handles.append(hook)
        self.masks = Masks(parameters)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the masks, or make them, and set the weights to zero off them."""
        assert self.masks is not None
        self._resolve_windows(trainer)
        if self._restored:
            self._apply(self._restored)
            self._restored = {}
        else:
            self._seed = int(trainer.strategy.broadcast(default_seed()))
            self._begin_all()
        for owner in self._owners:
            self.masks.enforce(owner.parameters, owner.optimizer)
        for callback in trainer.callbacks:
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
            self._restored = {k: v for k, v in self.state_dict().items() if k != "rng"}
        for handle in self._handles:
            handle.remove()
        self._handles, self._owners, self._runs, self._assignments = [], [], [], []
        self._trainer = self.masks = None
        self._in_batch = False
        self._warned = set()

    def _resolve_windows(self, trainer: pl.Trainer) -> None:
        total = trainer.estimated_stepping_batches
        self._total = float(total) if total > 0 else float("inf")
        windows = []
        for a in self._assignments:
            if a.method.rule is None:
                continue
            try:
                steps = a.method.window.resolve(self._total)
            except ValueError as error:
                raise MisconfigurationException(f"{a.key}: {error}") from None
            if not (steps.opens(self._total) or trainer.fast_dev_run):
                rank_zero_warn(
                    f"{a.key} makes no update: training has {self._total:g} optimizer steps, and "
                    f"its window is steps {steps.start} to {steps.end}, every {steps.every}. "
                    "Lower update_start or update_interval."
                )
            windows.append((a.key, steps, frozenset(a.names)))
            for run in self._runs:
                if run.key == a.key:
                    run.steps = steps
        check_windows(windows)

    def _begin_all(self) -> None:
        """Begin every initial method, then the first updater on each parameter."""
        made: set[str] = set()
        taken: set[str] = set()
        for a in self._assignments:
            names = set(a.names)
            if a.method.role == "updater":
                if names & taken:
                    continue
                taken |= names
            if names & made and names - made:
                raise MisconfigurationException(
                    f"{a.key}: an earlier callback made masks for {min(names & made)} but none for "
                    f"{min(names - made)}. Give the two sets of parameters to two callbacks, with "
                    "include= and exclude=."
                )
            self._begin([run for run in self._runs if run.key == a.key], found=names <= made)
            made |= names

    def _begin(self, runs: Sequence[_Run], found: bool) -> None:
        assert self.masks is not None
        groups = [self._layers(run) for run in runs]
        sizes = tuple(sum(layer.size for layer in group) for group in groups)
        begun = runs[0].method.begin(groups, found)
        for index, (run, layers) in enumerate(zip(runs, begun, strict=True)):
            self.masks.commit(layers, run.owner.optimizer)
            start = {layer.name: layer.live for layer in layers}
            run.share = Share(sizes, index, start, found)

    def _layers(self, run: _Run) -> Layers:
        assert self.masks is not None
        seed = self._seed if run.method.seed is None else run.method.seed
        return [
            self.masks[name].layer(
                grad=run.owner.kept.get(name),
                generator=generator(seed, run.key, name, run.updates),
            )
            for name in run.names
        ]

    # ---------------------------------------------------------------------- each step

    def on_train_batch_start(self, *args: Any) -> None:
        """Optimizer steps count as training from here."""
        self._in_batch = True

    def on_train_batch_end(self, *args: Any) -> None:
        """Optimizer steps outside a batch are not training."""
        self._in_batch = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read what the methods need from the dense gradients, then mask them."""
        assert self.masks is not None
        owner = self._owner(optimizer)
        if owner is not None:
            self._keep_gradients(owner, copy=True)
            self.masks.enforce_gradients(owner.parameters)
            owner.masked = True

    def _keep_gradients(self, owner: _Owner, copy: bool) -> None:
        assert self.masks is not None
        ending = self._ending_epoch()
        owner.kept.clear()
        for run in self._runs:
            if run.owner is not owner:
                continue
            dense = {name: self.masks[name].parameter.grad for name in run.names}
            due = run.due(ending, self._total, ahead=1)
            if run.method.observe is not None:
                owner.kept.update({k: g.detach() for k, g in dense.items() if g is not None})
                for layer in self._layers(run):
                    if layer.grad is not None:
                        self.masks[layer.name].slots.update(run.method.observe(layer))
                owner.kept.clear()
            if due and needs_gradient(run.method.rule):
                for name, grad in dense.items():
                    if grad is not None:
                        owner.kept[name] = grad.detach().clone() if copy else grad.detach()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: mask what the step wrote, then run the updates that are due."""
        owner = self._owner(optimizer)
        if owner is None or not self._in_batch or not _stepped(owner):
            return
        assert self.masks is not None
        if not owner.masked:  # a raw optimizer: its gradients are still dense
            self._keep_gradients(owner, copy=False)
        zero_stays = owner.masked and self._gradients_stay_masked
        if not (zero_stays and type(optimizer) in _ZERO_STAYS_ZERO and not _pre_hooks(optimizer)):
            self.masks.enforce(owner.parameters, optimizer)
        owner.steps += 1
        owner.masked = False
        ending = self._ending_epoch()
        for run in self._runs:
            if run.owner is owner and run.due(ending, self._total):
                self._update(run)
        owner.kept.clear()

    def _update(self, run: _Run) -> None:
        assert self.masks is not None and run.steps is not None
        try:
            if run.share is None:
                self._begin([run], found=True)
            assert run.share is not None
            run.updates += 1
            layers = self._layers(run)
            if needs_gradient(run.method.rule):
                layers = self._with_gradient(run, layers)
            progress = run.steps.progress(run.owner.steps)
            changed = run.method.update(layers, run.share, progress) if layers else []
        except NonFiniteScoreError as error:
            run.updates -= run.share is not None
            run.pending = True
            self._warn_once(
                f"{run.key}: {error} The update waits for the next step with finite scores."
            )
            return
        self.masks.commit(changed, run.owner.optimizer)
        run.pending = False
        run.last_epoch = self._epoch()

    def _with_gradient(self, run: _Run, layers: Layers) -> Layers:
        there = [layer for layer in layers if layer.grad is not None]
        if len(there) < len(layers):
            missing = next(layer.name for layer in layers if layer.grad is None)
            self._warn_once(
                f"{run.key}: {missing} got no gradient in an update step and is left as it is."
            )
        return there

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch whose last batch made no real step owes its update to the next step."""
        for run in self._runs:
            if run.steps is None or run.steps.every != "epoch":
                continue
            inside = max(run.steps.start, 1) <= run.owner.steps < run.steps.end
            run.pending |= inside and run.last_epoch != trainer.current_epoch

    # --------------------------------------------- copies of the weights made by others

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback has put in place."""
        self._enforce_weights()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask weights that an averaging callback has put in place."""
        self._enforce_weights()

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
        """Masks packed to bits, slots, counters: tensors and plain Python only."""
        if self.masks is None or not any(run.share for run in self._runs):
            return self._restored
        return {
            "version": 1,
            "seed": self._seed,
            "rng": rng_state(),
            "steps": [owner.steps for owner in self._owners],
            "methods": [_describe(a) for a in self._assignments],
            "parameters": {
                p.name: {
                    "shape": tuple(p.parameter.shape),
                    "structure": repr(p.structure),
                    "mask": pack(p.mask).cpu(),
                    "slots": {key: tensor.cpu() for key, tensor in p.slots.items()},
                }
                for p in self.masks
            },
            "runs": [_save_run(run) for run in self._runs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only store: the state is compared and applied when training starts."""
        self._restored = dict(state_dict)

    def _apply(self, state: dict[str, Any]) -> None:
        assert self.masks is not None
        if differences := self._differences(state):
            raise MisconfigurationException(
                "The checkpoint was made by another sparse training, and nothing was restored:\n  "
                + "\n  ".join(differences)
                + "\nUse the callbacks and the model it was made with, or load only its weights."
            )
        self._seed = state["seed"]
        for owner, steps in zip(self._owners, state["steps"], strict=True):
            owner.steps = steps
        for kept in self.masks:
            saved = state["parameters"][kept.name]
            device = kept.parameter.device
            kept.set_mask(unpack(saved["mask"], saved["shape"]).to(device))
            kept.slots = {key: tensor.to(device) for key, tensor in saved["slots"].items()}
        for run, saved in zip(self._runs, state["runs"], strict=True):
            _load_run(run, saved)

    def _differences(self, state: dict[str, Any]) -> list[str]:
        assert self.masks is not None
        now = {p.name: (tuple(p.parameter.shape), repr(p.structure)) for p in self.masks}
        then = {
            name: (tuple(saved["shape"]), saved["structure"])
            for name, saved in state["parameters"].items()
        }
        found = [
            f"{name}: {then.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} now"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        methods = [_describe(a) for a in self._assignments]
        if methods != state["methods"]:
            found.append(f"callbacks: {state['methods']} in the checkpoint, {methods} now")
        if len(self._owners) != len(state["steps"]) or len(self._runs) != len(state["runs"]):
            found.append(f"optimizers: {len(state['steps'])} then, {len(self._owners)} now")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without the Trainer and the model."""
        return {**MaskKeeper().__dict__, "_model": None, "_restored": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Back from a pickle."""
        self.__dict__.update(state, _model=lambda: None)

    # ------------------------------------------------------------------------ helpers

    def _epoch(self) -> int:
        assert self._trainer is not None
        return self._trainer.current_epoch

    def _ending_epoch(self) -> int | None:
        """The epoch of which this is the last batch, or None."""
        assert self._trainer is not None
        return self._trainer.current_epoch if self._trainer.is_last_batch else None

    def _owner(self, optimizer: Optimizer) -> _Owner | None:
        return next((o for o in self._owners if o.optimizer is optimizer), None)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


def _by_optimizer(
    parameters: Sequence[SparseParameter], optimizers: Sequence[Optimizer]
) -> list[_Owner]:
    """One owner per optimizer that steps a sparse parameter, and one for those of none."""
    owned: dict[int | None, list[SparseParameter]] = {}
    for parameter in parameters:
        owned.setdefault(owner_of(parameter, optimizers), []).append(parameter)
    return [
        _Owner(None if index is None else optimizers[index], members)
        for index, members in sorted(owned.items(), key=lambda i: (i[0] is None, i[0]))
    ]


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


def _pre_hooks(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_optimizer_step_pre_hooks", None))


def _stepped(owner: _Owner) -> bool:
    """Whether a step that ended really changed the weights."""
    found_inf = getattr(owner.optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and bool(found_inf.item()):
        return False
    return any(p.parameter.grad is not None for p in owner.parameters)


def _describe(assignment: Assignment) -> dict[str, Any]:
    density = assignment.method.density
    return {"name": assignment.key, "density": density if density is None else float(density)}


def _save_run(run: _Run) -> dict[str, Any]:
    share = run.share
    return {
        "updates": run.updates,
        "pending": run.pending,
        "last_epoch": run.last_epoch,
        "share": share
        and {
            "sizes": share.sizes,
            "index": share.index,
            "start": dict(share.start),
            "found": share.found,
        },
    }


def _load_run(run: _Run, saved: dict[str, Any]) -> None:
    run.updates = saved["updates"]
    run.pending = saved["pending"]
    run.last_epoch = saved["last_epoch"]
    run.share = saved["share"] and Share(**saved["share"])
