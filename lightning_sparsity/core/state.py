"""State: what the keeper writes to a checkpoint, compares and restores.

Tensors and plain Python only, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.plan import Assignment
from lightning_sparsity.core.randomness import rng_state
from lightning_sparsity.core.run import Owner, Run
from lightning_sparsity.core.shards import is_sharded, whole
from lightning_sparsity.ops.packing import pack, unpack

VERSION = 1
"""Of the form of what is saved."""


def save(
    masks: Masks,
    assignments: Sequence[Assignment],
    owners: Sequence[Owner],
    runs: Sequence[Run],
    seed: int,
) -> dict[str, Any]:
    """Everything that a resumed run needs, masks at one bit per weight."""
    return {
        "version": VERSION,
        "seed": seed,
        "rng": rng_state(),
        "methods": [_describe(a) for a in assignments],
        "parameters": {
            kept.name: {
                "aliases": kept.aliases,
                "shape": kept.shape,
                "structure": repr(kept.structure),
                "mask": pack(whole(kept.mask)).cpu(),
                "slots": {key: whole(tensor).cpu() for key, tensor in kept.slots.items()},
            }
            for kept in masks
        },
        "steps": [owner.steps for owner in owners],
        "runs": [_save_run(run) for run in runs],
    }


def differences(
    state: dict[str, Any],
    masks: Masks,
    assignments: Sequence[Assignment],
    owners: Sequence[Owner],
    runs: Sequence[Run],
) -> list[str]:
    """What differs between a saved state and the run that should take it; one line each."""
    if state["version"] != VERSION:
        return [f"form of the state: version {state['version']} in the checkpoint, {VERSION} now"]
    now = {p.name: (p.shape, repr(p.structure)) for p in masks}
    then = {
        name: (tuple(saved["shape"]), saved["structure"])
        for name, saved in state["parameters"].items()
    }
    found = [
        f"{name}: {_said(then.get(name))} in the checkpoint, {_said(now.get(name))} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    found += [
        f"{name}: {saved['mask'].numel()} bytes of mask in the checkpoint, {-(-size // 8)} now"
        for name, saved in state["parameters"].items()
        if saved["mask"].numel() != -(-(size := math.prod(saved["shape"])) // 8)
    ]
    methods = [_describe(a) for a in assignments]
    if methods != state["methods"]:
        found.append(f"callbacks: {state['methods']} in the checkpoint, {methods} now")
    grouped = (len(owners), len(runs))
    if not found and grouped != (len(state["steps"]), len(state["runs"])):
        found.append(f"optimizers: {len(state['steps'])} in the checkpoint, {len(owners)} now")
    return found


def restore(
    state: dict[str, Any], masks: Masks, owners: Sequence[Owner], runs: Sequence[Run]
) -> None:
    """Apply a saved state without differences."""
    for owner, steps in zip(owners, state["steps"], strict=True):
        owner.steps = steps
    for kept in masks:
        saved = state["parameters"][kept.name]
        device = kept.parameter.device
        kept.set_mask(unpack(saved["mask"], saved["shape"]).to(device))
        kept.keep(saved["slots"])
    for run, saved in zip(runs, state["runs"], strict=True):
        run.updates = saved["updates"]
        run.pending = saved["pending"]
        run.last_epoch = saved["last_epoch"]
        run.released = saved["released"]
        run.share = Share(**saved["share"]) if saved["share"] else None


def replace_masks(state: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
    """Replace masks in a saved state, in place."""
    for name, mask in masks.items():
        state["parameters"][name]["mask"] = pack(mask).cpu()


def mask_weights(state: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Replace what is in ``weights``, by name, by copies that are zero off the saved masks."""
    for saved in state.get("parameters", {}).values():
        mask = unpack(saved["mask"], saved["shape"])
        for name in saved["aliases"]:
            if name in weights and not mask.all() and not is_sharded(weights[name]):
                off = ~mask.to(weights[name].device)
                weights[name] = weights[name].masked_fill(off, 0)


def _save_run(run: Run) -> dict[str, Any]:
    share = run.share
    return {
        "updates": run.updates,
        "pending": run.pending,
        "last_epoch": run.last_epoch,
        "released": run.released,
        "share": share and {**vars(share), "start": dict(share.start)},
    }


def _describe(assignment: Assignment) -> str:
    """The call of a method, as far as two runs must agree on it."""
    density = assignment.method.density
    return assignment.key if density is None else f"{assignment.key}(density={float(density)})"


def _said(what: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if what is None else f"{what[0]} {what[1]}"
