"""Rules: layers in, layers out. A method is a chain of these verbs.

A rule takes ``(layers, budget, progress)``: the layers, the live units each should have
afterwards, and training progress in [0, 1]. It is pure: it returns changed copies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparsity.core.layer import (
    Budget,
    Distribution,
    Layer,
    Layers,
    Rule,
    Schedule,
    Score,
    call_of,
    works_on_parts,
)
from lightning_sparsity.ops.selection import NonFiniteScoreError, sample, top_k, top_n_per_group
from lightning_sparsity.scores import needs_gradient, random
from lightning_sparsity.structures import NM


@dataclass(frozen=True)
class drop:
    """Keep the best live units of each layer.

    Args:
        score: Ranks the live units; the lowest go.
        fraction: Share of each layer's live units to drop, a number in [0, 1] or a
            schedule of it. None: drop down to the budget.
        share: How the units that stay are split over the layers; None: each layer
            drops its own. ``share=global_by(magnitude)`` ranks across layers. Layers of
            an ``NM`` pattern keep their own counts.
        rounding: ``math.floor`` or ``math.ceil``, for ``fraction``.

    Raises:
        ValueError: If ``fraction`` is a number outside [0, 1].
    """

    score: Score
    fraction: float | Schedule | None = None
    share: Distribution | None = None
    rounding: Callable[[float], int] = math.floor

    def __post_init__(self) -> None:
        if not (self.fraction is None or callable(self.fraction) or 0 <= self.fraction <= 1):
            raise ValueError(f"{self}: fraction must lie in [0, 1].")

    @property
    def needs_gradient(self) -> bool:
        """Whether the score or the share reads gradients."""
        return needs_gradient(self.score) or (self.share is not None and needs_gradient(self.share))

    @property
    def on_parts(self) -> bool:
        """Whether the score works on sharded layers."""
        return works_on_parts(self.score)

    def __repr__(self) -> str:
        return _call(self)

    def fraction_at(self, progress: float) -> float | None:
        """The fraction to drop at ``progress``; None if the budget decides."""
        return self.fraction(progress) if callable(self.fraction) else self.fraction

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Drop units.

        Args:
            layers: Layers to prune.
            budget: Live units each layer should keep, when ``fraction`` is None.
            progress: Training progress in [0, 1], for a scheduled ``fraction``.

        Returns:
            The layers with their new masks.
        """
        fraction = self.fraction_at(progress)
        if fraction is None:
            keep = [min(layer.live, count) for layer, count in zip(layers, budget, strict=True)]
        else:
            keep = [self._survivors(layer.live, fraction) for layer in layers]
        if self.share is not None:
            keep = _shared(self.share, layers, keep)
        return [
            self._drop_in_groups(layer, layer.structure, count)
            if fraction is None and isinstance(layer.structure, NM)
            else self._drop(layer, count)
            for layer, count in zip(layers, keep, strict=True)
        ]

    def _survivors(self, live: int, fraction: float) -> int:
        dropped = self.rounding(round(fraction * live, 9))  # 0.3 * 10 is not 3.0000000000000004
        return live - min(dropped, max(live - 1, 0))

    def _drop(self, layer: Layer, keep: int) -> Layer:
        if keep == layer.live:
            return layer
        return layer.with_units(_choose(self.score, layer, keep, layer.units))

    def _drop_in_groups(self, layer: Layer, pattern: NM, keep: int) -> Layer:
        if keep == layer.live:
            return layer
        candidates = pattern.group(layer.mask, layer.layout)
        counts = candidates.count_nonzero(dim=1).clamp(max=-(-keep // len(candidates)))
        chosen = _choose_in_groups(self.score, layer, pattern, counts, candidates)
        return dataclasses.replace(layer, mask=chosen)


@dataclass(frozen=True)
class grow:
    """Bring the best free units of each layer to life, up to the budget.

    Grown weights start at zero unless ``start`` gives them a value. Units that are barred
    (:class:`barring`) grow only where all others of their layer have.

    Args:
        score: Ranks the free units; the highest grow.
        share: How the units to grow are split over the layers, such as
            ``global_by(gradient, min_per_layer=0)``; None: each layer grows to its own
            budget. With a share the budget's sum counts. Layers of an ``NM`` pattern
            grow to their own.
        start: Standard deviation of the normal distribution from which the weights
            that come alive are drawn; 0: they start at zero. Or a function of the layer
            that gives values of the weight's shape.
    """

    score: Score
    share: Distribution | None = None
    start: float | Callable[[Layer], Tensor] = 0.0

    def __repr__(self) -> str:
        return _call(self)

    @property
    def needs_gradient(self) -> bool:
        """Whether the score or the share reads gradients."""
        return needs_gradient(self.score) or (self.share is not None and needs_gradient(self.share))

    @property
    def on_parts(self) -> bool:
        """Whether the score works on sharded layers, and the values that grow do."""
        return works_on_parts(self.score) and not callable(self.start)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Grow units.

        Args:
            layers: Layers with room.
            budget: Live units each layer should have afterwards.
            progress: Unused.

        Returns:
            The layers with their new masks (and weights, if ``start`` is not 0).
        """
        room = [max(n - layer.live, 0) for layer, n in zip(layers, budget, strict=True)]
        if self.share is not None and any(room):
            missing = [n - layer.live for layer, n in zip(layers, budget, strict=True)]
            free = [dataclasses.replace(layer, mask=layer.free) for layer in layers]
            if sum(missing) > sum(layer.live for layer in free):
                free = [dataclasses.replace(layer, mask=~layer.mask) for layer in layers]
            room = _shared(self.share, free, missing)
        grown: Layers = [
            self._grow_in_groups(layer, layer.structure, count)
            if isinstance(layer.structure, NM)
            else self._grow(layer, count)
            for layer, count in zip(layers, room, strict=True)
        ]
        if self.start:
            grown = [self._fill(old, new) for old, new in zip(layers, grown, strict=True)]
        return grown

    def _grow(self, layer: Layer, count: int) -> Layer:
        if count == 0:
            return layer
        units = layer.units
        free = layer.structure.live(layer.free, layer.layout)
        few = min(count, int(free.count_nonzero()))
        units = units | _choose(self.score, layer, few, free)
        if few < count:
            units = units | _choose(self.score, layer, count - few, ~units)
        return layer.with_units(units)

    def _grow_in_groups(self, layer: Layer, pattern: NM, count: int) -> Layer:
        groups = pattern.group(layer.mask, layer.layout)
        live = (layer.live + count) // len(groups)
        room = (live - groups.count_nonzero(dim=1)).clamp(min=0)
        free = pattern.group(layer.free, layer.layout)
        few = room.minimum(free.count_nonzero(dim=1))
        mask = layer.mask | _choose_in_groups(self.score, layer, pattern, few, free)
        if (few < room).any():
            rest = ~pattern.group(mask, layer.layout)
            mask = mask | _choose_in_groups(self.score, layer, pattern, room - few, rest)
        return dataclasses.replace(layer, mask=mask)

    def _fill(self, old: Layer, new: Layer) -> Layer:
        if callable(self.start):
            draw = self.start(new).to(new.weight)
        else:
            draw = torch.randn(new.shape, generator=new.generator).to(new.weight) * self.start
        # A weight dropped and regrown by the same chain keeps its value.
        fresh = new.mask & ~old.mask & (new.weight == 0)
        return dataclasses.replace(new, weight=torch.where(fresh, draw, new.weight))


@dataclass(frozen=True)
class rewind:
    """Give live weights back the values kept in a slot (Frankle et al., 2020).

    Args:
        slot: Key in ``layer.slots``.
    """

    slot: str
    needs_gradient = False
    on_parts = True

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Replace the weights of every layer by its slot."""
        return [dataclasses.replace(layer, weight=layer.slots[self.slot]) for layer in layers]


@dataclass(frozen=True, init=False)
class forget:
    """Let go of slots.

    Args:
        *slots: Their keys in ``layer.slots``; a layer need not have them.
    """

    slots: tuple[str, ...]
    needs_gradient = False
    on_parts = True

    def __init__(self, *slots: str) -> None:
        object.__setattr__(self, "slots", slots)

    def __repr__(self) -> str:
        return f"forget({', '.join(map(repr, self.slots))})"

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Remove the slots from every layer."""
        return [
            dataclasses.replace(
                layer, slots={k: v for k, v in layer.slots.items() if k not in self.slots}
            )
            for layer in layers
        ]


@dataclass(frozen=True, init=False)
class chain:
    """Apply rules one after the other, with the same budget and progress.

    Args:
        *rules: The rules, first to last.
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(call_of, self.rules))})"

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the rules reads gradients."""
        return any(needs_gradient(rule) for rule in self.rules)

    @property
    def on_parts(self) -> bool:
        """Whether all of the rules work on sharded layers."""
        return all(map(works_on_parts, self.rules))

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Apply the rules."""
        for rule in self.rules:
            layers = rule(layers, budget, progress)
        return layers


