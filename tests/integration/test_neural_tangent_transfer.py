"""NeuralTangentTransfer: the kernel, the transfer, what it leaves alone and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import (
    NeuralTangentTransfer,
    Rows,
    StaticSparse,
    global_by,
    uniform,
)
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.scores import magnitude
from lightning_sparsity.testing import Batch, Batches, TinyModel, fit, quiet_trainer


def output_of(model: TinyModel, batch: Any) -> Tensor:
    return model.net(batch[0])  # type: ignore[no-any-return]


def ntt(density: float | None = 0.3, **options: Any) -> NeuralTangentTransfer:
    given = {"steps": 4, "mask_interval": 2, "samples": 8, "forward_fn": output_of}
    return NeuralTangentTransfer(density, **{"data": Batches(2), **given, **options})


def small() -> TinyModel:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 4))
    return TinyModel(net).double()


def layers_of(model: TinyModel) -> list[Layer]:
    return [
        Layer(f"net.{n}.weight", m.weight.detach(), torch.ones_like(m.weight).bool(), bias=m.bias)
        for n, m in enumerate(model.net)  # type: ignore[arg-type]
        if isinstance(m, nn.Linear)
    ]


def share_of(layers: list[Layer]) -> Share:
    return Share(tuple(x.name for x in layers), (sum(x.size for x in layers),), 0, found=False)


def batch_of(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.zeros(count).long()


def random_masks(model: TinyModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        layer.name: torch.rand(layer.shape, generator=generator) < 0.4 for layer in layers_of(model)
    }


def opened(model: TinyModel) -> Any:
    return ModelView(quiet_trainer([]), model).open([], mode="eval", dtype=torch.float64)


def slopes(model: TinyModel, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Gradients of all outputs of all samples by every live weight, one after the other."""
    rows = []
    for sample in x:
        for place in range(4):
            model.zero_grad()
            model.net(sample[None])[0, place].backward()
            parts = []
            for name, p in model.named_parameters():
                assert p.grad is not None
                parts.append((p.grad * masks[name] if name in masks else p.grad).flatten())
            rows.append(torch.cat(parts))
    model.zero_grad(set_to_none=True)
    return torch.stack(rows)


# the kernel and the loss ----------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_that_of_the_gradients_of_live_weights(masked: bool) -> None:
    model, (x, y) = small(), batch_of()
    masks = random_masks(model) if masked else {}
    with opened(model) as copy:
        outputs, kernel = ntt()._tangents(copy, copy.weights, masks, (x, y), checks=not masked)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    rows = slopes(model, x, masks)
    torch.testing.assert_close(outputs, model.net(x))
    torch.testing.assert_close(kernel, rows[:12] @ rows[12:].T)


def test_the_gradient_goes_through_the_kernel() -> None:
    model, batch = small(), batch_of()
    masks = random_masks(model)
    callback = ntt(kernel_weight=0.7)
    with opened(model) as copy:
        teacher = {name: weight.detach() for name, weight in copy.weights.items()}
        student = {name: (1.3 * w).requires_grad_() for name, w in teacher.items()}
        loss = callback._loss(copy, student, teacher, masks, batch, checks=False)
        found = torch.autograd.grad(loss, list(student.values()))
        for (name, weight), grad in zip(student.items(), found, strict=True):
            for place in range(0, weight.numel(), 17):
                values = []
                for move in (1e-5, -1e-5):
                    moved = weight.detach().clone()
                    moved.view(-1)[place] += move
                    there = {**student, name: moved}
                    at = callback._loss(copy, there, teacher, masks, batch, checks=False)
                    values.append(float(at.detach()))
                slope = (values[0] - values[1]) / 2e-5
                assert float(grad.view(-1)[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
                if name in masks and not masks[name].view(-1)[place]:
                    assert grad.view(-1)[place] == 0


def test_the_penalty_grows_as_density_falls() -> None:
    weight = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[True, False], [False, False]])
    found = ntt(penalty=0.1)._decay({"w": weight}, {"w": mask})
    assert float(found) == pytest.approx(0.1 / 0.25 * 9)


