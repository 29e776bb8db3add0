"""Effective weights: a layer that computes with a function of its parameter.

The gradient of what the layer computes with arrives at the parameter as it is; whoever learns
the function turns it into what it is (:mod:`~lightning_sparsity.core.learner`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparsity.core.stand_in import StandIn


class EffectiveWeight(StandIn):
    """What a layer computes with in place of one parameter.

    The forward pass reads ``value``; its gradient goes to the parameter as it is. Whoever
    changes the parameter says so by ``is_stale``, and reads ``value`` before a compiled forward
    pass, which does not look there.

    Args:
        parameter: The latent weight.
        renew: Writes what training computes with to a tensor.
        evaluate: Gives the weight of validation and files.
        constant: Whether validation computes with ``value`` too.

    Attributes:
        is_stale: Whether ``value`` is to be made anew when somebody reads it.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        renew: Callable[[Tensor], None],
        evaluate: Callable[[], Tensor],
        constant: bool = True,
    ) -> None:
        super().__init__(parameter)
        self.constant = constant
        self.is_stale = True
        self._value = parameter.detach().clone()
        self._renew = renew
        self._evaluate = evaluate

    @property
    def value(self) -> Tensor:
        """What training computes with, shape of the parameter. Its identity never changes."""
        if self.is_stale:
            self.is_stale = False
            self._renew(self._value)
        return self._value

    def evaluated(self) -> Tensor:
        """The weight of validation and files, detached."""
        return self.value.detach() if self.constant else self._evaluate().detach()

    def version(self) -> object:
        """Differs when what layers compute with does."""
        return self.value._version

    def seen(self, training: bool) -> Tensor:
        """What the layer computes with; its gradient goes to the parameter."""
        if torch.compiler.is_compiling():  # the same in arithmetic, which needs no warning
            value = self._value if training or self.constant else self._evaluate()
            return value + (self.parameter - self.parameter.detach())
        value = self.value if training or self.constant else self._evaluate()
        through: Tensor = _Through.apply(self.parameter, value)  # type: ignore[no-untyped-call]
        return through


class _Through(torch.autograd.Function):
    """The second tensor, with a gradient that goes to the first one unchanged."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
