"""Layers that compute with compressed weights, against dense ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparsity.core.compressed import CompressedWeight, reason_to_stay_dense
from lightning_sparsity.core.stand_in import dense_weight

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def pair(make: Callable[[], nn.Module], density: float = 0.4) -> tuple[nn.Module, nn.Module]:
    """A layer with dense storage and the same one with compressed storage, in float64."""
    torch.manual_seed(0)
    dense = make().double()
    held = dense._parameters["weight"]
    assert held is not None
    mask = torch.rand(held.shape) < density
    held.data.mul_(mask)
    packed = copy.deepcopy(dense)
    compress([packed], mask)
    return dense, packed


def compress(modules: list[nn.Module], mask: Tensor) -> CompressedWeight:
    held = modules[0]._parameters["weight"]
    assert held is not None
    weight = CompressedWeight(held, mask)
    held.data = weight.compress(held.detach())
    weight.install(modules)
    return weight


def weight_of(layer: nn.Module) -> CompressedWeight:
    return vars(layer)["_stand_ins"]["weight"]  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (7, 6)),
    "linear, one example": (lambda: nn.Linear(6, 5), (1, 6)),
    "linear, one output": (lambda: nn.Linear(6, 1), (7, 6)),
    "linear, one input": (lambda: nn.Linear(1, 5), (7, 1)),
    "linear of a vector": (lambda: nn.Linear(6, 5), (6,)),
    "linear of sequences": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "linear of nothing": (lambda: nn.Linear(6, 5), (2, 0, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv1d, one example": (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "conv1d, stride and padding": (lambda: nn.Conv1d(3, 4, 4, stride=2, padding=1), (2, 3, 9)),
    "conv1d, dilation": (lambda: nn.Conv1d(3, 4, 2, dilation=3, padding="same"), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 7)),
    "conv2d, one example": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "conv2d, batch of one": (lambda: nn.Conv2d(3, 4, 3), (1, 3, 6, 7)),
    "conv2d, batch of none": (lambda: nn.Conv2d(3, 4, 3), (0, 3, 6, 7)),
    "conv2d, one place": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 3, 3)),
    "conv2d, oblong": (
        lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        (2, 3, 6, 7),
    ),
    "conv2d, even and same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 6, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 6, 7)),
    "conv2d 1x1, stride": (lambda: nn.Conv2d(3, 4, 1, stride=(2, 3), padding=1), (2, 3, 6, 7)),
    "conv2d 3x1": (lambda: nn.Conv2d(3, 4, (3, 1), stride=2), (2, 3, 6, 7)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=list(LAYERS))


@layers
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_outputs_and_gradients(
    make: Callable[[], nn.Module], shape: tuple[int, ...], density: float
) -> None:
    dense, packed = pair(make, density)
    weight = weight_of(packed)
    weight.record(True)
    inputs = torch.randn(shape, dtype=torch.float64)
    mine, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    out, right = packed(mine), dense(theirs)
    torch.testing.assert_close(out, right)
    assert out.is_contiguous()
    slope = torch.randn_like(right)
    out.backward(slope)
    right.backward(slope)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(
        weight.parameter.grad,
        weight.compress(dense.weight.grad),  # type: ignore[arg-type]
    )
    formed = weight.dense_gradient(lambda grad: grad)
    assert formed is not None
    torch.testing.assert_close(formed.formed(), dense.weight.grad)
    if dense.bias is not None:
        torch.testing.assert_close(packed.bias.grad, dense.bias.grad)  # type: ignore[union-attr]


@layers
def test_what_comes_out_may_be_changed_in_place(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    dense, packed = pair(make)
    inputs = torch.randn(shape, dtype=torch.float64)
    nn.ReLU(inplace=True)(packed(inputs)).square().sum().backward()
    nn.ReLU(inplace=True)(dense(inputs)).square().sum().backward()
    weight = weight_of(packed)
    torch.testing.assert_close(
        weight.parameter.grad,
        weight.compress(dense.weight.grad),  # type: ignore[arg-type]
    )


def test_a_chained_output_may_be_changed_in_place() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    weight_of(packed).is_chained = True
    out = packed(torch.randn(7, 6, dtype=torch.float64))
    assert out.t().is_contiguous()
    out.relu_().sum().backward()
    assert weight_of(packed).parameter.grad is not None


def test_inputs_go_in_by_name_too() -> None:
    for make, shape in (LAYERS["linear"], LAYERS["conv2d"]):
        dense, packed = pair(make)
        inputs = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(packed(input=inputs), dense(input=inputs))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 5), (7, 5)),
        (lambda: nn.Linear(6, 5), (7, 7)),
        (lambda: nn.Conv2d(3, 4, 3), (2, 2, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3), (2, 3, 2, 2)),
        (lambda: nn.Conv1d(3, 4, 1), (2, 4, 6)),
    ],
    ids=["narrow", "wide", "channels", "small", "1x1"],
)
def test_inputs_that_do_not_fit_are_an_error(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    for layer in pair(make):
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.randn(shape, dtype=torch.float64))


# autocast ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_autocast_computes_in_the_dtype_of_the_weight(name: str) -> None:
    make, shape = LAYERS[name]
    dense, packed = pair(make)
    dense.float()
    packed.float()
    inputs = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed(inputs)
        assert out.dtype == dense(inputs).dtype == torch.bfloat16
    torch.testing.assert_close(out, dense(inputs).bfloat16(), rtol=2**-7, atol=1e-6)


def test_autocast_leaves_float64_alone_as_it_does_in_dense_layers() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    inputs = torch.randn(7, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(inputs).dtype == torch.float64
        assert packed(inputs).dtype == torch.float64


def test_the_dense_gradient_is_formed_exactly_under_autocast() -> None:
    # manual optimization steps inside training_step, where autocast is on
    _, packed = pair(lambda: nn.Linear(6, 5))
    packed.float()
    weight = weight_of(packed)
    weight.record(True)
    packed(torch.randn(7, 6)).square().sum().backward()
    formed = weight.dense_gradient(lambda grad: grad)
    assert formed is not None
    right = formed.formed()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(formed.formed(), right)


# records ----------------------------------------------------------------------------


def test_records_add_up_until_they_are_forgotten() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    assert weight.dense_gradient(lambda grad: grad) is None
    weight.record(True)
    for _ in range(3):
        inputs = torch.randn(7, 6, dtype=torch.float64)
        packed(inputs).square().sum().backward()
        dense(inputs).square().sum().backward()
        weight.record(True)  # goes on
    formed = weight.dense_gradient(lambda grad: grad.mul_(2))
    assert formed is not None
    torch.testing.assert_close(formed.formed() / 2, dense.weight.grad)
    torch.testing.assert_close(formed.formed() / 2, dense.weight.grad)  # as often as asked
    weight.record(False)
    assert weight.dense_gradient(lambda grad: grad) is None
    torch.testing.assert_close(formed.formed() / 2, dense.weight.grad)  # what was given stays


def test_nothing_is_recorded_without_a_gradient() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    weight.record(True)
    with torch.no_grad():
        packed(torch.randn(7, 6, dtype=torch.float64))
    assert weight.dense_gradient(lambda grad: grad) is None


# following a mask -------------------------------------------------------------------


def test_values_follow_to_another_mask() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    before = weight.evaluated()
    old, new = before != 0, torch.rand(5, 6) < 0.5
    state = torch.randn(len(weight.parameter), dtype=torch.float64)
    spread = weight.expand(state)
    carried = weight.follow(new)
    weight.parameter.data = carried(weight.parameter.data)
    assert torch.equal(weight.evaluated(), before * new)
    assert torch.equal(weight.expand(carried(state)), spread * new * old)
    assert torch.equal(weight.pattern.positions, new.view(-1).nonzero().view(-1))


@pytest.mark.parametrize("many", [2, 3])
def test_a_graph_that_is_kept_over_a_change_of_length_does_no_harm(many: int) -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    kept = [packed(torch.randn(7, 6, dtype=torch.float64)).sum()]
    kept[0].backward()
    mask = torch.rand(5, 6) < 0.7
    weight.parameter.grad = None
    weight.parameter.data = weight.follow(mask)(weight.parameter.data)
    dense.weight.data.mul_(mask)
    for _ in range(many):
        inputs = torch.randn(7, 6, dtype=torch.float64)
        kept.append(packed(inputs).square().sum() + packed.weight.square().sum())
        kept[-1].backward()
        (dense(inputs).square().sum() + dense.weight.square().sum()).backward()
    torch.testing.assert_close(
        weight.parameter.grad,
        weight.compress(dense.weight.grad),  # type: ignore[arg-type]
    )


def test_a_gradient_hook_that_would_be_missed_is_an_error() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    kept = packed(torch.randn(7, 6, dtype=torch.float64)).sum()
    weight.parameter.data = weight.follow(torch.ones(5, 6, dtype=torch.bool))(weight.parameter.data)
    weight.parameter.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="changed its length .* Detach what is kept"):
        packed(torch.randn(7, 6, dtype=torch.float64))
    assert kept.isfinite()


# what others see --------------------------------------------------------------------


def test_the_weight_that_others_read_is_dense_and_differentiable() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    weight.record(True)
    seen = packed.weight
    assert torch.equal(seen, dense.weight)
    assert weight.reads == 1
    (seen - 1).square().sum().backward()
    (dense.weight - 1).square().sum().backward()
    torch.testing.assert_close(
        weight.parameter.grad,
        weight.compress(dense.weight.grad),  # type: ignore[arg-type]
    )
    formed = weight.dense_gradient(lambda grad: grad)
    assert formed is not None
    torch.testing.assert_close(formed.formed(), dense.weight.grad)


def _write_in_place(layer: Any) -> None:
    layer.weight += 1


def _write_data_in_place(layer: Any) -> None:
    layer.weight.data += 1


def _write_an_entry(layer: Any) -> None:
    layer.weight[0, 0] = 1


def _write_a_view(layer: Any) -> None:
    layer.weight.t()[0].zero_()


def _write_a_detached_one(layer: Any) -> None:
    layer.weight.detach().copy_(torch.ones(5, 6))


@pytest.mark.parametrize(
    "write",
    [
        _write_in_place,
        _write_data_in_place,
        _write_an_entry,
        _write_a_view,
        _write_a_detached_one,
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.data.fill_(0),
        lambda layer: layer.weight.view(-1).clamp_(0),
    ],
    ids=["+=", "data +=", "[]", "view", "detached", "init", "fill_", "clamp_"],
)
def test_it_cannot_be_written_to(write: Callable[[Any], None]) -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="kept compressed, and the dense tensor is a copy"),
    ):
        write(packed)
    assert torch.equal(weight_of(packed).evaluated(), dense.weight)


def test_what_is_computed_from_it_may_be_written_to() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    (packed.weight * 2).add_(1)
    packed.weight.clone().detach().zero_()


def test_the_layer_looks_like_any_other() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    assert repr(packed) == repr(dense)
    assert type(packed).__name__ == "Linear"
    assert isinstance(packed, nn.Linear)
    assert [name for name, _ in packed.named_parameters()] == ["weight", "bias"]
    assert packed._parameters["weight"] is weight_of(packed).parameter
    assert torch.equal(dense_weight(packed, "weight"), dense.weight)


def test_a_functional_call_computes_with_what_it_is_given() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    inputs, given = torch.randn(7, 6).double(), {"weight": torch.randn(5, 6).double()}
    right = torch.func.functional_call(dense, given, (inputs,))
    torch.testing.assert_close(torch.func.functional_call(packed, given, (inputs,)), right)


# files and copies -------------------------------------------------------------------


@layers
def test_files_hold_and_give_dense_weights(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    dense, packed = pair(make)
    saved = packed.state_dict()
    assert list(saved) == list(dense.state_dict())
    assert all(torch.equal(saved[key], value) for key, value in dense.state_dict().items())
    parameter = packed._parameters["weight"]
    packed.load_state_dict({key: value + 1 for key, value in saved.items()})
    assert packed._parameters["weight"] is parameter
    assert parameter is not None
    assert parameter.ndim == 1
    live = dense.weight != 0
    assert torch.equal(weight_of(packed).evaluated(), (saved["weight"] + 1) * live)  # type: ignore[operator]


def test_a_file_that_does_not_fit_leaves_the_weight_alone() -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    with pytest.raises(RuntimeError, match="size mismatch"):
        packed.load_state_dict({"weight": torch.zeros(4, 6), "bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({"bias": torch.zeros(5)})
    assert torch.equal(weight_of(packed).evaluated(), dense.weight)
    assert packed._parameters["weight"] is weight_of(packed).parameter


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_copies_are_plain_layers(how: str) -> None:
    dense, packed = pair(lambda: nn.Linear(6, 5))
    copied: Any = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    }[how](packed)
    assert type(copied) is nn.Linear
    assert isinstance(copied.weight, nn.Parameter)
    assert torch.equal(copied.weight, dense.weight)
    inputs = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(copied(inputs), packed(inputs))
    copied.weight.data.add_(1)
    assert torch.equal(weight_of(packed).evaluated(), dense.weight)


def test_removing_gives_the_class_back() -> None:
    _, packed = pair(lambda: nn.Linear(6, 5))
    weight = weight_of(packed)
    weight.remove()
    assert type(packed) is nn.Linear
    assert "_stand_ins" not in vars(packed)
    assert packed.weight is weight.parameter


# what stays dense -------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * 2


class Same(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(6, 5), None),
        (nn.Linear(6, 5).double(), None),
        (Same(6, 5), None),
        (nn.Conv1d(4, 4, 3), None),
        (nn.Conv2d(4, 4, 3, dilation=2), None),
        (Own(6, 5), "Own has no product with a compressed weight"),
        (nn.Conv3d(4, 4, 3), "Conv3d has no product"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d has no product"),
        (nn.Conv2d(4, 4, 3, groups=2), "its groups have a matrix each"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Linear(6, 5).bfloat16(), "torch has no products of compressed bfloat16 weights"),
        (nn.Linear(6, 5).half(), "torch has no products of compressed float16 weights"),
        (nn.Linear(6, 5).requires_grad_(False), "frozen"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value)[:12],
)
def test_reasons_to_stay_dense(module: nn.Module, reason: str | None) -> None:
    parameter = module._parameters["weight"]
    assert parameter is not None
    found = reason_to_stay_dense(module, parameter)
    assert found == reason if reason is None else (found or "").startswith(reason)
