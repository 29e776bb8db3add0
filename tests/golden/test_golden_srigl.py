"""One update of SRigL against the numbers of the authors' program.

The cases have no neuron with more survivors than the fan-in, which that program cuts by
position.
"""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity import SRigL
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "srigl_step"
]


def before(given):
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    grad = torch.tensor(given["dense_grad"])
    return Layer("hidden", torch.tensor(given["weight"]), mask, grad=grad)


def callback(given):
    assert given["min_salient_is_fraction_of_sparse_fan_in"]
    density = 1 - given["sparsity"]
    return SRigL(density, drop_fraction=given["drop_fraction"], gamma=given["min_salient"])


@pytest.mark.parametrize("case", CASES)
def test_mask(case):
    layer = before(case["inputs"])
    share = Share(("hidden", "last"), (layer.size,), 0, False, {"hidden": layer.live})
    (after,) = callback(case["inputs"]).update([layer], share, 0.0)
    assert torch.equal(after.mask, torch.tensor(case["expected"]["mask"], dtype=torch.bool))
    fan_in = after.mask.sum(1)
    assert set(fan_in[fan_in > 0].tolist()) == {case["expected"]["fan_in"]}


@pytest.mark.parametrize("case", CASES)
def test_the_steps_on_the_way(case):
    layer, expected = before(case["inputs"]), case["expected"]
    lose, even = callback(case["inputs"]).rule.rules
    assert int(lose.fraction_at(0.0) * layer.live) == expected["n_prune"]
    (kept,) = lose([layer], [layer.live], 0.0)
    assert kept.live == expected["n_keep"]
    assert torch.equal(kept.mask, torch.tensor(expected["kept"], dtype=torch.bool))
    gone = [] if kept.barred is None else kept.barred.all(1).nonzero().view(-1).tolist()
    assert gone == sorted(expected["ablated"])
    (after,) = even([kept], [layer.live], 0.0)
    grown = torch.tensor(expected["grown"], dtype=torch.bool)
    assert torch.equal(after.mask & ~kept.mask, grown)


def test_there_are_cases():
    assert sorted(bool(case.values[0]["expected"]["ablated"]) for case in CASES) == [False, True]
