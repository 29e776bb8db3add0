"""What DNW computes with and trains, in a real training step, against its authors' program.

The program drops ``int(rate * n)`` weights in every forward pass, and hands the gradient on.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparsity.callbacks.learned.dnw import DNW
from lightning_sparsity.testing import TinyModel, fit

HERE = Path(__file__).parent
CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((HERE / "dynamic.json").read_text())["cases"]
    if case["kind"] == "dnw"
]


class Given(TinyModel):
    """Its loss has a given gradient by the weight that the layer computes with."""

    def __init__(self, weight, upstream):
        super().__init__(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        with torch.no_grad():
            self.net.weight.copy_(weight)
        self.upstream = upstream

    def loss(self, batch):
        self.computed = self.net.weight.detach().clone()
        return (self.net.weight * self.upstream).sum()


class Gradient(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        (parameter,) = pl_module.parameters()
        self.found = parameter.grad.clone()


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case):
    weight = torch.tensor(case["inputs"]["weight"])
    upstream = torch.linspace(-1, 1, weight.numel()).view(weight.shape)
    density = 1 - case["inputs"]["prune_rate"]
    gradient = Gradient()
    result = fit([DNW(density), gradient], lambda: Given(weight, upstream), max_steps=1)
    expected = case["expected"]
    assert torch.equal(result.masks["net.weight"], torch.tensor(expected["mask"]).bool())
    assert torch.equal(result.model.computed, torch.tensor(expected["forward_weight"]))
    assert torch.equal(gradient.found, upstream)
