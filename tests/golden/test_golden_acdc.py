"""Phases of AC/DC against those of the authors' program."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_sparsity import ACDC
from lightning_sparsity.testing import Batches, fit

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((Path(__file__).parent / "dynamic.json").read_text())["cases"]
    if case["kind"] == "acdc"
]


def phases(densities):
    return "".join("D" if density == 1 else "S" for density in densities)


def events(case, of_phases):
    before = zip([*pairwise(of_phases)], range(1, case["inputs"]["epochs"]), strict=True)
    names = {("D", "S"): "compress", ("S", "D"): "decompress"}
    return [[epoch, names[change]] for change, epoch in before if change in names]


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 391, 2503])
@pytest.mark.parametrize("case", CASES)
def test_phases_and_events(case, steps_per_epoch):
    epochs = case["inputs"]["epochs"]
    steps = ACDC(0.1).window.resolve(epochs * steps_per_epoch, arrives=True)
    density = ACDC(0.1).ramp(1.0, 0.1)
    # what holds in an epoch was decided after the last step of the one before
    ours = phases(density(steps.progress(epoch * steps_per_epoch)) for epoch in range(epochs))
    assert ours == case["expected"]["phase"]
    assert ours.count("S") == case["expected"]["n_sparse_epochs"]
    assert events(case, ours) == case["expected"]["events"]


@pytest.mark.parametrize("case", CASES)
def test_phases_of_a_training_in_a_fifth_of_the_epochs(case):
    result = fit([ACDC(0.1)], data=Batches(2), max_epochs=20)
    numel = sum(mask.numel() for mask in result.masks.values())
    after_first_step = result.history[::2]
    ours = phases(sum(live.values()) / numel for _, live in after_first_step)
    assert ours == case["expected"]["phase"][::5]
    assert result.live == round(0.1 * numel)


def test_there_are_cases():
    assert CASES
