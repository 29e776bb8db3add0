"""SparseParameter: one sparse weight of a model, its mask and its slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_sparsity.core.filters import Candidate
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.ops.masked import gate
from lightning_sparsity.structures import Structure


class SparseParameter:
    """A weight that is zero off its mask (the in-place kind).

    Monitors, scores and export read ``name``, ``weight``, ``mask``, ``density`` and
    ``slots``; only :class:`~lightning_sparsity.core.masks.Masks` writes.

    Args:
        candidate: The parameter and where it is in the model.
        structure: What one unit is.
        place: Number of the layer among the linear and convolutional ones of the model.

    Attributes:
        name: Plain parameter name.
        aliases: Every name under which the model's ``state_dict`` holds the weight.
        parameter: The parameter itself.
        module: The layer that holds it.
        mask: Same shape, bool, True = live. Its identity never changes.
        slots: Tensors that a method keeps for this weight.
    """

    def __init__(
        self, candidate: Candidate, structure: Structure, place: int | None = None
    ) -> None:
        self.name = candidate.name
        self.aliases = candidate.aliases
        self.parameter: nn.Parameter = candidate.parameter
        self.module = candidate.module
        self.layout = candidate.layout
        self.structure = structure
        self.place = place
        self.mask = torch.ones_like(candidate.parameter, dtype=torch.bool)
        self.slots: dict[str, Tensor] = {}
        self._live: int | None = None
        self._gate: Tensor | None = None
        self._gate_is_stale = True

    @property
    def weight(self) -> Tensor:
        """The effective weight, detached."""
        return self.parameter.detach()

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the layer's output units, if it has one."""
        found = getattr(self.module, "bias", None)
        mine = getattr(self.module, "weight", None) is self.parameter
        return found if mine and isinstance(found, nn.Parameter) else None

    @property
    def numel(self) -> int:
        """Number of weights, live or not."""
        return self.parameter.numel()

    @property
    def size(self) -> int:
        """Number of units, live or not (weights, if unstructured)."""
        return self.structure.size(tuple(self.parameter.shape), self.layout)

    @property
    def live(self) -> int:
        """Number of live weights."""
        if self._live is None:
            self._live = int(self.mask.count_nonzero())
        return self._live

    @property
    def density(self) -> float:
        """Live share of the weights, in [0, 1]."""
        return self.live / self.numel if self.numel else 1.0

    @property
    def is_dense(self) -> bool:
        """Whether every weight is live."""
        return self.live == self.numel

    @property
    def gate(self) -> Tensor:
        """The mask as bits that zero a tensor of the weight's dtype (see ``ops.masked``)."""
        if self._gate is None:
            self._gate = gate(self.mask, self.parameter)
            self._gate_is_stale = False
        elif self._gate_is_stale:
            self._gate.copy_(self.mask).neg_()
            self._gate_is_stale = False
        return self._gate

    def set_mask(self, mask: Tensor) -> None:
        """Overwrite the mask in place."""
        self.mask.copy_(mask)
        self._live = None
        self._gate_is_stale = True

    def layer(
        self,
        grad: Tensor | None,
        generator: torch.Generator,
        statistics: Mapping[str, tuple[Tensor, ...]] | None = None,
        lr: float | None = None,
    ) -> Layer:
        """The frozen view that rules work on."""
        return Layer(
            name=self.name,
            weight=self.weight,
            mask=self.mask,
            grad=grad,
            slots=self.slots,
            statistics=statistics or {},
            structure=self.structure,
            layout=self.layout,
            generator=generator,
            bias=None if self.bias is None else self.bias.detach(),
            lr=lr,
            place=self.place,
        )

    def __repr__(self) -> str:
        shape = tuple(self.parameter.shape)
        return f"SparseParameter({self.name}, {shape}, density={self.density:.4g})"
