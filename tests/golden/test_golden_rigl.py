"""One update of RigL against the numbers of a public reference program.

The program drops ``int(fraction * live)`` weights of smallest magnitude, lets those it
dropped compete for growth, and multiplies weights and momentum by the new mask.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sparsity import RigL
from lightning_sparsity.core.filters import candidates
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.structures import Unstructured

HERE = Path(__file__).parent
CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((HERE / "dynamic.json").read_text())["cases"]
    if case["kind"] == "rigl_step"
]


def the_mask(given):
    if isinstance(given["mask"], list):
        return torch.tensor(given["mask"], dtype=torch.bool)
    period, keep = given["mask"]["period"], given["mask"]["keep"]
    numel = math.prod(given["shape"])
    return torch.tensor([(7 * i) % period < keep for i in range(numel)]).view(given["shape"])


def values(given, key):
    """A tensor of the file: a list, or a rule with ``a``, ``b`` and maybe ``times_mask``."""
    if isinstance(given[key], list):
        return torch.tensor(given[key])
    a, b = given[key]["a"], given[key]["b"]
    numel = math.prod(given["shape"])
    flat = [round(math.sin(a * i) + b * math.cos(3.7 * i), 4) for i in range(1, numel + 1)]
    tensor = torch.tensor(flat).view(given["shape"])
    return tensor * the_mask(given) if given[key].get("times_mask") else tensor


def module_of(weight):
    if weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)


def update(given):
    """The parameter and its mask after one update, with the optimizer that owns it."""
    module = module_of(values(given, "weight"))
    with torch.no_grad():
        module.weight.copy_(values(given, "weight"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[module.weight]["momentum_buffer"] = values(given, "momentum")
    kept = SparseParameter(candidates(module)[0], Unstructured())
    kept.set_mask(the_mask(given))
    masks = Masks([kept])
    layer = Layer(kept.name, kept.weight, kept.mask, grad=values(given, "dense_grad"))
    rule = RigL(0.5, drop_fraction=given["alpha"]).rule
    masks.commit(rule([layer], [layer.live], given["step"] / given["t_end"]), [optimizer])
    return kept, optimizer


@pytest.mark.parametrize("case", CASES)
def test_mask(case):
    kept, _ = update(case["inputs"])
    expected = torch.tensor(case["expected"]["mask"], dtype=torch.bool)
    assert torch.equal(kept.mask, expected.view(kept.mask.shape))
    assert kept.live == int(the_mask(case["inputs"]).sum())
    if "n_active_after" in case["expected"]:
        assert kept.live == case["expected"]["n_active_after"]


@pytest.mark.parametrize("case", CASES)
def test_weight_and_momentum(case):
    kept, optimizer = update(case["inputs"])
    momentum = optimizer.state[kept.parameter]["momentum_buffer"]
    for ours, key in ((kept.weight, "weight"), (momentum, "momentum_buffer")):
        theirs = torch.tensor(case["expected"][key]).view(ours.shape)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not ours[~kept.mask].any()


@pytest.mark.parametrize("case", CASES)
def test_drop_fraction(case):
    given = case["inputs"]
    callback = RigL(0.5, drop_fraction=given["alpha"])
    fraction = callback.drop_fraction_at(given["step"] / given["t_end"])
    assert fraction == pytest.approx(case["expected"]["drop_fraction"], abs=1e-9)


def test_there_are_cases_that_drop_and_one_that_is_too_late_to():
    assert len(CASES) == 4
    moved = [
        bool((update(case.values[0]["inputs"])[0].mask != the_mask(case.values[0]["inputs"])).any())
        for case in CASES
    ]
    assert moved == [True, True, False, True]
