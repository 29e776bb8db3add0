"""Masks: all sparse parameters of one model, and the only place that writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.ops.masked import apply_gate


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
        if changed:
            kept.set_mask(layer.mask)
        if layer.weight.data_ptr() != kept.parameter.data_ptr():
            kept.parameter.copy_(layer.weight)
        bias = kept.bias
        if layer.bias is not None and bias is not None and layer.bias.data_ptr() != bias.data_ptr():
            bias.copy_(layer.bias)
        if layer.slots is not kept.slots:
            kept.slots = dict(layer.slots)
        if latent or kept.is_latent:  # what is off its mask may come back
            return
        # State off the old mask is zero already, so the new mask clears all but survivors.
        state = [t for o in optimizers for t in optimizer_state(kept, o)] if changed else []
        if not kept.is_dense:
            apply_gate([kept.parameter, *state], [kept.gate] * (1 + len(state)))

    @torch.no_grad()
    def enforce(
        self, parameters: Iterable[SparseParameter], optimizer: Optimizer | None = None
    ) -> None:
        """Set weights, and their state in ``optimizer``, to zero off the masks.

        Latent weights, which layers do not compute with, are left alone.
        """
        tensors, gates = [], []
        for kept in parameters:
            if kept.is_latent or kept.is_dense:
                continue
            state = optimizer_state(kept, optimizer) if optimizer is not None else []
            tensors += [kept.parameter, *state]
            gates += [kept.gate] * (1 + len(state))
        apply_gate(tensors, gates)

    @torch.no_grad()
    def enforce_gradients(self, parameters: Iterable[SparseParameter]) -> None:
        """Set gradients to zero off the masks, but for parameters that get dense ones."""
        sparse = [
            p
            for p in parameters
            if p.parameter.grad is not None and not p.dense_gradients and not p.is_dense
        ]
        apply_gate(
            [p.parameter.grad for p in sparse if p.parameter.grad is not None],
            [p.gate for p in sparse],
        )

    def digest(self) -> str:
        """A short hash of all masks, equal exactly when the masks are."""
        total = hashlib.blake2b(digest_size=8)
        for parameter in self:
            total.update(parameter.name.encode())
            total.update(parameter.mask.cpu().numpy().tobytes())
        return total.hexdigest()


def optimizer_state(parameter: SparseParameter, optimizer: Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state that have one entry per weight."""
    return [
        value
        for value in optimizer.state.get(parameter.parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.parameter.shape
    ]
