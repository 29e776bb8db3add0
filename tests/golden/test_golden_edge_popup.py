"""EdgePopup and its start values against the numbers of the authors' program."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sparsity.callbacks.learned.edge_popup import EdgePopup
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.starts import signed_constant

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "learned.json").read_text())["cases"]
}


def test_choice_and_gradient():
    case = CASES["edge_popup"]
    given, tol = case["inputs"], case["tol"]
    weight, score, x, upstream = (
        torch.tensor(given[key]) for key in ("w", "scores", "x", "upstream")
    )
    method = EdgePopup(given["k"])
    share = Share(("w",), (4,), 0, found=False)
    # at the start two other weights are live
    other = ~torch.tensor(case["expected"]["mask"], dtype=torch.bool)
    layer = Layer("w", weight, other, slots={"score": score})
    (chosen,) = method.update([layer], share, 0.5)
    assert chosen.mask.int().tolist() == case["expected"]["mask"]
    out = x @ method.effective(chosen).T
    torch.testing.assert_close(out, torch.tensor(case["expected"]["out"]), rtol=tol, atol=tol)
    grad = upstream.T @ x
    found = method.gradients(Layer("w", weight, chosen.mask, grad, slots={"score": score}))
    assert found["weight"] is None
    expected = torch.tensor(case["expected"]["grad_scores"])
    torch.testing.assert_close(found["score"], expected, rtol=tol, atol=tol)


def test_signed_constant():
    case = CASES["signed_constant_init"]
    given = case["inputs"]
    weight = torch.tensor(given["w_flat"]).view(given["shape_out_in_k"])
    # The program scales the fan by one minus the share that it keeps; here it is by the share.
    live = 1 - given["keep_fraction_arg"]
    weight = weight.repeat(5, 1, 1)  # 20 weights, of which 14 are 0.7
    mask = (torch.arange(20) < round(20 * live)).view(weight.shape)
    (start,) = signed_constant("live_fan_in")([Layer("w", weight, mask)], [14], 0.0)
    expected = torch.tensor(case["expected"]).view(given["shape_out_in_k"]).repeat(5, 1, 1)
    assert start.weight.numpy() == pytest.approx(expected.numpy(), abs=case["tol"])
    (dense,) = signed_constant()([Layer("w", weight, mask)], [14], 0.0)
    assert dense.weight.abs().unique().tolist() == [1.0]  # sqrt(2 / 2)
