"""Sparse variational dropout against the numbers of the authors' program.

The program draws its noise in the layer's outputs and the file replaces it by 1; ours is in the
weights, so that the mean and the standard deviation of the outputs are compared, which the two
estimators share, not a draw.
"""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.variational_dropout import (
    VariationalDropout,
    divergence,
    log_alpha,
)
from lightning_sparsity.core.layer import Layer

(CASE,) = (
    case
    for case in json.loads((Path(__file__).parent / "learned.json").read_text())["cases"]
    if case["name"] == "sparse_vd"
)


@pytest.fixture
def layer():
    weight = torch.tensor(CASE["inputs"]["W_in_out"]).T.contiguous()
    slots = {
        "log_sigma2": torch.tensor(CASE["inputs"]["log_sigma2"]).T.contiguous(),
        "noise": torch.zeros_like(weight),
        "kl_weight": torch.tensor(1.0),
    }
    return Layer("fc.weight", weight, torch.ones_like(weight, dtype=torch.bool), slots=slots)


def close(ours, expected, tol=CASE["tol"]):
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=tol, atol=tol)


def test_log_alpha_and_divergence(layer):
    ours = log_alpha(layer.weight, layer.slots["log_sigma2"])
    close(ours.T, CASE["expected"]["log_alpha"])
    close(divergence(ours).T, CASE["expected"]["kl_each"])
    close(VariationalDropout(examples=1).penalty(layer), CASE["expected"]["kl"])
    close(VariationalDropout(examples=4).penalty(layer), CASE["expected"]["kl"] / 4)


def test_validation(layer):
    x = torch.tensor(CASE["inputs"]["x"])
    close(x @ VariationalDropout().evaluated(layer).T, CASE["expected"]["out_test"])


def test_mean_and_deviation_of_the_outputs(layer):
    x = torch.tensor(CASE["inputs"]["x"])
    power = log_alpha(layer.weight, layer.slots["log_sigma2"]).exp() * layer.weight**2
    deviation = (x**2 @ power.T + 1e-8).sqrt()
    close(x @ layer.weight.T + deviation, CASE["expected"]["out_train_eps1"])

    generator = torch.Generator().manual_seed(0)
    method, outputs = VariationalDropout(), []
    for _ in range(4000):
        noise = torch.randn(layer.shape, generator=generator)
        drawn = Layer(layer.name, layer.weight, layer.mask, slots={**layer.slots, "noise": noise})
        outputs.append(x @ method.effective(drawn).T)
    close(torch.cat(outputs).std(0), deviation[0].tolist(), tol=0.05)
    close(torch.cat(outputs).mean(0), (x @ layer.weight.T)[0].tolist(), tol=0.05)
