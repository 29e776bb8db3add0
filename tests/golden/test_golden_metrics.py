"""Metrics and FLOPs against numbers from formulas of the literature."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparsity.connectivity import dead_inputs, dead_outputs
from lightning_sparsity.flops import FlopCounter
from lightning_sparsity.metrics import (
    Churn,
    CompressionRatio,
    Density,
    HardnessNormalizedEfficiency,
    MaskSimilarity,
    ParameterEfficiency,
    index_bits,
)
from lightning_sparsity.metrics.size import Storage

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "pruning.json").read_text())["cases"]
}
STORAGES: list[Storage] = ["bitmap", "coo", "delta", "csr"]


def near(value: float) -> Any:
    """Metrics are float32, with a relative error of 6e-8 at most in each operation."""
    return pytest.approx(value, rel=2e-7)


def test_masks() -> None:
    given, expected = (CASES["mask_metrics_a"][key] for key in ("inputs", "expected"))
    a, b = (torch.tensor(given[key], dtype=torch.bool) for key in ("mask_a", "mask_b"))
    assert float(Density()({"w": a})) == near(expected["density_a"])
    assert float(Density()({"w": b})) == near(expected["density_b"])
    for kind, key in [
        ("jaccard", "jaccard"),
        ("hamming", "hamming_fraction"),
        ("overlap", "overlap_kept"),
    ]:
        assert float(MaskSimilarity(kind)({"w": a}, {"w": b})) == near(expected[key])  # type: ignore[arg-type]
    churn = Churn()
    churn.update({"w": a})
    churn.update({"w": b})
    assert int(churn.dropped) == expected["dropped"]
    assert int((b & ~a).sum()) == expected["grown"]
    assert float(churn.compute()) == near(expected["churn_fraction_of_kept"])
    assert dead_outputs(b).nonzero().flatten().tolist() == expected["dead_output_rows_b"]
    assert dead_inputs(b).nonzero().flatten().tolist() == expected["dead_input_columns_b"]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("storage", STORAGES)
def test_storage_of_counts(storage: Storage, row: int) -> None:
    case = CASES["storage_a"]
    given, expected = case["inputs"][row], case["expected"][row]
    bits = index_bits(
        storage,
        weights=given["n"],
        live=given["m"],
        rows=given["rows"],
        columns=given["columns"],
        gap=given["max_delta"],
    )
    assert bits == expected["index_bits"][storage]
    total = given["m"] * given["value_bits"] + bits
    assert total == expected["total_bits"][storage]
    dense = given["n"] * given["value_bits"]
    assert dense == expected["dense_bits"]
    assert dense / total == pytest.approx(expected["compression_ratio"][storage], rel=1e-9)


@pytest.mark.parametrize("storage", STORAGES)
def test_storage_of_a_mask(storage: Storage) -> None:
    case = CASES["storage_a"]
    given, expected = case["inputs"][2], case["expected"][2]
    ratio = CompressionRatio(storage, value_bits=given["value_bits"])
    ratio.update({"w": spread(given)})
    assert int(ratio.dense) == expected["dense_bits"]
    assert int(ratio.stored) == expected["total_bits"][storage]
    assert float(ratio.compute()) == near(expected["compression_ratio"][storage])


def spread(given: dict[str, int]) -> Tensor:
    """A mask with so many live weights, whose largest gap is the given one."""
    mask = torch.zeros(given["n"], dtype=torch.bool)
    mask[: given["m"] - 1] = True
    mask[given["m"] - 2 + given["max_delta"]] = True
    return mask.view(given["rows"], given["columns"])


@pytest.mark.parametrize("row", range(4))
def test_hardness_normalised_efficiency(row: int) -> None:
    case = CASES["hardness_normalised_efficiency_a"]
    given, expected = case["inputs"][row], case["expected"][row]
    target = torch.zeros(50_000, dtype=torch.long)
    preds = (torch.arange(50_000) >= expected["correct_images"]).long()
    parameters = round(given["params_millions"] * 1e6)
    hard, plain = HardnessNormalizedEfficiency(), ParameterEfficiency()
    assert float(hard(preds, target, parameters)) == near(expected["efficiency_per_million"])
    assert float(hard(preds, target, 1_000_000)) == near(expected["hardness_normalised"])
    percent = given["top1_percent"] / given["params_millions"]
    assert float(plain(preds, target, parameters)) == near(percent)


def test_flops() -> None:
    case = CASES["flops_a"]
    given, expected = case["inputs"], case["expected"]
    size = given["hw"] // 2
    net = nn.Sequential()
    net.add_module("c1", nn.Conv2d(given["cin"], given["c1"], 3, padding=1))
    net.add_module("c2", nn.Conv2d(given["c1"], given["c2"], 3, padding=1, stride=2, bias=False))
    net.add_module("flat", nn.Flatten())
    net.add_module("f", nn.Linear(given["c2"] * size**2, given["out"]))
    counter = FlopCounter({name: p for name, p in net.named_parameters() if p.ndim > 1})
    with counter:
        net(torch.randn(2, given["cin"], given["hw"], given["hw"]))
    flops = counter.per_sample(2)
    macs = {name.removesuffix(".weight"): count / 2 for name, count in flops.layers.items()}
    assert macs == expected["macs_weight_per_layer"]
    assert flops.other == 0  # adding a bias counts nothing
    assert flops.dense == expected["dense_flops_2_per_mac"] == 2 * expected["dense_macs_weights"]
    densities = {f"{name}.weight": density for name, density in given["density"].items()}
    sparse = flops.inference(densities)
    assert sparse == pytest.approx(expected["sparse_flops_2_per_mac"], rel=case["rtol"])
    assert 3 * flops.dense == expected["train_flops_per_sample_dense_3x"]
    static = expected["train_flops_per_sample_static_sparse_3x"]
    assert 3 * sparse == pytest.approx(static, rel=case["rtol"])
