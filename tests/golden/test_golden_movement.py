"""What movement pruning keeps, hard and soft, against the authors' later program."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.movement import MovementPruning, SoftMovementPruning
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "learned.json").read_text())["cases"]
}


def test_hard():
    case = CASES["movement_topk"]
    score = torch.tensor(case["inputs"]["scores"])
    dense = torch.ones_like(score, dtype=torch.bool)
    layer = Layer("w", torch.ones_like(score), dense, slots={"score": score})
    share = Share(("w",), (score.numel(),), 0, found=False, start={"w": score.numel()})
    (kept,) = MovementPruning(case["inputs"]["keep"]).update([layer], share, 1.0)
    assert kept.mask.int().tolist() == case["expected"]


@pytest.mark.parametrize("name", ["soft_movement_threshold", "soft_movement_min_elements"])
def test_soft(name):
    case = CASES[name]
    given = case["inputs"]
    score = torch.tensor(given["scores"])
    method = SoftMovementPruning(threshold=given["threshold"], min_density=given["min_elements"])
    dense = torch.ones_like(score, dtype=torch.bool)
    slots = {"score": score.reshape(-1)}  # one per unit
    layer = Layer("w", torch.ones_like(score), dense, slots=slots)
    slots |= method.settle(layer, 1.0)
    assert method.support(layer).int().tolist() == case["expected"]
