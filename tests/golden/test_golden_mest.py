"""What MEST drops, against the authors' program.

It keeps scores above a percentile, all weights competing; here those are all live.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.dynamic.mest import importance
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import drop

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "mest_drop"
]


def values(shape, a, b):
    """The rule of the golden file: round(sin(a (i + 1)) + b cos(3.7 (i + 1)), 4)."""
    count = range(1, math.prod(shape) + 1)
    flat = [round(math.sin(a * i) + b * math.cos(3.7 * i), 4) for i in count]
    return torch.tensor(flat).view(shape)


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept(case):
    given = case["inputs"]
    weight, grad = (values(given["shape"], **given[key]) for key in ("weight", "grad"))
    layer = Layer("w", weight, torch.ones_like(weight, dtype=torch.bool), grad=grad)
    live = round((1 - given["sparsity"]) * layer.size)
    (kept,) = drop(importance(given["lmd"]))([layer], [live], 0.0)
    assert kept.mask.int().tolist() == case["expected"]["mask"]
    # by magnitude alone it would be another mask
    (other,) = drop(importance(0.0))([layer], [live], 0.0)
    assert not torch.equal(other.mask, kept.mask)


def test_there_are_cases():
    assert CASES
