"""The table of public mask methods that the contract tests run over."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lightning.pytorch.callbacks import Callback

import lightning_sparsity
from lightning_sparsity import (
    GMP,
    SET,
    Magnitude,
    MaskCallback,
    RedrGradient,
    RedrGradientGlobal,
    RedrLoss,
    RedrRandom,
    RigL,
    StaticSparse,
)

Make = Callable[..., MaskCallback]

# Arguments that make each method act several times in a run of 24 steps.
METHODS: dict[str, Make] = {
    "StaticSparse": lambda density=0.3, **kw: StaticSparse(density, **kw),
    "SET": lambda density=0.3, **kw: SET(density, **kw),
    "RigL": lambda density=0.3, **kw: RigL(density, **{"update_interval": 4, **kw}),
    "GMP": lambda density=0.3, **kw: GMP(density, **{"update_interval": 4, **kw}),
    "RedrRandom": lambda density=0.3, **kw: RedrRandom(density, **kw),
    "RedrGradient": lambda density=0.3, **kw: RedrGradient(density, **kw),
    "RedrGradientGlobal": lambda density=0.3, **kw: RedrGradientGlobal(density, **kw),
    "RedrLoss": lambda density=0.3, **kw: RedrLoss(density, **kw),
    "Magnitude": lambda density=0.3, **kw: Magnitude(density, **{"at": 0.5, **kw}),
}
UPDATERS = [name for name in METHODS if name != "StaticSparse"]
MOVE_BETWEEN_LAYERS = ["RedrGradientGlobal"]  # only the total stays the same
SINGLE_WEIGHTS = [name for name, make in METHODS.items() if make().single_weights]
FULL_MATRIX = ["RigL", "SET", "GMP"]


def public_callbacks() -> set[str]:
    """Names of all public callbacks."""
    members = {name: getattr(lightning_sparsity, name) for name in lightning_sparsity.__all__}
    return {n for n, m in members.items() if inspect.isclass(m) and issubclass(m, Callback)}


def public_methods() -> set[str]:
    """Names of the public callbacks that make masks."""
    return {
        name
        for name in lightning_sparsity.__all__
        if inspect.isclass(member := getattr(lightning_sparsity, name))
        and issubclass(member, MaskCallback)
        and member is not MaskCallback
    }
