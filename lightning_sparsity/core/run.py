"""Runs and owners: which method works on which optimizer's weights, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_sparsity.core.capture import Capture
from lightning_sparsity.core.method import Method, Share
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.shards import local
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
        parameters: The sparse parameters that are its own.
        shared: Sparse parameters it steps too, but that an earlier optimizer owns.
        steps: Steps it was asked for in training, skipped ones included.
        masked: Whether gradients were masked for a step that has not come yet.
        moving: Whether there was any gradient for that step.
        kept: Dense gradients of this step, by parameter name, where a method needs them.
        observed: By parameter name, new slots and the key of the method that they are for, for
            when the step turns out to be real.
        capture: Records activations for an update that is due at the next step.
    """

    optimizer: Optimizer | None
    parameters: list[SparseParameter]
    shared: list[SparseParameter] = field(default_factory=list)
    steps: int = 0
    masked: bool = False
    moving: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)
    capture: Capture | None = None
    _seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def stepping(self) -> list[SparseParameter]:
        """Every sparse parameter that the optimizer steps."""
        return self.parameters + self.shared

    def forget(self) -> None:
        """Let go of what was kept for one step."""
        self.kept, self.observed = {}, {}
        self.masked = self.moving = False
        for kept in self.parameters:
            if kept.compressed is not None:
                kept.compressed.record(False)
        if self.capture is not None:
            self.capture.close()
            self.capture = None

    def learning_rates(self) -> dict[int, float]:
        """The learning rate of every parameter that the optimizer steps, by its ``id``."""
        return self._setting("lr")

    def weight_decays(self) -> dict[int, float]:
        """The weight decay of every parameter that the optimizer steps, by its ``id``."""
        return self._setting("weight_decay")

    def _setting(self, name: str) -> dict[int, float]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return {id(p): float(group.get(name, 0)) for group in groups for p in group["params"]}

    def stepped(self) -> bool:
        """Whether a step of the optimizer that just ended changed the weights."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf.item()):
            return False
        return self.moving or self.has_gradients

    @property
    def has_gradients(self) -> bool:
        """Whether any of the weights has a gradient."""
        return any(p.parameter.grad is not None for p in self.stepping)

    def keeps_zeros(self) -> bool:
        """Whether zero weights with zero gradients are certain to stay zero in a step."""
        optimizer = self.optimizer
        if optimizer is None or type(optimizer) not in _ZERO_STAYS_ZERO:
            return False
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return False
        # One post-hook is ours; others may write to the weights.
        if optimizer._optimizer_step_pre_hooks or len(optimizer._optimizer_step_post_hooks) > 1:
            return False
        return all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)  # 0 / 0

    def remember(self) -> None:
        """Note the state of the weights, for :meth:`touched`."""
        self._seen = self._look()

    def doubt(self) -> None:
        """Take it that somebody will write to the weights and leave no trace."""
        self._seen = []

    def touched(self) -> bool:
        """Whether somebody wrote to the weights since :meth:`remember`.

        Writes through ``.data`` leave no trace, unless they replace the storage.
        """
        return self._seen != self._look()

    def _look(self) -> list[tuple[int, int]]:
        parts = (local(p.parameter) for p in self.stepping)
        return [(part._version, part.data_ptr()) for part in parts]


@dataclass(eq=False)
class Run:
    """One method at work on the parameters of one optimizer.

    Args:
        key: Name of the method, such as ``RigL``.
        method: The callback.
        owner: Whose parameters.
        size: Units of each parameter, by plain name.
        steps: The method's window; None if it makes no updates.
        share: What the method began with; None before it began.
        updates: Updates so far.
        pending: Whether a due update waits for the next real step.
        last_epoch: Epoch of the latest update.
        released: Whether the method has ended for good, before its window or with it.
    """

    key: str
    method: Method
    owner: Owner
    size: dict[str, int]
    steps: Steps | None = None
    share: Share | None = None
    updates: int = 0
    pending: bool = False
    last_epoch: int = -1
    released: bool = False

    def due(self, ending: int | None, total: float, ahead: int = 0) -> bool:
        """Whether an update follows the owner's latest step, or one ``ahead``.

        Args:
            ending: The epoch of which this is the last batch, if it is.
            total: Optimizer steps in the whole training.
            ahead: Steps that are still to come.
        """
        step = self.owner.steps + ahead
        if self.steps is None or self.owner.optimizer is None or self.released:
            return False
        if not self.method.ramps and step >= total:
            return False
        ends = ending is not None and ending != self.last_epoch and self.steps.counts(ending)
        return self.pending or self.steps.due(step, ends)

    @property
    def observes(self) -> bool:
        """Whether the method wants to see dense gradients: an update may still come."""
        if self.method.observe is None or self.is_over:
            return False
        begins = self.steps is not None and self.owner.steps + 1 >= self.steps.start
        return self.share is not None or begins

    @property
    def is_over(self) -> bool:
        """Whether no update can follow any more, in this training or a longer one."""
        if self.released:
            return True
        steps = self.steps
        return steps is not None and self.owner.steps >= steps.end and not self.pending

    @property
    def names(self) -> list[str]:
        """Plain names of the parameters."""
        return list(self.size)

    @property
    def progress(self) -> float:
        """How much of the window has passed, in [0, 1]; 0 without a window."""
        return self.steps.progress(self.owner.steps) if self.steps else 0.0

    @property
    def unfinished(self) -> bool:
        """Whether the density was to change up to a step that has not come."""
        if self.steps is None or self.owner.optimizer is None or self.released:
            return False
        return self.method.ramps and self.owner.steps < self.steps.end

    def idle(self, total: float, epochs: float = math.inf) -> bool:
        """Whether no update can come in a training of so many steps and epochs."""
        if self.steps is None or self.owner.optimizer is None:
            return False
        return not self.steps.opens(total, epochs) or self.owner.steps >= self.steps.end

    def among(self, runs: Sequence[Run]) -> tuple[tuple[int, ...], int]:
        """Units of each run of the same method, and which of them this one is."""
        mates = [run for run in runs if run.key == self.key]
        return tuple(sum(mate.size.values()) for mate in mates), mates.index(self)


def by_optimizer(
    parameters: Sequence[SparseParameter], optimizers: Sequence[Optimizer]
) -> list[Owner]:
    """One owner per optimizer that steps a sparse parameter, and one for those of none."""
    left = list(parameters)
    owners = []
    for optimizer in optimizers:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        all_of_it = [p for p in parameters if id(p.parameter) in stepped]
        own = [p for p in left if id(p.parameter) in stepped]
        left = [p for p in left if id(p.parameter) not in stepped]
        if all_of_it:
            owners.append(Owner(optimizer, own, [p for p in all_of_it if p not in own]))
    return [*owners, Owner(None, left)] if left else owners


def census(optimizers: Sequence[Optimizer]) -> list[tuple[int, int]]:
    """Which optimizers there are and which parameters they step, to see a change."""
    return [
        (id(o), hash(tuple(id(p) for group in o.param_groups for p in group["params"])))
        for o in optimizers
    ]


def carry_over(old: Sequence[Run], new: Sequence[Run]) -> None:
    """Let runs over newly grouped parameters go on where the old ones were."""
    for run in new:
        before = [r for r in old if r.key == run.key]
        twin = next((r for r in before if r.owner.optimizer is run.owner.optimizer), before[0])
        run.steps, run.updates = twin.steps, twin.updates
        run.pending, run.last_epoch = twin.pending, twin.last_epoch
        run.released = twin.released
        parts = [r.share for r in before if r.share is not None]
        if parts:
            sizes, index = run.among(new)
            start = {name: live for part in parts for name, live in part.start.items()}
            run.share = replace(
                parts[0],
                sizes=sizes,
                index=index,
                start={name: start[name] for name in run.names if name in start},
            )
