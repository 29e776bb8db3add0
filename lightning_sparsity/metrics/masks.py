"""Metrics of masks: how many weights live, on what paths, and how masks differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparsity import connectivity
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.metrics.base import MaskMetric, share
from lightning_sparsity.metrics.sources import Source, live_masks, masks_of


class Density(MaskMetric):
    """Live weights / weights.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> Density()({"a": torch.tensor([True, False, False, False])})
        tensor(0.2500)
    """

    live: Tensor
    weights: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_counts("live", "weights")

    def update(self, source: Source) -> None:
        """Look at a model or its masks."""
        masks = masks_of(source).values()
        self.live += sum(int(mask.count_nonzero()) for mask in masks)
        self.weights += sum(mask.numel() for mask in masks)

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        return share(self.live, self.weights, empty=1.0)


class EffectiveDensity(MaskMetric):
    """Live weights on a path from input to output / weights.

    What counts as a path, and how far it can be read off a model, is said in
    :mod:`lightning_sparsity.connectivity`. Masks without a model are read as layers that
    follow each other in the order given, convolutions as having one group.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> first = torch.tensor([[True, True], [False, False]])
        >>> second = torch.tensor([[True, True]])
        >>> EffectiveDensity()({"fc1": first, "fc2": second})
        tensor(0.5000)
    """

    effective: Tensor
    weights: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_counts("effective", "weights")

    def update(self, source: Source) -> None:
        """Look at a model or its masks."""
        masks = masks_of(source)
        found = connectivity.wiring(_layers(source, masks))
        self.effective += sum(
            found[name].effective if name in found else int(mask.count_nonzero())
            for name, mask in masks.items()
        )
        self.weights += sum(mask.numel() for mask in masks.values())

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        return share(self.effective, self.weights, empty=1.0)


class MaskSimilarity(MaskMetric):
    r"""How much two masks of the same weights agree.

    - "jaccard": :math:`|A \cap B| / |A \cup B|`; of masks drawn at random
      :func:`expected_jaccard`.
    - "hamming": share of all weights in which they differ; 0 if equal.
    - "overlap": :math:`|A \cap B| / |A|`, what is left of the first.

    Args:
        kind: One of these.
        to: What an update with a single source compares it with: the masks of the "first"
            update, those of the "last" one before, or a model or masks, say of another seed.
            An update without anything to compare with only looks. ``reset`` forgets the
            counts, not these masks.
        kwargs: As for any ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``kind`` or ``to`` is another.

    Example:
        >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
        >>> MaskSimilarity("overlap")({"w": a}, {"w": b})
        tensor(0.5000)
        >>> MaskSimilarity("jaccard", to={"w": a})({"w": b})
        tensor(0.3333)
    """

    first: Tensor
    both: Tensor
    either: Tensor
    weights: Tensor

    def __init__(
        self,
        kind: Literal["jaccard", "hamming", "overlap"] = "jaccard",
        *,
        to: Literal["first", "last"] | Source = "first",
        **kwargs: Any,
    ) -> None:
        if kind not in ("jaccard", "hamming", "overlap"):
            raise ValueError(f"MaskSimilarity(kind={kind!r}): must be jaccard, hamming or overlap.")
        given = isinstance(to, nn.Module | Mapping | Masks)
        if not given and to not in ("first", "last"):
            raise ValueError(
                f'MaskSimilarity(to={to!r}): must be "first", "last", or a model or its masks.'
            )
        super().__init__(**kwargs)
        self.kind = kind
        self.reference = live_masks(to) if isinstance(to, nn.Module | Mapping | Masks) else to
        self._add_counts("first", "both", "either", "weights")

    def update(self, a: Source, b: Source | None = None) -> None:
        """Compare two models or their masks, or one with what ``to`` says.

        Args:
            a: The first, such as an earlier :func:`live_masks`.
            b: The second, such as the model now; None: ``a`` is, and the first is that of ``to``.

        Raises:
            ValueError: If they are not of the same weights.
        """
        if b is not None:
            self._compare(masks_of(a), masks_of(b))
            return
        now = masks_of(a)
        before = self._past if isinstance(self.reference, str) else self.reference
        if before:
            self._compare(before, now)
        if self.reference == "last" or not before:
            self._past = {name: mask.clone() for name, mask in now.items()}

    def _compare(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        _check_same(ours, theirs)
        for name, mask in ours.items():
            other = theirs[name].to(mask.device)
            self.first += int(mask.count_nonzero())
            self.both += int((mask & other).count_nonzero())
            self.either += int((mask | other).count_nonzero())
            self.weights += mask.numel()

    def compute(self) -> Tensor:
        """A share; masks without a live weight are alike."""
        if self.kind == "hamming":
            return share(self.either - self.both, self.weights, empty=0.0)
        whole = self.either if self.kind == "jaccard" else self.first
        return share(self.both, whole, empty=1.0)


class Churn(MaskMetric):
    """Weights that died since the update before / weights that were live then.

    The first update only looks. ``reset`` forgets the counts, not the masks last seen, so that
    a change from one epoch to the next is counted too.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> churn = Churn()
        >>> churn.update({"w": torch.tensor([True, True, False, False])})
        >>> churn({"w": torch.tensor([True, False, True, False])})
        tensor(0.5000)
    """

    dropped: Tensor
    before: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_counts("dropped", "before")

    def update(self, source: Source) -> None:
        """Compare a model or its masks with those of the update before.

        Raises:
            ValueError: If they are not of the same weights.
        """
        masks = masks_of(source)
        if self._past:
            _check_same(self._past, masks)
        for name, last in self._past.items():
            self.before += int(last.count_nonzero())
            self.dropped += int((last & ~masks[name].to(last.device)).count_nonzero())
        self._past = {name: mask.clone() for name, mask in masks.items()}

    def compute(self) -> Tensor:
        """A share; 0 before there is anything to compare."""
        return share(self.dropped, self.before, empty=0.0)


class ITOP(MaskMetric):
    r"""In-time over-parameterisation: weights live at any update / weights.

    :math:`R_s` of Liu et al., 2021 (arXiv:2102.02887). A metric object that Lightning logs by
    epoch is reset at the end of it; log the value to see the rate of the whole training, as
    in ``self.log("itop", self.itop(self))``. ``DensityMonitor`` also keeps it over a resumption.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> itop = ITOP()
        >>> itop.update({"w": torch.tensor([True, False, False, False])})
        >>> itop({"w": torch.tensor([False, True, False, False])})
        tensor(0.5000)
    """

    def update(self, source: Source) -> None:
        """Note what is live.

        Raises:
            ValueError: If the weights are not those of the updates before.
        """
        masks = masks_of(source)
        if self._past:
            _check_same(self._past, masks)
        for name, mask in masks.items():
            seen = self._past.get(name)
            self._past[name] = mask.clone() if seen is None else seen.to(mask.device) | mask

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        ever = sum(int(mask.count_nonzero()) for mask in self._past.values())
        weights = sum(mask.numel() for mask in self._past.values())
        return torch.tensor(ever / weights if weights else 1.0, device=self.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The rate with this update: there is none of a single one."""
        self.update(*args, **kwargs)
        rate = self.compute()
        self._forward_cache = rate  # type: ignore[assignment]  # what Lightning logs
        return rate

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self._past = {}


