"""ESPN: multiply weights by factors, and drive most factors to zero."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_sparsity.callbacks.learned_mask import LearnedMask, sgd, stay
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper, nobody
from lightning_sparsity.core.layer import Distribution, Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.snapshot import put_back, take
from lightning_sparsity.core.window import Window
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import slot
from lightning_sparsity.structures import Structure

Phase = Literal["warmup", "joint", "tune"]
Missed = Literal["raise", "warn"]

_FACTOR = slot("factor")
_MOMENTUM = 0.9


class _ESPN(LearnedMask):
    """The phases that both endings share: dense training, then joint training of factors."""

    trained: ClassVar[Sequence[str]] = ("factor",)
    derived: ClassVar[bool] = True

    def __init__(
        self,
        *,
        density: float | None,
        alpha: float,
        epsilon: float,
        warmup_epochs: int,
        joint_lr: float | None,
        tune_epochs: int,
        on_missed: Missed,
        distribution: Mapping[str, float] | Distribution | None,
        include: Selection,
        exclude: Selection,
        structure: Structure | None,
        seed: int | None,
    ) -> None:
        self._check_number("alpha", alpha, 0, inside=True)
        self._check("epsilon", epsilon)
        self._check_count("tune_epochs", tune_epochs)
        if joint_lr is not None:
            self._check_number("joint_lr", joint_lr, 0, inside=True)
        if on_missed not in ("raise", "warn"):
            raise ValueError(f'{self._name}(on_missed={on_missed!r}): must be "raise" or "warn".')
        self.alpha = plain(alpha)
        self.epsilon = plain(epsilon)
        self.warmup_epochs = plain(warmup_epochs)
        self.joint_lr = plain(joint_lr)
        self.tune_epochs = plain(tune_epochs)
        self.on_missed = on_missed
        self._forget()
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(_FACTOR),
            initial=stay,
            update=stay,
            update_interval="epoch",
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def _forget(self) -> None:
        self._phase: Phase = "warmup"
        self._tuned_from = 0
        self._snapshot: dict[str, Any] | None = None
        self._model: Callable[[], pl.LightningModule | None] = nobody
        self._trainer: Callable[[], pl.Trainer | None] = nobody

    # ------------------------------------------------------------------------- factors

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Factors of 1, float32, shape of the weight."""
        return {"factor": torch.ones_like(layer.weight, dtype=torch.float32)}

    def effective(self, layer: Layer) -> Tensor:
        """The weight times its factor, which may exceed 1 or be negative."""
        return (layer.weight * layer.slots["factor"]).to(layer.weight.dtype)

    def evaluated(self, layer: Layer) -> Tensor:
        """As :meth:`effective`, without the factors that are nearly 0."""
        return self.effective(layer) * self.support(layer)

    def support(self, layer: Layer) -> Tensor:
        """Where the factor is not nearly 0."""
        return layer.slots["factor"].abs() > self.epsilon

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Of the loss and the penalty ``alpha * |factor|``, whose slope at 0 is 0."""
        assert layer.grad is not None
        grad, factor = layer.grad.float(), layer.slots["factor"]
        slope = (grad * layer.weight).add_(factor.sign(), alpha=self.alpha)
        return {"weight": grad.mul_(factor), "factor": slope}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum and no weight decay, at the rate of the weights."""
        return sgd(groups, momentum=_MOMENTUM)

    def figures(self, layer: Layer) -> Mapping[str, float]:
        """The share of the factors above epsilon, which ends the joint training."""
        above = float((layer.slots["factor"] > self.epsilon).float().mean())
        return {**super().figures(layer), "above_epsilon": above}

    # --------------------------------------------------------------------- the budget

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Give every weight a factor of 1."""
        self._budget.check_found(layers, share)
        if self.density is None:
            raise ValueError(
                f"{self._name}(density=None): the density to arrive at is needed; for 90% sparsity "
                f"pass {self._name}(density=0.1)."
            )
        return super().begin(layers, share)

    def is_done(self, layers: Layers, share: Share) -> bool:
        """Whether no more factors are above epsilon than may live; asked once per epoch."""
        return self._above(layers) <= self._total(layers)

    def bake(self, layers: Layers, share: Share) -> Layers:
        """Keep the weights of largest factor, times the factor.

        Raises:
            MisconfigurationException: If too many factors are above epsilon, and that was to
                be an error.
        """
        if not self.is_done(layers, share):
            self._missed(layers)
        alive = [dataclasses.replace(layer, mask=torch.ones_like(layer.mask)) for layer in layers]
        counts = self._budget.first(alive, share)
        chosen = drop(_FACTOR)(alive, counts, 1.0)
        return [dataclasses.replace(layer, weight=self.effective(layer)) for layer in chosen]

    def _above(self, layers: Layers) -> int:
        return sum(int((layer.slots["factor"] > self.epsilon).sum()) for layer in layers)

    def _total(self, layers: Layers) -> int:
        assert self.density is not None
        return round(self.density * sum(layer.weight.numel() for layer in layers))

    def _missed(self, layers: Layers) -> None:
        message = (
            f"{self._name}(density={self.density}): {self._above(layers)} of "
            f"{sum(layer.weight.numel() for layer in layers)} factors are above epsilon="
            f"{self.epsilon} after the joint training, and {self._total(layers)} may live. Raise "
            f"alpha (here {self.alpha}) or joint_lr, or train longer with Trainer(max_epochs=...)."
        )
        if self.on_missed == "raise":
            raise MisconfigurationException(message)
        rank_zero_warn(f"{message} The largest factors are kept all the same.")

    # ------------------------------------------------------------------------- phases

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lay out the phases over the epochs."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self._model() is not pl_module or self._trainer() is not trainer:
            self._forget()
            self._model, self._trainer = weakref.ref(pl_module), weakref.ref(trainer)
        epochs = trainer.max_epochs or -1
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        needed = self.warmup_epochs + 1 + self.tune_epochs
        if epochs < needed and not dev_run:
            raise MisconfigurationException(
                f"{self._name}: {self.warmup_epochs} dense epochs, joint training of at least one "
                f"and {self.tune_epochs} after it do not fit into Trainer(max_epochs="
                f"{trainer.max_epochs}); give at least {needed}. What is left after both is the "
                "most that the joint training may take; training ends when all is done."
            )
        if trainer.max_steps > 0 and not dev_run:
            raise MisconfigurationException(
                f"{self._name} divides training into phases of whole epochs, which "
                f"Trainer(max_steps={trainer.max_steps}) may cut short; leave max_steps out."
            )
        start, end = self.warmup_epochs / epochs, (epochs - self.tune_epochs) / epochs
        self.window = Window("epoch", min(start, 1.0) if start else 0, end if end > 0 else 1.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the phases can set what they must set, and that one is left."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"{self._name} gives its phases settings of their own, and can do so for one "
                f"optimizer, not for {len(trainer.optimizers)}."
            )
        missing = [name for name in ("joint_lr", "tune_lr") if getattr(self, name, 0.0) is None]
        if missing and not isinstance(trainer.optimizers[0], SGD):
            raise MisconfigurationException(
                f"{self._name}: the learning rates of the paper are those of SGD; with "
                f"{type(trainer.optimizers[0]).__name__} give {' and '.join(missing)}."
            )
        self._stop_in_time(trainer, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Begin a phase at its first batch, and keep its settings against schedulers.

        Not at the start of its epoch, which a run that is resumed there does not see.
        """
        now = self._now(trainer)
        if now != self._phase:
            self._phase = now
            self._enter(now, trainer, pl_module)
        if now != "warmup":
            self._set(now, trainer)

    def _now(self, trainer: pl.Trainer) -> Phase:
        keeper = MaskKeeper.of(trainer)
        runs = [run for run in (keeper.runs if keeper else ()) if id(run.method) == id(self)]
        if any(run.is_over for run in runs):
            return "tune"
        return "joint" if any(run.share is not None for run in runs) else "warmup"

    def _enter(self, phase: Phase, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if phase == "joint":
            self._snapshot = self._keep(trainer, pl_module)
        else:
            self._tuned_from = trainer.current_epoch
            self._end(trainer, pl_module)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What later phases need of the moment before the joint training: the schedules."""
        return {"schedulers": take(trainer, pl_module)["schedulers"]}

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What happens between the joint training and the last phase."""

    def _set(self, phase: Phase, trainer: pl.Trainer) -> None:
        """Settings of the optimizer in a phase; a user's schedule stands still in it."""
        options = self._options(phase, trainer.current_epoch - self._tuned_from)
        if options is None or self._snapshot is None:
            return
        for group in trainer.optimizers[0].param_groups:
            group.update({name: value for name, value in options.items() if name in group})
        for config, state in zip(
            trainer.lr_scheduler_configs, self._snapshot["schedulers"], strict=True
        ):
            config.scheduler.load_state_dict(copy.deepcopy(state))

    def _options(self, phase: Phase, epoch: int) -> dict[str, Any] | None:
        """Settings of the optimizer in an epoch of a phase; None: those of the user."""
        lr = 0.1 if self.joint_lr is None else self.joint_lr
        return {"lr": lr, "momentum": _MOMENTUM, "nesterov": False, "weight_decay": 0.0}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the training when the last phase is over."""
        self._stop_in_time(trainer, trainer.current_epoch + 1)

    def _stop_in_time(self, trainer: pl.Trainer, done: int) -> None:
        if self._phase == "tune" and done - self._tuned_from >= self.tune_epochs:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that training was stopped before the last phase, as by EarlyStopping."""
        keeper = MaskKeeper.of(trainer)
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._phase == "tune" or dev_run or keeper is None or keeper.masks is None:
            return
        runs = [run for run in keeper.runs if id(run.method) == id(self)]
        when = f"in the {self._phase} phase, before the last one"
        self._warn_of_stop(keeper.masks, runs, when)

    # -------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The phase, and what the training goes back to."""
        return {
            "phase": self._phase,
            "tuned_from": self._tuned_from,
            "snapshot": self._snapshot,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._phase = state_dict["phase"]
        self._tuned_from = state_dict["tuned_from"]
        self._snapshot = state_dict["snapshot"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as new: what it goes back to belongs to a model that does not come along."""
        fresh = {"_phase": "warmup", "_tuned_from": 0, "_snapshot": None}
        return {**super().__getstate__(), **fresh, "_model": nobody, "_trainer": nobody}


class ESPNFinetune(_ESPN):
    r"""Extreme sparsity by joint training, then fine-tuning (Cho, Joshi and Hegde, 2020).

    ESPN, arXiv:2006.15741, Algorithm 1. Three phases in one ``fit``:

    1. ``warmup_epochs`` of dense training with the user's settings, or none where the network
       is trained already.
    2. Joint training of the weights and of a factor :math:`c` per weight, at first 1, on
       :math:`L(w \odot c) + \alpha \lVert c \rVert_1`, by SGD with momentum 0.9, one learning
       rate and no weight decay, until at the end of an epoch no more factors are above
       :math:`\epsilon` than may live.
    3. The weights of largest :math:`|c|` in the whole network stay, as :math:`w \odot c`, and
       are trained for ``tune_epochs`` more.

    Training ends with the last phase. ``Trainer(max_epochs=...)`` is the most it may take: the
    joint training gets what the other two leave. While it goes on, the density that monitors
    show is the share of factors not within :math:`\epsilon` of 0, and validation is without
    the weights of all others.

    Departures: the paper keeps :math:`c > \epsilon`; like the authors' program this keeps the
    largest :math:`|c|`, here to the exact count. Nesterov momentum in the paper, plain in the
    program and here. Biases and norm layers stay as the joint training leaves them, as in the
    paper (the program puts norm layers back).

    Args:
        density: Live share of all sparse weights at the end, in (0, 1].
        alpha: :math:`\alpha`, above 0. The program's for LeNet-300-100: 8e-5 at 95 and 98 %
            sparsity, 1.5e-4 at 99 %; up to 6e-4 at extremes.
        epsilon: :math:`\epsilon`, in [0, 1].
        warmup_epochs: Dense epochs before the joint training, at least 0.
        joint_lr: Learning rate of the joint training; None: 0.1, with SGD only. A factor that
            the loss does not hold falls by ``10 * alpha * joint_lr`` per step.
        tune_epochs: Epochs after it, at least 1.
        tune_lr: Learning rate after it; None: 1e-3, with SGD only.
        tune_weight_decay: Weight decay after it, at least 0.
        tune_lr_step: Epochs after which that learning rate falls tenfold, again and again.
        on_missed: What happens if the joint training ends with too many factors: "raise", or
            "warn" and keep the largest.
        distribution: How the density is split over layers, or densities by name pattern;
            default: all factors are ranked together.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is; default single weights.
        seed: Unused by factors; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=400, callbacks=[ESPNFinetune(density=0.02, warmup_epochs=160)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        alpha: float = 1e-4,
        epsilon: float = 1e-2,
        warmup_epochs: int = 0,
        joint_lr: float | None = None,
        tune_epochs: int = 50,
        tune_lr: float | None = None,
        tune_weight_decay: float = 5e-4,
        tune_lr_step: int = 30,
        on_missed: Missed = "raise",
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("warmup_epochs", warmup_epochs, least=0)
        self._check_count("tune_lr_step", tune_lr_step)
        self._check("tune_weight_decay", tune_weight_decay)
        if tune_lr is not None:
            self._check_number("tune_lr", tune_lr, 0, inside=True)
        self.tune_lr = plain(tune_lr)
        self.tune_weight_decay = plain(tune_weight_decay)
        self.tune_lr_step = plain(tune_lr_step)
        super().__init__(
            density=density,
            alpha=alpha,
            epsilon=epsilon,
            warmup_epochs=warmup_epochs,
            joint_lr=joint_lr,
            tune_epochs=tune_epochs,
            on_missed=on_missed,
            distribution=distribution,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what sets the learning rate of the last phase too."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise MisconfigurationException(
                "ESPNFinetune and StochasticWeightAveraging both set the learning rate of the last "
                "epochs; use EMAWeightAveraging, or ESPNRewind, whose last phase has your settings."
            )
        super().on_train_start(trainer, pl_module)

    def _options(self, phase: Phase, epoch: int) -> dict[str, Any] | None:
        if phase == "joint":
            return super()._options(phase, epoch)
        lr = 1e-3 if self.tune_lr is None else self.tune_lr
        return {
            "lr": lr * 0.1 ** (epoch // self.tune_lr_step),
            "momentum": _MOMENTUM,
            "nesterov": False,
            "weight_decay": self.tune_weight_decay,
        }


class ESPNRewind(_ESPN):
    r"""Extreme sparsity by joint training, then rewinding (Cho, Joshi and Hegde, 2020).

    ESPN, arXiv:2006.15741, Algorithm 2. As :class:`ESPNFinetune`, with another ending: only the
    mask of the joint training is kept. Weights, biases, buffers, learning rate and its
    schedule go back to where they were after ``rewind_to`` epochs, the weights off the mask
    are zero, and ``tune_epochs`` more follow with the user's settings. Optimizer state begins
    empty in every phase.

    Training ends with the last phase. ``Trainer(max_epochs=...)`` is the most it may take; a
    schedule of the learning rate should span ``rewind_to + tune_epochs``. It stands still
    during the joint training.

    Args:
        density: Live share of all sparse weights at the end, in (0, 1].
        rewind_to: Dense epochs before the joint training, at least 0; the paper has 1 on MNIST
            and 10 on CIFAR and ImageNet.
        tune_epochs: Epochs after it, at least 1: those of a usual training, less ``rewind_to``.
        alpha: :math:`\alpha`, above 0; see :class:`ESPNFinetune`.
        epsilon: :math:`\epsilon`, in [0, 1].
        joint_lr: Learning rate of the joint training; None: 0.1, with SGD only.
        on_missed: What happens if the joint training ends with too many factors: "raise", or
            "warn" and keep the largest.
        distribution: How the density is split over layers, or densities by name pattern;
            default: all factors are ranked together.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is; default single weights.
        seed: Unused by factors; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=460, callbacks=[ESPNRewind(0.02, rewind_to=1, tune_epochs=159)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        rewind_to: int = 1,
        tune_epochs: int = 159,
        alpha: float = 1e-4,
        epsilon: float = 1e-2,
        joint_lr: float | None = None,
        on_missed: Missed = "raise",
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("rewind_to", rewind_to, least=0)
        self.rewind_to = plain(rewind_to)
        super().__init__(
            density=density,
            alpha=alpha,
            epsilon=epsilon,
            warmup_epochs=rewind_to,
            joint_lr=joint_lr,
            tune_epochs=tune_epochs,
            on_missed=on_missed,
            distribution=distribution,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return take(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._snapshot is not None
        put_back(self._snapshot, trainer, pl_module)
        self._snapshot = None
        keeper = MaskKeeper.of(trainer)
        if keeper is not None and keeper.masks is not None:
            keeper.masks.enforce(keeper.masks)

    def _options(self, phase: Phase, epoch: int) -> dict[str, Any] | None:
        return super()._options(phase, epoch) if phase == "joint" else None
