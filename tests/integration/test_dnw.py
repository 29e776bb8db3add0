"""DNW: a weight off the mask goes where the loss wants it, and comes in when it is large.

What it has in common with others, and a plain loop of it, are in test_straight_through.py.
"""

import pytest
import torch
from torch import nn

from lightning_sparsity.callbacks.learned.dnw import DNW
from lightning_sparsity.testing import TinyModel, fit


class Pull(TinyModel):
    """Two weights, 1 and 0.5; the loss falls by 1 as the second rises by 1."""

    def __init__(self, **optimizer):
        super().__init__(nn.Linear(2, 1, bias=False), lambda p: torch.optim.SGD(p, **optimizer))
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[1.0, 0.5]]))
        self.computed = []

    def loss(self, batch):
        self.computed.append(self.net.weight.detach().flatten().tolist())
        return -self.net.weight[0, 1]


def test_the_larger_of_two_weights_computes():
    result = fit([DNW(0.5)], lambda: Pull(lr=0.125), max_steps=8)
    # the second weight is 0.5 + 0.125 t: as large as the first after 4 steps, larger after 5
    second = [[0.0, 0.5 + 0.125 * t] for t in range(5, 8)]
    assert result.model.computed == [[1.0, 0.0]] * 5 + second
    assert result.weights["net.weight"].tolist() == [[0.0, 1.5]]


def test_weight_decay_and_momentum_act_on_both():
    optimizer = {"lr": 0.125, "momentum": 0.5, "weight_decay": 0.25}
    result = fit([DNW(0.5)], lambda: Pull(**optimizer), max_steps=8)
    both = torch.tensor([1.0, 0.5], requires_grad=True)
    plain = torch.optim.SGD([both], **optimizer)
    for computed in result.model.computed:
        first, second = both.tolist()
        assert computed == ([0.0, second] if second > first else [first, 0.0])
        both.grad = torch.tensor([0.0, -1.0])
        plain.step()
    assert result.weights["net.weight"].tolist() == [[0.0, both[1].item()]]
    assert both[0].item() < 0.8  # it has decayed, live or not


def test_without_learning_the_mask_never_moves():
    def still(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    assert fit([DNW(0.3)], lambda: TinyModel(optimizer=still)).changes == 0


def test_each_layer_keeps_its_own_density():
    result = fit([DNW(0.25)])
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == {
        "net.0.weight": 18,
        "net.5.weight": 512,
        "net.7.weight": 16,
    }
    assert {tuple(live.values()) for _, live in result.history} == {(18, 512, 16)}


def test_bad_density():
    with pytest.raises(ValueError, match=r"^DNW\(density=0\): .*for 90% sparsity pass density=0.1"):
        DNW(0)
