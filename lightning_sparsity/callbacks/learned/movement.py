"""Movement pruning: keep the weights that training moves away from zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask, slope_of
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Curve, Distribution, Layer, Schedule
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.window import Interval
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import cubic
from lightning_sparsity.scores import slot
from lightning_sparsity.structures import NM, Structure


class _Movement(LearnedMask):
    """What both kinds share: how scores are trained, and the flat ends of the ramps."""

    trained: ClassVar[Sequence[str]] = ("score",)
    lr: float | Schedule
    warmup: float
    cooldown: float

    def learning_rate(self, lr: float, progress: float) -> float:
        """Their own."""
        return self.lr(progress) if callable(self.lr) else self.lr

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """AdamW without weight decay."""
        return AdamW(groups, lr=0.0, weight_decay=0.0)

    def _between_flat_ends(self, start: float, end: float) -> Schedule:
        """The cubic ramp, with ``start`` held through the warm-up and ``end`` afterwards."""
        curve = cubic(start, end)

        def value(progress: float) -> float:
            return curve((progress - self.warmup) / (1 - self.warmup - self.cooldown))

        return value

    def _take(self, lr: float | Schedule | Curve, warmup: float, cooldown: float) -> None:
        if callable(lr) and not isinstance(lr, type):
            self._check_schedule("lr", lr, 0)
        else:
            self._check_number("lr", lr, 0, inside=True)
        self._check("warmup", warmup)
        self._check("cooldown", cooldown)
        if warmup + cooldown >= 1:
            raise ValueError(
                f"{self._name}(warmup={warmup!r}, cooldown={cooldown!r}): must be below 1 "
                "together; what they leave of the window is the ramp."
            )
        self.lr, self.warmup, self.cooldown = plain(lr), plain(warmup), plain(cooldown)


class MovementPruning(_Movement):
    r"""Movement pruning (Sanh et al., 2020, arXiv:2005.07683), the hard kind.

    Every weight has a score, at first 0, and each layer computes with the weights of largest
    score, chosen anew after every step. The gradient passes the choice unchanged, for
    chosen weights and others alike: :math:`\partial L / \partial S = W \, \partial L / \partial
    (W \odot M)`, so that a score rises while its weight moves away from zero and falls
    while it moves towards it, whatever the weight's magnitude. The density falls
    cubically and is flat before and after. Made for fine-tuning.

    Weights that are not chosen keep their values, as far as weight decay and momentum do, and
    may come back. Masks that an earlier callback made are never left.

    Departures from the authors' program: counts are exact, with ties to the lowest index;
    scores have a learning rate of their own, constant unless a schedule is given, where the
    program's has the warm-up and decay of the weights'.

    Args:
        density: Final live share of all sparse weights, in (0, 1].
        lr: Learning rate of the scores, above 0, or a schedule of it over the window, such as
            ``linear(1e-2)``. In this kind only its course counts, not its size.
        warmup: Share of the window before the density falls, in [0, 1).
        cooldown: Share of the window after it has fallen, in [0, 1); 0.1 and 0.2 are those
            of the authors' SQuAD command.
        distribution: How the density is split over layers, or densities by name pattern;
            default: the same in every layer; ``global_by(slot("score", signed=True))`` ranks
            all together.
        update_interval: Optimizer steps between masks, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Last change of the mask: step (int) or fraction of training (float); after
            it the weights are trained as they are.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(32, 32)``, whose scores are added up;
            default single weights.
        seed: Unused by scores; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[MovementPruning(density=0.15, exclude="*.classifier")])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        lr: float | Schedule | Curve = 1e-2,
        warmup: float = 0.1,
        cooldown: float = 0.2,
        distribution: Mapping[str, float] | Distribution | None = None,
        update_interval: Interval = 1,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._take(lr, warmup, cooldown)
        best = drop(slot("score", signed=True))
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=uniform,
            initial=best,
            update=best,
            ramp=self._between_flat_ends,
            update_interval=update_interval,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores of 0, float32, shape of the weight."""
        return {"score": torch.zeros_like(layer.weight, dtype=torch.float32)}

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Of the score; the weight's own gradient stops at the mask."""
        assert layer.grad is not None
        return {"score": layer.grad.float() * layer.weight}


