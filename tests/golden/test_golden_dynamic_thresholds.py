"""Trainable thresholds (DST) against the numbers of its authors' program."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sparsity.callbacks.learned.dynamic_thresholds import DynamicThresholds, step
from lightning_sparsity.core.layer import Layer

HERE = Path(__file__).parent
CASES = {
    case["name"]: case
    for case in json.loads((HERE / "learned.json").read_text())["cases"]
    if case["name"].startswith("dst_")
}


def test_step_and_its_derivative():
    case = CASES["dst_long_tail_ste"]
    x = torch.tensor(case["inputs"]["x"], requires_grad=True)
    out = step(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert out.tolist() == case["expected"]["step"]
    close = {"rtol": case["tol"], "atol": case["tol"]}
    torch.testing.assert_close(slope, torch.tensor(case["expected"]["ste"]), **close)


@pytest.mark.parametrize("name", ["dst_masked_linear", "dst_reset_when_layer_empty"])
def test_one_step_of_a_linear_layer(name):
    case = CASES[name]
    given, expected = case["inputs"], case["expected"]
    close = {"rtol": case["tol"], "atol": case["tol"]}
    method = DynamicThresholds(alpha=given["alpha"], weight_decay=0)
    weight, threshold = torch.tensor(given["w"]), torch.tensor(given["threshold"])
    mask = torch.ones_like(weight, dtype=torch.bool)
    layer = Layer("w", weight, mask, slots={"threshold": threshold})
    method.settle(layer, 0.5)  # the program looks at the start of its forward pass
    after = torch.tensor(expected["threshold_after_forward"])
    torch.testing.assert_close(threshold, after, **close)

    effective = method.effective(layer).requires_grad_()
    out = nn.functional.linear(torch.tensor(given["x"]), effective, torch.tensor(given["b"]))
    torch.testing.assert_close(out, torch.tensor(expected["out"]), **close)
    (grad,) = torch.autograd.grad(out, effective, torch.tensor(given["upstream"]))
    assert float(method.penalty(layer)) == pytest.approx(expected["penalty"], rel=case["tol"])

    seen = Layer("w", weight, mask, grad=grad, slots={"threshold": threshold})
    found = method.gradients(seen)
    torch.testing.assert_close(found["weight"], torch.tensor(expected["grad_weight"]), **close)
    torch.testing.assert_close(
        found["threshold"], torch.tensor(expected["grad_threshold"]), **close
    )


def test_there_are_three_cases():
    assert len(CASES) == 3
