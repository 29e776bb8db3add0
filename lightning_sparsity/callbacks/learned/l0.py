"""L0: gates that open and close at random, and a price on every gate that may be open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_sparsity.callbacks.examples import count_examples
from lightning_sparsity.callbacks.learned_mask import EMERGENT, LearnedMask
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.structures import NM, Structure

_TEMPERATURE, _STRETCH = 2 / 3, (-0.1, 1.1)
_LIMIT = math.log(100)  # of log alpha, as in the authors' program
_EDGE = 1e-6  # u stays this far from 0 and 1


class L0(LearnedMask):
    r"""L0 regularization through hard concrete gates (Louizos et al., 2018, arXiv:1712.01312).

    Layers compute with :math:`w z`. Every unit has a gate :math:`z` that is exactly 0 or 1 with
    some probability and in between otherwise, so that a trained number :math:`\log\alpha`
    decides how often it is open (Sec. 2.2):

    .. math::
        s = \sigma\big((\log u - \log(1 - u) + \log\alpha) / \beta\big), \quad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \quad u \sim U(0, 1).

    The price is the expected number of weights that are not zero, and if asked for their
    expected squares (Sec. 2.3, 2.4); for a unit of weights :math:`w_i` and :math:`N` examples

    .. math::
        P(z \neq 0) \sum_i \Big(\frac{\lambda}{N} + \frac{d}{2} w_i^2\Big), \qquad
        P(z \neq 0) = \sigma(\log\alpha - \beta \log(-\gamma / \zeta)).

    Validation and files have :math:`w \hat z` with the gate without noise, :math:`\hat z =
    \min(1, \max(0, \sigma(\log\alpha)(\zeta - \gamma) + \gamma))`; what it leaves at zero is off
    the mask, and at the end the others are multiplied into the weights.

    The density is not asked for but emerges, from ``lam`` above all, and from how long the gates
    are trained at which ``lr``. Single weights have gates of their own by default, as in Sec.
    2.1 and everywhere in this package. The paper's experiments have one gate for all weights of
    an input unit in linear layers and of a filter in convolutions: two callbacks, see below.
    Larger studies found single gates hard to use on large networks; units do better.

    Departures from the authors' program: one draw of the gates per optimizer step, the same for
    the whole batch and on every rank (theirs too, unless it is asked for one per example, which
    a weight cannot have); biases are left alone (there they are penalized in linear layers and
    lost in convolutions); the gates have an Adam of their own.

    Args:
        lam: :math:`\lambda`, at least 0, as in the program: the price of one weight on the scale
            of a loss that is summed over the training set.
        weight_decay: :math:`d`, at least 0, on the scale of an optimizer's ``weight_decay``,
            which it replaces for the gated weights.
        droprate_init: Chance :math:`1 - \sigma(\log\alpha)` at the start, in (0, 1); the program
            has 0.5, in the first layer of its MLP 0.2, in wide residual nets 0.3.
        temperature: :math:`\beta`, above 0.
        stretch: :math:`\gamma` below 0 and :math:`\zeta` above 1.
        lr: Learning rate of the gates; None: in every step that of the weights.
        examples: :math:`N`; None: the length of the training set.
        update_start: First step (int) or fraction of training (float); before it the weights are
            trained without gates.
        update_end: When gates are folded into the weights, as for ``update_start``.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What has a gate: ``Rows()``, ``Columns()``, ``Block(r, c)``; default single
            weights. Not ``NM``: gates open and close one by one.
        seed: Of the noise; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[L0(0.1)])
        Trainer(callbacks=[
            L0(0.1, include=nn.Linear, structure=Columns()),
            L0(0.1, include=nn.Conv2d, structure=Rows()),
        ])
    """

    trained: ClassVar[Sequence[str]] = ("log_alpha",)
    derived: ClassVar[bool] = True
    dense_gradients: bool = True  # a gate that is shut without noise may be open with it

    def __init__(
        self,
        lam: float = 0.1,
        *,
        weight_decay: float = 0.0,
        droprate_init: float = 0.5,
        temperature: float = _TEMPERATURE,
        stretch: tuple[float, float] = _STRETCH,
        lr: float | None = 1e-3,
        examples: int | None = None,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_number("lam", lam, 0)
        self._check_number("weight_decay", weight_decay, 0)
        self._check_number("droprate_init", droprate_init, 0, 1, inside=True)
        self._check_number("temperature", temperature, 0, inside=True)
        self._check_stretch(stretch)
        if lr is not None:
            self._check_number("lr", lr, 0)
        if examples is not None:
            self._check_count("examples", examples)
        self.lam = plain(lam)
        self.weight_decay = plain(weight_decay)
        self.droprate_init = plain(droprate_init)
        self.temperature = plain(temperature)
        self.stretch = (float(stretch[0]), float(stretch[1]))
        self.lr = plain(lr)
        self.examples = plain(examples)
        self._n = examples or 1
        super().__init__(
            **EMERGENT,
            update_start=update_start,
            update_end=update_end,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the examples."""
        self._n = count_examples(trainer, self.examples, "L0")

    # ----------------------------------------------------------------------------- gates

    def extras(self, layer: Layer) -> Mapping[str, Tensor]:
        """One log alpha per unit, float32: normal, around the chance to be dropped."""
        mean = math.log(1 / self.droprate_init - 1)
        log_alpha = mean + 0.01 * torch.randn(layer.size, generator=layer.generator)
        return {"log_alpha": log_alpha.to(layer.weight.device)}

    def settle(self, layer: Layer, progress: float) -> Mapping[str, Tensor]:
        """Keep log alpha within its limits, and draw the noise of the next step."""
        layer.slots["log_alpha"].clamp_(-_LIMIT, _LIMIT)
        u = torch.rand(layer.size, generator=layer.generator) * (1 - 2 * _EDGE) + _EDGE
        return {"u": u.to(layer.weight.device)}

    def effective(self, layer: Layer) -> Tensor:
        """The weight times its random gate."""
        log_alpha, u = layer.slots["log_alpha"], layer.slots["u"]
        return layer.weight * _spread(
            noisy_gate(log_alpha, u, self.temperature, *self.stretch), layer
        )

    def evaluated(self, layer: Layer) -> Tensor:
        """The weight times its gate without noise."""
        return layer.weight * _spread(gate(layer.slots["log_alpha"], *self.stretch), layer)

    def support(self, layer: Layer) -> Tensor:
        """Where the gate without noise is open."""
        return _spread(gate(layer.slots["log_alpha"], *self.stretch), layer) > 0

    def penalty(self, layer: Layer) -> Tensor:
        """The price of all units; weights that an earlier mask bars cost nothing."""
        log_alpha = layer.slots["log_alpha"]
        price = self.lam / self._n + self.weight_decay / 2 * layer.weight.to(log_alpha.dtype) ** 2
        if (barred := layer.slots.get("barred")) is not None:
            price = price.masked_fill(barred, 0)
        chance = chance_to_be_open(log_alpha, self.temperature, *self.stretch)
        return (chance * layer.reduce(price)).sum()

    def learning_rate(self, lr: float, progress: float) -> float:
        """The one given, or that of the weights."""
        return lr if self.lr is None else self.lr

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Adam, as in the paper's experiments on MNIST; no weight decay."""
        return Adam(groups, lr=0.0)

    # ---------------------------------------------------------------------------- checks

    def _check_units(self, structure: Structure, where: str) -> None:
        if isinstance(structure, NM):
            raise ValueError(
                f"{where}: the gates of L0 open and close freely and keep no pattern; use "
                "Rows(), Columns() or Block(r, c), or single weights."
            )

    def _check_stretch(self, stretch: object) -> None:
        if not isinstance(stretch, tuple | list) or len(stretch) != 2:
            raise TypeError(f"L0(stretch={stretch!r}): must be two numbers, such as (-0.1, 1.1).")
        if not all(type(plain(end)) in (int, float) for end in stretch):
            raise TypeError(f"L0(stretch={stretch!r}): must be two numbers, such as (-0.1, 1.1).")
        if not -math.inf < stretch[0] < 0 or not 1 < stretch[1] < math.inf:
            raise ValueError(
                f"L0(stretch={stretch!r}): must begin below 0 and end above 1, such as (-0.1, "
                "1.1); otherwise no gate is ever exactly 0 or 1."
            )


