"""Method: what the engine asks of a callback that makes or changes masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from lightning_sparsity.core.capture import Statistic
from lightning_sparsity.core.filters import Selection
from lightning_sparsity.core.layer import Layer, Layers, Rule
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.core.window import Window
from lightning_sparsity.structures import Structure

Role = Literal["initial", "reparametrization", "updater"]
"""Initial methods act once, before the first step; updaters act in a window; under one of them
a reparametrization changes what layers compute with, and leaves masks alone."""

Observe = Callable[[Layer], Mapping[str, Tensor]]
"""Sees a layer with its dense gradient before every step; returns the slots to keep."""


@dataclass(frozen=True)
class Share:
    """The part of a method's weights that one optimizer owns.

    Args:
        names: Every parameter of the method.
        sizes: Units of the method that each optimizer owns.
        index: Which of them this part is.
        found: Whether an earlier method had made the masks when this one began.
        start: Live units by parameter name as the method began; empty before.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    index: int
    found: bool
    start: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A callback that makes or changes masks.

    Attributes:
        role: Initial, reparametrization or updater.
        include: Which parameters are sparse.
        exclude: Which of those are left dense.
        structure: What one unit is; None: as an earlier method has it.
        window: When updates run.
        rule: What an update does; None: nothing after the start.
        observe: Fills slots from dense gradients, or None.
        statistics: What updates need of the layers' activations, if anything.
        ramps: Whether the density changes in the window. If not, the last step of
            training is never followed by an update, as nothing would train on it.
        seed: Of random choices; None: the run's.
        density: Asked live share, None if it is taken from an earlier method.
    """

    role: Role
    include: Selection
    exclude: Selection
    structure: Structure | None
    window: Window
    rule: Rule | None
    observe: Observe | None
    statistics: Collection[Statistic]
    ramps: bool
    seed: int | None
    density: float | None

    @property
    def needs_gradient(self) -> bool:
        """Whether updates read dense gradients."""
        ...

    @property
    def on_parts(self) -> bool:
        """Whether sharded layers need not be gathered for updates."""
        ...

    @property
    def begins_on_parts(self) -> bool:
        """Whether sharded layers need not be gathered for :meth:`begin`."""
        ...

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` at the start of training if a later update could not be done.

        Args:
            layers: Every layer of the method.
        """
        ...

    def estimate(self, layers: Layers, share: Share, view: ModelView) -> Layers:
        """Look at the model and its data before beginning, at the start of training.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.
            view: The model, with all its layers as the methods before left them.

        Returns:
            The layers with what :meth:`begin` needs, such as a score in a slot.
        """
        ...

    @property
    def only_prunes(self) -> bool:
        """Whether no update ever brings a unit to life."""
        ...

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make masks, or adapt those that an earlier method made.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.

        Returns:
            The layers as they should be.
        """
        ...

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """One update of the layers of one optimizer.

        Args:
            layers: The layers as they are, after the optimizer step.
            share: What part of the whole they are.
            progress: How much of the window has passed, in [0, 1].

        Returns:
            The layers as they should be.
        """
        ...
