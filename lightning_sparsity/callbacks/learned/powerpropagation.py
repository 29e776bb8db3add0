"""Powerpropagation: weights as powers, so that large ones learn and small ones stay small."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparsity.callbacks.learned_mask import LearnedMask, stay
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.distributions import uniform


class Powerpropagation(LearnedMask):
    r"""Powerpropagation (Schwarz et al., 2021, arXiv:2110.00296).

    The parameter is :math:`\phi`, and layers compute with

    .. math::
        w = \phi |\phi|^{\alpha - 1}, \qquad
        \frac{\partial L}{\partial \phi} = \alpha |\phi|^{\alpha - 1} \frac{\partial L}{\partial w}.

    Large weights move faster than small ones, so that training leaves more weights near zero,
    which can be pruned. At the start :math:`\phi = \mathrm{sign}(w) |w|^{1/\alpha}`: the network
    is the same.

    It makes no masks. Another callback does, such as :class:`Magnitude` at the end or
    :class:`RigL` on the way, and works on :math:`\phi`, which has the zeros and the order of
    :math:`w`; the gradients that it grows by are those of :math:`w`. Files hold :math:`w`, and
    at the end of training so do the parameters.

    Departure from the paper: the slope of the power is not let below the one at ``floor``
    standard deviations of the layer's live parameters. At :math:`\phi = 0` it would be 0, and a
    weight that grows at zero would stay there for ever. With ``floor=0`` it is the paper's.

    The model's weight decay acts on :math:`\phi`. So do methods that write other values than
    zero, such as second-order updates, which mean :math:`w`: do not combine it with those, nor
    with methods that learn their masks, whose layers compute with weights of their own.

    Args:
        alpha: :math:`\alpha`, at least 1; 1 changes nothing, the paper has 2 to 5.
        floor: In standard deviations, in [0, 1].
        include: Which parameters are powers: names, patterns, module types, callables.
        exclude: Which of those are not.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[Powerpropagation(alpha=3.0), RigL(density=0.1)])
    """

    derived: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        floor: float = 0.1,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
    ) -> None:
        self._check_number("alpha", alpha, 1)
        self._check("floor", floor)
        self.alpha = plain(alpha)
        self.floor = plain(floor)
        super().__init__(
            density=None,
            default_distribution=uniform,
            initial=stay,
            include=include,
            exclude=exclude,
            role="reparametrization",
        )

    def begin(self, layers: Layers, share: Share) -> Layers:
        """The parameters whose powers are the weights."""
        return [
            dataclasses.replace(layer, weight=power(layer.weight, 1 / self.alpha))
            for layer in layers
        ]

    def effective(self, layer: Layer) -> Tensor:
        """The power."""
        return power(layer.weight, self.alpha)

    def gradients(self, layer: Layer) -> Mapping[str, Tensor | None]:
        """The chain rule, with a slope that is not below that at the floor."""
        assert layer.grad is not None
        least = self.floor * (layer.weight.square().sum() / layer.mask.sum().clamp(min=1)).sqrt()
        slope = self.alpha * layer.weight.abs().maximum(least) ** (self.alpha - 1)
        return {"weight": slope * layer.grad}


def power(tensor: Tensor, exponent: float) -> Tensor:
    """Sign kept, size to the power of ``exponent``.

    Example:
        >>> power(torch.tensor([-2.0, 0.0, 3.0]), 2.0)
        tensor([-4.,  0.,  9.])
    """
    return torch.copysign(tensor.abs() ** exponent, tensor)
