"""The tables, as users read them."""

import pytest
import torch
from torch import nn

from lightning_sparsity import NM, Rows, Unstructured, reports
from lightning_sparsity.connectivity import Wiring
from lightning_sparsity.core.filters import candidates, linear_and_conv
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.flops import Flops
from lightning_sparsity.reports import Course


def make(*structures):
    """Two linear layers, 4 x 3 and 2 x 4, with half of the first and one row live."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    structures = structures or (Unstructured(), Unstructured())
    pool = filter(linear_and_conv, candidates(model))
    kept = [SparseParameter(c, s) for c, s in zip(pool, structures, strict=True)]
    kept[0].set_mask(torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool))
    kept[1].set_mask(torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool))
    return model, Masks(kept)


def test_allocation():
    model, masks = make()
    assert reports.allocation_table(masks, model) == (
        "sparse parameter | shape | density | live | weights | dead rows\n"
        "---------------------------------------------------------------\n"
        "0.weight         | 4 x 3 |  0.5000 |    6 |      12 |    2 of 4\n"
        "2.weight         | 2 x 4 |  0.2500 |    2 |       8 |          \n"
        "---------------------------------------------------------------\n"
        "total            |       |  0.4000 |    8 |      20 |          \n"
        "Dense: the other 2 parameters (6 weights)."
    )
    assert "Dense" not in reports.allocation_table(masks)
    masks["0.weight"].set_mask(torch.tensor([[True, False, False]] * 4))
    assert "dead" not in reports.allocation_table(masks)


def test_allocation_in_units():
    _, masks = make(Rows(), NM(1, 4))
    header, _, first, second, *_ = reports.allocation_table(masks).splitlines()
    assert header.endswith(" live units")
    assert first.endswith("2 of 4 Rows()")
    assert second.endswith(f"2 of 8 {NM(1, 4)!r}")
    assert "dead" not in header  # the structure says which rows there are


def test_allocation_of_a_dense_model():
    model, _ = make()
    assert reports.allocation_table(Masks([]), model) == (
        "No parameter is sparse: all 4 are dense (26 weights)."
    )
    assert reports.allocation_table(Masks([])) == ""


def test_final_table():
    _, masks = make()
    courses = {
        "0.weight": Course(start=12, ever_live=12, dropped=1006),
        "2.weight": Course(2, 5, 3),
    }
    assert reports.final_table(masks, courses) == (
        "sparse parameter | density at start | at end | live | ever live | dropped | dead rows\n"
        "-------------------------------------------------------------------------------------\n"
        "0.weight         |           1.0000 | 0.5000 |    6 |    100.0% |   1,006 |    2 of 4\n"
        "2.weight         |           0.2500 | 0.2500 |    2 |     62.5% |       3 |          \n"
        "-------------------------------------------------------------------------------------\n"
        "total            |           0.7000 | 0.4000 |    8 |     85.0% |   1,009 |          "
    )


def test_final_table_with_flops():
    _, masks = make()
    courses = {name: Course(6, 6, 0) for name in ("0.weight", "2.weight")}

    def column(flops):
        lines = reports.final_table(masks, courses, flops).splitlines()
        return [line.rpartition("| ")[2].strip() for line in lines if "|" in line]

    known = Flops({"0.weight": 24_000.0, "2.weight": 16.0})
    assert column(known) == ["FLOPs", "12.0 k", "4.00", "12.0 k"]
    assert column(Flops({"2.weight": 16.0}, unknown="reason")) == ["FLOPs", "?", "4.00", "?"]


def test_connectivity_line():
    wired = {"a": Wiring(80, 10, 8, 6, 1), "b": Wiring(20, 2, 2, 2, 0)}
    assert reports.connectivity_line(wired) == (
        "Effective density: 0.1000; 10 of 12 live weights lie on a path from input to output. "
        "Dead neurons: 1 of 8."
    )


def test_flops_lines():
    flops = Flops({"a": 900.0}, other=100.0)
    assert reports.flops_line(flops, {"a": 0.1}) == (
        "Forward FLOPs per sample: 1.00 k dense, 190 at these densities (0.19x)."
    )
    assert reports.flops_line(Flops(unknown="the model is compiled"), {}) == (
        "FLOPs are not known: the model is compiled."
    )
    assert "3.00 k dense" in reports.training_flops_line(600, flops)
    assert "(0.2x)" in reports.training_flops_line(600, flops)


def test_time_line_is_honest():
    line = reports.time_line(0.00193, 17)
    assert "1.93 ms per batch" in line
    assert "zeros computed too" in line
    assert "zeros" not in reports.time_line(0.00193, 17, zeros=False)


def test_memory():
    _, masks = make()
    values, mask, gate = 4 * 12, 12, 4 * 12
    assert reports.stored_bytes(masks["0.weight"]) == values + mask + gate
    masks["0.weight"].slots["average"] = torch.zeros(4, 3)
    assert reports.stored_bytes(masks["0.weight"]) == 2 * values + mask + gate
    masks["0.weight"].set_mask(torch.ones(4, 3, dtype=torch.bool))
    assert reports.stored_bytes(masks["0.weight"]) == 2 * values + mask  # dense: no gate
    # 12 and 2 live values of 4 bytes, bitmaps of 2 and 1 bytes
    assert reports.memory_line(masks).endswith(f"would be {12 * 4 + 2 + 2 * 4 + 1}.0 B.")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.999e3, "999"),
        (0.9996e3, "1.00 k"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1.0, "1.00"),
        (123456, "123 k"),
        (4.1e12, "4.10 T"),
        (1.5e18, "1500 P"),
        (0.25, "250 m"),
        (12e-6, "12.0 µ"),
        (12e-9, "0.01 µ"),
        (0, "0.00"),
    ],
)
def test_quantities(value, text):
    assert reports.quantity(value) == text
