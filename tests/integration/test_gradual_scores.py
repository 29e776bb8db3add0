"""GMP by other scores than magnitude: random, saliency, Taylor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparsity import GMP, Rows, global_by
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.scores import random, saliency, taylor
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import fit


def layer(weight: Tensor, grad: Tensor, **more: Any) -> Layer:
    return Layer("w", weight, torch.ones_like(weight, dtype=torch.bool), grad=grad, **more)


def test_taylor_squares_the_sum_over_a_unit_before_the_mean() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    grads = [torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[2.0, 1.0], [0.0, 4.0]])]
    score = taylor(0.5)
    slots: dict[str, Tensor] = {}
    for grad in grads:
        slots = dict(score.observe(layer(weight, grad, slots=slots, structure=Rows())))
    # rows: (1 - 2)^2 = 1 and (3 - 1)^2 = 4, then (2 + 2)^2 = 16 and (-4)^2 = 16
    assert slots["taylor"].tolist() == [0.25 * 1 + 0.5 * 16, 0.25 * 4 + 0.5 * 16]
    rows = layer(weight, grads[0], slots=slots, structure=Rows())
    assert Rows().reduce(score(rows), Layout()).tolist() == slots["taylor"].tolist()


def test_taylor_of_single_weights_is_the_square_of_saliency() -> None:
    weight, grad = torch.randn(4, 3), torch.randn(4, 3)
    single = layer(weight, grad)
    slots = dict(taylor(0.0).observe(single))
    found = taylor(0.0)(layer(weight, grad, slots=slots))
    assert torch.allclose(found, saliency(single).square())


def test_an_infinite_step_is_left_out() -> None:
    weight = torch.ones(2, 2)
    good = dict(taylor(0.5).observe(layer(weight, weight)))
    after = taylor(0.5).observe(layer(weight, weight * torch.inf, slots=good))
    assert torch.equal(after["taylor"], good["taylor"])


@pytest.mark.parametrize("score", [random, saliency, taylor(0.9)], ids=["random", "wg", "taylor"])
@pytest.mark.parametrize("structure", [None, Rows()], ids=["weights", "rows"])
def test_the_density_falls_to_what_was_asked(score: Any, structure: Any) -> None:
    result = fit([GMP(0.5, score=score, structure=structure, update_interval=4)])
    lives = [sum(live.values()) for _, live in result.history]
    assert lives == sorted(lives, reverse=True)
    assert lives[0] == 2184
    assert result.changes > 3
    if structure is None:
        assert result.live == 1092
    else:
        assert sum(int(mask.flatten(1).any(1).sum()) for mask in result.masks.values()) == 14


def test_ranking_the_whole_net() -> None:
    score = taylor(0.9)
    result = fit([GMP(0.1, score=score, distribution=global_by(score), update_interval=4)])
    assert result.live == round(0.1 * 2184)


@pytest.mark.parametrize("bad", [None, 3, "magnitude", taylor])
def test_bad_scores(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"GMP\(score="):
        GMP(0.1, score=bad)


@pytest.mark.parametrize(("beta", "error"), [(1.0, ValueError), (-1, ValueError), ("a", TypeError)])
def test_bad_betas(beta: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"taylor.*beta must"):
        taylor(beta)
