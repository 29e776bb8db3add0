"""The plan: which method works on which parameter, checked before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparsity.core.filters import Candidate, candidates, linear_and_conv, select
from lightning_sparsity.core.layer import errors_of
from lightning_sparsity.core.method import Method, Role
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.window import Steps
from lightning_sparsity.structures import Structure, Unstructured


@dataclass(frozen=True)
class Assignment:
    """One method and the parameters it works on.

    Args:
        key: Name of the method in messages and checkpoints, such as ``RigL``.
        method: The callback.
        names: Plain names of its parameters, in the model's order.
    """

    key: str
    method: Method
    names: tuple[str, ...]


def assign(
    model: nn.Module, callbacks: Iterable[Callback]
) -> tuple[list[Assignment], list[SparseParameter]]:
    """Match methods and parameters; initial methods first, each role in list order.

    Returns:
        The assignments, and every sparse parameter once, in the model's order.

    Raises:
        ValueError: If a filter matches nothing or a structure does not fit a weight.
        MisconfigurationException: If two methods cut one weight in different units.
    """
    pool = candidates(model)
    order = get_args(Role)
    methods = sorted(
        (c for c in callbacks if isinstance(c, Method)), key=lambda m: order.index(m.role)
    )
    assignments: list[Assignment] = []
    chosen: dict[str, tuple[Candidate, Structure, str]] = {}
    for key, method in zip(_keys(methods), methods, strict=True):
        found = _select(key, method, pool)
        for candidate in found:
            first = chosen.get(candidate.name)
            structure = _structure(key, method, candidate, first)
            chosen.setdefault(candidate.name, (candidate, structure, key))
        _check_capture(key, method, found)
        assignments.append(Assignment(key, method, tuple(c.name for c in found)))
    ordered = [chosen[c.name] for c in pool if c.name in chosen]
    places = {c.name: n for n, c in enumerate(c for c in pool if linear_and_conv(c))}
    parameters = [SparseParameter(c, unit, places.get(c.name)) for c, unit, _ in ordered]
    return assignments, parameters


def check_effective(learned: Sequence[Assignment]) -> None:
    """Refuse two methods that both change what a layer computes with, if one does so always.

    Args:
        learned: Those whose layers compute with effective weights.

    Raises:
        MisconfigurationException: Naming both callbacks, the parameter and the way out.
    """
    for place, a in enumerate(learned):
        for b in learned[:place]:
            always = "reparametrization" in (a.method.role, b.method.role)
            if always and (both := set(a.names) & set(b.names)):
                raise MisconfigurationException(
                    f"{b.key} and {a.key} both change what {min(both)} computes with. Give them "
                    "different parameters with include= and exclude=, or leave one out."
                )


def check_windows(windows: Sequence[tuple[str, Steps, frozenset[str]]]) -> None:
    """Refuse two updaters that are active on one parameter at the same time.

    Args:
        windows: Key, steps and parameter names of every updater, in list order.

    Raises:
        MisconfigurationException: Naming both callbacks, the parameter and the way out.
    """
    for place, (key, steps, names) in enumerate(windows):
        for earlier, before, taken in windows[:place]:
            if names & taken and steps.start < before.end:
                raise MisconfigurationException(
                    f"{earlier} works on {min(names & taken)} from step {before.start} to "
                    f"{before.end}, and {key} from step {steps.start} to {steps.end}. One updater "
                    f"at a time: let {key} begin when {earlier} ends (update_start={before.end}), "
                    "or give them different parameters with include= and exclude=."
                )


def check_order(assignment: Assignment, made: Mapping[str, tuple[str, float]]) -> None:
    """Refuse a method that cannot go on from what those before it leave.

    Args:
        assignment: The method.
        made: By parameter: who acted on it last, and the density it leaves.

    Raises:
        MisconfigurationException: If the method found masks on some of its parameters
            only, or would have to grow and only prunes.
    """
    key, method, names = assignment.key, assignment.method, set(assignment.names)
    if method.role == "reparametrization":
        return
    found, fresh = names & made.keys(), names - made.keys()
    if found and fresh:
        raise MisconfigurationException(
            f"{key}: an earlier callback made masks for {min(found)} but none for {min(fresh)}. "
            "Give the two sets of parameters to two callbacks, with include= and exclude=."
        )
    for name in sorted(found):
        earlier, density = made[name]
        if method.only_prunes and method.density is not None and density < method.density:
            raise MisconfigurationException(
                f"{key}(density={method.density}) only prunes, and {earlier} leaves a density of "
                f"{density:.4g} before it. Lower the density of {key}, or raise that of {earlier}."
            )


def _keys(methods: Sequence[Method]) -> list[str]:
    """Class names, numbered from the second of a kind."""
    names = [type(method).__name__ for method in methods]
    counts = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}[{n}]" if n else name for name, n in zip(names, counts, strict=True)]


def _select(key: str, method: Method, pool: list[Candidate]) -> list[Candidate]:
    with errors_of(key):
        found = select(pool, method.include, method.exclude)
    for candidate in found:
        if getattr(candidate.module, "sparse", False) or not candidate.parameter.ndim:
            raise ValueError(
                f"{key}: {candidate.name} has sparse gradients or no dimensions, and cannot be "
                "masked; leave it out with exclude=."
            )
        if isinstance(candidate.parameter, UninitializedParameter):
            raise ValueError(
                f"{key}: {candidate.name} is not initialised yet; run one batch through the lazy "
                "module before fit."
            )
    return [candidate for candidate in found if candidate.parameter.numel()]


def _check_capture(key: str, method: Method, found: Sequence[Candidate]) -> None:
    for candidate in found if method.statistics else ():
        if any("_orig_mod" in alias for alias in candidate.aliases):
            raise MisconfigurationException(
                f"{key} reads the activations of {candidate.name}, which is inside a compiled "
                "module, where hooks never fire. Leave that module uncompiled."
            )


def _structure(
    key: str,
    method: Method,
    candidate: Candidate,
    first: tuple[Candidate, Structure, str] | None,
) -> Structure:
    structure = method.structure or (first[1] if first else Unstructured())
    if first is not None and structure != first[1]:
        raise MisconfigurationException(
            f"{first[2]} cuts {candidate.name} in units of {first[1]!r}, but {key} in units of "
            f"{structure!r}. Give both the same structure=, or leave it out of {key}."
        )
    with errors_of(f"{key}: {candidate.name}"):
        structure.check(tuple(candidate.parameter.shape), candidate.layout)
    return structure
