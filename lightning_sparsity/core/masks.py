"""Masks: all sparse parameters of one model, and the only place that writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.core.compressed import CompressedWeight
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.shards import local, part_of, whole
from lightning_sparsity.ops.fingerprint import fingerprint
from lightning_sparsity.ops.masked import apply_gate
from lightning_sparsity.ops.sharded import Sharded


class Masks:
    """The sparse parameters of one LightningModule, addressed by plain name.

    Args:
        parameters: Every sparse parameter once, in the model's order.

    Attributes:
        changes: How many commits there were; observers compare it to see new masks.
    """

    def __init__(self, parameters: Iterable[SparseParameter]) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self.changes = 0

    def __iter__(self) -> Iterator[SparseParameter]:
        return iter(self._parameters.values())

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, name: str) -> SparseParameter:
        return self._parameters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    @property
    def numel(self) -> int:
        """Number of sparse weights, live or not."""
        return sum(parameter.numel for parameter in self)

    @property
    def live(self) -> int:
        """Number of live weights."""
        return sum(parameter.live for parameter in self)

    @property
    def density(self) -> float:
        """Live share of all sparse weights, in (0, 1]."""
        return self.live / self.numel

    @torch.no_grad()
    def commit(
        self,
        layers: Layers,
        optimizers: Sequence[Optimizer] = (),
        latent: Collection[str] = (),
    ) -> None:
        """Write the masks, weights, biases and slots of ``layers`` to the model.

        Weights that died get zero, and so does their optimizer state and that of the
        weights that came alive; those that lived on keep both.

        Args:
            layers: What a rule returned.
            optimizers: Those whose state follows the weights.
            latent: Names of weights that are about to be latent, and keep what they are off
                the mask.
        """
        for layer in layers:
            self._commit(layer, self[layer.name], optimizers, layer.name in latent)
        self.changes += 1

    def _commit(
        self, layer: Layer, kept: SparseParameter, optimizers: Sequence[Optimizer], latent: bool
    ) -> None:
        changed = layer.mask is not kept.mask
        if kept.compressed is not None:
            _move(kept, kept.compressed, layer, optimizers)
        elif not kept.is_view(layer.weight):
            kept.write(layer.weight)
        if changed:
            kept.set_mask(layer.mask)
        bias = kept.bias
        if layer.bias is not None and bias is not None and layer.bias.data_ptr() != bias.data_ptr():
            local(bias).copy_(part_of(layer.bias, bias))
        if layer.slots is not kept.slots:
            kept.slots = dict(layer.slots)
        if latent or kept.is_latent or kept.compressed is not None:
            return  # what is off the mask may come back, or is not there
        # State off the old mask is zero already, so the new mask clears all but survivors.
        state = [t for o in optimizers for t in optimizer_state(kept, o)] if changed else []
        if not kept.is_dense:
            apply_gate([local(kept.parameter), *state], [kept.gate] * (1 + len(state)))

    @torch.no_grad()
    def enforce(
        self, parameters: Iterable[SparseParameter], optimizer: Optimizer | None = None
    ) -> None:
        """Set weights, and their state in ``optimizer``, to zero off the masks.

        Latent weights, which layers do not compute with, are left alone.
        """
        tensors, gates = [], []
        for kept in parameters:
            if kept.is_latent or kept.is_dense or kept.compressed is not None:
                continue
            state = optimizer_state(kept, optimizer) if optimizer is not None else []
            tensors += [local(kept.parameter), *state]
            gates += [kept.gate] * (1 + len(state))
        apply_gate(tensors, gates)

    @torch.no_grad()
    def enforce_gradients(self, parameters: Iterable[SparseParameter]) -> None:
        """Set gradients to zero off the masks, but for parameters that get dense ones."""
        sparse = [
            p
            for p in parameters
            if p.parameter.grad is not None and not p.dense_gradients and not p.is_dense
            if p.compressed is None
        ]
        apply_gate(
            [local(p.parameter.grad) for p in sparse if p.parameter.grad is not None],
            [p.gate for p in sparse],
        )

    def digest(self) -> str:
        """A short hash of all masks, equal exactly when the masks are."""
        total = hashlib.blake2b(digest_size=8)
        for parameter in self:
            total.update(parameter.name.encode())
            total.update(whole(parameter.mask).cpu().numpy().tobytes())
        return total.hexdigest()


def hashes(layers: Layers) -> list[int]:
    """A 64-bit hash of the mask of each layer, made in one cheap pass; equal masks have equal ones.

    Of a mask in parts, which no process has, it is the number of live units.
    """
    parted = (isinstance(layer.mask, Sharded) for layer in layers)
    return [
        layer.live if in_parts else fingerprint(layer.mask)
        for layer, in_parts in zip(layers, parted, strict=True)
    ]


def _move(
    kept: SparseParameter,
    compressed: CompressedWeight,
    layer: Layer,
    optimizers: Sequence[Optimizer],
) -> None:
    """Let compressed values, their gradient and their optimizer state follow to a new mask."""
    written = None if kept.is_view(layer.weight) else layer.weight.clone()
    if layer.mask is not kept.mask:
        resize(kept, compressed.follow(layer.mask), optimizers)
    if written is not None:
        kept.write(written)


def resize(
    kept: SparseParameter, carried: Callable[[Tensor], Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Replace a parameter's values, its gradient and its optimizer state by what is carried."""
    parameter, grad = kept.parameter, kept.parameter.grad
    parameter.grad = None  # torch compares its shape with the parameter's
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = carried(value)
    parameter.data = carried(parameter.detach())
    parameter.grad = None if grad is None else carried(grad)


def optimizer_state(parameter: SparseParameter, optimizer: Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state with one entry per weight, or the part here."""
    return [
        local(value)
        for value in optimizer.state.get(parameter.parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.parameter.shape
    ]
