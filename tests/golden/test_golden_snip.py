"""SNIP, its rounds and FORCE against the numbers of public programs.

The programs keep ``n - floor((1 - d) n)`` weights (SNIP) or ``floor(d n)`` after every round,
where we round to the nearest; the tests ask for their counts.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparsity import FORCE, SNIP, IterSNIP, SNIPit, exponential, linear
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.testing import TinyModel, fit, quiet_trainer

HERE = Path(__file__).parent
CASES = {case["name"]: case for case in json.loads((HERE / "pruning.json").read_text())["cases"]}
MLP, CONV = CASES["saliency_mlp_a"], CASES["saliency_conv_bn_a"]
ROUNDS, HALVING = CASES["force_itersnip_a"], CASES["snipit_schedule_a"]


class Mean(nn.Module):
    """The mean over height and width."""

    def forward(self, x):
        return x.mean((2, 3))


def mlp(given, dtype=torch.float32):
    layers = []
    for weight, bias in zip(given["weights"], given["biases"], strict=True):
        layer = nn.Linear(len(weight[0]), len(weight), dtype=dtype)
        weight, bias = torch.tensor(weight, dtype=dtype), torch.tensor(bias, dtype=dtype)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return TinyModel(nn.Sequential(*layers[:-1]))


def convolutional(given, dtype=torch.float32):
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), Mean(), nn.Linear(3, 4)
    )
    keys = {
        "0.weight": "conv_w",
        "0.bias": "conv_b",
        "1.weight": "bn_weight",
        "1.bias": "bn_bias",
        "1.running_mean": "bn_running_mean",
        "1.running_var": "bn_running_var",
        "4.weight": "lin_w",
        "4.bias": "lin_b",
    }
    state = {key: torch.tensor(given[name], dtype=dtype) for key, name in keys.items()}
    net.to(dtype).load_state_dict({**net.state_dict(), **state})
    return TinyModel(net)


def data(given):
    return [(torch.tensor(given["x"]), torch.tensor(given["y"]))]


def scores(callback, make, given):
    """How the callback scores the untouched model, in float64 throughout."""
    model = make(given, torch.float64)
    layers = [
        Layer(name, p.detach(), torch.ones_like(p, dtype=torch.bool))
        for name, p in model.named_parameters()
        if p.ndim > 1
    ]
    view = ModelView(quiet_trainer([]), model)
    batches = [(x.double(), y) for x, y in data(given)]
    with view.open(layers, mode=callback.mode, dtype=torch.float64) as opened:
        return list(callback.score(opened, layers, batches).values())


def masks(callback, make, given):
    """The masks that the callback makes at the start of a training."""
    callback.data = data(given)
    training = DataLoader(data(given), batch_size=None)
    return list(fit([callback], lambda: make(given), data=training, max_epochs=1).masks.values())


def lists(found):
    return [mask.int().tolist() for mask in found]


def assert_masks(ours, theirs):
    assert lists(ours) == theirs


def assert_scores(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        theirs = torch.tensor(other, dtype=torch.float64)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_sensitivities_of_a_perceptron():
    found = scores(SNIP(0.4), mlp, MLP["inputs"])
    expected = MLP["expected"]["snip"]
    assert_scores(found, expected["raw_abs_w_times_grad"])
    total = sum(score.sum() for score in found)
    assert_scores([score / total for score in found], expected["scores"])


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_of_a_perceptron(scope):
    density = MLP["inputs"]["density"]
    options = {"distribution": {"*": density}} if scope == "local" else {"density": density}
    found = masks(SNIP(**options), mlp, MLP["inputs"])
    assert_masks(found, MLP["expected"]["snip"][f"mask_{scope}"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_convolution_with_batch_normalisation(mode):
    given, expected = CONV["inputs"], CONV["expected"][f"snip_{mode}"]
    found = scores(SNIP(mode=mode), convolutional, given)
    total = sum(score.sum() for score in found)
    sums = [float(score.sum() / total) for score in found]
    assert_scores([score / total for score in found], expected["scores"])
    assert sums == pytest.approx(expected["layer_sums"], rel=1e-6)
    count = sum(score.numel() for score in found)
    kept = count - math.floor((1 - given["density"]) * count)
    assert_masks(masks(SNIP(kept / count, mode=mode), convolutional, given), expected["mask"])


def test_the_mode_matters():
    given = CONV["inputs"]
    found = [masks(SNIP(0.4, mode=mode), convolutional, given) for mode in ("eval", "train")]
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def rounded_down(start, end):
    """Densities of which 42 weights give the whole counts below them."""
    schedule = exponential(start, end)
    return lambda progress: int(schedule(progress) * 42 + 1e-9) / 42


@pytest.mark.parametrize(("method", "key"), [(IterSNIP, "iter_snip"), (FORCE, "force")])
def test_rounds(method, key):
    given, expected = ROUNDS["inputs"], ROUNDS["expected"][key]
    callback = method(given["density"], rounds=given["steps"], ramp=rounded_down)
    found = masks(callback, mlp, given)
    assert sum(int(mask.sum()) for mask in found) == expected["remaining"]
    assert_masks(found, expected["mask"])


def test_one_round_and_five_differ_as_do_the_two_methods():
    given = ROUNDS["inputs"]
    once = lists(masks(SNIP(given["density"], mode="train"), mlp, given))
    assert_masks(masks(IterSNIP(given["density"], rounds=1), mlp, given), once)
    assert_masks(masks(FORCE(given["density"], rounds=1), mlp, given), once)
    expected = [ROUNDS["expected"][key]["mask"] for key in ("iter_snip", "force")]
    assert expected[0] != expected[1]
    assert once not in expected


@pytest.mark.parametrize(
    ("ramp", "key"), [(exponential, "density_schedule_exp"), (linear, "density_schedule_linear")]
)
@pytest.mark.parametrize("method", [IterSNIP, FORCE])
def test_densities_of_the_rounds(method, ramp, key):
    given = ROUNDS["inputs"]
    found = method(given["density"], rounds=given["steps"], ramp=ramp).rounds(given["density"])
    assert found == pytest.approx(ROUNDS["expected"][key], rel=1e-6)
    assert found[-1] == given["density"]


@pytest.mark.parametrize("sparsity", HALVING["inputs"]["limits"])
def test_halving(sparsity):
    density = 1 - sparsity
    callback = SNIPit(density, halvings=HALVING["inputs"]["steps"])
    found = [1 - left for left in callback.rounds(density)]
    assert found == pytest.approx(HALVING["expected"][str(sparsity)], rel=1e-9)
    assert callback.rounds(density)[-1] == density
