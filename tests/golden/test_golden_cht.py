"""CH3-L3p scores against the numbers of the authors' program, which enumerates paths."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.ops.link_prediction import ch3_l3p

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "ch3_l3p"
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_scores(case, turned):
    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    expected = torch.tensor(case["expected"]["scores_on_inactive"], dtype=torch.float64)
    ours = ch3_l3p(mask.T).T if turned else ch3_l3p(mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_there_is_a_case():
    assert CASES
