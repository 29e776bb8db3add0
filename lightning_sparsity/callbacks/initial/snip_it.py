"""SNIPit and SNAPit: prune weights or neurons before training, in ever smaller steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, last_layer, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import LossFunction, Pass
from lightning_sparsity.structures import Rows, Structure


def halving(density: float, halvings: int) -> list[float]:
    r"""Densities whose distance to the last one is halved from round to round.

    The sparsities are :math:`s - (s - 0.5) \, 0.5^i` for :math:`i = 0 \ldots n`, and then
    :math:`s` itself; where :math:`s \le 0.5`, at which they would begin, only :math:`s`.

    Args:
        density: The last one, :math:`1 - s`.
        halvings: :math:`n`, at least 0.

    Example:
        >>> [round(density, 4) for density in halving(0.1, 5)]
        [0.5, 0.3, 0.2, 0.15, 0.125, 0.1125, 0.1]
    """
    if density >= 0.5:
        return [density]
    return [density + (0.5 - density) * 0.5**i for i in range(halvings + 1)] + [density]


class SNIPit(ScoredStart):
    r"""SNIP-it, before training (Verdenius et al., 2020, arXiv:2006.00896).

    Prunes by the elasticity :math:`|w \, \partial L / \partial w \, / L|` of the loss,
    over all layers together, to half of the weights and then in rounds that halve the
    distance to the density; each round scores what the rounds before have left. What is
    pruned does not come back.

    The division by :math:`L`, one number for all weights of a round, changes no rank and is
    left out. A density above 0.5 is reached in one round, where the authors' list would
    begin with 0.5.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        halvings: How often the distance is halved before the last round, at least 0.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together.
        batches: How many batches are looked at, at least 1.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "eval" (the authors') or "train": of all modules while scoring.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Block(1, 4)``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SNIPit(density=0.02)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        halvings: int = 5,
        distribution: Mapping[str, float] | Distribution | None = None,
        batches: int = 5,
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
        self._check_count("halvings", halvings, least=0)
        self.halvings = plain(halvings)
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
        """Half of the weights, then ever closer to ``density``."""
        return halving(density, self.halvings)

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The elasticity of the loss, up to a factor."""
        names = [layer.name for layer in layers]
        found = opened.sensitivities(names, batches, self.loss_fn)
        return {name: change.abs() for name, change in found.items()}


class SNAPit(ScoredStart):
    r"""SNAP-it, SNIP-it for whole neurons and filters (Verdenius et al., 2020, arXiv:2006.00896).

    With a gate :math:`g_j = 1` on the value of every output unit before normalisation and
    activation, the score of a unit is :math:`|\partial L / \partial g_j \, / L|`;
    the largest over all layers stay, in the rounds of SNIP-it. As a gate scales the unit's
    weights and bias,

    .. math:: \partial L / \partial g_j
        = \sum_i w_{ji} \, \partial L / \partial w_{ji} + b_j \, \partial L / \partial b_j ,

    so that no gate has to be put into the model. With another structure the gates are on
    its units: inputs, tiles, or single weights, where it is SNIP-it.

    The authors remove a pruned unit from the network. Here the unit's weights are zero and
    stay zero, while its bias, its normalisation and the weights that read it are left in
    place: it gives the same value for every input. Every layer keeps a unit. As in
    SNIP-it, the division by :math:`L` changes no rank and is left out.

    Args:
        density: Live share of all units of the sparse layers, in (0, 1].
        halvings: How often the distance is halved before the last round, at least 0.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together.
        batches: How many batches are looked at, at least 1.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "eval" (the authors') or "train": of all modules while scoring. Units before a
            batch normalisation in "train" all have a score near 0, as it undoes the gate.
        shuffle: A control: which units of each layer live is drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense; default the last layer, whose units are the
            model's outputs.
        structure: What one unit is; default ``Rows()``.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SNAPit(density=0.2)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        halvings: int = 5,
        distribution: Mapping[str, float] | Distribution | None = None,
        batches: int = 5,
        data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        mode: Literal["train", "eval"] = "eval",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = last_layer,
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("halvings", halvings, least=0)
        self.halvings = plain(halvings)
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
            structure=Rows() if structure is None else structure,
            seed=seed,
        )

    def rounds(self, density: float) -> list[float]:
        """Half of the units, then ever closer to ``density``."""
        return halving(density, self.halvings)

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The sensitivity of the loss to the gates, in equal parts on the weights of a unit."""
        biased = {layer.name: _bias(layer) for layer in layers if _has_biased_units(layer)}
        names = [*(layer.name for layer in layers), *biased.values()]
        found = opened.sensitivities(names, batches, self.loss_fn)
        scores = {}
        for layer in layers:
            gates = layer.reduce(found[layer.name])
            if layer.name in biased:
                gates = gates + found[biased[layer.name]]
            parts = gates.abs() * layer.size / layer.weight.numel()
            scores[layer.name] = layer.structure.expand(parts, layer.shape, layer.layout)
        return scores


def _has_biased_units(layer: Layer) -> bool:
    return isinstance(layer.structure, Rows) and layer.bias is not None


def _bias(layer: Layer) -> str:
    return layer.name.removesuffix("weight") + "bias"
