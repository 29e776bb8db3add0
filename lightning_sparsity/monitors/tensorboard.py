"""TensorBoard: the page of charts, histograms of live weights, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

_BINS = 64


def writers(trainer: pl.Trainer) -> Iterator[Any]:
    """The summary writer of every TensorBoard logger; nothing off rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def layout() -> dict[str, dict[str, list[Any]]]:
    """Charts of the custom scalars page; a logger's prefix may stand before each tag."""
    charts = {
        "density": "(effective_)?density/total$",
        "density by layer": "density/(?!total$)",
        "churn: dropped by the last update / live before": "churn/",
        "ever live / all weights (in-time over-parameterisation)": "itop/",
        "FLOPs relative to dense": "flops/.*_ratio$",
        "share that an update drops": "drop_fraction/",
        "layers that collapsed": "collapse/",
    }
    return {
        "sparsity": {
            title: ["Multiline", [f"(.*-)?{pattern}"]] for title, pattern in charts.items()
        }
    }


def write_histogram(writer: Any, tag: str, values: Tensor, step: int) -> None:
    """Write a histogram from bins that were counted where the values are.

    Args:
        writer: A summary writer.
        tag: Name of the histogram.
        values: What to count; values that are not finite are left out.
        step: On the horizontal axis.
    """
    values = values.float()
    values = values[values.isfinite()]
    if not len(values):
        return
    low, high = (float(x) for x in values.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    # Not torch.histc, which Trainer(deterministic=True) forbids on a GPU.
    bins = ((values - low) * (_BINS / (high - low))).long().clamp(max=_BINS - 1)
    counts = torch.bincount(bins, minlength=_BINS)
    writer.add_histogram_raw(
        tag,
        min=low,
        max=high,
        num=len(values),
        sum=float(values.sum()),
        sum_squares=float(values.square().sum()),
        bucket_limits=torch.linspace(low, high, _BINS + 1)[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def write_text(writer: Any, tag: str, text: str, step: int) -> None:
    """Write a table so that its columns stay aligned."""
    writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