# the transfer ---------------------------------------------------------------------------


def distances(model: TinyModel, students: list[Layer], teacher: TinyModel) -> list[float]:
    """Squared distances of outputs and kernels, of a student put into ``model``."""
    with torch.no_grad():
        for layer in students:
            model.get_parameter(layer.name).copy_(layer.weight * layer.mask)
            if layer.bias is not None:
                model.get_parameter(layer.name.replace("weight", "bias")).copy_(layer.bias)
    x, _ = batch_of(16)
    masks = {layer.name: layer.mask for layer in students}
    mine, theirs = slopes(model, x, masks), slopes(teacher, x, {})
    kernels = (mine[:32] @ mine[32:].T - theirs[:32] @ theirs[32:].T).square().mean()
    outputs = (model.net(x) - teacher.net(x)).square().mean()
    return [float(outputs.detach()), float(kernels)]


@pytest.mark.parametrize("kernel_weight", [0.0, 0.1])
def test_the_student_comes_near_the_teacher(kernel_weight: float) -> None:
    teacher = small()
    layers = layers_of(teacher)
    callback = ntt(
        0.4,
        data=[batch_of(16)],
        steps=120,
        lr=1e-2,
        kernel_weight=kernel_weight,
        penalty=0.0,
        mask_interval=10,
        samples=16,
    )
    callback.dtype = torch.float64
    before = callback._refreshed(layers, share_of(layers))
    with opened(teacher) as copy:
        after = callback._train(copy, layers, share_of(layers))
    was, now = (distances(small(), list(found), teacher) for found in (before, after))
    assert now[0] < 0.1 * was[0]
    assert now[1] < 0.75 * was[1] if kernel_weight else now[1] > was[1]


def test_training_starts_from_the_student() -> None:
    model = small().float()
    layers = layers_of(model)
    callback = ntt(seed=3)
    with ModelView(quiet_trainer([]), model, seed=3).open(layers, mode="eval") as copy:
        student = callback._train(copy, layers, share_of(layers))
    trained = fit([ntt()], lambda: _still(small()), max_epochs=1)
    for layer in student:
        assert torch.equal(trained.masks[layer.name], layer.mask)
        assert torch.equal(trained.weights[layer.name], layer.weight)
        assert layer.bias is not None
        assert torch.equal(trained.weights[layer.name.replace("weight", "bias")], layer.bias)
        begun = model.get_parameter(layer.name)
        assert not torch.equal(begun[layer.mask], layer.weight[layer.mask])


def _still(model: TinyModel) -> TinyModel:
    """The model, in float32, with an optimizer that moves nothing."""
    return TinyModel(model.net.float(), lambda p: torch.optim.SGD(p, lr=0.0))


def test_the_mask_alone_can_be_transferred() -> None:
    both = fit([ntt()], lambda: _still(small()), max_epochs=1)
    mask = fit([ntt(transfer_weights=False)], lambda: _still(small()), max_epochs=1)
    begun = small().float().state_dict()
    for name, found in mask.masks.items():
        assert torch.equal(found, both.masks[name])
        assert torch.equal(mask.weights[name], begun[name] * found)
    assert torch.equal(mask.weights["net.1.bias"], begun["net.1.bias"])
    assert not torch.equal(both.weights["net.1.bias"], begun["net.1.bias"])


