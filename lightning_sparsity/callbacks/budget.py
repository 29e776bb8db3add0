"""Budgeter: how many units of each layer a method asks for, at its start and on its way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lightning_sparsity.core.apportion import apportion, fill, shares
from lightning_sparsity.core.layer import (
    Distribution,
    Layer,
    Layers,
    Ramp,
    call_of,
    density_of,
    errors_of,
)
from lightning_sparsity.core.method import Share
from lightning_sparsity.distributions import fixes_total, is_exact, uniform, unmatched
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.scores import needs_gradient
from lightning_sparsity.structures import NM


@dataclass(frozen=True)
class Budgeter:
    """Live units per layer, from what a method was given and what it finds.

    Args:
        name: Of the method, for messages.
        density: What it should arrive at; None if found masks or the distribution say it.
        given: The distribution that the user gave, if any.
        default: The method's own.
        initial_density: Where a ramp starts on fresh weights.
        ramp: How the density goes from its start to its end; None: it stays.
        only_prunes: Whether the method can never grow.
    """

    name: str
    density: float | None
    given: Distribution | None
    default: Distribution
    initial_density: float
    ramp: Ramp | None
    only_prunes: bool

    @property
    def distribution(self) -> Distribution:
        """What splits the density over the layers."""
        return self.given or self.default

    # -------------------------------------------------------------------------- counts

    def first(self, layers: Layers, share: Share) -> list[int]:
        """Live units per layer when the method begins."""
        if self.ramp is not None and fixes_total(self.distribution):
            return uniform(layers, _part(self.initial_density, layers, share))
        density = self.density if self.ramp is None else self.initial_density
        if density is None:
            density = density_of(layers) if share.found else 1.0
        start = {layer.name: layer.live for layer in layers}
        like = start if share.found and self.given is None else None
        there = layers if self.only_prunes else _all_live(layers)
        return self._counts(there, density, _part(density, layers, share), like)

    def on_the_way(self, layers: Layers, share: Share, progress: float) -> list[int]:
        """Live units per layer where the ramp has come to, ``progress`` in [0, 1]."""
        assert self.ramp is not None
        start = [share.start[layer.name] for layer in layers]
        if fixes_total(self.distribution):
            left = 2 * self.ramp(1.0, 0.5)(progress) - 1  # 1 at the start, 0 at the end
            wanted = [b + (a - b) * left for a, b in zip(start, self._fixed(layers), strict=True)]
            most = [layer.live if self.only_prunes else layer.size for layer in layers]
            return [min(round(n), limit) for n, limit in zip(wanted, most, strict=True)]
        assert self.density is not None
        began = sum(start) / _size(layers) if share.found else self.initial_density
        now = self.ramp(began, self.density)(progress)
        like = share.start if share.found and self.given is None else None
        return self._counts(layers, now, _part(now, layers, share), like)

    def _fixed(self, layers: Layers) -> list[int]:
        """What a distribution says that sets the total itself."""
        return self._counts(_all_live(layers), 1.0, 0, None)

    def _counts(
        self, layers: Layers, density: float, total: int, like: Mapping[str, int] | None
    ) -> list[int]:
        """Live units per layer: ``total`` by the distribution, or in proportion to ``like``."""
        limited = {layer.name: _in_groups(layer, density) for layer in layers if _is_limited(layer)}
        if limited:
            free = [layer for layer in layers if layer.name not in limited]
            rest = self._counts(free, density, round(density * _size(free)), like) if free else []
            counts = {**limited, **dict(zip((layer.name for layer in free), rest, strict=True))}
            return [counts[layer.name] for layer in layers]
        if total > _live(layers):  # to grow: every position has room
            layers = _all_live(layers)
        if total == _live(layers) and is_exact(self.distribution):  # nothing to rank yet
            return [layer.live for layer in layers]
        if like is None:
            return self._distributed(layers, total)
        capacity = [layer.live for layer in layers]
        ideal = fill([like[layer.name] for layer in layers], capacity, total)
        return apportion(ideal, capacity, total)

    def _distributed(self, layers: Layers, total: int) -> list[int]:
        """What the distribution says, checked: it may be the user's."""
        with errors_of(self.name):
            made: Any = self.distribution(layers, total)
        counts: list[Any] = list(made) if isinstance(made, Iterable) else [made]
        fits = len(counts) == len(layers) and all(
            isinstance(n, int) and 0 <= n <= layer.live
            for n, layer in zip(counts, layers, strict=False)
        )
        if not fits or (is_exact(self.distribution) and sum(counts) != total):
            raise ValueError(
                f"{self.name}: {call_of(self.distribution)} gave {counts} for "
                f"{[layer.name for layer in layers]}; a distribution gives one int per layer, from "
                f"0 to {[layer.live for layer in layers]}, {total} in all."
            )
        return counts

    # -------------------------------------------------------------------------- checks

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` if the density cannot be reached; says what is the most."""
        asked = self.density is not None or fixes_total(self.distribution)
        if asked:
            density, everything = 1.0 if self.density is None else self.density, _all_live(layers)
            errors: list[type[Exception]] = [
                KeyError
            ]  # a slot is not filled yet: ranks, can be met
            if needs_gradient(self.distribution):  # there is none yet: other numbers take its place
                everything = [dataclasses.replace(n, grad=n.weight) for n in everything]
                errors.append(NonFiniteScoreError)
            with suppress(*errors):
                self._counts(everything, density, round(density * _size(layers)), None)

    def check_found(self, layers: Layers, share: Share) -> None:
        """Raise ``ValueError`` if what was given contradicts itself or the layers."""
        if typos := unmatched(self.distribution, share.names):
            raise ValueError(
                f"{self.name}(distribution={call_of(self.distribution)}): {typos[0]!r} matches no "
                f"sparse layer; they are {', '.join(share.names)}."
            )
        if not fixes_total(self.distribution):
            return
        fixed = self._fixed(layers)
        size = _size(layers)
        if self.density is not None and abs(sum(fixed) - self.density * size) > len(layers):
            raise ValueError(
                f"{self.name}(density={self.density}): {call_of(self.distribution)} fixes the "
                f"density at {sum(fixed) / size:.4g}; leave one of the two out."
            )
        for layer, end in zip(layers, fixed, strict=True):
            if share.found and self.only_prunes and end > layer.live:
                raise ValueError(
                    f"{self.name}(distribution={call_of(self.distribution)}) only prunes, and "
                    f"{layer.name} has {layer.live} live units where {end} are asked for."
                )


def _size(layers: Layers) -> int:
    return sum(layer.size for layer in layers)


def _live(layers: Layers) -> int:
    return sum(layer.live for layer in layers)


def _all_live(layers: Layers) -> Layers:
    return [dataclasses.replace(layer, mask=torch.ones_like(layer.mask)) for layer in layers]


def _is_limited(layer: Layer) -> bool:
    return isinstance(layer.structure, NM)


def _in_groups(layer: Layer, density: float) -> int:
    """Live weights of a layer whose pattern has ``ceil(density * m)`` in every group."""
    assert isinstance(layer.structure, NM)
    per_group = max(1, math.ceil(round(density * layer.structure.m, 9)))
    return layer.size // layer.structure.m * per_group


def _part(density: float, layers: Layers, share: Share) -> int:
    """Integer share of ``density`` of all units that falls to the layers of one optimizer."""
    size = _size(layers)
    if size != share.sizes[share.index]:  # not all of them are here
        return max(1, round(density * size))
    total = max(len(share.sizes), round(density * sum(share.sizes)))
    return shares(total, share.sizes)[share.index]
