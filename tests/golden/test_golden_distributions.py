"""Distributions against the numbers of public reference programs."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sparsity.core.apportion import fill
from lightning_sparsity.core.layer import Layer, dense_layers
from lightning_sparsity.distributions import (
    er,
    erk,
    erk_power,
    global_by,
    keep_dense,
    lamp,
    lamp_score,
    smart_ratio,
    smart_ratio_with,
    uniform,
    uniform_plus,
)
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.scores import magnitude

HERE = Path(__file__).parent
DYNAMIC = json.loads((HERE / "dynamic.json").read_text())["cases"]
PRUNING = {case["name"]: case for case in json.loads((HERE / "pruning.json").read_text())["cases"]}
LAMP = PRUNING["lamp_a"]


def cases(kind):
    return [pytest.param(case, id=case["name"]) for case in DYNAMIC if case["kind"] == kind]


def layers_of(shapes):
    return dense_layers({f"fc{i}": shape for i, shape in enumerate(shapes)})


def assert_within_one_unit(counts, densities, shapes):
    for count, density, shape in zip(counts, densities, shapes, strict=True):
        assert abs(count - density * math.prod(shape)) <= 1


@pytest.mark.parametrize("case", cases("erk"))
def test_erk(case):
    given, expected = case["inputs"], case["expected"]["density"]
    shapes = given["shapes"]
    sizes = [math.prod(shape) for shape in shapes]
    total = given["density"] * sum(sizes)

    raw = [
        (sum(shape) / size) ** given["power"] * size
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    ideal = fill(raw, sizes, total)
    densities = [count / size for count, size in zip(ideal, sizes, strict=True)]
    assert densities == pytest.approx(expected, abs=1e-6)

    counts = erk_power(given["power"])(layers_of(shapes), round(total))
    assert sum(counts) == round(total)
    # 1e-10: the golden densities are rounded.
    for count, density, size in zip(counts, expected, sizes, strict=True):
        assert abs(count - density * size) <= 1 + 1e-10 * size

    dense = set(case["expected"].get("dense_layers", []))
    names = given.get("layer_names", [])
    for name, count, size in zip(names, counts, sizes, strict=False):
        assert (count == size) or name not in dense


@pytest.mark.parametrize("case", cases("er_vs_erk"))
def test_er_and_erk(case):
    shapes = case["inputs"]["shapes_out_in_kh_kw"]
    total = round(case["inputs"]["density"] * sum(math.prod(shape) for shape in shapes))
    for distribution, key in ((er, "er_density"), (erk, "erk_density")):
        counts = distribution(layers_of(shapes), total)
        assert sum(counts) == total
        # The official code rounds the zeros of each layer down before it solves.
        assert_within_one_unit(counts, case["expected"][key], shapes)


@pytest.mark.parametrize("case", cases("erk_excluded"))
def test_erk_around_dense_layers(case):
    shapes = case["inputs"]["shapes"]
    layers = layers_of(shapes)
    dense = [layers[i].name for i in case["inputs"]["keep_dense"]]
    total = round(case["inputs"]["density"] * sum(layer.size for layer in layers))

    over_rest = case["expected"].get("budget_over_sparse_layers_only")
    if over_rest is not None:
        assert_within_one_unit(keep_dense(erk, dense)(layers, total), over_rest, shapes)

    charged = keep_dense(erk, dense, charge=True)
    over_all = case["expected"]["budget_over_all_layers"]
    if isinstance(over_all, str):
        with pytest.raises(ValueError, match="largest sparsity is 0.1164"):
            charged(layers, total)
    else:
        counts = charged(layers, total)
        assert sum(counts) == total
        assert_within_one_unit(counts, over_all, shapes)


@pytest.mark.parametrize("case", cases("uniform_excluded"))
def test_uniform_around_dense_layers(case):
    shapes = case["inputs"]["shapes"]
    layers = layers_of(shapes)
    dense = [layers[i].name for i in case["inputs"]["keep_dense"]]
    total = round(case["inputs"]["density"] * sum(layer.size for layer in layers))
    counts = keep_dense(uniform, dense, charge=True)(layers, total)
    assert sum(counts) == total
    assert_within_one_unit(counts, case["expected"]["density"], shapes)


@pytest.fixture
def lamp_layers():
    weights = [torch.tensor(weight) for weight in LAMP["inputs"]["weights"]]
    return [
        Layer(f"layer{i}", weight, torch.ones_like(weight, dtype=torch.bool))
        for i, weight in enumerate(weights)
    ]


def test_lamp_scores(lamp_layers):
    for layer, expected in zip(lamp_layers, LAMP["expected"]["scores"], strict=True):
        torch.testing.assert_close(
            lamp_score(layer).float(), torch.tensor(expected), rtol=LAMP["rtol"], atol=1e-9
        )


@pytest.mark.parametrize(
    ("distribution", "key", "total"),
    [
        (lamp, "lamp", 76),
        (global_by(magnitude), "global", 76),
        (erk, "erk", 76),
        (uniform_plus, "uniform_plus", 76),
        # The official code rounds each layer by itself and so keeps 75 weights, not 76.
        (uniform, "uniform", 75),
    ],
)
def test_counts_and_masks_of_the_lamp_code(lamp_layers, distribution, key, total):
    assert round((1 - LAMP["inputs"]["sparsity"]) * sum(layer.size for layer in lamp_layers)) == 76
    counts = distribution(lamp_layers, total)
    assert counts == LAMP["expected"][f"{key}_kept"]
    for layer, count, expected in zip(
        lamp_layers, counts, LAMP["expected"][f"{key}_masks"], strict=True
    ):
        (mask,) = top_k([magnitude(layer)], count)
        assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "distribution"),
    [("smart_ratio_resnet_a", smart_ratio), ("smart_ratio_vgg_a", smart_ratio_with(vgg=True))],
)
def test_smart_ratios(name, distribution):
    given, expected = PRUNING[name]["inputs"], PRUNING[name]["expected"]
    shapes = [(out, into, k, k) for into, out, k in given["conv_layers_in_out_k"]]
    layers = layers_of([*shapes, tuple(given["linear_in_out"][::-1])])
    assert [layer.size for layer in layers] == given["sizes"]
    counts = distribution(layers, expected["budget"])
    assert sum(counts) == expected["budget"]
    # The official code rounds down layer by layer, in float32, and so loses one or two weights.
    for count, official in zip(counts, expected["kept_per_layer"], strict=True):
        assert 0 <= count - official <= 1
