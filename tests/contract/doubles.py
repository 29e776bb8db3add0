"""Trainings in float64, in which two orders of adding the same numbers agree to many digits."""

from __future__ import annotations

import torch

from lightning_sparsity.testing import Batches, Result, TinyModel


def double() -> TinyModel:
    """The tiny model, stepped by SGD with momentum."""
    return TinyModel().double()


def doubles(count: int = 8) -> Batches:
    """The batches of the other tests."""
    batches = Batches(count)
    batches._batches = [(x.double(), y) for x, y in batches._batches]
    return batches


def assert_close(one: Result, other: Result, tolerance: float) -> None:
    """Raise ``AssertionError`` unless masks are equal, weights and optimizer state nearly."""
    assert one.masks.keys() == other.masks.keys() or not other.masks
    assert all(torch.equal(one.masks[key], mask) for key, mask in other.masks.items())
    assert one.history == other.history or not other.history
    assert one.weights.keys() == other.weights.keys()
    assert len(one.state) == len(other.state)
    pairs = [(one.weights[key], other.weights[key]) for key in other.weights]
    for a, b in [*pairs, *zip(one.state, other.state, strict=True)]:
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
