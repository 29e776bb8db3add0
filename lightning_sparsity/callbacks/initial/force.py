"""IterSNIP and FORCE: prune before training, a little in each of many rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers, Ramp, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import LossFunction, Pass
from lightning_sparsity.schedules import exponential
from lightning_sparsity.structures import Structure


class ProgressiveSkeletonization(ScoredStart):
    r"""What Iterative SNIP and FORCE share (de Jorge et al., 2021, arXiv:2006.09081).

    The network is pruned in :math:`T` rounds, each after scoring what the rounds before have
    left, to the densities :math:`d_k = d^{k/T}`; the largest scores over all layers stay.

    All rounds look at the same batches; the authors' program takes the first batch of a
    fresh shuffle each time.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        rounds: :math:`T`, at least 1; 1 is SNIP.
        ramp: ``ramp(1.0, density)`` gives the densities over the rounds, such as ``linear``.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together.
        batches: How many batches are looked at, at least 1.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "train" (the authors') or "eval": of all modules while scoring.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        rounds: int = 60,
        ramp: Ramp = exponential,
        distribution: Mapping[str, float] | Distribution | None = None,
        batches: int = 1,
        data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        mode: Literal["train", "eval"] = "train",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("rounds", rounds)
        self._check_arrives(ramp)
        self._rounds = plain(rounds)
        self._ramp = ramp
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

    def rounds(self, density: float) -> list[float]:
        """The density after each round, from 1 to ``density``."""
        schedule = self._ramp(1.0, density)
        return [schedule(k / self._rounds) for k in range(1, self._rounds)] + [density]


class IterSNIP(ProgressiveSkeletonization):
    r"""Iterative SNIP (de Jorge et al., 2021): SNIP, a little in each of many rounds.

    The score of a weight is :math:`|w \, \partial L / \partial w|` in the network that the
    rounds before have left. What is pruned does not come back.

    Arguments as of all progressive skeletonization.

    Example::

        Trainer(callbacks=[IterSNIP(density=0.01)])
    """

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The sensitivity of the loss to every weight that is left."""
        names = [layer.name for layer in layers]
        found = opened.sensitivities(names, batches, self.loss_fn)
        return {name: change.abs() for name, change in found.items()}


class FORCE(ProgressiveSkeletonization):
    r"""Foresight connection sensitivity (de Jorge et al., 2021).

    Seeks the mask under which :math:`\sum |w \, \partial L / \partial w|` of the network that
    is left is largest. The score of a weight, pruned or not, is
    :math:`|w \, \partial L(c \odot w) / \partial (c \odot w)|`: its dense value times the
    gradient in the network under the mask :math:`c` of the round before. So a weight may come
    back, but not one that an earlier callback pruned.

    Arguments as of all progressive skeletonization.

    Example::

        Trainer(callbacks=[FORCE(density=0.01)])
    """

    revives = True

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """What every weight would add to the sensitivity of the pruned network."""
        grads = opened.gradients([layer.name for layer in layers], batches, self.loss_fn)
        return {layer.name: (layer.weight * grads[layer.name]).abs() for layer in layers}
