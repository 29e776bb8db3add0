"""ProsPr beyond the contracts and the golden numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparsity import ProsPr
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.testing import Batch, TinyModel, quiet_trainer


def small() -> TinyModel:
    torch.manual_seed(1)
    return TinyModel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()


def tied() -> TinyModel:
    torch.manual_seed(1)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return TinyModel(nn.Sequential(first, nn.Tanh(), second)).double()


class Recurrent(TinyModel):
    """An LSTM, which keeps its parameters in a list too."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.LSTM(4, 3, batch_first=True))
        self.double()

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0][:, None])[0][:, 0], batch[1])


def data(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(6, 4, generator=generator).double(),
            torch.randint(3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def layers_of(model: TinyModel) -> list[Layer]:
    return [
        Layer(name, p.detach(), torch.ones_like(p, dtype=torch.bool))
        for name, p in model.named_parameters()
        if p.ndim > 1
    ]


def scores(
    callback: ProsPr, model: TinyModel, batches: list[Batch], layers: list[Layer] | None = None
) -> dict[str, Tensor]:
    layers = layers or layers_of(model)
    with ModelView(quiet_trainer([]), model).open(layers, dtype=torch.float64) as opened:
        return callback.score(opened, layers, batches)


def trained(model: TinyModel, batches: list[Batch], steps: int, **options: Any) -> list[Any]:
    """All parameters before every step of torch's SGD, and after the last."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, **options)
    path = []
    for step in range(steps + 1):
        path.append([p.detach().clone() for p in model.parameters()])
        optimizer.zero_grad()
        model.loss(batches[step % len(batches)]).backward()
        optimizer.step()
    return path


@pytest.mark.parametrize("make", [small, tied, Recurrent])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_steps_are_those_of_sgd(make: Callable[[], TinyModel], momentum: float) -> None:
    path = []

    def loss(model: TinyModel, batch: Batch) -> Tensor:
        found = dict(model.named_modules(remove_duplicate=False))
        names = [name for name, _ in make().named_parameters()]
        tensors = [getattr(found[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in names]
        path.append([tensor.detach().clone() for tensor in tensors])
        return model.loss(batch)

    callback = ProsPr(inner_lr=0.3, inner_momentum=momentum, loss_fn=loss, first_order=True)
    model, batches = make(), data(4)
    before = [p.detach().clone() for p in model.parameters()]
    scores(callback, model, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    expected = trained(make(), batches, 3, lr=0.3, momentum=momentum)
    for mine, theirs in zip(path, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not torch.equal(path[0][0], path[-1][0])


def final_loss(model: TinyModel, batches: list[Batch], steps: int, lr: float) -> float:
    trained(model, batches, steps - 1, lr=lr)
    return float(model.loss(batches[steps % len(batches)]).detach())


def test_the_meta_gradient_goes_through_the_steps() -> None:
    batches = data(3)
    callback = ProsPr(inner_steps=2, inner_lr=0.5, inner_momentum=0.0)
    found = scores(callback, small(), batches)
    first = scores(ProsPr(inner_steps=2, inner_momentum=0.0, first_order=True), small(), batches)
    for name, score in found.items():
        for place in range(0, score.numel(), 2):
            losses = []
            for gate in (1 + 1e-5, 1 - 1e-5):
                model = small()
                model.get_parameter(name).data.view(-1)[place] *= gate
                losses.append(final_loss(model, batches, 2, 0.5))
            slope = abs(losses[0] - losses[1]) / 2e-5
            assert float(score.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert any(not torch.allclose(found[name], first[name], rtol=1e-2) for name in found)


def test_first_order_is_the_gradient_after_the_steps_times_the_start() -> None:
    batches = data(3)
    callback = ProsPr(inner_steps=2, inner_lr=0.5, first_order=True)
    found = scores(callback, small(), batches)
    model, start = small(), small()
    trained(model, batches, 1, lr=0.5, momentum=0.9)
    model.zero_grad()
    model.loss(batches[2]).backward()
    for name, score in found.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(score, (grad * start.get_parameter(name)).abs().detach())


def test_pruned_and_frozen_parameters_do_not_move() -> None:
    seen: list[dict[str, Tensor]] = []

    def loss(model: TinyModel, batch: Batch) -> Tensor:
        first, _, last = model.net  # type: ignore[misc]
        seen.append(
            {key: getattr(first, key).detach().clone() for key in ("weight", "bias")}
            | {"last": last.weight.detach().clone()}
        )
        return model.loss(batch)

    model = small()
    model.net[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
    layers = layers_of(model)
    mask = layers[0].mask.clone()
    mask[1:3] = False
    masked = Layer(layers[0].name, layers[0].weight, mask)
    found = scores(ProsPr(loss_fn=loss), model, data(4), [masked, layers[1]])
    assert len(seen) == 4
    assert all(torch.equal(state["bias"], seen[0]["bias"]) for state in seen)
    assert not any(state["weight"][~mask].any() for state in seen)
    assert not found["net.0.weight"][~mask].any()
    assert not torch.equal(seen[0]["weight"][mask], seen[1]["weight"][mask])
    assert not torch.equal(seen[0]["last"], seen[1]["last"])


@pytest.mark.parametrize(
    ("batches", "order"), [(None, [0, 1, 2, 3]), (1, [0] * 4), (2, [0, 1] * 2)]
)
def test_batches_are_taken_in_turn(batches: int | None, order: list[int]) -> None:
    callback = ProsPr(batches=batches)
    given = data(callback.batches)
    firsts = [float(batch[0][0, 0]) for batch in given]
    taken = []

    def loss(model: TinyModel, batch: Batch) -> Tensor:
        taken.append(firsts.index(float(batch[0][0, 0])))
        return model.loss(batch)

    callback.loss_fn = loss
    scores(callback, small(), given)
    assert taken == order


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_can_be_derived_twice(first_order: bool) -> None:
    class Attention(TinyModel):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))

        def loss(self, batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]).mean(1), batch[1])

    batch = (torch.randn(3, 5, 8).double(), torch.randint(8, (3,)))
    found = scores(ProsPr(first_order=first_order), Attention(), [batch])
    assert found["net.self_attn.out_proj.weight"].count_nonzero() == 64


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"inner_steps": -1}, ValueError),
        ({"inner_steps": 1.0}, TypeError),
        ({"inner_lr": 0.0}, ValueError),
        ({"inner_lr": float("nan")}, ValueError),
        ({"inner_lr": "0.1"}, TypeError),
        ({"inner_momentum": 1.1}, ValueError),
        ({"first_order": 1}, TypeError),
        ({"batches": 0}, ValueError),
        ({"mode": "test"}, ValueError),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^ProsPr\({next(iter(bad))}="):
        ProsPr(0.1, **bad)
