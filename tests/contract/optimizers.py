"""Optimizers for the contract tests, among them one that the package has never heard of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Smearing(Optimizer):
    """Moves every weight by the mean of its row's momentum: zeros do not stay zeros."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["average"] = torch.full_like(weight, 0.01)
            state["step"] = 0
        state["step"] += 1
        state["average"].mul_(0.9).add_(weight.grad, alpha=0.1)  # type: ignore[arg-type]
        rows = state["average"].flatten(1) if weight.ndim > 1 else state["average"]
        smear = rows.mean(-1, keepdim=True).expand_as(rows).reshape_as(weight)
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
        weight.add_(smear + 0.001, alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, **kw),
    "nesterov": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, **kw),
    "unknown": Smearing,
}
