"""ProsPr against the numbers of a public program.

It keeps ``ceil(d n)`` weights, where we round to the nearest; the test asks for its count.
"""

import math

import pytest
from test_golden_snip import CASES, MLP, assert_masks, assert_scores, masks, mlp, scores

from lightning_sparsity import ProsPr

CASE = CASES["prospr_a"]


def prospr(density=None, **options):
    given = CASE["inputs"]
    return ProsPr(
        density,
        inner_steps=given["inner_steps"],
        inner_lr=given["inner_lr"],
        inner_momentum=given["inner_momentum"],
        batches=1,
        **options,
    )


@pytest.mark.parametrize("first_order", [False, True])
def test_scores_and_masks(first_order):
    given = CASE["inputs"]
    expected = CASE["expected"]["first_order" if first_order else "full"]
    found = scores(prospr(first_order=first_order), mlp, given)
    assert_scores(found, expected["scores"])
    count = sum(score.numel() for score in found)
    density = math.ceil(given["density"] * count) / count
    assert_masks(masks(prospr(density, first_order=first_order), mlp, given), expected["mask"])


def test_without_steps_it_is_snip():
    found = scores(ProsPr(inner_steps=0), mlp, MLP["inputs"])
    assert_scores(found, MLP["expected"]["snip"]["raw_abs_w_times_grad"])