def test_nothing_else_is_changed() -> None:
    def still() -> TinyModel:
        torch.manual_seed(4)
        model = TinyModel(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        model.net[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
        return model

    plain = fit([], still, max_epochs=1).weights
    found = fit([ntt(include="net.0"), ntt(0.5, include="net.5")], still, max_epochs=1).weights
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    changed -= {"net.1.running_mean", "net.1.running_var"}  # training sees other pictures there
    assert changed == {"net.0.weight", "net.5.weight", "net.5.bias"}


def test_labels_are_not_used() -> None:
    def run(shift: int) -> Any:
        data = Batches(2)
        data._batches = [(x, (y + shift) % 4) for x, y in data._batches]
        return fit([ntt(data=data)])

    run(0).assert_equal(run(1))


def test_the_seed_decides_the_order_of_the_data() -> None:
    def run(seed: int) -> Any:
        x = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(TensorDataset(x, torch.arange(32) % 4), batch_size=8, shuffle=True)
        model = _still(small())
        return fit([ntt(data=None, seed=seed)], lambda: model, data=loader, max_epochs=1)

    run(1).assert_equal(run(1))
    assert not torch.equal(run(1).weights["net.1.weight"], run(2).weights["net.1.weight"])


# masks ----------------------------------------------------------------------------------


def test_masks_are_refreshed_but_for_the_last_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    refreshed = NeuralTangentTransfer._refreshed

    def counted(self: Any, layers: Any, share: Any) -> Any:
        calls.append(float(layers[0].weight.abs().sum()))
        return refreshed(self, layers, share)

    monkeypatch.setattr(NeuralTangentTransfer, "_refreshed", counted)
    fit([ntt(steps=10, mask_interval=3)], max_epochs=1)
    assert len(set(calls)) == len(calls) == 3  # at steps 0, 3 and 6
    calls.clear()
    fit([ntt(steps=3, mask_interval=3)], max_epochs=1)
    assert len(calls) == 1


def test_a_long_transfer_chooses_other_weights_than_magnitude_would() -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        return fit([ntt(lr=0.02, **options)], lambda: _still(small()), max_epochs=1).masks

    first, later = run(steps=1), run(steps=30, mask_interval=5)
    begun = small().float()
    for name, mask in first.items():
        size = begun.get_parameter(name).abs()
        assert size[mask].min() >= size[~mask].max()
        assert (later[name] & ~mask).any()
        assert int(later[name].sum()) == int(mask.sum()) == round(0.3 * mask.numel())


def test_all_layers_can_be_ranked_together() -> None:
    found = fit([ntt(distribution=global_by(magnitude))], lambda: _still(small()), max_epochs=1)
    even = fit([ntt(distribution=uniform)], lambda: _still(small()), max_epochs=1)
    assert found.live == even.live
    name = "net.3.weight"
    assert int(found.masks[name].sum()) > int(even.masks[name].sum()) == round(0.3 * 24)


def test_masks_that_were_found_stay() -> None:
    first = StaticSparse(0.6, distribution=uniform)
    result = fit([first, ntt(0.2)], lambda: _still(small()), max_epochs=1)
    found = fit([first], lambda: _still(small()), max_epochs=1)
    for name, mask in result.masks.items():
        assert int(mask.sum()) == round(0.2 * mask.numel())
        assert not (mask & ~found.masks[name]).any()


def test_rows_and_controls() -> None:
    result = fit([ntt(0.5, structure=Rows())], lambda: _still(small()), max_epochs=1)
    rows = result.masks["net.1.weight"]
    assert torch.equal(rows.all(1), rows.any(1))
    assert int(rows.any(1).sum()) == 3
    plain = fit([ntt(0.5)], lambda: _still(small()), max_epochs=1)
    mixed = fit([ntt(0.5, shuffle=True)], lambda: _still(small()), max_epochs=1)
    for name, mask in mixed.masks.items():
        assert int(mask.sum()) == int(plain.masks[name].sum())
        assert not torch.equal(mask, plain.masks[name])


# which models ---------------------------------------------------------------------------


class Encoder(TinyModel):
    """Attention over the rows of the pictures."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, 0.1, batch_first=True)
        super().__init__(nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(36, 4)))


def test_attention() -> None:
    result = fit([ntt(0.5, include=nn.Linear)], Encoder, max_epochs=1)
    assert result.live == round(0.5 * sum(mask.numel() for mask in result.masks.values()))


def test_tokens_in_a_dict() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = {"ids": torch.arange(24).view(8, 3) % 10, "names": ["a"] * 8}
    callback = ntt(
        0.5, data=[tokens], forward_fn=lambda model, batch: model.net(batch["ids"]), samples=5
    )
    model = TinyModel(net)
    layers = [Layer("net.2.weight", net[2].weight.detach(), torch.ones(3, 12).bool())]
    with opened(model) as copy:
        (found,) = callback._train(copy, layers, share_of(layers))
    assert found.live == 18


class Mixing(nn.Module):
    """Does to the batch what it is told to."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def _branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x - x.mean(0), "not what it gives for each of them alone"),
        (lambda x: functional.dropout(x, 0.5, training=True), "kernel of this model cannot be"),
        (_branch, "kernel of this model cannot be computed: .*branches on values"),
        (lambda x: x.sum(), "not what it gives for each of them alone"),
    ],
    ids=["mean", "random", "branch", "sum"],
)
def test_models_that_mix_samples_are_refused(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    def model() -> TinyModel:
        return TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Mixing(change)))

    with pytest.raises(MisconfigurationException, match=rf"^NeuralTangentTransfer: .*{message}"):
        fit([ntt()], model)