def expected_jaccard(p: float, q: float) -> float:
    r"""Mean Jaccard similarity of two large masks that are drawn at random.

    :math:`pq / (p + q - pq)`: what a :class:`MaskSimilarity` has to be compared with.

    Args:
        p: Density of one mask, in [0, 1].
        q: Density of the other, in [0, 1].

    Returns:
        In [0, 1]; 1 if both are empty.

    Raises:
        ValueError: If a density is out of range.

    Example:
        >>> round(expected_jaccard(0.1, 0.1), 4)
        0.0526
    """
    for name, density in (("p", p), ("q", q)):
        if not 0 <= density <= 1:
            raise ValueError(f"expected_jaccard({name}={density!r}): must lie in [0, 1].")
    either = p + q - p * q
    return p * q / either if either else 1.0


def _layers(source: Source, masks: dict[str, Tensor]) -> Iterable[connectivity.Masked | None]:
    if isinstance(source, nn.Module):
        return connectivity.layers_of(source, masks)
    found = (
        [
            Layer(kept.name, masks[kept.name], masks[kept.name], layout=kept.layout)
            for kept in source
        ]
        if isinstance(source, Masks)
        else [Layer(name, mask, mask) for name, mask in masks.items()]
    )
    return [layer if layer.mask.ndim > 1 else None for layer in found]


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    odd = [
        name
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if odd:
        raise ValueError(f"masks of different weights: {', '.join(odd)}; compare the same model.")
