"""STR against the numbers of its authors' program."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.soft_threshold import STR
from lightning_sparsity.core.layer import Layer

HERE = Path(__file__).parent
CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((HERE / "learned.json").read_text())["cases"]
    if case["name"].startswith("str_threshold")
]


def layer_of(given):
    weight = torch.tensor(given["w"])
    mask = torch.ones_like(weight, dtype=torch.bool)
    slots = {"s": torch.tensor(given["s"])}
    return Layer("w", weight, mask, grad=torch.tensor(given["upstream"]), slots=slots)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_sparsity(case):
    layer, method, expected = layer_of(case["inputs"]), STR(weight_decay=1e-4), case["expected"]
    close = {"rtol": case["tol"], "atol": case["tol"]}
    out = method.effective(layer)
    torch.testing.assert_close(out, torch.tensor(expected["out"]), **close)
    assert not out[~method.support(layer)].any()
    dead = 1 - method.support(layer).float().mean()
    assert float(dead) == pytest.approx(expected["sparsity"], abs=case["tol"])
    assert float(layer.slots["s"].sigmoid()) == pytest.approx(
        expected["threshold"], rel=case["tol"]
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay", [1e-30, 0.5])
def test_gradients(case, decay):
    layer, expected = layer_of(case["inputs"]), case["expected"]
    close = {"rtol": case["tol"], "atol": case["tol"]}
    found = STR(weight_decay=decay).gradients(layer)
    torch.testing.assert_close(found["weight"], torch.tensor(expected["grad_w"]), **close)
    wanted = expected["grad_s"] + decay * case["inputs"]["s"]
    torch.testing.assert_close(found["s"], torch.tensor(wanted), **close)


def test_one_threshold_per_output_unit_is_that_of_each_row():
    given = CASES[0].values[0]["inputs"]
    whole = layer_of(given)
    rows = layer_of({**given, "s": [given["s"], -9.0]})
    method = STR(weight_decay=1e-30, granularity="output")
    out, found = method.effective(rows), method.gradients(rows)
    assert torch.equal(out[0], STR(weight_decay=1e-30).effective(whole)[0])
    assert not torch.equal(out[1], STR(weight_decay=1e-30).effective(whole)[1])
    assert found["s"].shape == (2,)
    threshold = torch.tensor(given["s"]).sigmoid()
    pull = torch.tensor([1.0, -1.0]).sum()  # upstream where the first row is live, w above 0
    torch.testing.assert_close(found["s"][0], -pull * threshold * (1 - threshold))


def test_there_are_two_cases():
    assert len(CASES) == 2
