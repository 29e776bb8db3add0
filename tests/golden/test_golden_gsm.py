"""GSM against three steps of the authors' program.

It makes ``int(q n)`` weights active, where we round to the nearest; here both are 10.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparsity import GSM
from lightning_sparsity.testing import Batches, TinyModel, fit

CASES = json.loads((Path(__file__).parent / "pruning.json").read_text())["cases"]
CASE = next(case for case in CASES if case["name"] == "gsm_a")
GIVEN = CASE["inputs"]


def tensors(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def model(decay_of):
    """The perceptron of the case; ``decay_of`` gives the weight decay of a parameter."""
    first, second = nn.Linear(*GIVEN["dims"][:2]), nn.Linear(*GIVEN["dims"][1:])
    for layer, weight, bias in zip(
        (first, second), tensors(GIVEN["weights"]), tensors(GIVEN["biases"]), strict=True
    ):
        layer.weight = nn.Parameter(weight)
        layer.bias = nn.Parameter(bias)

    def sgd(parameters):
        groups = [{"params": [p], "weight_decay": decay_of(p)} for p in parameters]
        options = {key: GIVEN[key] for key in ("lr", "momentum", "nesterov")}
        return torch.optim.SGD(groups, **options)

    return TinyModel(nn.Sequential(first, nn.ReLU(), second), sgd)


class Stop(Callback):
    """Keeps the parameters as they are before the mask is made."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == GIVEN["steps"]:
            self.kept = [p.detach().clone() for p in pl_module.parameters()]


def run(decay_of, **options):
    x, y = torch.tensor(GIVEN["x"], dtype=torch.float64), torch.tensor(GIVEN["y"])
    data = Batches(GIVEN["steps"] + 1)
    data._batches = [(x, y)] * len(data)
    stop = Stop()
    result = fit(
        [GSM(GIVEN["nonzero_ratio"], **options), stop],
        lambda: model(decay_of),
        data=data,
        max_epochs=1,
        precision="64-true",
    )
    return result, stop.kept


def assert_expected(found):
    for place, kind in enumerate(("weights", "biases")):
        for mine, theirs in zip(found[place::2], tensors(CASE["expected"][kind]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=CASE["rtol"], atol=1e-9)


def test_steps_with_the_weight_decay_of_the_optimizer():
    def decay_of(p):
        return GIVEN[f"weight_decay_on_{'weights' if p.ndim > 1 else 'biases'}"]

    result, found = run(decay_of)
    assert_expected(found)
    numel = sum(mask.numel() for mask in result.masks.values())
    assert result.live == round(GIVEN["nonzero_ratio"] * numel) == 10


def test_steps_with_its_own_weight_decay():
    assert GIVEN["weight_decay_on_biases"] == 0
    _, found = run(lambda p: 0.0, weight_decay=GIVEN["weight_decay_on_weights"])
    assert_expected(found)


def test_the_numbers_tell_other_methods_apart():
    _, found = run(lambda p: 0.0, weight_decay=2 * GIVEN["weight_decay_on_weights"])
    with pytest.raises(AssertionError):
        assert_expected(found)
