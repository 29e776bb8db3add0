"""SparseParameter: one sparse weight of a model, its mask and its slots."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_sparsity.core.compressed import CompressedWeight
from lightning_sparsity.core.effective import EffectiveWeight
from lightning_sparsity.core.filters import Candidate
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.shards import is_sharded, local, part_of, whole
from lightning_sparsity.ops.live import Formed
from lightning_sparsity.ops.masked import gate
from lightning_sparsity.ops.sharded import Gathered, Sharded, Split
from lightning_sparsity.structures import Structure


class SparseParameter:
    """A weight that is zero off its mask.

    Three kinds, which monitors, scores and export never tell apart. *In place*: the parameter
    itself is zero off the stored mask; the layer computes with it, or with a function of it that
    keeps zeros. *Straight-through*: the layer computes with the latent parameter times the
    stored mask. *Derived*: it computes with a function of the parameter and of slots, and the
    mask is where that is not zero by design.

    The parameter of a weight in place may hold the live values alone
    (:class:`~lightning_sparsity.core.compressed.CompressedWeight`).

    Monitors, scores and export read ``name``, ``weight``, ``mask``, ``density`` and
    ``slots``; only :class:`~lightning_sparsity.core.masks.Masks` and
    :class:`~lightning_sparsity.core.learner.Learner` write.

    Args:
        candidate: The parameter and where it is in the model.
        structure: What one unit is.
        place: Number of the layer among the linear and convolutional ones of the model.

    Attributes:
        name: Plain parameter name.
        aliases: Every name under which the model's ``state_dict`` holds the weight.
        parameter: The parameter itself.
        module: The layer that holds it.
        slots: Tensors that a method keeps for this weight.
        shape: Of the weight.
        effective: What the layer computes with; None: the parameter.
        compressed: How the parameter holds the live values alone; None: it is dense.
        is_latent: Whether the parameter may live off the mask: the kinds that are not in place.
        dense_gradients: Whether the parameter gets gradients off its mask.
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
        self.slots: dict[str, Tensor] = {}
        self.shape = tuple(candidate.parameter.shape)
        self.effective: EffectiveWeight | None = None
        self.compressed: CompressedWeight | None = None
        self.is_latent = False
        self.dense_gradients = False
        self._support: Callable[[], Tensor] | None = None
        self._mask_is_stale = False
        self._seen_mask: weakref.ref[Tensor] | None = None
        self._live: int | None = self.numel
        parameter = candidate.parameter
        self._split = Split.of(parameter) if is_sharded(parameter) else None
        self._mask = torch.ones_like(local(parameter), dtype=torch.bool)
        if self._split is not None:
            self._mask = Sharded(self._mask, self._split)
        self._gate: Tensor | None = None
        self._gate_is_stale = True

    @property
    def weight(self) -> Tensor:
        """The weight of validation and files, detached and whole; call it on all processes."""
        stand_in = self.effective or self.compressed
        return whole(self.parameter) if stand_in is None else stand_in.evaluated()

    @property
    def is_sharded(self) -> bool:
        """Whether the parameter lies in parts on several processes, and the mask with it."""
        return self._split is not None

    @property
    def has_parts_of_activations(self) -> bool:
        """Whether the layer computes some of its units here, as under tensor parallelism."""
        return self._split is not None and self._split.is_tensor_parallel

    @property
    def view(self) -> Tensor:
        """The weight as rules see it: the parameter itself, detached, if it is dense."""
        if self.compressed is not None:
            return self.compressed.view
        if self._split is not None:
            return Sharded(local(self.parameter), self._split)
        return self.parameter.detach()

    def is_view(self, weight: Tensor) -> bool:
        """Whether a rule has left the weight as it was."""
        if isinstance(weight, Gathered):
            weight = weight.gathered_from
        if isinstance(weight, Sharded):
            return not weight.is_own
        if isinstance(weight, Formed):
            return weight is self.view
        return self.compressed is None and weight.data_ptr() == self.parameter.data_ptr()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the weight, of its shape; what is off a compressed weight's mask is not kept."""
        if self.compressed is not None:
            self.compressed.load(weight)
        else:
            local(self.parameter).copy_(part_of(weight, self.parameter))

    @property
    def values(self) -> Tensor:
        """The live weights of validation and files, ``(live,)``, in row-major order."""
        if self.compressed is not None:
            return self.parameter.detach()
        return self.weight[whole(self.mask)]

    @property
    def computed(self) -> Tensor:
        """What the layer computes with in training, detached."""
        return self.weight if self.effective is None else self.effective.value

    @property
    def mask(self) -> Tensor:
        """Same shape, bool, True = live.

        Its identity never changes, but for compressed weights: that of these is made from their
        pattern when somebody looks, and lives as long as somebody holds it. The mask of a sharded
        weight is cut as the weight is; look at it on all processes.
        """
        if self.compressed is not None:
            mask = self._seen_mask() if self._seen_mask is not None else None
            if mask is None:
                mask = self.compressed.mask()
                self._seen_mask = weakref.ref(mask)
            return mask
        if self._mask_is_stale and self._support is not None:
            self._mask_is_stale = False
            self.set_mask(self._support())
        return self._mask

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the layer's output units, if it has one."""
        held = self.module._parameters  # not attributes: they may be effective weights
        return held.get("bias") if held.get("weight") is self.parameter else None

    @property
    def numel(self) -> int:
        """Number of weights, live or not."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of units, live or not (weights, if unstructured)."""
        return self.structure.size(self.shape, self.layout)

    @property
    def live(self) -> int:
        """Number of live weights."""
        if self.compressed is not None:
            return self.compressed.pattern.nnz
        mask = self.mask
        if self._live is None:
            self._live = int(mask.count_nonzero())
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
        """The mask as bits that zero a tensor of the weight's dtype (see ``ops.masked``).

        Of a sharded weight, for the part of this process.
        """
        mask = local(self.mask)
        if self._gate is None:
            self._gate = gate(mask, local(self.parameter))
        elif self._gate_is_stale:
            self._gate.copy_(mask).neg_()
        self._gate_is_stale = False
        return self._gate

    def set_mask(self, mask: Tensor) -> None:
        """Overwrite the mask in place; of a compressed weight, which has it, only take note."""
        self._seen_mask = None
        if self.compressed is None:
            local(self._mask).copy_(part_of(mask, self.parameter))
        self._mask_is_stale = False
        # Parts are counted at once, on all processes: later one alone may ask.
        self._live = int(self._mask.count_nonzero()) if self.is_sharded else None
        self._gate_is_stale = True

    def keep(self, slots: Mapping[str, Tensor]) -> None:
        """Take over whole slots, from a file say: of a sharded weight, the parts here."""
        device = self.parameter.device
        self.slots = {
            key: Sharded(self._split.part_of(tensor.to(device)), self._split)
            if self._split is not None and tensor.shape == self.shape
            else tensor.to(device)
            for key, tensor in slots.items()
        }

    def store(self, compressed: CompressedWeight | None) -> None:
        """Let the parameter hold live values alone, or be dense again; whoever calls moves them."""
        if compressed is None:
            self._mask = self.mask
        else:
            self._mask = torch.empty(0, dtype=torch.bool)
        self.compressed, self._seen_mask = compressed, None
        self._live = None
        self._gate = None
        self._gate_is_stale = True

    def compute_with(
        self,
        effective: EffectiveWeight | None,
        dense_gradients: bool = False,
        support: Callable[[], Tensor] | None = None,
        in_place: bool = False,
    ) -> None:
        """Become a straight-through or derived weight, or in place again.

        Args:
            effective: What the layer computes with; None: the parameter.
            dense_gradients: Whether the parameter gets gradients off its mask.
            support: Gives the mask of a derived weight.
            in_place: Whether the parameter stays zero off the mask.
        """
        self.effective = effective
        self.is_latent = effective is not None and not in_place
        self.dense_gradients = dense_gradients
        self._support = support
        self._mask_is_stale = support is not None

    def outdate(self) -> None:
        """The mask of a derived weight is to be found anew when somebody looks."""
        self._mask_is_stale = self._support is not None

    def layer(
        self,
        grad: Tensor | None = None,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, tuple[Tensor, ...]] | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        fresh: bool = True,
    ) -> Layer:
        """The frozen view that rules work on; ``weight`` is the parameter itself, if dense.

        Args:
            grad: Gradient of the loss by what the layer computes with.
            generator: Of random choices.
            statistics: Inputs and output gradients of this step.
            lr: Learning rate of the step.
            weight_decay: Of the weight's optimizer.
            fresh: Whether the mask of a derived weight is brought up to date first.
        """
        return Layer(
            name=self.name,
            weight=self.view,
            mask=self.mask if fresh or self.compressed is not None else self._mask,
            grad=grad,
            slots=self.slots,
            statistics=statistics or {},
            structure=self.structure,
            layout=self.layout,
            generator=generator,
            bias=None if self.bias is None else whole(self.bias),
            lr=lr,
            weight_decay=weight_decay,
            place=self.place,
        )

    def __repr__(self) -> str:
        return f"SparseParameter({self.name}, {self.shape}, density={self.density:.4g})"
