"""Timing: which of several ways to compute the same is the fastest here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]


def race(runs: Sequence[Run], device: torch.device, seconds: float) -> list[float]:
    """The shortest time that each of some functions takes, in seconds.

    They run in turns, so that other load on the machine meets all of them, and each finds the
    caches as another one left them; the shortest time counts, as other load can only add to it.
    On a GPU, which works behind the program, a turn is a millisecond of the same function.

    Args:
        runs: The functions.
        device: Where they compute.
        seconds: For all turns together; there are at least three, or one of slow functions.
    """
    for run in runs:
        run()
    best = [_turn(run, 1, device) for run in runs]
    at_once = 0.0 if device.type == "cpu" else 1e-3
    repeats = [max(1, round(at_once / single)) for single in best]
    turns = 3 if max(best) < seconds else 1
    end = time.perf_counter() + seconds
    while turns > 0 or time.perf_counter() < end:
        for place, run in enumerate(runs):
            best[place] = min(best[place], _turn(run, repeats[place], device))
        turns -= 1
    return best


def _turn(run: Run, repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait()
