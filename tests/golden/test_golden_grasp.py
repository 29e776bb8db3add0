"""GraSP against the numbers of two public programs.

One keeps ``n - floor((1 - d) n)`` weights, the other one more; the tests ask for their counts.
Scores there are divided by the absolute value of their sum plus 1e-10.
"""

import pytest
import torch
from test_golden_snip import CONV, MLP, assert_masks, assert_scores, convolutional, mlp, scores
from torch.utils.data import DataLoader

from lightning_sparsity import GraSP
from lightning_sparsity.testing import fit


def output_of(model, batch):
    return model.net(batch[0])


def grasp(density=None, **options):
    return GraSP(
        density, **{"forward_fn": output_of, "samples_per_class": None, "batches": 1, **options}
    )


def normalised(found):
    total = abs(sum(float(score.sum()) for score in found)) + 1e-10
    return [score / total for score in found]


def masks(callback, make, given, parts=1):
    """The masks at the start of a training, with the data in so many batches."""
    x, y = torch.tensor(given["x"]), torch.tensor(given["y"])
    callback.data = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    training = DataLoader([(x, y)], batch_size=None)
    return list(fit([callback], lambda: make(given), data=training, max_epochs=1).masks.values())


def test_scores_of_a_perceptron():
    found = normalised(scores(grasp(), mlp, MLP["inputs"]))
    assert_scores(found, MLP["expected"]["grasp"]["scores"])
    assert any((score < 0).any() for score in found)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_of_a_perceptron(scope):
    density = MLP["inputs"]["density"]
    options = {"distribution": {"*": density}} if scope == "local" else {"density": density}
    found = masks(grasp(**options), mlp, MLP["inputs"])
    assert_masks(found, MLP["expected"]["grasp"][f"mask_{scope}"])


def test_two_halves():
    given, expected = MLP["inputs"], MLP["expected"]["grasp_two_halves_official"]
    count = sum(len(row) for weight in given["weights"] for row in weight)
    found = masks(grasp(expected["kept"] / count, batches=2), mlp, given, parts=2)
    assert_masks(found, expected["mask"])


def test_a_convolution_with_batch_normalisation():
    given, expected = CONV["inputs"], CONV["expected"]["grasp_eval"]
    found = normalised(scores(grasp(mode="eval"), convolutional, given))
    assert_scores(found, expected["scores"])
    kept = sum(torch.tensor(mask).sum() for mask in expected["mask"])
    count = sum(score.numel() for score in found)
    assert_masks(
        masks(grasp(float(kept / count), mode="eval"), convolutional, given), expected["mask"]
    )
