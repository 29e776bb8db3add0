"""StaticSparse: a fixed mask from the first step to the last."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Layers, Rule, Score, Verb
from lightning_sparsity.core.method import Share
from lightning_sparsity.distributions import erk, fixes_total
from lightning_sparsity.rules import chain, drop
from lightning_sparsity.scores import random
from lightning_sparsity.structures import NM, Structure


class StaticSparse(MaskCallback):
    r"""Training on a fixed sparse topology, the baseline of all dynamic methods.

    The mask is drawn once, before the first step. Without a density it is read off the
    weights: what is zero stays zero, which continues from a sparse file.

    Args:
        density: Live share of all sparse weights, in (0, 1]; None: keep the zeros that
            the weights have, or the masks that an earlier callback made.
        score: What stays: ``random`` (default) or ``magnitude``.
        topology: A rule that places the live weights instead, such as ``spread_inputs``.
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default ERK.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        weight_init: Where this callback makes the masks: a rule for the start values of the
            live weights, such as
            ``rescale_to_fan_in`` (standard deviation times :math:`1/\sqrt{d}`, d the live
            share of the neuron's inputs) or ``sparse_kaiming_normal`` (Evci et al., 2022);
            None keeps the model's own.
        seed: Of the random mask; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range, or no density is given and no weight
            is zero.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[StaticSparse(density=0.1, weight_init=rescale_to_fan_in)])
    """

    entrywise = True

    def __init__(
        self,
        density: float | None = None,
        *,
        score: Score = random,
        topology: Rule | Verb | None = None,
        distribution: Mapping[str, float] | Distribution | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        weight_init: Rule | Verb | None = None,
        seed: int | None = None,
    ) -> None:
        self._keeps_zeros = density is None
        self._check_callable("weight_init", weight_init, "rescale_to_fan_in")
        self._check_callable("score", score, "magnitude", optional=False)
        self._check_callable("topology", topology, "spread_inputs")
        place = topology or drop(score)
        super().__init__(
            density=density,
            distribution=distribution,
            default_distribution=erk,
            initial=chain(place, weight_init) if weight_init else place,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
            role="initial",
        )

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make the masks, or read them off the weights; see the base class."""
        if share.found or not self._keeps_zeros or fixes_total(self._budget.distribution):
            return super().begin(layers, share)
        kept = [layer.with_units(layer.reduce(layer.weight != 0) > 0) for layer in layers]
        if any(layer.live < layer.size for layer in kept):
            for layer in kept:
                self._check_zeros(layer)
            return kept
        if self.density is not None:  # a pattern that no layer has yet
            return super().begin(layers, share)
        raise ValueError(
            "StaticSparse(density=None): no weight is zero, so there is no mask to keep; give a "
            "density, such as StaticSparse(density=0.1)."
        )

    @staticmethod
    def _check_zeros(layer: Layer) -> None:
        pattern = layer.structure
        if isinstance(pattern, NM) and (
            (pattern.group(layer.mask, layer.layout).sum(1) != pattern.n).any()
        ):
            raise ValueError(
                f"StaticSparse(structure={pattern!r}): {layer.name} has zeros, but not {pattern.n} "
                f"live weights in every {pattern.m}; leave structure out, or prune to the pattern "
                "with Magnitude."
            )
