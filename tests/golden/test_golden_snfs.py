"""One update of sparse momentum against the numbers of the authors' program."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sparsity import SNFS, constant
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import magnitude

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "snfs_step"
]


def values(shape, a, b, scale=1.0, times_mask=None):
    """The rule of the golden file: round(sin(a (i + 1)) + b cos(3.7 (i + 1)), 4)."""
    count = range(1, math.prod(shape) + 1)
    flat = [round(math.sin(a * i) + b * math.cos(3.7 * i), 4) for i in count]
    return torch.tensor(flat).view(shape) * scale


def layers_of(given):
    for i, shape in enumerate(given["shapes"]):
        period, keep = given["masks"][i]["period"], given["masks"][i]["keep"]
        flat = [7 * j % period < keep for j in range(math.prod(shape))]
        mask = torch.tensor(flat).view(shape)
        slots = {"momentum": values(shape, **given["momentum"][i])}
        yield Layer(str(i), values(shape, **given["weights"][i]) * mask, mask, slots=slots)


@pytest.mark.parametrize("case", CASES)
def test_one_update(case):
    given, expected = case["inputs"], case["expected"]
    layers = list(layers_of(given))
    means = [float(layer.slots["momentum"][layer.mask].abs().mean()) for layer in layers]
    shares = [mean / sum(means) for mean in means]
    assert shares == pytest.approx(expected["layer_share"], abs=1e-6)

    rate = given["prune_rate"]
    pruned = drop(magnitude, rate, rounding=math.ceil)(layers, [0] * len(layers), 0.0)
    removed = [old.live - new.live for old, new in zip(layers, pruned, strict=True)]
    assert removed == expected["removed"]

    after = SNFS(0.5, drop_fraction=constant(rate)).rule(layers, [0] * len(layers), 0.0)
    assert [layer.live for layer in after] == expected["n_active_after"]
    for layer, mask in zip(after, expected["mask_after"], strict=True):
        assert layer.mask.int().tolist() == mask


def test_there_is_a_case_and_it_moves_weights_between_layers():
    (case,) = [case.values[0] for case in CASES]
    before = [layer.live for layer in layers_of(case["inputs"])]
    assert before == [60, 32, 16]
    assert case["expected"]["n_active_after"] == [42, 35, 31]
    assert case["expected"]["adjusted_growth_next"] == 0.0
