"""Oddities: what a user should hear of methods and layers, each with a key to say it once."""

from __future__ import annotations

from collections.abc import Container, Iterator

from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.run import Run

Oddity = tuple[str, str]
"""What it is about, and the message."""


def dead_layers(run: Run, masks: Masks, hidden: Container[str]) -> Iterator[Oddity]:
    """Layers of a method that have no live weight left.

    Args:
        run: The method at work.
        masks: All masks.
        hidden: Layers of which more may live in training than in validation.
    """
    for name in run.names:
        kept = masks[name]
        if kept.numel and not kept.live and name not in hidden:
            yield (
                f"{name} is dead",
                f"{run.key}: {name} has no live weight left. Nothing passes through the layer "
                "any more, and what has no way around it stops training. Raise the density, "
                "choose a distribution that leaves every layer some weights, or leave the "
                "layer out with exclude=.",
            )


def idle_method(run: Run, total: float, epochs: float) -> Iterator[Oddity]:
    """A method that will make no update, or a single one where many are meant.

    Args:
        run: The method at work.
        total: Optimizer steps in the whole training.
        epochs: Epochs in the whole training.
    """
    steps = run.steps
    if steps is None:
        return
    if run.idle(total, epochs):
        yield (
            f"{run.key} is idle",
            f"{run.key} makes no update: training has {total:g} optimizer steps, "
            f"{run.owner.steps} of them behind it, and the window is steps {steps.start} "
            f"to {steps.end}, every {steps.every}. Move the window, or update more often.",
        )
    elif run.method.ramps and run.owner.optimizer is None:
        yield (
            f"{run.key} is not stepped",
            f"{run.key} makes no update of {', '.join(run.names)}, which no optimizer "
            "steps. Leave frozen weights out with exclude=, give them to an optimizer, or "
            "take StaticSparse or another initial method for them.",
        )
    elif run.method.ramps and steps.jumps:
        yield (
            f"{run.key} jumps",
            f"{run.key} goes to its density in a single update, at step {steps.end}: the "
            f"window is steps {steps.start} to {steps.end}, every {steps.every}. Lower "
            "update_interval for a gradual change.",
        )


def unfinished_ramp(run: Run, live: int, size: int) -> Iterator[Oddity]:
    """A density that was to change up to a step that has not come.

    Args:
        run: The method at work, unfinished.
        live: Its live units.
        size: All its units.
    """
    assert run.steps is not None
    asked = run.method.density
    arrived = asked is not None and live == round(asked * size)
    is_not = "" if arrived else f", not {asked or 'the final one'}"
    yield (
        f"{run.key} is unfinished",
        f"{run.key}: training ended at step {run.owner.steps}, before update_end "
        f"(step {run.steps.end}); the density is {live / size:.4g}{is_not}.",
    )
