"""GraSP beyond the contracts and the golden numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparsity import GraSP, Rows
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.view import ModelView, Pass
from lightning_sparsity.testing import Batch, TinyModel, fit, quiet_trainer


def output_of(model: TinyModel, batch: Batch) -> Tensor:
    return model.net(batch[0])


def small() -> TinyModel:
    torch.manual_seed(1)
    return TinyModel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def view(model: TinyModel) -> tuple[ModelView, list[Layer]]:
    layers = [
        Layer(name, p.detach(), torch.ones_like(p, dtype=torch.bool))
        for name, p in model.named_parameters()
        if p.ndim > 1
    ]
    return ModelView(quiet_trainer([]), model), layers


def chosen(callback: GraSP, model: TinyModel | None = None) -> list[Any]:
    opening, layers = view(model or small())
    with opening.open(layers) as opened:
        return list(callback.look(opened))


def pairs(classes: list[int], size: int = 2) -> list[Batch]:
    """Batches whose inputs carry the number of the sample."""
    x = torch.arange(len(classes)).float()[:, None].expand(-1, 4)
    return list(zip(x.split(size), torch.tensor(classes).split(size), strict=True))


# The score ----------------------------------------------------------------------------


def test_scores_are_what_the_squared_gradient_loses() -> None:
    model = small().double()
    opening, layers = view(model)
    batch = (torch.randn(6, 4).double(), torch.randint(3, (6,)))
    callback = GraSP(forward_fn=output_of, temperature=2.0, samples_per_class=None, batches=1)
    with opening.open(layers, dtype=torch.float64) as opened:
        found = callback.score(opened, layers, [batch])
        names = [layer.name for layer in layers]

        def flow() -> float:
            loss = nn.functional.cross_entropy(model.net(batch[0]) / 2, batch[1])
            grads = torch.autograd.grad(loss, [opened.weights[name] for name in names])
            return sum(float((grad**2).sum()) for grad in grads)

        for name in names:
            weight = opened.weights[name].data.view(-1)
            for place in range(0, weight.numel(), 3):
                whole = float(weight[place])
                step = 1e-5
                weight[place] = whole * (1 + step)
                more = flow()
                weight[place] = whole * (1 - step)
                less = flow()
                weight[place] = whole
                slope = (more - less) / (2 * step)  # of |g|^2, along the weight itself
                assert 2 * float(found[name].view(-1)[place]) == pytest.approx(
                    slope, rel=1e-5, abs=1e-9
                )


def test_halves_are_summed() -> None:
    opening, layers = view(small().double())
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    callback = GraSP(forward_fn=output_of, samples_per_class=None)
    with opening.open(layers, dtype=torch.float64) as opened:
        whole = callback.score(opened, layers, [(x, y)])
        halves = callback.score(opened, layers, [(x[:3], y[:3]), (x[3:], y[3:])])
    for name, score in whole.items():  # equal halves: the mean loss is that of the whole
        assert torch.allclose(halves[name], score, rtol=1e-9)


def test_units_of_different_size_are_ranked_by_their_sums() -> None:
    def uneven() -> TinyModel:
        return TinyModel(nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 4)))

    seen: dict[str, Tensor] = {}

    class Kept(GraSP):
        def score(self, opened: Pass, layers: Any, batches: Any) -> dict[str, Tensor]:
            seen.update(super().score(opened, layers, batches))
            return seen

    torch.manual_seed(2)
    data = [(torch.randn(8, 40), torch.randint(4, (8,)))]
    callback = Kept(
        0.5, structure=Rows(), data=data, forward_fn=output_of, samples_per_class=None, batches=1
    )
    masks = fit([callback], uneven, data=torch.utils.data.DataLoader(data, batch_size=None)).masks
    sums = torch.cat([score.sum(1) for score in seen.values()])
    assert (sums < 0).any()
    live = torch.cat([mask.any(1) for mask in masks.values()])
    assert live.sum() == 5
    assert sums[live].min() > sums[~live].max()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_can_be_derived_twice(mode: Any) -> None:
    class Attention(TinyModel):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean(1)

    opening, layers = view(Attention())
    batch = (torch.randn(3, 5, 8), torch.randint(8, (3,)))
    with opening.open(layers, mode=mode) as opened:
        found = GraSP(mode=mode).score(opened, layers, [batch])
    assert found["net.self_attn.out_proj.weight"].count_nonzero() == 64


# The samples --------------------------------------------------------------------------


def test_samples_of_every_class_in_two_halves() -> None:
    data = pairs([2, 0, 0, 0, 1, 2, 2, 0, 1, 1])
    first, second = chosen(GraSP(samples_per_class=2, data=data, forward_fn=output_of))
    assert first[1].tolist() == [0, 0, 1]
    assert second[1].tolist() == [1, 2, 2]
    places = torch.cat([first[0], second[0]])[:, 0].tolist()
    assert places == [1, 2, 4, 8, 0, 5]  # the first that come, by class, the tenth not read


def test_no_more_is_read_than_needed() -> None:
    read = []

    class Counted:
        def __iter__(self) -> Iterator[Batch]:
            for place, batch in enumerate(pairs([0, 1, 2, 0, 1, 2])):
                read.append(place)
                yield batch

    chosen(GraSP(samples_per_class=1, data=Counted(), forward_fn=output_of))
    assert read == [0, 1]


def test_a_class_that_never_comes_does_not_hang() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Batch]:
            while True:
                yield pairs([0, 2])[0]

    callback = GraSP(samples_per_class=3, data=Endless(), forward_fn=output_of)
    first, second = chosen(callback)
    assert torch.cat([first[1], second[1]]).tolist() == [0, 0, 0, 2, 2, 2]


def test_numbers_that_are_no_class_are_passed_over() -> None:
    data = pairs([-100, 0, 7, 1, 2, -100])
    first, second = chosen(GraSP(samples_per_class=1, data=data, forward_fn=output_of))
    assert torch.cat([first[1], second[1]]).tolist() == [0, 1, 2]
    with pytest.raises(MisconfigurationException, match="no sample of any class"):
        chosen(GraSP(data=pairs([-100, 7]), forward_fn=output_of))


def test_batches_may_be_dicts() -> None:
    data = [{"x": x, "y": y, "scale": torch.tensor(2.0)} for x, y in pairs([0, 1, 2, 2])]
    callback = GraSP(
        samples_per_class=1,
        data=data,
        forward_fn=lambda model, batch: model.net(batch["x"]),
        target_fn=lambda batch: batch["y"],
    )
    first, second = chosen(callback)
    assert first["y"].tolist() == [0]
    assert second["y"].tolist() == [1, 2]
    assert second["x"].shape == (2, 4)


def test_as_they_come() -> None:
    data = pairs([0, 0, 1, 1, 2, 2])
    found = chosen(GraSP(samples_per_class=None, batches=3, data=data, forward_fn=output_of))
    assert [batch[1].tolist() for batch in found] == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(2, 4)], "the batch is a Tensor.*target_fn="),
        ([(torch.ones(2, 4), torch.rand(2, 3))], r"targets \(2, 3\), torch.float32.*target_fn="),
        ([(torch.ones(2, 4), torch.rand(2))], r"targets \(2,\), torch.float32"),
        ([(torch.ones(2, 4), torch.ones(2, 5).long())], r"targets \(2, 5\), torch.int64"),
    ],
)
def test_targets_that_are_no_classes(data: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        chosen(GraSP(data=data, forward_fn=output_of))


def test_samples_that_do_not_fit_together() -> None:
    class Pooled(TinyModel):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mean(1))

    data = [
        (torch.ones(1, length, 4), torch.tensor([place])) for place, length in enumerate((2, 2, 3))
    ]
    with pytest.raises(MisconfigurationException, match="do not fit.*samples_per_class=None"):
        chosen(GraSP(data=data, samples_per_class=1), Pooled(nn.Linear(4, 3)))


# Another loss -------------------------------------------------------------------------


def test_another_loss_takes_the_place_of_the_cross_entropy() -> None:
    def squares(model: TinyModel, batch: Batch) -> Tensor:
        return (model.net(batch[0]) ** 2).mean()

    data = pairs([0, 1, 2, 0])
    callback = GraSP(loss_fn=squares, samples_per_class=None, data=data)
    opening, layers = view(small())
    with opening.open(layers) as opened:
        found = callback.score(opened, layers, callback.look(opened))
    assert all(score.isfinite().all() and score.any() for score in found.values())


def test_a_loss_without_curvature_scores_nothing() -> None:
    callback = GraSP(loss_fn=lambda model, batch: model.net(batch[0]).sum(), samples_per_class=None)
    opening, layers = view(TinyModel(nn.Linear(4, 3)))
    with opening.open(layers) as opened:
        found = callback.score(opened, layers, pairs([0, 1]))
    assert not found["net.weight"].any()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"temperature": 0}, ValueError, r"temperature=0\): must be finite and above 0"),
        ({"temperature": float("inf")}, ValueError, r"temperature=inf\)"),
        ({"temperature": "200"}, TypeError, r"temperature='200'\): must be a number"),
        ({"samples_per_class": 0}, ValueError, r"samples_per_class=0\): must be at least 1"),
        ({"samples_per_class": 1.0}, TypeError, r"samples_per_class=1.0\)"),
        ({"batches": 0, "samples_per_class": None}, ValueError, r"batches=0\)"),
        ({"forward_fn": 3}, TypeError, r"forward_fn=3\)"),
        ({"target_fn": 3}, TypeError, r"target_fn=3\)"),
        ({"loss_fn": 3, "samples_per_class": None}, TypeError, r"loss_fn=3\)"),
        ({"loss_fn": output_of}, ValueError, "pass samples_per_class=None, and batches="),
        (
            {"loss_fn": output_of, "samples_per_class": None, "forward_fn": output_of},
            ValueError,
            "forward_fn and target_fn are for the cross entropy",
        ),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GraSP\(.*{message}"):
        GraSP(0.1, **bad)
