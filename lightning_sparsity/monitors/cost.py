"""Costs: the FLOPs of a training so far, and how long its batches took."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_sparsity.flops import Flops


class TrainingCost:
    """Adds up the training FLOPs of batches, sparse and as a dense model would need.

    Args:
        flops: Of the model; None as long as they are not known.
    """

    def __init__(self, flops: Flops | None = None) -> None:
        self.flops = flops
        self._spent = 0.0
        self._batches = 0

    @property
    def spent(self) -> float:
        """Training FLOPs per sample, mean over the batches so far."""
        return self._spent / self._batches

    def add(self, densities: Mapping[str, float], dense: Mapping[str, int]) -> None:
        """Add one batch.

        Args:
            densities: Of the masks with which it was computed.
            dense: Parameters whose gradient was needed off the mask as well, and over how
                many batches it was gathered.
        """
        if self.flops is None or self.flops.unknown:
            return
        self._spent += 3 * self.flops.inference(densities)
        for name, batches in dense.items():
            self._spent += batches * self.flops.off_mask(densities, [name])
        self._batches += 1

    def metrics(self, densities: Mapping[str, float]) -> dict[str, float]:
        """``flops/`` of inference and training; nothing if they are not known."""
        if self.flops is None or not self._batches:
            return {}
        inference = self.flops.inference(densities)
        return {
            "flops/inference": inference,
            "flops/inference_ratio": inference / self.flops.dense,
            "flops/training": self.spent,
            "flops/training_ratio": self.spent / (3 * self.flops.dense),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain Python only."""
        flops = self.flops
        return {
            "flops": flops
            and {"layers": dict(flops.layers), "other": flops.other, "unknown": flops.unknown},
            "spent": self._spent,
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.flops = Flops(**state["flops"]) if state["flops"] else None
        self._spent, self._batches = state["spent"], state["batches"]


class BatchClock:
    """Time from the start of one batch to the start of the next; a median of the latest.

    Args:
        size: How many intervals are kept.
    """

    def __init__(self, size: int = 1000) -> None:
        self._intervals: deque[float] = deque(maxlen=size)
        self._last: float | None = None

    def start_batch(self) -> None:
        """A batch begins."""
        now = time.perf_counter()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Something else comes before the next batch: validation, the end of an epoch."""
        self._last = None

    def __len__(self) -> int:
        return len(self._intervals)

    @property
    def median(self) -> float:
        """Seconds per batch."""
        return statistics.median(self._intervals)
