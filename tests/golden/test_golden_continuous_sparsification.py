"""Continuous sparsification against the numbers of its authors' program."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.continuous_sparsification import ContinuousSparsification
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.testing import TinyModel, quiet_trainer

HERE = Path(__file__).parent
CASES = {
    case["name"]: case
    for case in json.loads((HERE / "learned.json").read_text())["cases"]
    if case["name"].startswith("continuous_sparsification")
}
CASE = CASES["continuous_sparsification"]
GIVEN, EXPECTED, TOL = CASE["inputs"], CASE["expected"], CASE["tol"]


def layer_at(temperature):
    weight = torch.tensor(GIVEN["w"])
    slots = {"score": torch.tensor(GIVEN["s"]), "temperature": torch.tensor(temperature)}
    mask = torch.ones_like(weight, dtype=torch.bool)
    return Layer("w", weight, mask, grad=torch.tensor(GIVEN["upstream"]), slots=slots)


@pytest.mark.parametrize("soft", EXPECTED["soft"], ids=lambda soft: f"temp={soft['temp']:g}")
def test_soft_masks_and_gradients(soft):
    method, layer = ContinuousSparsification(s_init=GIVEN["s0"], lam=0), layer_at(soft["temp"])
    mask = torch.tensor(soft["mask"])
    torch.testing.assert_close(method.effective(layer) / layer.weight, mask, rtol=TOL, atol=TOL)
    found = method.gradients(layer)
    # the file has a gradient of 0 at temp 200 and s = 0.1, where sigmoid(20) is 1 in float32
    torch.testing.assert_close(found["score"], torch.tensor(soft["grad_s"]), rtol=TOL, atol=2e-5)
    torch.testing.assert_close(found["weight"], layer.grad * mask, rtol=TOL, atol=TOL)


def test_the_penalty_is_the_sum_of_the_masks():
    method, layer = ContinuousSparsification(s_init=GIVEN["s0"], lam=0.25), layer_at(1.0)
    expected = 0.25 * sum(EXPECTED["soft"][0]["mask"][0])
    assert float(method.penalty(layer)) == pytest.approx(expected, rel=TOL)


def test_ticket():
    method, layer = ContinuousSparsification(s_init=GIVEN["s0"]), layer_at(200.0)
    ticket = torch.tensor(EXPECTED["ticket"])
    torch.testing.assert_close(method.evaluated(layer), layer.weight * ticket, rtol=TOL, atol=TOL)
    assert torch.equal(method.support(layer), ticket > 0)


def test_scores_after_a_round():
    method, layer = ContinuousSparsification(s_init=GIVEN["s0"], rounds=2), layer_at(200.0)
    assert method.settle(layer, 0.5)["temperature"] == 1
    after = torch.tensor(EXPECTED["s_after_round"])
    torch.testing.assert_close(layer.slots["score"], after, rtol=TOL, atol=TOL)


def test_temperature():
    case, steps = CASES["continuous_sparsification_temperature"], 7
    given = case["inputs"]
    method = ContinuousSparsification(final_temperature=given["final_temp"])
    trainer = quiet_trainer([method], max_epochs=given["epochs"])
    method.setup(trainer, TinyModel(), "fit")
    total = steps * given["epochs"]
    for epoch, expected in zip(given["epoch_indices"], case["expected"], strict=True):
        for step in range(steps):  # the same in every step of an epoch
            progress = (steps * epoch + step) / total
            assert method.temperature(progress) == pytest.approx(expected, rel=case["tol"])
