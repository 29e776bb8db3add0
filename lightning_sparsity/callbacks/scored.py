"""ScoredStart: what methods share that score the untrained model before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import (
    Distribution,
    Layers,
    Rule,
    Verb,
    density_of,
    errors_of,
)
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import LossFunction, ModelView, Pass
from lightning_sparsity.distributions import fixes_total, global_by
from lightning_sparsity.rules import chain, drop, forget
from lightning_sparsity.scores import slot
from lightning_sparsity.starts import FOUND, redraw, shuffle_within_layers
from lightning_sparsity.structures import Structure

_SCORE = "score"


class ScoredStart(MaskCallback):
    """Prunes the model once, before the first step, by a score that a pass over it gives.

    The pass leaves no trace: weights, gradients, buffers, random numbers and the order of the
    training data are as without it. Under several processes scores are averaged.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together.
        batches: How many batches are looked at, at least 1.
        data: Where they come from: batches or a loader; None: the Trainer's training data, in
            an order of its own.
        loss_fn: ``loss_fn(pl_module, batch)`` gives the loss; None: ``training_step`` does.
        mode: "train" or "eval": of all modules in the pass.
        shuffle: A control (Frankle et al., 2021): the places of each layer's live weights are
            drawn at random, among those that earlier callbacks left.
        reinitialize: Another control: the values of each layer, as they left it, are dealt out
            anew over the same weights.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps the model's own.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.
        single_weights: Whether the method makes sense for single weights only.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """

    dtype = torch.float32
    entrywise = True
    by_gradients: ClassVar[bool] = True
    revives: ClassVar[bool] = False

    def __init__(
        self,
        density: float | None = None,
        *,
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
        single_weights: bool = False,
    ) -> None:
        self._check_count("batches", batches)
        self._check_callable("loss_fn", loss_fn, "a function of the module and a batch")
        if mode not in ("train", "eval"):
            raise ValueError(f'{self._name}(mode={mode!r}): must be "train" or "eval".')
        self._check_flag("shuffle", shuffle)
        self._check_flag("reinitialize", reinitialize)
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        if data is not None and (not isinstance(data, Iterable) or isinstance(data, str | type)):
            raise TypeError(f"{self._name}(data={data!r}): must be batches, such as a DataLoader.")
        self.batches = plain(batches)
        self.data = data
        self.loss_fn = loss_fn
        self.mode: Literal["train", "eval"] = mode
        place: list[Rule] = [drop(slot(_SCORE))]
        place += [shuffle_within_layers] if shuffle else []
        place += [redraw] if reinitialize else []
        place += [forget(_SCORE, FOUND)]
        place += [weight_init] if weight_init else []
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(slot(_SCORE)),
            initial=chain(*place),
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            role="initial",
            single_weights=single_weights,
        )

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Scores of the weights of ``layers``, which are in the model as their masks have them.

        Args:
            opened: A copy of the model.
            layers: The layers.
            batches: The data.

        Returns:
            By parameter name: shape of the weight, larger = keep; may be negative.
        """
        raise NotImplementedError

    def look(self, opened: Pass) -> Sequence[Any]:
        """The data that scores are computed from; the first batches.

        Args:
            opened: A copy of the model.
        """
        with errors_of(self._name):
            return opened.batches(self.batches, self.data) if self.batches else []

    def rounds(self, density: float) -> list[float]:
        """Densities to prune to, one after the other, each after scoring; the last is ``density``.

        Those that are not below the density of the masks that were found are passed over.

        Args:
            density: The one asked for.
        """
        return [density]

    def estimate(self, layers: Layers, share: Share, view: ModelView) -> Layers:
        """Score the layers, pruning and scoring again where the method has several rounds."""
        if self.density is None and self.distribution is None:
            return layers  # what is there stays
        start = layers = with_found(layers)
        found = density_of(layers)
        asked = found if self.density is None else min(self.density, found)
        if fixes_total(self._budget.distribution):
            counts = self._budget.first(layers, share)
            asked = sum(counts) / sum(layer.size for layer in layers)
        with view.open(
            layers,
            mode=self.mode,
            dtype=self.dtype,
            seed=self.seed,
            on_parts=self.by_gradients,
        ) as opened:
            batches = self.look(opened)
            between = [n for n in self.rounds(asked)[:-1] if asked < n < found]
            for density in opened.progress(between, self._name):
                scored = self._scored(opened, layers, batches, start)
                counts = self._on_the_way(scored, start, share, density)
                layers = drop(slot(_SCORE))(scored, counts, 0.0)
                opened.put(layers)
            return self._scored(opened, layers, batches, start)

    def _scored(
        self, opened: Pass, layers: Layers, batches: Sequence[Any], start: Layers
    ) -> Layers:
        scores = _raised(layers, self.score(opened, layers, batches))
        if self.revives:  # what earlier rounds pruned may come back
            layers = start
        return [
            dataclasses.replace(layer, slots={**layer.slots, _SCORE: scores[layer.name].detach()})
            for layer in layers
        ]

    def _on_the_way(self, layers: Layers, start: Layers, share: Share, density: float) -> list[int]:
        """Live units per layer when ``density`` is left of all."""
        if not fixes_total(self._budget.distribution):
            return dataclasses.replace(self._budget, density=density).first(layers, share)
        end = self._budget.first(start, share)
        total, size = sum(end), sum(layer.size for layer in start)
        left = (density * size - total) / (sum(layer.live for layer in start) - total)
        return [n + round((layer.live - n) * left) for layer, n in zip(start, end, strict=True)]

    def _check_positive(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{self._name}({name}={value!r}): must be a number above 0.")
        if not 0 < float(value) < math.inf:
            raise ValueError(f"{self._name}({name}={value!r}): must be finite and above 0.")


def with_found(layers: Layers) -> Layers:
    """The layers with the masks that they have in a slot, for the controls."""
    return [
        dataclasses.replace(layer, slots={**layer.slots, FOUND: layer.mask}) for layer in layers
    ]


def _raised(layers: Layers, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Scores of at least 0: where some are negative, every unit's is raised by the same."""
    weights = {layer.name: layer.weight.numel() // layer.size for layer in layers}
    lowest = min(float(scores[name].detach().min()) * n for name, n in weights.items())
    if not lowest < 0:
        return scores
    return {name: score.double() - lowest / weights[name] for name, score in scores.items()}
