"""GSM: only the weights that matter now hear the loss; the others fade, and are cut at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Curve, Distribution, Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.run import Run
from lightning_sparsity.distributions import global_by
from lightning_sparsity.ops.selection import NonFiniteScoreError, top_k
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import step
from lightning_sparsity.scores import magnitude, saliency
from lightning_sparsity.structures import NM, Structure


class GSM(LearnedMask):
    r"""Global sparse momentum SGD (Ding et al., 2019, arXiv:1909.12778).

    In every step the share ``density`` of all weights with the largest :math:`T = |w \,
    \partial L / \partial w|` is active, the others are passive: their gradient is
    zero. What is left to a passive weight is SGD's weight decay :math:`\eta` and its
    momentum,

    .. math::
        z \leftarrow \beta z + \eta w + B \odot \frac{\partial L}{\partial w}, \qquad
        w \leftarrow w - \alpha z,

    with :math:`B` one where a weight is active, under which it fades exponentially, the faster
    the larger the momentum. Who is active is chosen anew in every step, so a weight that fades
    may come back. Training is dense; at ``update_end`` the weights of largest magnitude over
    all layers stay, and what is cut then is small already, so that the paper needs no
    fine-tuning.

    It is made for SGD with a high momentum (the paper's is 0.98 to 0.99, with Nesterov's
    variant) and a weight decay, and begins best with a trained network; with another optimizer,
    or SGD without momentum, it warns. Without a weight decay nothing fades, and it refuses.
    Gradients are chosen before they are clipped. The authors' program keeps ties at the
    threshold; here the count is exact.

    Args:
        density: Live share of all sparse weights from ``update_end`` on, and active share of
            them before, in (0, 1]; 1 leaves training as it is.
        distribution: How ``density`` is split over layers, in every step and at the end, or
            densities by name pattern; default: all weights are ranked together, in every step
            by :math:`T`, at the end by magnitude, when each layer keeps at least one unit.
        weight_decay: :math:`\eta` of the sparse weights until ``update_end``, above 0, added to
            what the optimizer has; None: that of the optimizer alone.
        update_start: First step (int) or fraction of training (float); before it all weights
            are active.
        update_end: Step (int) or fraction of training (float) after which the mask is made.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``, which are active, and cut, as a whole;
            default single weights.
        seed: Unused by the scores; kept for distributions with random choices.

    Raises:
        ValueError: If an argument is out of range, or, at the start of training, if weights
            have no weight decay.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[GSM(density=0.1, weight_decay=5e-4)])
    """

    latent = False

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        weight_decay: float | None = None,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        if weight_decay is not None:
            self._check_number("weight_decay", weight_decay, 0)
            if weight_decay == 0:
                raise ValueError(
                    f"GSM(weight_decay={weight_decay!r}): must be above 0, such as 5e-4, or None "
                    "for that of the optimizer alone."
                )
        self.weight_decay = plain(weight_decay)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            update=drop(magnitude),
            ramp=_at_the_end,
            update_interval="epoch",
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def together(self, layers: Iterable[Layer]) -> Layers:
        """The layers, with the active weights for masks."""
        layers = list(layers)
        apart = self.distribution is not None or any(isinstance(x.structure, NM) for x in layers)
        try:
            return self._split(layers) if apart else self._ranked(layers)
        except NonFiniteScoreError:  # a step that a GradScaler skips, or a training that is lost
            return layers

    def _ranked(self, layers: Layers) -> Layers:
        """The most salient units of all layers are active."""
        assert self.density is not None
        live = sum(layer.live for layer in layers)
        count = min(live, max(1, round(self.density * sum(layer.size for layer in layers))))
        if count == live:
            return layers
        scores = [layer.reduce(saliency(layer)) for layer in layers]
        chosen = top_k(scores, count, [layer.units for layer in layers])
        return [layer.with_units(units) for layer, units in zip(layers, chosen, strict=True)]

    def _split(self, layers: Layers) -> Layers:
        """The most salient units of each layer are active, as many as it may have."""
        ranked = global_by(saliency, min_per_layer=0)
        budget = dataclasses.replace(self._budget, ramp=None, default=ranked)
        size = sum(layer.size for layer in layers)
        share = Share(tuple(layer.name for layer in layers), (size,), 0, found=False)
        return drop(saliency)(layers, budget.first(layers, share), 0.0)

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """Those of active weights, and the weight decay of all."""
        if self.density == 1 or layer.grad is None:
            return {}
        grad = torch.where(layer.mask, layer.grad, 0)
        return {"weight": grad.add_(layer.weight, alpha=self.weight_decay or 0.0)}

    # ----------------------------------------------------------------------- checks

    def check(self, layers: Layers) -> None:
        """Raise if the density cannot be reached, or nothing would make weights fade."""
        super().check(layers)
        if self.weight_decay is not None or self.density == 1:
            return
        for layer in layers:
            if layer.weight_decay is not None and not layer.weight_decay > 0:
                raise ValueError(
                    f"GSM(weight_decay=None): the optimizer has no weight decay for {layer.name}, "
                    "so that passive weights would not fade. Give the optimizer one, or pass "
                    "GSM(weight_decay=5e-4)."
                )

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """Warn where the optimizer is another than the method is made for."""
        super().on_masks_ready(trainer, pl_module, keeper)
        mine = [run for run in keeper.runs if id(run.method) == id(self)]
        odd = [found for run in mine if (found := _other_than_sgd(run, keeper))]
        if odd and self.density != 1:
            rank_zero_warn(
                f"GSM: weights are stepped by {odd[0]}. It is SGD's momentum that makes passive "
                "weights fade in time, and what has not faded at update_end is cut all the same. "
                "Use torch.optim.SGD with momentum=0.98 and a weight decay."
            )


def _at_the_end(start: float, end: float) -> Curve:
    """A ramp that stays at its start, and jumps."""
    return step(start, {1.0: end / start})


def _other_than_sgd(run: Run, keeper: MaskKeeper) -> str | None:
    """The optimizer of a run, if it is not SGD with momentum for all weights of the run."""
    if run.owner.optimizer is None or keeper.masks is None:
        return None
    kind = type(run.owner.optimizer)
    if not issubclass(kind, torch.optim.SGD):
        return kind.__name__
    mine = {id(keeper.masks[name].parameter) for name in run.names}
    groups = run.owner.optimizer.param_groups
    still = (g for g in groups if not g["momentum"] and mine & {id(p) for p in g["params"]})
    return "SGD without momentum" if any(still) else None
