"""What SR-STE computes with and trains, in a real training step, against its authors' program.

In the convolution 0.3 and -0.3 tie. The program drops the first of them, here the first stays:
so the first is made a little smaller than its tie.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparsity import NM
from lightning_sparsity.callbacks.learned.sr_ste import SRSTE
from lightning_sparsity.testing import TinyModel, fit

HERE = Path(__file__).parent
CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((HERE / "learned.json").read_text())["cases"]
    if case["name"].startswith("sr_ste_")
]


def tensors(case):
    """Weight and upstream gradient, and the expected weight and gradient, of one shape."""
    given, expected = case["inputs"], case["expected"]
    if "w_flat" in given:
        shape = given["shape_out_in_kh_kw"]
        flat = [given["w_flat"], given["upstream_flat"], expected["out"], expected["grad"]]
        return [torch.tensor(values).view(shape) for values in flat]
    nested = [given["w"], given["upstream"], expected["out"], expected["grad"]]
    return [torch.tensor(values) for values in nested]


def layer_of(weight):
    outputs, inputs, *kernel = weight.shape
    if not kernel:
        return nn.Linear(inputs, outputs, bias=False)
    return nn.Conv2d(inputs, outputs, tuple(kernel), bias=False)


class Given(TinyModel):
    """Its loss has a given gradient by the weight that the layer computes with."""

    def __init__(self, weight, upstream):
        super().__init__(layer_of(weight))
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
    weight, upstream, computed, grad = tensors(case)
    given = case["inputs"]
    if "w_flat" in given:
        weight = torch.where(weight == 0.3, 0.3 - 1e-6, weight)
    method = SRSTE(structure=NM(given["N"], given["M"]), decay=given["lambda_w"], exclude=())
    gradient = Gradient()
    result = fit([method, gradient], lambda: Given(weight, upstream), max_steps=1)
    assert torch.equal(result.model.computed, computed)
    torch.testing.assert_close(gradient.found, grad, rtol=case["tol"], atol=case["tol"])
    assert result.live == weight.numel() * given["N"] // given["M"]
