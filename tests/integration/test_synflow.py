"""SynFlow beyond the contracts and the golden numbers."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparsity import SNIP, MaskCallback, StaticSparse, SynFlow, global_by
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.scores import slot
from lightning_sparsity.testing import Batch, Batches, TinyModel, fit, quiet_trainer

SEEDS = range(5)


def output_of(model: TinyModel, batch: Batch) -> Tensor:
    return model.net(batch[0])


def perceptron() -> TinyModel:
    layers: list[nn.Module] = []
    for width, following in ((8, 16), (16, 16), (16, 4)):
        layers += [nn.Linear(width, following, bias=False), nn.ReLU()]
    return TinyModel(nn.Sequential(*layers[:-1]))


def scores(callback: SynFlow, model: TinyModel, batch: Any) -> dict[str, Tensor]:
    layers = [
        Layer(name, p.detach(), torch.ones_like(p, dtype=torch.bool))
        for name, p in model.named_parameters()
        if p.ndim > 1 and "embed" not in name
    ]
    with ModelView(quiet_trainer([]), model).open(
        layers, mode=callback.mode, dtype=callback.dtype
    ) as opened:
        return callback.score(opened, layers, opened.batches(1, [batch]))


# Collapse: three layers, three weights ------------------------------------------------


def paths(method: type[SynFlow | SNIP], seed: int, **options: Any) -> int:
    """Paths from input to output that live with three weights in all, one per layer at best."""
    callback: MaskCallback = method(
        3 / 448,
        distribution=global_by(slot("score"), min_per_layer=0),
        data=Batches(1, shape=(8,)),
        **options,
    )
    found = fit([callback], perceptron, data=Batches(1, shape=(8,)), seed=seed, max_epochs=1)
    assert found.live == 3
    return int(
        reduce(torch.matmul, [mask.float() for mask in reversed(found.masks.values())]).sum()
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hundred_rounds_leave_a_path(seed: int) -> None:
    assert paths(SynFlow, seed, forward_fn=output_of) == 1


@pytest.mark.filterwarnings("ignore:.*has no live weight left")
def test_one_round_cuts_it() -> None:
    assert [paths(SynFlow, seed, rounds=1, forward_fn=output_of) for seed in SEEDS] == [0] * 5


@pytest.mark.filterwarnings("ignore:.*has no live weight left")
def test_snip_cuts_it() -> None:
    assert sum(paths(SNIP, seed) for seed in SEEDS) <= 1


def test_a_floor_keeps_every_layer_by_default() -> None:
    callback = SynFlow(3 / 448, rounds=1, data=Batches(1, shape=(8,)), forward_fn=output_of)
    found = fit([callback], perceptron, data=Batches(1, shape=(8,)), max_epochs=1)
    assert [int(mask.sum()) for mask in found.masks.values()] == [1, 1, 1]


# The scores ---------------------------------------------------------------------------


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def normalised() -> TinyModel:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    return TinyModel(
        nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), Mean(), nn.Linear(3, 5), nn.ReLU())
    )


def sums(found: dict[str, Tensor]) -> list[float]:
    return [float(score.sum()) for score in found.values()]


def test_layers_have_equal_sums_without_biases() -> None:
    torch.manual_seed(0)
    found = sums(scores(SynFlow(forward_fn=output_of), perceptron(), (torch.randn(2, 8),)))
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_zero_bias_makes_the_sums_equal() -> None:
    batch = (torch.randn(2, 2, 5, 5),)
    with_bias = sums(scores(SynFlow(forward_fn=output_of), normalised(), batch))
    without = sums(scores(SynFlow(zero_bias=True, forward_fn=output_of), normalised(), batch))
    assert without[1] == pytest.approx(without[0], rel=1e-12)
    assert with_bias[1] > 1.01 * with_bias[0]


def test_only_the_shape_of_the_data_counts() -> None:
    model = normalised()
    callback = SynFlow(forward_fn=output_of)
    first = scores(callback, model, (torch.full((1, 2, 5, 5), math.nan),))
    second = scores(callback, model, [torch.randn(7, 2, 5, 5), torch.zeros(7).long()])
    assert all(torch.equal(first[name], second[name]) for name in first)
    larger = scores(callback, model, (torch.randn(1, 2, 8, 8),))
    assert not torch.equal(first["net.0.weight"], larger["net.0.weight"])


def test_deep_networks_stay_finite() -> None:
    def deep() -> TinyModel:
        layers = [nn.Linear(64, 64, bias=False) for _ in range(30)]
        for layer in layers:
            nn.init.normal_(layer.weight)
        return TinyModel(nn.Sequential(*layers, nn.Linear(64, 4)))

    data = Batches(1, shape=(64,))
    callback = SynFlow(0.1, rounds=2, data=data, forward_fn=output_of)
    assert max(sums(scores(callback, deep(), next(iter(data))))) > torch.finfo(torch.float32).max
    found = fit([callback], deep, data=data, max_epochs=0)
    assert found.trainer.global_step == 0
    live = fit([callback], deep, data=data, max_epochs=1, gradient_clip_val=1e-6).live
    assert live == round(0.1 * (30 * 64 * 64 + 64 * 4))


def test_a_model_that_casts_is_scored_in_single_precision() -> None:
    callback = SynFlow(double=False, forward_fn=lambda model, batch: model.net(batch[0].float()))
    found = scores(callback, perceptron(), (torch.ones(1, 8),))
    assert {score.dtype for score in found.values()} == {torch.float32}


def test_rounds_go_on_from_a_mask_that_was_found() -> None:
    start = fit([StaticSparse(0.5)], perceptron, data=Batches(1, shape=(8,)), max_epochs=1)
    callback = SynFlow(0.2, rounds=4, data=Batches(1, shape=(8,)), forward_fn=output_of)
    both = fit([StaticSparse(0.5), callback], perceptron, data=Batches(1, shape=(8,)), max_epochs=1)
    assert both.live == round(0.2 * 448)
    assert all((both.masks[key] <= mask).all() for key, mask in start.masks.items())


# What goes into the model -------------------------------------------------------------


class Tokens(TinyModel):
    """Has a ``forward``, and reads token numbers or bytes."""

    def __init__(self, *, embeds: bool = True) -> None:
        super().__init__(nn.Linear(6, 4))
        self.embedding = nn.Embedding(20, 6) if embeds else None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embedding(x).sum(1) if self.embedding else x)


def test_tokens_become_ones_behind_the_embedding() -> None:
    torch.manual_seed(0)
    model = Tokens()
    tokens = torch.randint(20, (3, 5))
    found = scores(SynFlow(), model, (tokens,))
    expected = 5 * model.net.weight.detach().double().abs()
    assert torch.allclose(found["net.weight"], expected, rtol=1e-12)
    assert model.embedding is not None
    assert not model.embedding._forward_hooks


def test_integers_without_an_embedding_are_refused() -> None:
    pixels = torch.randint(255, (2, 6), dtype=torch.uint8)
    with pytest.raises(MisconfigurationException, match=r"torch\.uint8.*no nn\.Embedding.*forward"):
        scores(SynFlow(), Tokens(embeds=False), (pixels,))
    given = SynFlow(forward_fn=lambda model, batch: model.net(torch.ones(1, 6).double()))
    assert scores(given, Tokens(embeds=False), (pixels,))["net.weight"].count_nonzero() == 24


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (perceptron, (torch.ones(2, 8),), "TinyModel has no forward method; give forward_fn="),
        (Tokens, {"x": torch.ones(2, 6)}, "the batch is a dict.*give forward_fn="),
    ],
)
def test_what_cannot_be_called_says_so(model: Any, batch: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        scores(SynFlow(), model(), batch)


def test_the_output_must_be_a_tensor() -> None:
    callback = SynFlow(forward_fn=lambda model, batch: (model.net(batch[0]),))  # type: ignore[arg-type,return-value]
    with pytest.raises(MisconfigurationException, match="output of the model is a tuple"):
        scores(callback, perceptron(), (torch.ones(2, 8),))


def test_a_batch_may_be_a_tensor_or_a_dict() -> None:
    model = Tokens(embeds=False)
    ones = model.net.weight.detach().double().abs()
    assert torch.equal(scores(SynFlow(), model, torch.randn(3, 6))["net.weight"], ones)
    named = SynFlow(forward_fn=lambda model, batch: model.net(batch["x"]))
    assert torch.equal(scores(named, model, {"x": torch.randn(3, 6)})["net.weight"], ones)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"rounds": 0}, ValueError),
        ({"rounds": 2.5}, TypeError),
        ({"rounds": True}, TypeError),
        ({"zero_bias": 1}, TypeError),
        ({"double": None}, TypeError),
        ({"forward_fn": 3}, TypeError),
        ({"mode": "test"}, ValueError),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^SynFlow\({next(iter(bad))}="):
        SynFlow(0.1, **bad)
