"""OptG: accumulate the gradients of a mask, and renew the mask once per epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import LearnedMask, sgd
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Schedule
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval, Window
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import slot
from lightning_sparsity.structures import Structure


class OptG(LearnedMask):
    r"""Optimizing gradient-driven criteria (Zhang et al., 2022, arXiv:2201.12826).

    Every weight has a score, at first 0, that is trained as if it were its mask: the gradient
    of the loss by the mask, :math:`\frac{\partial L}{\partial m} = \frac{\partial L}{\partial
    (w \odot m)} w`, reaches the score unchanged (straight-through, Eq. 7 and 10), for live and
    pruned weights alike. SGD on the scores accumulates these gradients. The mask is fixed
    within an epoch; between epochs it becomes the weights of largest score of the whole
    network (Eq. 6), at the sparsity :math:`P_k = P / (1 + e^{-\alpha(k - \tau/2)})` of epoch
    :math:`k` of :math:`\tau` (Eq. 16). Scores learn at
    :math:`\eta_k / (1 + e^{-\alpha(k - \tau/2)})`, :math:`\eta_k` being the learning rate of the
    weights (Eq. 17).

    Pruned weights keep their values: weight decay and momentum still move them, the loss does
    not, and they may come back. Masks that an earlier callback made are never left.

    Departures from the authors' program: epochs count from 0 as there, and the first is dense;
    the density is exact, where the program keeps ties; the last epoch has the density asked
    for (Eq. 16 alone ends below it in short trainings); ``alpha=1`` is what its published
    settings give, 0.5 what the paper says.

    Args:
        density: Live share of all sparse weights in the last epoch, in (0, 1].
        alpha: :math:`\alpha`, per epoch, above 0; "auto": 80 over the number of epochs, the
            paper's 0.5 over 160 epochs in a training of any length.
        momentum: Of the scores' SGD, in [0, 1).
        distribution: How the density is split over layers, or densities by name pattern;
            default: all scores are ranked together.
        update_interval: "epoch", ``epochs(n)`` or optimizer steps between masks.
        update_start: First step (int) or fraction of training (float); before it scores are
            not trained. From 0 or not, Eq. 16 goes from its first to its last epoch in the
            window.
        update_end: Last change of the mask, from which on the weights are trained as they are;
            None: the start of the last epoch.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Unused by scores; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=160, callbacks=[OptG(density=0.1), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("score",)

    def __init__(
        self,
        density: float | None = None,
        *,
        alpha: float | Literal["auto"] = 0.5,
        momentum: float = 0.9,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = "epoch",
        update_start: int | float = 0,
        update_end: int | float | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_alpha(alpha)
        self._check_momentum(momentum)
        self.alpha = plain(alpha)
        self.momentum = plain(momentum)
        self.update_end = plain(update_end)
        self._steepness, self._epochs = 80.0, 0
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(slot("score", signed=True)),
            initial=drop(slot("score", signed=True)),
            update=drop(slot("score", signed=True)),
            ramp=self._sparsify,
            update_interval=update_interval,
            update_start=update_start,
            update_end=1.0 if update_end is None else update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the epochs, for the schedule and the end of the window."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        if epochs is None and (self.update_end is None or self.alpha != "auto"):
            raise MisconfigurationException(
                f"OptG(alpha={self.alpha!r}, update_end={self.update_end!r}): the number of epochs "
                'is not known. Set Trainer(max_epochs=...), or give alpha="auto" and update_end=.'
            )
        if self.update_end is None and epochs is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            start, end = self.window.start, 1 - 1 / epochs if epochs > 1 else 0.5
            if isinstance(start, float) and start >= end:
                raise MisconfigurationException(
                    f"OptG(update_start={start}): the masks are final from {end:.4g} of training "
                    "on, where the last epoch begins. Begin earlier, or give update_end=."
                )
            self.window = Window(self.window.every, start, end)
        self._epochs = epochs or 0
        self._steepness = 80.0 if self.alpha == "auto" else float(self.alpha) * self._epochs

    # ------------------------------------------------------------------------- schedules

    def _sparsify(self, start: float, end: float) -> Schedule:
        """Eq. 16, as a schedule of the density over the window; arrives at its end."""

        def density(progress: float) -> float:
            return end if progress >= 1 else start + (end - start) * self._risen(progress)

        return density

    def learning_rate(self, lr: float, progress: float) -> float:
        """Eq. 17: constant within an epoch, where the number of epochs is known."""
        done = progress * self._span * self._epochs  # the step just made is inside an epoch
        epoch = math.ceil(round(done, 9)) - 1
        return lr * self._risen(epoch / self._epochs / self._span if self._epochs else progress)

    def _risen(self, progress: float) -> float:
        """The share of the final sparsity that Eq. 16 asks for, ``progress`` of the window."""
        return 1 / (1 + math.exp(-self._steepness * (progress * self._span - 0.5)))

    @property
    def _span(self) -> float:
        """What part of the epochs of Eq. 16 the window is."""
        return float(self.window.end) if self.update_end is None else 1.0

    # --------------------------------------------------------------------------- scores

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores of 0, float32, shape of the weight."""
        return {"score": torch.zeros_like(layer.weight, dtype=torch.float32)}

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Eq. 10; the weight's own gradient stops at the mask."""
        assert layer.grad is not None
        return {"score": layer.grad.float() * layer.weight}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum, without weight decay."""
        return sgd(groups, momentum=self.momentum)

    # --------------------------------------------------------------------------- checks

    def _check_alpha(self, alpha: object) -> None:
        if isinstance(alpha, str) and alpha == "auto":
            return
        number = plain(alpha)
        message = f'OptG(alpha={alpha!r}): must be a number above 0 or "auto".'
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(message)
        if not 0 < number < math.inf:
            raise ValueError(message)
