"""What SET drops by sign, against the authors' program.

The program finds its thresholds at an index that is one further than the share says: of 6
weights of a sign and a share of 0.3 it drops 2, where ours drops floor(0.3 * 6) = 1. The order
in which weights go is the same, so dropping a third must give the program's mask.
"""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity import SET
from lightning_sparsity.core.layer import Layer

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "set_drop"
]


def layer_of(case):
    weight = torch.tensor(case["inputs"]["weights"])
    return Layer("w", weight, weight != 0, generator=torch.Generator().manual_seed(0))


def dropped(case, share):
    layer = layer_of(case)
    rule = SET(0.5, drop_fraction=share, sign_split=True).rule.rules[0]
    return rule([layer], [layer.live], 0.0)[0].mask


@pytest.mark.parametrize("case", CASES)
def test_the_program_drops_one_more_of_each_sign(case):
    layer, ours = layer_of(case), dropped(case, case["inputs"]["zeta"])
    theirs = torch.tensor(case["expected"]["kept"], dtype=torch.bool)
    assert int(theirs.sum()) == case["expected"]["n_kept"]
    more = ours & ~theirs
    assert not (theirs & ~ours).any()
    assert int((more & (layer.weight > 0)).sum()) == int((more & (layer.weight < 0)).sum()) == 1


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_the_same(case):
    theirs = torch.tensor(case["expected"]["kept"], dtype=torch.bool)
    assert torch.equal(dropped(case, 2 / 6), theirs)


@pytest.mark.parametrize("case", CASES)
def test_as_many_grow(case):
    layer = layer_of(case)
    rule = SET(0.5, drop_fraction=case["inputs"]["zeta"], sign_split=True).rule
    (after,) = rule([layer], [layer.live], 0.0)
    assert after.live == case["expected"]["n_after_grow"]


def test_there_are_cases():
    assert CASES
