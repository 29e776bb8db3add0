"""Hard concrete gates against the numbers of two public programs.

The first, of the authors, adds the decay of the bias to the penalty of a layer; gates do not
touch it here, so that it is taken off what is expected. The second has gates of attention heads.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.l0 import L0, chance_to_be_open, gate, noisy_gate
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.structures import Columns

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "learned.json").read_text())["cases"]
}
DENSE = CASES["l0_hard_concrete_dense"]
HEADS = CASES["voita_head_gates"]


def close(ours, expected, case):
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=case["tol"], atol=case["tol"])


@pytest.fixture
def layer():
    given = DENSE["inputs"]
    slots = {"log_alpha": torch.tensor(given["log_alpha"]), "u": torch.tensor(given["u"])}
    weight = torch.tensor(given["W_in_out"]).T.contiguous()
    mask = torch.ones_like(weight, dtype=torch.bool)
    grad = torch.zeros_like(weight)
    return Layer("fc.weight", weight, mask, grad=grad, slots=slots, structure=Columns())


def the_method():
    given = DENSE["inputs"]
    return L0(
        given["lamba"],
        weight_decay=given["weight_decay"],
        temperature=given["temperature"],
        examples=1,
        structure=Columns(),
    )


def test_one_gate_per_input(layer):
    gates = torch.tensor(DENSE["expected"]["gate_sampled"])
    close(the_method().effective(layer), (layer.weight * gates).tolist(), DENSE)
    gates = torch.tensor(DENSE["expected"]["gate_test"])
    close(the_method().evaluated(layer), (layer.weight * gates).tolist(), DENSE)
    assert the_method().support(layer).tolist() == [[True, True, False]] * 2


def test_chance_to_be_open():
    log_alpha = torch.tensor(DENSE["inputs"]["log_alpha"])
    ours = chance_to_be_open(log_alpha, DENSE["inputs"]["temperature"])
    close(ours, DENSE["expected"]["p_open"], DENSE)


def test_penalty(layer):
    bias = sum(b * b for b in DENSE["inputs"]["bias"]) * DENSE["inputs"]["weight_decay"] / 2
    expected = -DENSE["expected"]["regularization"] - bias
    assert math.isclose(the_method().penalty(layer).item(), expected, rel_tol=DENSE["tol"])


def test_gradient_of_the_penalty(layer):
    found = the_method().gradients(layer)  # there is no loss but the penalty
    expected = [-g for g in DENSE["expected"]["grad_log_alpha"]]  # theirs is a log-prior
    close(found["log_alpha"], expected, DENSE)


def test_gates_of_heads():
    given, expected = HEADS["inputs"], HEADS["expected"]
    log_alpha, u = torch.tensor(given["log_alpha"]), torch.tensor(given["u"])
    close(noisy_gate(log_alpha, u, given["temperature"]), expected["gates_train"], HEADS)
    close(gate(log_alpha), expected["gates_test"], HEADS)
    price = given["l0_penalty"] * chance_to_be_open(log_alpha, given["temperature"]).sum()
    close(price, expected["penalty"], HEADS)
