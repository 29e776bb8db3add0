"""WoodFisher and WoodTaylor against the numbers of the authors' program.

The program halves nothing and adds 1e-10; it sums the updates of all removed weights.
"""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity import RedrWoodfisher, RedrWoodtaylor
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.ops.fisher import (
    inverse_blocks,
    newton_step,
    obs_saliency,
    survivors_update,
    to_blocks,
)

HERE = Path(__file__).parent
CASE = next(
    case
    for case in json.loads((HERE / "pruning.json").read_text())["cases"]
    if case["name"] == "woodfisher_a"
)
GIVEN, EXPECTED = CASE["inputs"], CASE["expected"]
SIZE, DAMPING = GIVEN["block_size"], GIVEN["damp"]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


GRADIENTS = double(GIVEN["per_gradient_rows"])
WEIGHTS = double(GIVEN["weights"])


def close(ours, theirs):
    torch.testing.assert_close(ours.reshape(-1), double(theirs).reshape(-1), rtol=1e-6, atol=1e-9)


def removed(mask):
    return to_blocks(~torch.tensor(mask, dtype=torch.bool), SIZE)


def callback(cls, **options):
    fraction = GIVEN["prune_count"] / len(WEIGHTS)
    return cls(0.5, drop_fraction=fraction, block_size=SIZE, damping=DAMPING, **options)


@pytest.fixture
def layer():
    """The weights, every second place of a row, after all gradients were observed."""
    place = torch.arange(len(WEIGHTS)) * 2
    weight = torch.zeros(1, 16, dtype=torch.float64)
    weight[0, place] = WEIGHTS
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, place] = True
    slots = {}
    observe = callback(RedrWoodtaylor).observe
    for row in GRADIENTS:
        grad = torch.full((1, 16), 7.0, dtype=torch.float64)  # dense, and not of use off the mask
        grad[0, place] = row
        slots = dict(observe(Layer("fc", weight, mask, grad=grad, slots=slots)))
    return Layer("fc", weight, mask, slots=slots)


def inverse():
    rows = GRADIENTS.view(-1, len(WEIGHTS) // SIZE, SIZE)
    return inverse_blocks(torch.einsum("nbi,nbj->bij", rows, rows), len(rows), DAMPING)


def test_inverse(layer):
    close(inverse(), EXPECTED["inverse_fisher_blocks"])
    gathered = inverse_blocks(layer.slots["fisher"], layer.slots["gradients"], DAMPING)
    close(gathered, EXPECTED["inverse_fisher_blocks"])
    close(gathered.diagonal(dim1=1, dim2=2), EXPECTED["inverse_fisher_diag"])


def test_saliency():
    close(obs_saliency(to_blocks(WEIGHTS, SIZE), inverse()), EXPECTED["obs_saliency_half"])


def test_updates():
    rows, gone = to_blocks(WEIGHTS, SIZE), removed(EXPECTED["mask"])
    change = survivors_update(rows, gone, inverse()).reshape(-1)
    kept = ~gone.view(-1)
    close(change[kept], double(EXPECTED["weight_update_sum_of_single_obs"])[kept].tolist())
    joint = rows + survivors_update(rows, gone, inverse(), joint=True)
    close(joint, EXPECTED["exact_joint_update_weights"])


def test_statistic_of_woodtaylor():
    theirs = EXPECTED["woodtaylor"]
    mean = to_blocks(double(theirs["mean_gradient"]), SIZE)
    loss = obs_saliency(newton_step(to_blocks(WEIGHTS, SIZE), inverse(), mean), inverse())
    close(loss - loss.min() + 1e-10, theirs["statistic_shifted_to_min_1e-10"])


@pytest.mark.parametrize(
    ("joint", "key"),
    [(False, "weights_after_update_and_mask"), (True, "exact_joint_update_weights")],
)
def test_woodfisher_drops_and_updates(layer, joint, key):
    rule = callback(RedrWoodfisher, joint=joint).rule.rules[0]  # without the growth
    (after,) = rule([layer], [8], 0.0)
    close(after.mask[0, ::2].double(), EXPECTED["mask"])
    close(after.weight[0, ::2], EXPECTED[key])
    assert not after.weight[0, 1::2].any()


def test_woodtaylor_drops_and_updates(layer):
    theirs = EXPECTED["woodtaylor"]
    (after,) = callback(RedrWoodtaylor).rule.rules[0]([layer], [8], 0.0)
    close(after.mask[0, ::2].double(), theirs["mask"])
    steps = (inverse() @ double(theirs["mean_gradient"]).view(-1, SIZE, 1)).view(-1)
    scale = double(theirs["unscaled_basis_vector"]).view(-1, SIZE, 1)
    new = WEIGHTS - steps + (inverse() @ scale).view(-1)
    close(after.weight[0, ::2], (new * double(theirs["mask"])).tolist())