def noisy_gate(
    log_alpha: Tensor,
    u: Tensor,
    temperature: float = _TEMPERATURE,
    low: float = _STRETCH[0],
    high: float = _STRETCH[1],
) -> Tensor:
    """A draw from the hard concrete distribution, in [0, 1].

    Args:
        log_alpha: One number per gate.
        u: Same shape, uniform in (0, 1).
        temperature: Above 0; the lower, the more often exactly 0 or 1.
        low: Below 0.
        high: Above 1.

    Example:
        >>> noisy_gate(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.99]))
        tensor([0.5000, 1.0000])
    """
    return (
        ((torch.logit(u) + log_alpha) / temperature).sigmoid().mul(high - low).add(low).clamp(0, 1)
    )


def gate(log_alpha: Tensor, low: float = _STRETCH[0], high: float = _STRETCH[1]) -> Tensor:
    """The gate without noise, and without temperature, in [0, 1].

    Example:
        >>> gate(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return log_alpha.sigmoid().mul(high - low).add(low).clamp(0, 1)


def chance_to_be_open(
    log_alpha: Tensor,
    temperature: float = _TEMPERATURE,
    low: float = _STRETCH[0],
    high: float = _STRETCH[1],
) -> Tensor:
    """Probability that :func:`noisy_gate` is not 0.

    Example:
        >>> chance_to_be_open(torch.tensor([0.0]))
        tensor([0.8318])
    """
    return (log_alpha - temperature * math.log(-low / high)).sigmoid()


def _spread(units: Tensor, layer: Layer) -> Tensor:
    return layer.structure.expand(units.to(layer.weight.dtype), layer.shape, layer.layout)
