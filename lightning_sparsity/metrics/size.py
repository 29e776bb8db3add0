"""Metrics of size: bits that are stored, and accuracy per parameter."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparsity.metrics.base import MaskMetric
from lightning_sparsity.metrics.sources import Source, masks_of, weights_of

Storage = Literal["bitmap", "coo", "delta", "csr"]
"""How the places of live weights are stored, see :func:`index_bits`."""

_STORAGES = ("bitmap", "coo", "delta", "csr")


class CompressionRatio(MaskMetric):
    r"""Bits of the dense weights / bits of the live ones and of their places.

    :math:`n k / (m k + i)` for :math:`n` weights of :math:`k` bits, :math:`m` of them live, whose
    places take :math:`i` bits (:func:`index_bits`). A weight is stored as a matrix whose rows
    are along its first dimension.

    Args:
        storage: "bitmap" (a bit per weight), "coo" (flat positions), "delta" (distances to the
            live weight before) or "csr" (a column each, and where every row begins).
        value_bits: :math:`k`, bits per value.
        max_gap: For "delta": larger distances are bridged by stored zeros; None: the largest
            distance of a weight sets the bits of all of its distances.
        kwargs: As for any ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> CompressionRatio("bitmap")({"a": torch.arange(32) < 8})  # 32 * 32 / (8 * 32 + 32)
        tensor(3.5556)
    """

    dense: Tensor
    stored: Tensor

    def __init__(
        self,
        storage: Storage = "csr",
        *,
        value_bits: int = 32,
        max_gap: int | None = None,
        **kwargs: Any,
    ) -> None:
        if storage not in _STORAGES:
            raise ValueError(
                f"CompressionRatio(storage={storage!r}): must be one of {', '.join(_STORAGES)}."
            )
        if type(value_bits) is not int or value_bits < 1:
            raise ValueError(
                f"CompressionRatio(value_bits={value_bits!r}): must be a positive number of bits."
            )
        if max_gap is not None and (type(max_gap) is not int or max_gap < 1):
            raise ValueError(
                f"CompressionRatio(max_gap={max_gap!r}): must be a positive distance, or None."
            )
        if max_gap is not None and storage != "delta":
            raise ValueError(
                f"CompressionRatio(storage={storage!r}, max_gap={max_gap}): only delta storage "
                "has gaps; leave max_gap out."
            )
        super().__init__(**kwargs)
        self.storage = storage
        self.value_bits = value_bits
        self.max_gap = max_gap
        self._add_counts("dense", "stored")

    def update(self, source: Source) -> None:
        """Look at a model or its masks."""
        for mask in masks_of(source).values():
            self.dense += mask.numel() * self.value_bits
            self.stored += self._bits(mask)

    def compute(self) -> Tensor:
        """A ratio; 1 if there are no weights, infinite if nothing is stored."""
        return torch.where(self.dense > 0, self.dense / self.stored, 1.0)

    def _bits(self, mask: Tensor) -> int:
        rows = len(mask) if mask.ndim else 1
        live, gap = int(mask.count_nonzero()), 1
        if self.storage == "delta" and live:
            places = mask.reshape(-1).nonzero().reshape(-1)
            gaps = places.diff(prepend=places.new_tensor([-1]))
            gap = self.max_gap or int(gaps.max())
            live += int(((gaps - 1) // gap).sum())
        places_bits = index_bits(
            self.storage,
            weights=mask.numel(),
            live=live,
            rows=rows,
            columns=mask.numel() // max(rows, 1),
            gap=gap,
        )
        return live * self.value_bits + places_bits


def index_bits(
    storage: Storage, *, weights: int, live: int, rows: int, columns: int, gap: int = 1
) -> int:
    r"""Bits that the places of the live weights of a matrix take.

    With :math:`\lg = \lceil \log_2 \rceil`, :math:`n` weights and :math:`m` of them live
    (Hoefler et al., 2021, arXiv:2102.00554, Sec. 2.2): "bitmap" :math:`n`, "coo"
    :math:`m \lg n`, "csr" :math:`m \lg(columns) + rows \lg m`, "delta" :math:`m \lg(gap)`.

    Args:
        storage: One of these.
        weights: Live or not.
        live: Live weights; for "delta" with the zeros that are stored to bridge larger gaps.
        rows: Of the matrix.
        columns: Of the matrix.
        gap: Largest distance from one live weight to the next, row by row, for "delta".

    Example:
        >>> index_bits("csr", weights=235200, live=11760, rows=300, columns=784)
        121800
    """
    if storage == "bitmap":
        return weights
    if storage == "coo":
        return live * _lg(weights)
    if storage == "csr":
        return live * _lg(columns) + rows * _lg(live)
    return live * _lg(gap)


class ParameterEfficiency(Metric):
    r"""Accuracy in per cent / million parameters that are not pruned.

    Of a model all that is no sparse weight counts in full: biases, normalisation and the like.
    Masks alone count their live weights, and nothing else. Accuracy is that of the predicted
    classes, over all ranks; where the number of parameters changes between updates, its mean
    over the samples counts.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> preds, target = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
        >>> ParameterEfficiency()(preds, target, 3_000_000)  # 75 % with 3 million
        tensor(25.)
    """

    is_differentiable = False
    full_state_update = False
    correct: Tensor
    samples: Tensor
    parameters_seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "samples", "parameters_seen"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, source: Source | int) -> None:
        """Count a batch.

        Args:
            preds: Classes, ``(samples,)``, or scores of the classes, ``(samples, classes)``.
            target: Classes, ``(samples,)``.
            source: A model, its masks, or a number of parameters.

        Raises:
            ValueError: If the shapes do not fit.
        """
        classes = preds.argmax(1) if preds.ndim == 2 else preds
        if target.ndim != 1 or classes.shape != target.shape:
            raise ValueError(
                f"preds of shape {tuple(preds.shape)}, target of shape {tuple(target.shape)}: "
                "needs (samples,) or (samples, classes), and (samples,)."
            )
        self.correct += int((classes == target).count_nonzero())
        self.samples += len(target)
        self.parameters_seen += len(target) * _parameters(source)

    def compute(self) -> Tensor:
        """Per cent per million."""
        samples = max(int(self.samples), 1)
        return self._per_million(int(self.correct) / samples, int(self.parameters_seen) / samples)

    def at(self, accuracy: float, source: Source | int) -> Tensor:
        """The value for an accuracy that was measured elsewhere; changes nothing.

        Args:
            accuracy: In [0, 1].
            source: A model, its masks, or a number of parameters.

        Raises:
            ValueError: If the accuracy is out of range.

        Example:
            >>> ParameterEfficiency().at(0.75, 3_000_000)
            tensor(25.)
        """
        parameters = _parameters(source)
        if not 0 <= accuracy <= 1:
            raise ValueError(
                f"{type(self).__name__}.at(accuracy={accuracy!r}): must lie in [0, 1]; 76.1 % are "
                "0.761."
            )
        return self._per_million(accuracy, parameters)

    def _per_million(self, accuracy: float, parameters: float) -> Tensor:
        value = self._worth(accuracy) / (parameters / 1e6) if parameters else math.inf
        return torch.tensor(value, device=self.correct.device)

    def _worth(self, accuracy: float) -> float:
        return 100 * accuracy


class HardnessNormalizedEfficiency(ParameterEfficiency):
    r"""As :class:`ParameterEfficiency`, with an accuracy that says how hard it was to get.

    The accuracy :math:`a` in [0, 1] becomes :math:`\exp((50000 a - 30908) / 5704.7)`, and is
    divided by million parameters (Hoefler et al., 2021, arXiv:2102.00554, Sec. 8.7). The
    numbers are a fit to networks on ImageNet, and mean something for top-1 accuracy there.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> preds = torch.arange(1000)
        >>> target = torch.where(preds < 761, preds, -1)  # 76.1 % right
        >>> HardnessNormalizedEfficiency()(preds, target, 25_600_000)
        tensor(0.1366)
    """

    def _worth(self, accuracy: float) -> float:
        return math.exp((50_000 * accuracy - 30_908) / 5704.7)


def _parameters(source: Source | int) -> int:
    """Parameters that are not pruned."""
    if isinstance(source, int):
        return source
    masks = masks_of(source).values()
    live = sum(int(mask.count_nonzero()) for mask in masks)
    if not isinstance(source, nn.Module):
        return live
    sparse = {id(parameter) for _, parameter, _, _ in weights_of(source)}
    return live + sum(p.numel() for p in source.parameters() if id(p) not in sparse)


def _lg(count: int) -> int:
    r""":math:`\lceil \log_2 count \rceil`, 0 for none."""
    return max(count - 1, 0).bit_length()