def test_batch_norm_needs_running_statistics() -> None:
    def net(**options: Any) -> nn.Module:
        norm = nn.BatchNorm1d(6, **options)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), norm, nn.Linear(6, 4))

    message = r"^NeuralTangentTransfer: net\.2 is a BatchNorm1d without running statistics"
    with pytest.raises(MisconfigurationException, match=message):
        fit([ntt()], lambda: TinyModel(net(track_running_stats=False)))
    fit([ntt()], lambda: TinyModel(net()))

    class Training(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(x, self.running_mean, self.running_var, training=True)

    forced = net()
    forced[2] = Training(6)  # type: ignore[index]
    with pytest.raises(MisconfigurationException, match="kernel of this model cannot be"):
        fit([ntt()], lambda: TinyModel(forced))
    assert not forced[2].running_mean.any()  # type: ignore[index]


@pytest.mark.parametrize("steps", [2, 6])
def test_a_student_that_is_lost_is_not_used(steps: int) -> None:
    class Rooted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).sqrt() + x  # a finite output, and no gradient

    def model() -> TinyModel:
        return TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Rooted()))

    message = r"^NeuralTangentTransfer: after 2 steps the student is no longer finite; lower lr="
    with pytest.raises(MisconfigurationException, match=message):
        fit([ntt(steps=steps)], model)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Batches(2, size=1), MisconfigurationException, "a batch has 1 samples"),
        ([(torch.tensor(3.0),)], MisconfigurationException, "a batch has 0 samples"),
        ([], ValueError, "the data is empty"),
        (iter([*Batches(1)]), ValueError, "can be read only once"),
    ],
    ids=["one", "none", "empty", "iterator"],
)
def test_data_that_do_not_do(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^NeuralTangentTransfer: .*{message}"):
        fit([ntt(data=data)])


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 1.5}, TypeError),
        ({"lr": 0.0}, ValueError),
        ({"lr": "0.1"}, TypeError),
        ({"kernel_weight": -1.0}, ValueError),
        ({"kernel_weight": float("nan")}, ValueError),
        ({"penalty": -1.0}, ValueError),
        ({"penalty": None}, TypeError),
        ({"mask_interval": 0}, ValueError),
        ({"samples": 1}, ValueError),
        ({"transfer_weights": 1}, TypeError),
        ({"forward_fn": 3}, TypeError),
        ({"shuffle": 1}, TypeError),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^NeuralTangentTransfer\({next(iter(bad))}="):
        NeuralTangentTransfer(0.1, **bad)
