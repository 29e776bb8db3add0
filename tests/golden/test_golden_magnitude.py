"""Magnitude before training against the numbers of a public program."""

import pytest
import torch
from test_golden_snip import MLP, assert_masks, mlp
from torch.utils.data import DataLoader

from lightning_sparsity import Magnitude
from lightning_sparsity.testing import fit


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_of_a_perceptron(scope):
    given = MLP["inputs"]
    density = given["density"]
    options = {"distribution": {"*": density}} if scope == "local" else {"density": density}
    batch = (torch.tensor(given["x"]), torch.tensor(given["y"]))
    data = DataLoader([batch], batch_size=None)
    found = fit([Magnitude(**options)], lambda: mlp(given), data=data, max_epochs=1).masks
    assert_masks(found.values(), MLP["expected"]["magnitude"][f"mask_{scope}"])
