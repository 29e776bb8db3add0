"""GraNet against the numbers of the authors' program.

That program keeps what lies strictly above the k-th largest magnitude, and thus one weight
fewer than it counts out, and prunes last one interval before its ramp ends. Our counts are
exact, and the ramp arrives: both are tested for what they are.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sparsity import GraNet, constant
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.distributions import global_by
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import magnitude

CASES = json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
SCHEDULE = next(case for case in CASES if case["kind"] == "granet_schedule")
STEP = next(case for case in CASES if case["kind"] == "granet_step")


def values(shape, a, b):
    """The rule of the golden file: round(sin(a (i + 1)) + b cos(3.7 (i + 1)), 4)."""
    count = range(1, math.prod(shape) + 1)
    flat = [round(math.sin(a * i) + b * math.cos(3.7 * i), 4) for i in count]
    return torch.tensor(flat).view(shape)


def dense(name, weight, grad=None):
    return Layer(name, weight, torch.ones_like(weight, dtype=torch.bool), grad=grad)


def update(callback, layers, progress):
    names = tuple(layer.name for layer in layers)
    size = sum(layer.size for layer in layers)
    share = Share(names, (size,), 0, False, {layer.name: layer.size for layer in layers})
    return callback.update(layers, share, progress)


@pytest.mark.parametrize("step", SCHEDULE["inputs"]["steps"])
def test_counts_on_the_ramp(step):
    given = SCHEDULE["inputs"]
    theirs = SCHEDULE["expected"]["n_active"][str(step)]
    ends = given["final_prune_epoch"] * given["iters_per_epoch"]
    callback = GraNet(
        given["final_density"],
        initial_density=given["init_density"],
        prune_end=0.5,  # of a window twice as long
        drop_fraction=0.0,  # only prunes
    )
    weight = torch.arange(1, given["N"] + 1).float().view(-1, 10)
    layer = dense("w", weight, torch.zeros_like(weight))
    (after,) = update(callback, [layer], step / (2 * ends))
    wanted = callback.ramp(given["init_density"], given["final_density"])(step / (2 * ends))
    assert after.live == round(given["N"] * wanted)
    assert (after.mask == (weight > given["N"] - after.live)).all()
    if step < ends:  # rounded down, in sparsities, and a weight fewer
        start, end = 1 - given["init_density"], 1 - given["final_density"]
        sparsity = start + (end - start) * (1 - (1 - step / ends) ** 3)
        assert int(given["N"] * (1 - sparsity)) - 1 == theirs
        assert 1 <= after.live - theirs <= 2
    else:  # they do not prune any more
        assert (after.live, theirs) == (100, given["N"])


def the_step():
    given = STEP["inputs"]
    layers = [
        dense(str(i), values(shape, **weight), values(shape, **grad))
        for i, (shape, weight, grad) in enumerate(
            zip(given["shapes"], given["weights"], given["grads"], strict=True)
        )
    ]
    ends = given["final_prune_epoch"] * given["iters_per_epoch"]
    callback = GraNet(
        given["final_density"],
        initial_density=given["init_density"],
        prune_end=1.0,
        drop_fraction=constant(given["regeneration_fraction"]),
    )
    return callback, layers, given["step"] / ends


def masks(key):
    return [torch.tensor(mask, dtype=torch.bool) for mask in STEP["expected"][key]]


def test_prune_then_regenerate_with_their_count():
    callback, layers, progress = the_step()
    theirs = sum(STEP["expected"]["n_active_after_prune"])
    budget = global_by(magnitude)(layers, theirs)
    assert budget == STEP["expected"]["n_active_after_prune"]
    pruned = drop(magnitude)(layers, budget, progress)
    for layer, mask in zip(pruned, masks("mask_after_prune"), strict=True):
        assert torch.equal(layer.mask, mask)
    after = callback.rule(layers, budget, progress)
    for layer, mask in zip(after, masks("mask_after_regeneration"), strict=True):
        assert torch.equal(layer.mask, mask)
    assert [layer.live for layer in after] == STEP["expected"]["n_active_after_regeneration"]


def test_prune_then_regenerate_with_ours():
    callback, layers, progress = the_step()
    after = update(callback, layers, progress)
    # 0.34375 of 36 weights are 12.375: 12, where they keep 11
    assert sum(layer.live for layer in after) == 12
    assert sum(STEP["expected"]["n_active_after_prune"]) == 11
