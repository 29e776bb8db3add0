"""Approximate isometry against its derivation in float64."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.starts import approximate_isometry

CASE = next(
    case
    for case in json.loads((Path(__file__).parent / "pruning.json").read_text())["cases"]
    if case["name"] == "approximate_isometry_a"
)


def given():
    weight = torch.tensor(CASE["inputs"]["weight_out_in"], dtype=torch.float64)
    return Layer("fc.weight", weight, torch.tensor(CASE["inputs"]["mask"], dtype=torch.bool))


def penalty(layer):
    weight = layer.weight * layer.mask
    return float((weight @ weight.T - torch.eye(len(weight))).norm())


def test_every_step():
    expected = CASE["expected"]["penalty_per_step_including_start"]
    assert penalty(given()) == pytest.approx(expected[0], rel=CASE["rtol"])
    for steps in range(1, CASE["inputs"]["steps"] + 1):
        rule = approximate_isometry(steps=steps, lr=CASE["inputs"]["lr"])
        (after,) = rule([given()], [0], 0.0)
        assert penalty(after) == pytest.approx(expected[steps], rel=CASE["rtol"])


def test_weights():
    rule = approximate_isometry(steps=CASE["inputs"]["steps"], lr=CASE["inputs"]["lr"])
    (after,) = rule([given()], [0], 0.0)
    expected = torch.tensor(CASE["expected"]["weights"], dtype=torch.float64)
    torch.testing.assert_close(after.weight, expected, rtol=CASE["rtol"], atol=1e-9)
