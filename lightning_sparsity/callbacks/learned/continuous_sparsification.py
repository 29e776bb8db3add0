"""Continuous sparsification: soft masks that harden as a temperature rises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask, sgd
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.numbers import plain


class ContinuousSparsification(LearnedMask):
    r"""Continuous sparsification (Savarese et al., 2020, arXiv:1912.04427).

    Every weight has a score :math:`s`, at first :math:`s_0`, and layers compute with
    :math:`w \odot m`, :math:`m = \sigma(\beta s) / \sigma(s_0)` (:math:`\sigma`: the sigmoid).
    Weights and scores minimise the loss plus :math:`\lambda \sum m`. The temperature rises
    from epoch to epoch, :math:`\beta_k = \beta_{end}^{k / (E - 1)}` in epoch :math:`k` of
    :math:`E`, and pushes every soft mask to one of its ends. The ticket has the masks
    :math:`1[s > 0] / \sigma(s_0)`: validation computes with it, files hold it, and it stays
    when the window ends, the factor folded into the weights.

    With ``rounds`` above 1 the window is that many equal parts. Each begins at a temperature
    of 1 and at :math:`\min(\beta_{end} s, s_0)`, so that what was pruned stays so, and what
    was not is judged anew. Learning rates do not begin anew unless the scheduler says so.

    **The density cannot be asked for**: smaller ``s_init`` and larger ``lam`` end sparser. Once
    the temperature is high, scores get no gradient and decisions stand.

    Departures from the paper and the authors' program: the factor :math:`1 / \sigma(s_0)` is
    the program's, the paper leaves it out; validation there computes with soft masks; weights
    are not rewound to an early epoch before they are trained on (end the window early to
    train the ticket on).

    Args:
        lam: :math:`\lambda`, per weight, at least 0.
        s_init: :math:`s_0`; the paper's densities come from -0.3 to 0.3.
        final_temperature: :math:`\beta_{end}`, at least 1.
        rounds: Parts of the window, at least 1.
        lr_scale: Learning rate of the scores as a multiple of that of the weights, above 0.
        momentum: Of the scores' SGD, in [0, 1).
        update_start: First step (int) or fraction of training (float); before it weights are
            dense and scores wait.
        update_end: Where the ticket is drawn: a step (int) or a fraction of training (float).
            Where the window is in steps, or the number of epochs not known, the temperature
            rises in every step.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        seed: Unused: nothing is drawn.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(max_epochs=85, callbacks=[ContinuousSparsification(), DensityMonitor()])
    """

    trained: ClassVar[Sequence[str]] = ("score",)
    derived: ClassVar[bool] = True
    dense_gradients: bool = True

    def __init__(
        self,
        *,
        lam: float = 1e-8,
        s_init: float = 0.0,
        final_temperature: float = 200.0,
        rounds: int = 1,
        lr_scale: float = 1.0,
        momentum: float = 0.9,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        seed: int | None = None,
    ) -> None:
        self._check_number("lam", lam, 0)
        self._check_number("s_init", s_init, -math.inf)
        self._check_number("final_temperature", final_temperature, 1)
        self._check_count("rounds", rounds)
        self._check_number("lr_scale", lr_scale, 0, inside=True)
        self._check_momentum(momentum)
        self.lam = plain(lam)
        self.s_init = plain(s_init)
        self.final_temperature = plain(final_temperature)
        self.rounds = plain(rounds)
        self.lr_scale = plain(lr_scale)
        self.momentum = plain(momentum)
        self._epochs = 0
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            seed=seed,
            single_weights=True,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the epochs, for the temperature."""
        super().setup(trainer, pl_module, stage)
        self._epochs = max(trainer.max_epochs or 0, 0)

    # ----------------------------------------------------------------------- temperature

    def temperature(self, progress: float) -> float:
        """Of the next step, ``progress`` of the window being done."""
        done = progress * self.rounds
        done -= min(math.floor(round(done, 9)), self.rounds - 1)  # of the round, in [0, 1]
        if (epochs := self._epochs_per_round) > 1:
            last = math.ceil(round(epochs, 9)) - 1
            done = min(math.floor(round(done * epochs, 9)) / last, 1)
        return float(self.final_temperature**done)

    @property
    def _epochs_per_round(self) -> float:
        """0 where it is not known."""
        start, end = self.window.start, self.window.end
        in_steps = isinstance(end, int) or (isinstance(start, int) and start > 0)
        return 0 if in_steps else self._epochs * (end - start) / self.rounds

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """The temperature of the next step; scores to begin with, if it is a round's first."""
        score, before = layer.slots["score"], layer.slots["temperature"]
        now = torch.full_like(before, self.temperature(progress))
        if self.rounds > 1 and bool(now < before):
            score.mul_(before).clamp_(max=self.s_init)
        return {"temperature": now}

    # ----------------------------------------------------------------------------- masks

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores of ``s_init`` and a temperature of 1, float32."""
        score = torch.full_like(layer.weight, self.s_init, dtype=torch.float32)
        return {"score": score, "temperature": score.new_ones(())}

    def effective(self, layer: Layer) -> Tensor:
        """The weight times its soft mask."""
        return layer.weight * self._soft(layer).to(layer.weight.dtype)

    def evaluated(self, layer: Layer) -> Tensor:
        """The ticket."""
        return layer.weight * (self.support(layer) * self._scale).to(layer.weight.dtype)

    def support(self, layer: Layer) -> Tensor:
        """Weights of positive score."""
        return layer.slots["score"] > 0

    def penalty(self, layer: Layer) -> Tensor:
        r"""The term :math:`\lambda \sum m`."""
        return self.lam * self._soft(layer).sum()

    def _soft(self, layer: Layer) -> Tensor:
        return (layer.slots["temperature"] * layer.slots["score"]).sigmoid() * self._scale

    @property
    def _scale(self) -> float:
        r"""The factor :math:`1 / \sigma(s_0)`."""
        return 1 + math.exp(-self.s_init)

    # -------------------------------------------------------------------------- training

    def learning_rate(self, lr: float, progress: float) -> float:
        """That of the weights, scaled."""
        return lr * self.lr_scale

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """SGD with momentum, without weight decay."""
        return sgd(groups, momentum=self.momentum)
