"""Rounds of iterative magnitude pruning against the numbers of a public program.

The program removes one weight more than ``ceil(fraction * remaining)`` in each round; we remove
exactly so many, whose counts the file has too.
"""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_sparsity.core.layer import Layer
from lightning_sparsity.lottery import run_imp
from lightning_sparsity.lottery.imp import IMP
from lightning_sparsity.testing import quiet_trainer

(CASE,) = (
    case
    for case in json.loads((Path(__file__).parent / "pruning.json").read_text())["cases"]
    if case["name"] == "imp_sparse_global_a"
)
FRACTION, ROUNDS = CASE["inputs"]["fraction_per_round"], CASE["inputs"]["rounds"]
WEIGHTS = [torch.tensor(weight) for weight in CASE["inputs"]["weights"]]
NUMEL = sum(weight.numel() for weight in WEIGHTS)


def dense():
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in WEIGHTS]
    return [Layer(str(n), *parts) for n, parts in enumerate(zip(WEIGHTS, masks, strict=True))]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_masks_at_the_counts_of_the_program(number):
    theirs = CASE["expected"]["official"][number]
    method = IMP(rounds=1, density=theirs["remaining"] / NUMEL)
    for layer, mask in zip(method.prune(dense(), 1), theirs["masks"], strict=True):
        assert layer.mask.int().tolist() == mask


def test_exactly_the_fraction_goes_and_more_only_in_the_program():
    method, layers, counts = IMP(rounds=ROUNDS, drop_fraction=FRACTION), dense(), []
    for turn, theirs in enumerate(CASE["expected"]["official"], start=1):
        layers = method.prune(layers, turn)
        counts.append(sum(layer.live for layer in layers))
        for layer, mask in zip(layers, theirs["masks"], strict=True):
            assert not (torch.tensor(mask, dtype=torch.bool) & ~layer.mask).any()
    assert counts == CASE["expected"]["remaining_if_exactly_ceil_fraction_is_pruned"]


class Fixed(pl.LightningModule):
    """The weights of the file, which training does not move."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(*reversed(w.shape), bias=False) for w in WEIGHTS)
        for layer, weight in zip(self.net, WEIGHTS, strict=True):
            layer.weight.data.copy_(weight)

    def training_step(self, batch, batch_idx):
        return sum(layer.weight.sum() for layer in self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_rounds_of_the_driver(tmp_path):
    rounds = run_imp(
        lambda: quiet_trainer([], max_epochs=1),
        Fixed,
        [0],
        directory=tmp_path,
        rounds=ROUNDS,
        drop_fraction=FRACTION,
    )
    expected = CASE["expected"]["remaining_if_exactly_ceil_fraction_is_pruned"]
    assert [found.live for found in rounds] == [NUMEL, *expected]
    ranked = torch.cat([weight.abs().flatten() for weight in WEIGHTS]).sort(descending=True).values
    for found in rounds:
        ticket = found.ticket
        for n, weight in enumerate(WEIGHTS):
            mask = ticket.masks[f"net.{n}.weight"]
            assert torch.equal(mask, weight.abs() >= ranked[found.live - 1])
            assert torch.equal(ticket.weights[f"net.{n}.weight"], weight * mask)
