"""The mask method of a round."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.distributions import fixes_total, global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import exponential
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import NM, Structure


class IMP(MaskCallback):
    """Holds the masks of a round, and prunes them after it; :func:`run_imp` adds it.

    The first round is dense; the masks of the others come with the checkpoint that they start
    from.

    Args:
        rounds: As for :func:`run_imp`, like all others.
        density: See there.
        drop_fraction: See there.
        distribution: See there.
        include: See there.
        exclude: See there.
        structure: See there.
        seed: See there.
    """

    def __init__(
        self,
        *,
        rounds: int | None = None,
        density: float | Sequence[float] | None = None,
        drop_fraction: float | None = None,
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self.densities: tuple[float, ...] | None = None
        if isinstance(density, Sequence) and not isinstance(density, str):
            self.densities = self._falling(density, rounds)
            rounds, density = len(self.densities), self.densities[-1]
        self._check_count("rounds", rounds)
        assert rounds is not None
        self.rounds = plain(rounds)
        by_name = isinstance(distribution, Mapping) or (
            distribution is not None and fixes_total(distribution)
        )
        fixed = by_name or isinstance(structure, NM)
        if drop_fraction is None and density is None and not fixed:
            drop_fraction = 0.2
        if drop_fraction is not None:
            self._check_number("drop_fraction", drop_fraction, 0, 1, inside=True)
            if density is not None or fixed:
                raise ValueError(
                    f"run_imp(drop_fraction={drop_fraction!r}): density, densities by name and "
                    "patterns say themselves how much is pruned; leave one of the two out."
                )
        self.drop_fraction = drop_fraction
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=global_by(magnitude),
            initial=drop(magnitude),
            ramp=None if drop_fraction is not None else exponential,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            role="initial",
        )

    def _falling(self, density: Sequence[float], rounds: int | None) -> tuple[float, ...]:
        """The densities of all rounds, checked."""
        for value in density:
            self._check("density", value, low_open=True)
        densities = tuple(plain(value) for value in density)
        falls = all(later <= sooner for sooner, later in itertools.pairwise(densities))
        if not densities or not falls:
            raise ValueError(
                f"run_imp(density={density!r}): densities of the rounds must fall, such as "
                "[0.5, 0.2, 0.1]."
            )
        if rounds is not None and rounds != len(densities):
            raise ValueError(
                f"run_imp(rounds={rounds!r}, density={density!r}): {len(densities)} densities are "
                f"for {len(densities)} rounds; leave rounds out."
            )
        return densities

    @property
    def _name(self) -> str:
        return "run_imp"

    @property
    def ramps(self) -> bool:
        """No: the density changes from round to round, not in one."""
        return False

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Begin dense."""
        self._budget.check_found(layers, share)
        return layers

    def prune(self, layers: Layers, turn: int) -> Layers:
        """Prune after a round.

        Args:
            layers: All layers, trained, with the masks of the round.
            turn: Number of this pruning, from 1.

        Returns:
            The layers with the masks of the next round.
        """
        sizes = {layer.name: layer.size for layer in layers}
        share = Share(tuple(sizes), (sum(sizes.values()),), 0, found=False, start=sizes)
        left = self._left(layers, turn)
        if left is None:
            budget = self._budget.on_the_way(layers, share, turn / self.rounds)
        else:
            here = dataclasses.replace(self._budget, density=left, ramp=None)
            budget = here.first(layers, share)
        return drop(magnitude)(layers, budget, turn / self.rounds)

    def _left(self, layers: Layers, turn: int) -> float | None:
        """The density after a pruning, where rounds do not prune equal shares up to the last."""
        if self.densities is not None:
            return self.densities[turn - 1]
        if self.drop_fraction is None:
            return None
        live = sum(layer.live for layer in layers)
        dropped = math.ceil(round(self.drop_fraction * live, 9))
        return max(live - dropped, 1) / sum(layer.size for layer in layers)
