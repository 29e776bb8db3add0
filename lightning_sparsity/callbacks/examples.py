"""How many examples a training has: what is paid once per training set is divided by it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def count_examples(trainer: pl.Trainer, given: int | None, name: str) -> int:
    """Examples in the training set, once its loader exists.

    Args:
        trainer: About to train.
        given: What the user said; None: the length of the loader's data set.
        name: Of the callback, for the message.

    Raises:
        MisconfigurationException: If nothing says how many there are.
    """
    if given is not None:
        return given
    try:
        return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        raise MisconfigurationException(
            f"{name}(examples=None): the training set has no length, and its size weighs the "
            f"penalty against the loss; pass the number of examples, {name}(examples=60000)."
        ) from None
