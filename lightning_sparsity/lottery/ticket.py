"""Tickets and finished rounds, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_sparsity.core.files import save


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse network before it is trained.

    Args:
        masks: By plain parameter name: bool, shape of the parameter, True = live.
        weights: A ``state_dict`` of the module, zero off the masks.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    @property
    def live(self) -> int:
        """Number of live weights."""
        return sum(int(mask.count_nonzero()) for mask in self.masks.values())

    @property
    def density(self) -> float:
        """Live share of the sparse weights."""
        return self.live / sum(mask.numel() for mask in self.masks.values())

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket from its file."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))

    def save(self, path: str | Path) -> None:
        """Write a file of plain tensors, whole or not at all."""
        save({"masks": dict(self.masks), "weights": dict(self.weights)}, Path(path))


@dataclass(frozen=True)
class Round:
    """A finished round of :func:`run_imp`.

    Args:
        number: 0 is the dense one.
        live: Live weights.
        density: Live share of the sparse weights.
        metrics: What the Trainer's ``callback_metrics`` were at the end.
        directory: Its folder.
    """

    number: int
    live: int
    density: float
    metrics: Mapping[str, float]
    directory: Path

    @property
    def ticket(self) -> Ticket:
        """What the round has trained, read from its file."""
        return Ticket.load(self.directory / "ticket.pt")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The ``state_dict`` after the training, zero off the masks, read from its file."""
        trained = torch.load(self.directory / "trained.pt", map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = trained["weights"]
        return weights