class exchange(chain):
    """A chain whose budget is what lives as it begins: drop units and grow as many.

    Args:
        *rules: The rules, first to last; the last grow what the first dropped.
    """

    def __repr__(self) -> str:
        return f"exchange({', '.join(map(call_of, self.rules))})"

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Apply the rules; ``budget`` is not used."""
        return super().__call__(layers, [layer.live for layer in layers], progress)


@dataclass(frozen=True)
class barring:
    """Apply a rule and bar what it dropped from growing in the same update.

    Args:
        rule: Drops units, such as ``drop(magnitude, fraction=0.3)``.
    """

    rule: Rule

    @property
    def needs_gradient(self) -> bool:
        """Whether the rule reads gradients."""
        return needs_gradient(self.rule)

    @property
    def on_parts(self) -> bool:
        """Whether the rule works on sharded layers."""
        return works_on_parts(self.rule)

    def __call__(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        """Apply the rule."""
        after = self.rule(layers, budget, progress)
        return [
            dataclasses.replace(new, barred=_either(new.barred, old.mask & ~new.mask))
            for old, new in zip(layers, after, strict=True)
        ]


def find(rule: Rule | None, kind: type[drop]) -> Sequence[drop]:
    """All rules of a ``kind`` in a chain, in order."""
    if isinstance(rule, barring):
        return find(rule.rule, kind)
    if isinstance(rule, chain):
        return [part for inner in rule.rules for part in find(inner, kind)]
    return [rule] if isinstance(rule, kind) else []


def _shared(share: Distribution, layers: Layers, counts: Sequence[int]) -> list[int]:
    """Counts split over the layers anew; those of an ``NM`` pattern, which fixes it, stay."""
    moving = [i for i, layer in enumerate(layers) if not isinstance(layer.structure, NM)]
    if not moving:
        return list(counts)
    new = share([layers[i] for i in moving], sum(counts[i] for i in moving))
    return [dict(zip(moving, new, strict=True)).get(i, n) for i, n in enumerate(counts)]


def _either(barred: Tensor | None, more: Tensor) -> Tensor:
    return more if barred is None else barred | more


def _choose(score: Score, layer: Layer, count: int, candidates: Tensor) -> Tensor:
    """The ``count`` best of the candidate units, ``(size,)`` bool."""
    if count == 0:
        return torch.zeros_like(candidates)
    if score is random:
        assert layer.generator is not None
        return sample(candidates, count, layer.generator)
    with _naming(layer, score):
        scores, among, places = layer.ranked(score(layer), candidates)
        chosen = top_k([scores], count, [among])[0]
    if places is None:
        return chosen
    return torch.zeros_like(candidates).index_fill_(0, places[chosen], True)


def _choose_in_groups(
    score: Score, layer: Layer, pattern: NM, counts: Tensor, candidates: Tensor
) -> Tensor:
    """The best ``counts`` candidates of every group, as a mask of the weight's shape."""
    with _naming(layer, score):
        values = pattern.group(score(layer), layer.layout)
        chosen = top_n_per_group(values, counts, candidates)
    return pattern.ungroup(chosen, layer.shape, layer.layout)


@contextmanager
def _naming(layer: Layer, score: Score) -> Iterator[None]:
    """Say of which layer the scores are not finite."""
    try:
        yield
    except NonFiniteScoreError:
        raise NonFiniteScoreError(
            f"{call_of(score)} of {layer.name} is not finite everywhere."
        ) from None


def _call(rule: drop | grow) -> str:
    """The call that makes a rule, without what is left at its default."""
    parts = [call_of(rule.score)]
    for field in dataclasses.fields(rule)[1:]:
        value = getattr(rule, field.name)
        if value != field.default:
            parts.append(f"{field.name}={call_of(value)}")
    return f"{type(rule).__name__}({', '.join(parts)})"
