"""SNIP-it and SNAP-it: rounds, and gates on units without putting gates into the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparsity import SNIP, Columns, Rows, SNAPit, SNIPit, Unstructured
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.view import ModelView, Pass
from lightning_sparsity.structures import Layout, Structure
from lightning_sparsity.testing import Batches, TinyModel, fit, quiet_trainer

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def counts(result: Any) -> list[int]:
    return [int(mask.sum()) for mask in result.masks.values()]


def neurons(result: Any) -> list[int]:
    return [int(mask.flatten(1).any(1).sum()) for mask in result.masks.values()]


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


# SNIP-it ----------------------------------------------------------------------------


def test_the_distance_is_halved_from_round_to_round() -> None:
    live = []

    class Watched(SNIPit):
        def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
            assert len(batches) == 5
            assert not opened.module.training
            live.append([opened.weights[layer.name].detach() != 0 for layer in layers])
            return super().score(opened, layers, batches)

    result = fit([Watched(0.1, data=Batches(8))])
    densities = [1, 0.5, 0.3, 0.2, 0.15, 0.125, 0.1125]
    assert [sum(int(m.sum()) for m in masks) for masks in live] == [
        round(density * NUMEL) for density in densities
    ]
    assert result.live == round(0.1 * NUMEL)
    rounds = [*live, list(result.masks.values())]
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert not any((b & ~a).any() for a, b in zip(before, after, strict=True))


def test_a_high_density_is_reached_in_one_round() -> None:
    assert SNIPit(0.7).rounds(0.7) == [0.7]
    found = fit([SNIPit(0.7, data=Batches(2))])
    assert found.history == fit([SNIP(0.7, batches=5, data=Batches(2))]).history
    lower = fit([SNIPit(0.1, data=Batches(2))])
    assert lower.history != fit([SNIP(0.1, batches=5, data=Batches(2))]).history


@pytest.mark.parametrize("method", [SNIPit, SNAPit])
def test_a_factor_of_the_loss_changes_no_rank(method: Any) -> None:
    def fourfold(model: TinyModel, batch: Any) -> Tensor:
        return 4 * model.loss(batch)

    def run(**options: Any) -> Any:
        return fit([method(0.2, data=Batches(2), **options)])

    run(loss_fn=fourfold).assert_equal(run())


@pytest.mark.parametrize("method", [SNIPit, SNAPit])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"halvings": -1}, ValueError, r"\(halvings=-1\): must be at least 0"),
        ({"halvings": True}, TypeError, r"\(halvings=True\): must be an int >= 0"),
        ({"batches": 0}, ValueError, r"\(batches=0\): must be at least 1"),
    ],
)
def test_bad_arguments(
    method: Any, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{method.__name__}{message}"):
        method(0.5, **bad)


# SNAP-it: the score -----------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[], nn.Module], Layout]] = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3), Layout()),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), Layout()),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), Layout(groups=2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), Layout(transposed=True)),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        Layout(groups=2, transposed=True),
    ),
}


def make(middle: nn.Module) -> TinyModel:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        middle,
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.Sigmoid(),
        nn.Linear(5, 4),
    )
    for buffer in net[2].buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return TinyModel(net).double().eval()


def unit_scores(model: TinyModel, module: nn.Module, layout: Layout, unit: Structure) -> Tensor:
    name = next(n for n, p in model.named_parameters() if p is module.weight)
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach()
    bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
    mask = torch.ones_like(weight, dtype=torch.bool)
    layer = Layer(name, weight, mask, structure=unit, layout=layout, bias=bias)
    batches = [(x.double(), y) for x, y in Batches(3)]
    with ModelView(quiet_trainer([]), model).open(
        [layer], mode="eval", dtype=torch.float64
    ) as opened:
        found = SNAPit().score(opened, [layer], batches)[name]
    assert (found >= 0).all()
    return layer.reduce(found)


def gate_scores(model: TinyModel, module: nn.Module, units: int, *, before: bool = False) -> Tensor:
    """Gradients of the loss by a gate of ones on what a layer gives, or what it gets."""
    gate = torch.ones(units, requires_grad=True, dtype=torch.float64)

    def through(value: Tensor) -> Tensor:
        return value * gate.view([-1 if dim == 1 else 1 for dim in range(value.ndim)])

    if before:
        hook = module.register_forward_pre_hook(lambda _, given: (through(given[0]),))
    else:
        hook = module.register_forward_hook(lambda _, given, out: through(out))
    total = torch.zeros_like(gate)
    for x, y in Batches(3):
        (grad,) = torch.autograd.grad(model.loss((x.double(), y)), gate)
        total += grad / 3
    hook.remove()
    return total.abs()


@pytest.mark.parametrize("kind", LAYERS)
def test_scores_of_filters_are_the_gradients_of_gates(kind: str) -> None:
    torch.manual_seed(0)
    build, layout = LAYERS[kind]
    module = build()
    model = make(module)
    expected = gate_scores(model, module, 6)
    found = unit_scores(model, module, layout, Rows())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert found.unique().numel() == 6


def test_scores_of_neurons_are_the_gradients_of_gates() -> None:
    torch.manual_seed(0)
    model = make(nn.Conv2d(4, 6, 3))
    assert isinstance(model.net, nn.Sequential)
    for place, units in ((6, 5), (8, 4)):
        module = model.net[place]
        expected = gate_scores(model, module, units)
        found = unit_scores(model, module, Layout(), Rows())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_scores_of_inputs_are_the_gradients_of_gates_before_the_layer() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3)
    model = make(module)
    expected = gate_scores(model, module, 4, before=True)
    found = unit_scores(model, module, Layout(), Columns())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_normalisation_by_the_batch_undoes_the_gates() -> None:
    start = TinyModel()
    layers = [
        Layer(n, p.detach(), torch.ones_like(p, dtype=torch.bool), structure=Rows())
        for n, p in start.named_parameters()
        if n in ("net.0.weight", "net.5.weight")
    ]

    def largest(mode: Any) -> list[float]:
        with ModelView(quiet_trainer([]), start).open(layers, mode=mode) as opened:
            found = SNAPit(mode=mode).score(opened, layers, list(Batches(2)))
        return [float(layer.reduce(found[layer.name]).max()) for layer in layers]

    train, evaluated = largest("train"), largest("eval")
    assert train[0] < 1e-5 < 1e-3 < evaluated[0]
    assert min(train[1], evaluated[1]) > 1e-3


# SNAP-it: what is pruned ------------------------------------------------------------


def test_whole_neurons_of_all_layers_but_the_last() -> None:
    result = fit([SNAPit(0.25, data=Batches(2))])
    assert list(result.masks) == ["net.0.weight", "net.5.weight"]
    for mask in result.masks.values():
        rows = mask.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
    assert sum(neurons(result)) == round(0.25 * (8 + 16))
    assert int((result.weights["net.7.weight"] == 0).sum()) == 0


def test_every_layer_keeps_a_neuron() -> None:
    result = fit([SNAPit(2 / 24, data=Batches(2))])
    assert neurons(result) == [1, 1]
    with pytest.raises(ValueError, match="^SNAPit: 1 live units are too few for 2 layers"):
        fit([SNAPit(1 / 24, data=Batches(2))])


def test_biases_and_what_reads_a_pruned_neuron_stay() -> None:
    start = fit([], max_epochs=0).model.state_dict()
    result = fit([SNAPit(0.25, data=Batches(2))], lambda: TinyModel(optimizer=still), max_epochs=1)
    for name, value in result.weights.items():
        if name in result.masks:
            assert torch.equal(value, start[name] * result.masks[name])
        elif not name.startswith("net.1."):  # the batch normalisation gathers statistics
            assert torch.equal(value, start[name])


def test_rounds_are_of_neurons() -> None:
    live = []

    class Watched(SNAPit):
        def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
            live.append(sum(layer.live for layer in layers))
            return super().score(opened, layers, batches)

    fit([Watched(0.1, data=Batches(2), halvings=2)])
    # of 24: densities 0.5, 0.3 and 0.2, and then 0.1
    assert live == [24, 12, 7, 5]


def test_single_weights_are_those_of_snip_it() -> None:
    plain = fit([SNIPit(0.1, data=Batches(2))])
    gates = fit([SNAPit(0.1, data=Batches(2), exclude=(), structure=Unstructured())])
    gates.assert_equal(plain)


def test_summing_signs_is_not_summing_sizes() -> None:
    sizes = fit([SNIPit(0.25, data=Batches(2), exclude="net.7", structure=Rows())])
    signs = fit([SNAPit(0.25, data=Batches(2))])
    assert sum(neurons(sizes)) == sum(neurons(signs))
    assert sizes.history != signs.history
