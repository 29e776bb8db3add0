"""Runs and owners: which method works on which optimizer's weights, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparsity.core.capture import Capture
from lightning_sparsity.core.method import Method, Share
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.window import Steps

# With these optimizers a weight whose value, gradient and state are zero stays zero, so
# masking the gradient is enough between updates. Every other one is masked after each step.
_ZERO_STAYS_ZERO = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
)


@dataclass(eq=False)
class Owner:
    """The sparse parameters that one optimizer steps.

    Args:
        optimizer: The optimizer; None for parameters that no optimizer steps.
        parameters: The sparse parameters it steps.
        steps: Steps it was asked for in training, skipped ones included.
        masked: Whether gradients were masked for a step that has not come yet.
        kept: Dense gradients of this step, by parameter name, where a method needs them.
        capture: Records activations for an update that is due at the next step.
    """

    optimizer: Optimizer | None
    parameters: list[SparseParameter]
    steps: int = 0
    masked: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    capture: Capture | None = None
    _versions: list[int] = field(default_factory=list)

    def forget(self) -> None:
        """Let go of what was kept for one step."""
        self.kept = {}
        self.masked = False
        if self.capture is not None:
            self.capture.close()
            self.capture = None

    def stepped(self) -> bool:
        """Whether a step of the optimizer that just ended changed the weights."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf.item()):
            return False
        return any(p.parameter.grad is not None for p in self.parameters)

    def keeps_zeros(self) -> bool:
        """Whether zero weights with zero gradients are certain to stay zero in a step."""
        pre_hooks = getattr(self.optimizer, "_optimizer_step_pre_hooks", None)
        return type(self.optimizer) in _ZERO_STAYS_ZERO and not pre_hooks

    def remember(self) -> None:
        """Note the state of the weights, for :meth:`touched`."""
        self._versions = [p.parameter._version for p in self.parameters]

    def touched(self) -> bool:
        """Whether somebody wrote to the weights in place since :meth:`remember`."""
        return self._versions != [p.parameter._version for p in self.parameters]


@dataclass(eq=False)
class Run:
    """One method at work on the parameters of one optimizer.

    Args:
        key: Name of the method, such as ``RigL``.
        method: The callback.
        owner: Whose parameters.
        names: Plain names of the parameters.
        steps: The method's window; None if it makes no updates.
        share: What the method began with; None before it began.
        updates: Updates so far.
        pending: Whether a due update waits for the next real step.
        last_epoch: Epoch of the latest update.
    """

    key: str
    method: Method
    owner: Owner
    names: list[str]
    steps: Steps | None = None
    share: Share | None = None
    updates: int = 0
    pending: bool = False
    last_epoch: int = -1

    def due(self, ending: int | None, total: float, ahead: int = 0) -> bool:
        """Whether an update follows the owner's latest step, or one ``ahead``.

        Args:
            ending: The epoch of which this is the last batch, if it is.
            total: Optimizer steps in the whole training.
            ahead: Steps that are still to come.
        """
        step = self.owner.steps + ahead
        if self.steps is None or self.owner.optimizer is None:
            return False
        if not self.method.ramps and step >= total:
            return False
        last_of_epoch = ending is not None and ending != self.last_epoch
        return self.pending or self.steps.due(step, last_of_epoch)

    @property
    def progress(self) -> float:
        """How much of the window has passed, in [0, 1]; 0 without a window."""
        return self.steps.progress(self.owner.steps) if self.steps else 0.0

    @property
    def unfinished(self) -> bool:
        """Whether the density was to change up to a step that has not come."""
        ramping = self.steps is not None and self.method.ramps and self.owner.optimizer is not None
        return ramping and self.owner.steps < self.steps.end  # type: ignore[union-attr]


def by_optimizer(
    parameters: Sequence[SparseParameter], optimizers: Sequence[Optimizer]
) -> list[Owner]:
    """One owner per optimizer that steps a sparse parameter, and one for those of none."""
    owned: dict[int, list[SparseParameter]] = {}
    for parameter in parameters:
        owned.setdefault(_first_owner(parameter, optimizers), []).append(parameter)
    return [
        Owner(optimizers[index] if index < len(optimizers) else None, members)
        for index, members in sorted(owned.items())
    ]


def _first_owner(parameter: SparseParameter, optimizers: Sequence[Optimizer]) -> int:
    """Index of the first optimizer that steps ``parameter``; their number if none does."""
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            if any(parameter.parameter is p for p in group["params"]):
                return index
    return len(optimizers)
