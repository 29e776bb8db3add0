"""SynFlow against the numbers of a public program.

It prunes ``floor((1 - d) n)`` weights in every round, where we keep ``round(d n)``; the trace is
compared with its counts.
"""

import math

import pytest
import torch
from test_golden_snip import (
    CASES,
    CONV,
    MLP,
    assert_masks,
    assert_scores,
    convolutional,
    mlp,
    scores,
)
from torch.utils.data import DataLoader

from lightning_sparsity import SynFlow
from lightning_sparsity.testing import fit

ROUNDS = CASES["synflow_iterative_a"]


def output_of(model, batch):
    return model.net(batch[0])


class Traced(SynFlow):
    """Keeps what is live and the sums of scores in every round, and rounds counts upwards."""

    def rounds(self, density):
        self.trace = []
        return [math.ceil(d * 69 - 1e-9) / 69 for d in super().rounds(density)]

    def score(self, opened, layers, batches):
        found = super().score(opened, layers, batches)
        live = sum(layer.live for layer in layers)
        self.trace.append((live, [float(score.sum()) for score in found.values()]))
        return found


def masks(callback, make, given):
    """The masks at the start of a training; the data are never looked at."""
    shape = (2, 4) if make is mlp else (2, 2, 4, 4)
    callback.data = [(torch.full(shape, math.nan),)]
    training = DataLoader([(torch.ones(shape), torch.zeros(2).long())], batch_size=None)
    return list(fit([callback], lambda: make(given), data=training, max_epochs=1).masks.values())


@pytest.mark.parametrize(
    ("make", "case", "key"),
    [(mlp, MLP, "synflow"), (convolutional, CONV, "synflow_eval")],
    ids=["mlp", "conv"],
)
def test_scores(make, case, key):
    found = scores(SynFlow(forward_fn=output_of), make, case["inputs"])
    assert_scores(found, case["expected"][key]["scores"])
    sums = [float(score.sum()) for score in found]
    assert sums == pytest.approx(case["expected"][key]["layer_sums"], rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_of_a_perceptron(scope):
    density = MLP["inputs"]["density"]
    options = {"distribution": {"*": density}} if scope == "local" else {"density": density}
    found = masks(SynFlow(**options, rounds=1, forward_fn=output_of), mlp, MLP["inputs"])
    assert_masks(found, MLP["expected"]["synflow"][f"mask_{scope}"])


def test_mask_of_a_convolution():
    given, expected = CONV["inputs"], CONV["expected"]["synflow_eval"]["mask"]
    kept = sum(int(torch.tensor(mask).sum()) for mask in expected)
    count = sum(torch.tensor(mask).numel() for mask in expected)
    found = masks(SynFlow(kept / count, rounds=1, forward_fn=output_of), convolutional, given)
    assert_masks(found, expected)


def test_every_round():
    given, expected = ROUNDS["inputs"], ROUNDS["expected"]
    callback = Traced(given["density"], rounds=given["iterations"], forward_fn=output_of)
    assert_masks(masks(callback, mlp, given), expected["mask"])
    assert len(callback.trace) == given["iterations"]
    for row in expected["trace"]:
        _, sums = callback.trace[row["iteration"] - 1]
        assert sums == pytest.approx(row["layer_score_sums"], rel=1e-6)
        if row["iteration"] < given["iterations"]:
            assert callback.trace[row["iteration"]][0] == row["remaining"]


def test_our_counts_lead_to_the_same_mask():
    given, expected = ROUNDS["inputs"], ROUNDS["expected"]
    callback = SynFlow(given["density"], rounds=given["iterations"], forward_fn=output_of)
    found = masks(callback, mlp, given)
    assert_masks(found, expected["mask"])
    assert [int(mask.sum()) for mask in found] == expected["remaining_per_layer"]


def test_one_round():
    given, expected = ROUNDS["inputs"], ROUNDS["expected"]
    found = masks(SynFlow(given["density"], rounds=1, forward_fn=output_of), mlp, given)
    assert_masks(found, expected["one_shot_mask"])
    assert [int(mask.sum()) for mask in found] == expected["one_shot_remaining_per_layer"]


def test_densities_of_the_rounds():
    given = ROUNDS["inputs"]
    found = SynFlow(given["density"]).rounds(given["density"])
    assert len(found) == given["iterations"]
    assert found[-1] == given["density"]
    for row in ROUNDS["expected"]["trace"]:
        assert found[row["iteration"] - 1] == pytest.approx(row["density_target"], rel=1e-9)
