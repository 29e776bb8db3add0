"""SNIP: prune what changes the loss least, before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers, Rule, Verb
from lightning_sparsity.core.view import LossFunction, Pass
from lightning_sparsity.structures import Structure


class SNIP(ScoredStart):
    r"""Single-shot network pruning (Lee et al., 2019, arXiv:1810.02340).

    With a mask :math:`c` of ones on the weights, the score of a weight is the sensitivity of
    the loss to its connection, :math:`|\partial L / \partial c| = |w \, \partial L / \partial w|`
    (Eq. 4 and 5); the largest over all layers stay.

    The authors' first program scores one draw of the weights and trains another; here the
    weights that are scored are those that are trained. The gradient is averaged over the
    batches before its absolute value is taken. Biases are never scored.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together.
        batches: How many batches are looked at, at least 1.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "eval" (the authors') or "train": of all modules while scoring.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps the model's own.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SNIP(density=0.05)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        batches: int = 1,
        data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        mode: Literal["train", "eval"] = "eval",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            density,
            distribution=distribution,
            batches=batches,
            data=data,
            loss_fn=loss_fn,
            mode=mode,
            shuffle=shuffle,
            reinitialize=reinitialize,
            weight_init=weight_init,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The sensitivity of the loss to every weight."""
        names = [layer.name for layer in layers]
        found = opened.sensitivities(names, batches, self.loss_fn)
        return {name: change.abs() for name, change in found.items()}
