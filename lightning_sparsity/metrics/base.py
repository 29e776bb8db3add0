"""What metrics of masks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sparsity.ops.packing import pack, unpack


class MaskMetric(Metric):
    """Base of metrics that are the same on every rank and need no gradient.

    Args:
        kwargs: As for any ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})
        self._past: dict[str, Tensor] = {}

    def past(self) -> dict[str, Any]:
        """The masks that it remembers, for a file: tensors at one bit per weight, and shapes."""
        return {
            name: {"shape": tuple(mask.shape), "mask": pack(mask).cpu()}
            for name, mask in self._past.items()
        }

    def recall(self, past: Mapping[str, Any]) -> None:
        """Remember what :meth:`past` gave, and nothing else."""
        self._past = {name: unpack(saved["mask"], saved["shape"]) for name, saved in past.items()}

    def _add_counts(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")


def share(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    """``part / whole``, or ``empty`` of nothing."""
    return torch.where(whole > 0, part / whole, empty)
