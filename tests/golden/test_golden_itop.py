"""In-time over-parameterisation against the numbers of the authors' program."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sparsity.core.filters import candidates
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.monitors.tracker import MaskTracker
from lightning_sparsity.ops.packing import unpack
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import gradient, magnitude
from lightning_sparsity.structures import Unstructured

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "itop"
]


def values(shape, a, b):
    """The rule of the golden file: round(sin(a (i + 1)) + b cos(3.7 (i + 1)), 4)."""
    count = range(1, math.prod(shape) + 1)
    flat = [round(math.sin(a * i) + b * math.cos(3.7 * i), 4) for i in count]
    return torch.tensor(flat).view(shape)


def mask_of(shape, period, keep):
    flat = [7 * i % period < keep for i in range(math.prod(shape))]
    return torch.tensor(flat).view(shape)


@pytest.mark.parametrize("case", CASES)
def test_itop(case):
    given, expected = case["inputs"], case["expected"]
    shape = given["shape"]
    mask = mask_of(shape, **given["mask"])
    assert given["mask"] == given["fired_mask"]
    weight = values(shape, given["weight"]["a"], given["weight"]["b"]) * mask
    grad = values(shape, given["grad"]["a"], given["grad"]["b"])

    model = nn.ParameterDict({"w": weight})
    kept = SparseParameter(candidates(model)[0], Unstructured())
    kept.set_mask(mask)
    masks = Masks([kept])
    tracker = MaskTracker(masks)
    assert tracker.metrics()["itop/w"] == kept.density

    layer = Layer("w", kept.weight, kept.mask, grad=grad)
    update = chain(
        drop(magnitude, fraction=given["death_rate"], rounding=math.ceil), grow(gradient)
    )
    (dropped,) = update.rules[0]([layer], [layer.live], 0.0)
    assert layer.live - dropped.live == expected["n_removed"]
    masks.commit(update([layer], [layer.live], 0.0))
    tracker.update({"w"})

    assert kept.mask.int().tolist() == expected["mask"]
    assert tracker.metrics()["itop/w"] == expected["Rs"]
    fired = unpack(tracker.state_dict()["w"]["fired"], shape)
    assert fired.int().tolist() == expected["fired_mask"]


def test_there_are_cases():
    assert CASES
