r"""Metrics of sparse models, for torchmetrics: on masks, models or whatever has been pruned.

Each takes a *source*: a model, ``{name: mask}``, or the ``Masks`` of a fit. Of a model that is
being trained by a sparsity callback the masks count, also where a live weight is zero just
now; of any other model the linear and convolutional weights, live where they are not zero.

A metric sums up over its updates, so that ``compute`` gives a mean over them; called like a
function it gives the value of that call. Masks and gradients are the same on every rank, so
that only accuracies are added up over ranks. None adds anything to a ``state_dict``.

Example::

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.ratio = CompressionRatio("csr")
            ...

        def on_train_epoch_end(self):
            self.log("compression", self.ratio(self))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparsity import connectivity
from lightning_sparsity.core.filters import candidates, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.shards import whole

__all__ = [
    "ITOP",
    "Churn",
    "CompressionRatio",
    "Density",
    "EffectiveDensity",
    "GradientFlow",
    "HardnessNormalizedEfficiency",
    "MaskSimilarity",
    "ParameterEfficiency",
    "index_bits",
    "live_masks",
]

Source = nn.Module | Mapping[str, Tensor] | Masks
"""A model, its masks by name (shape of the weight, bool), or the masks of a fit."""

Storage = Literal["bitmap", "coo", "delta", "csr"]
"""How the places of live weights are stored, see :func:`index_bits`."""

_STORAGES = ("bitmap", "coo", "delta", "csr")


def live_masks(source: Source) -> dict[str, Tensor]:
    """The masks of a model at this moment, as copies.

    Args:
        source: A model or its masks.

    Returns:
        Masks by plain parameter name, shape of the weight, bool.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 3.0]]))
        >>> live_masks(model)
        {'0.weight': tensor([[False,  True]])}
    """
    return {name: mask.clone() for name, mask in _masks(source).items()}


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


class _MaskMetric(Metric):
    """Base of metrics that are the same on every rank and need no gradient.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})

    def _add_counts(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")


class Density(_MaskMetric):
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
        masks = _masks(source).values()
        self.live += sum(int(mask.count_nonzero()) for mask in masks)
        self.weights += sum(mask.numel() for mask in masks)

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        return _share(self.live, self.weights, empty=1.0)


class EffectiveDensity(_MaskMetric):
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
        masks = _masks(source)
        found = connectivity.wiring(_layers(source, masks))
        self.effective += sum(
            found[name].effective if name in found else int(mask.count_nonzero())
            for name, mask in masks.items()
        )
        self.weights += sum(mask.numel() for mask in masks.values())

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        return _share(self.effective, self.weights, empty=1.0)


class CompressionRatio(_MaskMetric):
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
        for mask in _masks(source).values():
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


class MaskSimilarity(_MaskMetric):
    r"""How much two masks of the same weights agree.

    - "jaccard": :math:`|A \cap B| / |A \cup B|`. Masks drawn at random with densities :math:`p`
      and :math:`q` have :math:`pq / (p + q - pq)` on average.
    - "hamming": share of all weights in which they differ; 0 if equal.
    - "overlap": :math:`|A \cap B| / |A|`, what is left of the first.

    Args:
        kind: One of these.
        kwargs: As for any ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``kind`` is another.

    Example:
        >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
        >>> MaskSimilarity("overlap")({"w": a}, {"w": b})
        tensor(0.5000)
    """

    first: Tensor
    both: Tensor
    either: Tensor
    weights: Tensor

    def __init__(
        self, kind: Literal["jaccard", "hamming", "overlap"] = "jaccard", **kwargs: Any
    ) -> None:
        if kind not in ("jaccard", "hamming", "overlap"):
            raise ValueError(f"MaskSimilarity(kind={kind!r}): must be jaccard, hamming or overlap.")
        super().__init__(**kwargs)
        self.kind = kind
        self._add_counts("first", "both", "either", "weights")

    def update(self, a: Source, b: Source) -> None:
        """Compare two models or their masks, such as an earlier :func:`live_masks` and now.

        Raises:
            ValueError: If they are not of the same weights.
        """
        ours, theirs = _masks(a), _masks(b)
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
            return _share(self.either - self.both, self.weights, empty=0.0)
        whole = self.either if self.kind == "jaccard" else self.first
        return _share(self.both, whole, empty=1.0)


class Churn(_MaskMetric):
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
        self._last: dict[str, Tensor] = {}

    def update(self, source: Source) -> None:
        """Compare a model or its masks with those of the update before.

        Raises:
            ValueError: If they are not of the same weights.
        """
        masks = _masks(source)
        if self._last:
            _check_same(self._last, masks)
        for name, last in self._last.items():
            self.before += int(last.count_nonzero())
            self.dropped += int((last & ~masks[name].to(last.device)).count_nonzero())
        self._last = {name: mask.clone() for name, mask in masks.items()}

    def compute(self) -> Tensor:
        """A share; 0 before there is anything to compare."""
        return _share(self.dropped, self.before, empty=0.0)


class ITOP(_MaskMetric):
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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ever: dict[str, Tensor] = {}

    def update(self, source: Source) -> None:
        """Note what is live.

        Raises:
            ValueError: If the weights are not those of the updates before.
        """
        masks = _masks(source)
        if self._ever:
            _check_same(self._ever, masks)
        for name, mask in masks.items():
            seen = self._ever.get(name)
            self._ever[name] = mask.clone() if seen is None else seen.to(mask.device) | mask

    def compute(self) -> Tensor:
        """A share; 1 if there are no weights."""
        ever = sum(int(mask.count_nonzero()) for mask in self._ever.values())
        weights = sum(mask.numel() for mask in self._ever.values())
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
        self._ever = {}


class ParameterEfficiency(Metric):
    r"""Accuracy in per cent / million parameters that are not pruned.

    Everything that is no sparse weight counts in full: biases, normalisation and the like.
    Accuracy is that of the predicted classes, over all ranks; where the number of parameters
    changes between updates, its mean over the samples counts.

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
        return self._per_million(100 * self._accuracy)

    @property
    def _accuracy(self) -> float:
        return int(self.correct) / max(int(self.samples), 1)

    def _per_million(self, value: float) -> Tensor:
        millions = int(self.parameters_seen) / max(int(self.samples), 1) / 1e6
        return torch.tensor(value / millions if millions else math.inf, device=self.correct.device)


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

    def compute(self) -> Tensor:
        """Hardness per million."""
        return self._per_million(math.exp((50_000 * self._accuracy - 30_908) / 5704.7))


class GradientFlow(_MaskMetric):
    r"""Norm of the gradient, :math:`\lVert g \rVert_2`, of the live or of all sparse weights.

    Update it where gradients are, in ``on_before_optimizer_step``: there gradients of a
    ``LightningModule`` are unscaled and, under a sparsity callback, already masked, so that
    ``live=False`` shows more only where nothing masks them. Weights without gradient are
    left out.

    Args:
        live: Whether to leave out what is off the masks.
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> GradientFlow()(layer), GradientFlow(live=False)(layer)
        (tensor(4.), tensor(5.))
    """

    norms: Tensor
    updates: Tensor

    def __init__(self, *, live: bool = True, **kwargs: Any) -> None:
        if not isinstance(live, bool):
            raise TypeError(f"GradientFlow(live={live!r}): must be True or False.")
        super().__init__(**kwargs)
        self.live = live
        self.add_state("norms", torch.zeros(()), dist_reduce_fx="sum")
        self._add_counts("updates")

    def update(self, source: nn.Module | Masks) -> None:
        """Look at the gradients of a model."""
        weights = _weights(source)
        norms = [
            torch.linalg.vector_norm((grad[mask] if self.live else grad).float())
            for name, mask in _masks(source).items()
            if (grad := weights[name].grad) is not None
        ]
        if norms:
            self.norms += torch.linalg.vector_norm(torch.stack(norms)).to(self.norms.device)
        self.updates += 1

    def compute(self) -> Tensor:
        """Mean of the norms over the updates."""
        return self.norms / self.updates.clamp(min=1)


# -------------------------------------------------------------------------------- sources


def _masks(source: Source) -> dict[str, Tensor]:
    """The masks of a source themselves, by name."""
    if isinstance(source, Mapping):
        for name, mask in source.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name} is {mask.dtype}; torch.bool is needed.")
        return dict(source)
    kept = _kept(source)
    if kept is not None:
        return {one.name: whole(one.mask) for one in kept}
    assert isinstance(source, nn.Module)
    return {c.name: c.parameter.detach() != 0 for c in candidates(source) if linear_and_conv(c)}


def _kept(source: nn.Module | Masks) -> Masks | None:
    """The masks of a fit, if there are any."""
    if isinstance(source, Masks):
        return source
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"{type(source).__name__} is no model; give a torch module, masks by name, or Masks."
        )
    trainer = source._trainer if isinstance(source, pl.LightningModule) else None
    if trainer is None or trainer.lightning_module is not source:
        return None
    keeper = MaskKeeper.of(trainer)
    return keeper.masks if keeper is not None and keeper.masks else None


def _weights(source: nn.Module | Masks) -> dict[str, nn.Parameter]:
    kept = _kept(source)
    if kept is not None:
        return {one.name: one.parameter for one in kept}
    assert isinstance(source, nn.Module)
    return {c.name: c.parameter for c in candidates(source)}


def _layers(source: Source, masks: dict[str, Tensor]) -> Iterable[connectivity.Masked | None]:
    if isinstance(source, nn.Module):
        return connectivity.layers_of(source, masks)
    if isinstance(source, Masks):
        return [kept if kept.mask.ndim > 1 else None for kept in source]
    return [Layer(name, mask, mask) if mask.ndim > 1 else None for name, mask in masks.items()]


def _parameters(source: Source | int) -> int:
    """Parameters that are not pruned."""
    if isinstance(source, int):
        return source
    masks = _masks(source).values()
    live = sum(int(mask.count_nonzero()) for mask in masks)
    if not isinstance(source, nn.Module):
        return live
    others = sum(p.numel() for p in source.parameters()) - sum(mask.numel() for mask in masks)
    return live + others


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    odd = [
        name
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if odd:
        raise ValueError(f"masks of different weights: {', '.join(odd)}; compare the same model.")


def _share(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    return torch.where(whole > 0, part / whole, empty)


def _lg(count: int) -> int:
    r""":math:`\lceil \log_2 count \rceil`, 0 for none."""
    return max(count - 1, 0).bit_length()