class SoftMovementPruning(_Movement):
    r"""Soft movement pruning (Sanh et al., 2020, arXiv:2005.07683).

    As :class:`MovementPruning`, but layers compute with the weights of :math:`\sigma(S) > \tau`,
    and :math:`\lambda \, \frac{1}{n} \sum \sigma(S)` of every layer, :math:`n` its scores, is added
    to the loss. The threshold :math:`\tau` rises cubically from 0 and is flat before and after;
    :math:`\lambda` rises with it, in proportion. Every layer keeps its best
    :math:`\lfloor 0.005 \, n \rfloor + 1` scores at least.

    **The density is not set.** ``lam`` decides it: larger is sparser.

    Departures from the authors' program: the penalty is added up over layers, where the program
    takes their mean: its ``final_lambda`` of 400 is 400 / 72 for each of the 72 matrices of
    BERT-base. Scores have a learning rate of their own, constant unless a schedule is given,
    where the program's has the warm-up and decay of the weights'. Masks that an earlier callback
    made are never left.

    Args:
        lam: :math:`\lambda` at the end, for each layer, at least 0.
        threshold: :math:`\tau` at the end, in (0, 1).
        min_density: Share of the scores that every layer keeps, one more than its whole part,
            in [0, 1].
        lr: Learning rate of the scores, above 0, or a schedule of it over the window, such as
            ``linear(1e-2)``.
        warmup: Share of the window before the threshold rises, in [0, 1).
        cooldown: Share of the window after it has risen, in [0, 1); 0.1 and 0.2 are those of
            the authors' SQuAD command.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float); after it the mask stays and
            the weights are trained as they are.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What has one score, such as ``Block(32, 32)``; default single weights.
        seed: Unused; there are no random choices.

    Raises:
        ValueError: If an argument is out of range, or the structure is an ``NM`` pattern, which
            a threshold cannot keep.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SoftMovementPruning(exclude="*.classifier"), DensityMonitor()])
    """

    derived: ClassVar[bool] = True

    def __init__(
        self,
        *,
        lam: float = 400 / 72,
        threshold: float = 0.1,
        min_density: float = 0.005,
        lr: float | Schedule | Curve = 1e-2,
        warmup: float = 0.1,
        cooldown: float = 0.2,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("lam", lam, 0)
        self._check_number("threshold", threshold, 0, 1, inside=True)
        self._check("min_density", min_density)
        self._take(lr, warmup, cooldown)
        self.lam = plain(lam)
        self.threshold = plain(threshold)
        self.min_density = plain(min_density)
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """Scores of 0, float32, one per unit."""
        return {"score": torch.zeros(layer.size, device=layer.weight.device)}

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """The threshold of the next step."""
        now = self._between_flat_ends(0.0, self.threshold)(progress)
        return {"threshold": layer.slots["score"].new_tensor(now)}

    def effective(self, layer: Layer) -> Tensor:
        """The weight where it is above the threshold; its gradient reaches every score."""
        score = layer.structure.expand(layer.slots["score"], layer.shape, layer.layout)
        return layer.weight * (self.support(layer) + slope_of(score)).to(layer.weight.dtype)

    def support(self, layer: Layer) -> Tensor:
        """What is above the threshold, or the best if that is too little."""
        score = layer.slots["score"].detach()
        units = score.sigmoid() > layer.slots["threshold"]
        least = min(int(self.min_density * layer.size) + 1, layer.size)
        if units.count_nonzero() < least:
            (units,) = top_k([score], least)
        return layer.structure.expand(units, layer.shape, layer.layout)

    def penalty(self, layer: Layer) -> Tensor:
        """What lowers the scores, as far as the threshold has risen."""
        risen = layer.slots["threshold"] / self.threshold
        return self.lam * risen * layer.slots["score"].sigmoid().mean()

    def _check_units(self, structure: Structure, where: str) -> None:
        super()._check_units(structure, where)
        if isinstance(structure, NM):
            raise ValueError(
                f"{where}: a threshold does not keep to a pattern; use MovementPruning, or leave "
                "structure out."
            )
