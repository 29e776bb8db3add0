"""Randomness: generators that every rank and every resumed run draws alike."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from typing import Any

import torch


def default_seed() -> int:
    """The seed of ``seed_everything``, or else of torch. Draws nothing."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``key`` alone.

    Example:
        >>> int(torch.randint(1000, (), generator=generator(7, "net.0.weight", 3)))
        651
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, CUDA, Python and NumPy (if imported).

    Lightning does not save them, and without them a resumed run shuffles its data and
    drops its units in another order than the run that went on.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
