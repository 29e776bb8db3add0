"""Compressed models: the same outputs, the same interface, and an honest choice."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lightning_sparsity
from lightning_sparsity import RigL, compress
from lightning_sparsity.export import (
    CompressedConv,
    CompressedLinear,
    compression,
    compression_of,
    products,
)
from lightning_sparsity.export.layers import block_side, groups_above_two
from lightning_sparsity.export.timing import race
from lightning_sparsity.testing import TinyModel, fit

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(compression, "_SECONDS", 1e-3)


@pytest.fixture
def csr_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    _times(monkeypatch, {"dense": 3.0, "csr": 1.0, "bsr": 2.0})


def _times(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Have measurements find these times."""

    def race(runs: Any, device: torch.device, budget: float) -> list[float]:
        layers = [run.func for run in runs]
        return [seconds[getattr(layer, "layout", "dense")] for layer in layers]

    monkeypatch.setattr(compression, "race", race)


def pruned(model: nn.Module, density: float = 0.2) -> nn.Module:
    """The model with weights of all its layers set to zero."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            live = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name)))
            weight.data.mul_(live < density)
    return model


def blocks(rows: int, columns: int, side: int) -> Tensor:
    live = (torch.rand(rows // side, columns // side) < 0.4).float()
    live[0, 0] = 1
    return live.repeat_interleave(side, 0).repeat_interleave(side, 1)


def mlp() -> nn.Sequential:
    return pruned(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8)))  # type: ignore[return-value]


def assert_same(compressed: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
        found = compressed(*inputs)
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


# Layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 3, 32), (0, 32)])
@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_linear_layers_compute_the_same(layout: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(32, 16, bias=bias)
    layer.weight.data.mul_(blocks(16, 32, 4))
    compressed = CompressedLinear(layer, layout)
    assert_same(compressed, layer, torch.randn(shape))
    assert torch.equal(compressed.weight, layer.weight)
    assert (compressed.in_features, compressed.out_features) == (32, 16)
    assert sum(p.numel() for p in compressed.parameters()) < layer.weight.numel()


def test_a_layer_without_live_weights_gives_its_bias() -> None:
    layer = nn.Linear(8, 3)
    layer.weight.data.zero_()
    assert_same(CompressedLinear(layer, "csr"), layer, torch.randn(5, 8))
    assert torch.equal(CompressedLinear(layer, "csr").weight, layer.weight)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 8, 3, stride=2, padding=1), (3, 4, 9)),
    "2d": (nn.Conv2d(4, 8, 3, padding=1), (3, 4, 6, 5)),
    "3d": (nn.Conv3d(4, 8, (1, 2, 3), padding=(0, 1, 2)), (2, 4, 3, 4, 5)),
    "1x1": (nn.Conv2d(4, 8, 1), (3, 4, 6, 5)),
    "1x1, stride": (nn.Conv2d(4, 8, 1, stride=(2, 3)), (3, 4, 6, 7)),
    "stride": (nn.Conv2d(4, 8, 3, stride=(1, 2), bias=False), (3, 4, 6, 7)),
    "dilation": (nn.Conv2d(4, 8, 3, dilation=(2, 1), padding=(2, 0)), (3, 4, 6, 7)),
    "same, lopsided": (nn.Conv2d(4, 8, (2, 4), padding="same"), (3, 4, 6, 7)),
    "valid": (nn.Conv2d(4, 8, 3, padding="valid"), (3, 4, 6, 7)),
    "reflect": (nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect"), (3, 4, 6, 7)),
    "circular": (nn.Conv1d(4, 8, 3, padding=2, padding_mode="circular"), (3, 4, 7)),
    "groups": (nn.Conv2d(8, 12, 3, groups=4), (3, 8, 6, 7)),
    "each channel": (nn.Conv2d(8, 16, 3, groups=8), (3, 8, 6, 7)),
    "one sample": (nn.Conv2d(4, 8, 3), (4, 6, 7)),
    "no sample": (nn.Conv2d(4, 8, 3), (0, 4, 6, 7)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_convolutions_compute_the_same(
    case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CHUNK", chunk)
    layer, shape = CONVOLUTIONS[case]
    pruned(layer, 0.3)
    compressed = CompressedConv(layer, "csr")
    assert_same(compressed, layer, torch.randn(shape))
    assert torch.equal(compressed.weight, layer.weight)
    assert (compressed.kernel_size, compressed.padding) == (layer.kernel_size, layer.padding)


def test_convolutions_take_channels_last_and_other_views() -> None:
    layer = pruned(nn.Conv2d(4, 8, 3, padding=1))
    compressed = CompressedConv(layer, "csr")
    x = torch.randn(3, 4, 6, 5)
    assert_same(compressed, nn.Sequential(layer, nn.Identity()), x)
    for view in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x[::2, :, 1:]):
        torch.testing.assert_close(compressed(view), layer(view).detach())


def test_blocks_of_a_convolution_are_found() -> None:
    layer = nn.Conv2d(8, 8, 3)
    live = torch.rand(2, 2, 3, 3) < 0.4
    layer.weight.data.mul_(live.repeat_interleave(4, 0).repeat_interleave(4, 1))
    compressed = CompressedConv(layer, "bsr")
    assert compressed.values.shape == (int(live.sum()), 4, 4)
    assert torch.equal(compressed.weight, layer.weight)
    assert_same(compressed, layer, torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_largest_blocks_are_found(side: int) -> None:
    matrix = blocks(64, 32, side) * torch.randn(64, 32)
    matrix[0, 0] = 0  # a regrown weight
    assert block_side(matrix) == side


def test_rows_and_columns_that_are_no_multiple_have_no_blocks() -> None:
    assert block_side(torch.ones(30, 32)) == 0


def test_zeros_are_skipped_also_where_the_input_is_infinite() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[0.0, 2.0]]))
    assert CompressedLinear(layer, "csr")(torch.tensor([float("inf"), 3.0])) == 6


def test_gradients_are_refused() -> None:
    compressed = compress(mlp(), torch.randn(2, 12), "csr")
    assert not compressed(torch.randn(2, 12)).requires_grad
    x = torch.randn(2, 12, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"CompressedLinear: the input wants a gradient.*no_grad"
    ):
        compressed(x)
    with torch.no_grad():
        compressed(x)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 1)], ids=["linear", "conv"])
def test_autocast_gives_its_dtype_and_computes_in_that_of_the_weights(layer: nn.Module) -> None:
    pruned(layer, 0.5)
    x = torch.randn(6, 6, 6)
    compressed = compress(layer, x, "csr")
    exact = compressed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compressed(x.bfloat16().float())
        assert compressed(x.bfloat16()).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.02)


def test_under_autocast_it_is_compared_with_what_autocast_computes() -> None:
    model = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compressed = compress(model, torch.randn(3, 12), "csr")
        assert compressed(torch.randn(3, 12)).dtype == torch.bfloat16
    assert compression_of(compressed).layouts == {"0": "csr", "2": "csr"}


# Models


class Everything(nn.Module):
    """What a copy and a forward pass must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = pruned(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.last = self.fc(x)
        x.zero_()
        return self.drop(self.norm(self.last)) * scale + (0 if shift is None else shift)


def test_the_model_the_example_and_random_numbers_are_left_alone() -> None:
    model = Everything()
    model(torch.randn(4, 6))
    assert not model.last.is_leaf
    before, last = copy.deepcopy(model.state_dict()), model.last
    example, random = torch.ones(4, 6), torch.get_rng_state()
    compressed = compress(model, example, "csr")
    assert model.training
    assert isinstance(model.fc, nn.Linear)
    assert all(p.requires_grad for p in model.parameters())
    assert model.last is last
    assert model.seen == compressed.seen == [4]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert example.all()
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(vars(layer).get("forward") for layer in model.modules())


def test_the_copy_is_of_the_same_class_frozen_and_in_evaluation_mode() -> None:
    compressed = compress(Everything(), torch.randn(4, 6), "csr")
    assert type(compressed) is Everything
    assert isinstance(compressed.fc, CompressedLinear)
    assert not any(module.training for module in compressed.modules())
    assert not any(p.requires_grad for p in compressed.parameters())


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_examples_are_given_as_the_model_takes_them(kind: str) -> None:
    x = torch.ones(3, 6)
    examples: dict[str, Any] = {
        "tensor": x,
        "tuple": (x, 2.0),
        "dict": {"x": x, "shift": torch.ones(6)},
    }
    found = compression_of(compress(Everything(), examples[kind], "csr"))
    assert found.layouts == {"fc": "csr"}


def test_a_layer_alone_is_a_model() -> None:
    layer = pruned(nn.Linear(6, 5))
    compressed = compress(layer, torch.randn(2, 6), "csr")
    assert_same(compressed, layer, torch.randn(3, 6))
    assert "(the model)" in str(compression_of(compressed))


def test_other_shapes_than_the_example_work() -> None:
    model = mlp()
    compressed = compress(model, torch.randn(2, 12), "csr")
    for shape in ((12,), (1, 12), (9, 12), (2, 5, 12)):
        assert_same(compressed, model, torch.randn(shape))


def test_a_layer_in_two_places_is_replaced_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pruned(nn.Linear(6, 6))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    model.also = [layer]  # no submodule
    _times(monkeypatch, {"dense": 3.0, "csr": 1.0})
    compressed = compress(model, torch.randn(2, 6))
    assert isinstance(compressed[0], CompressedLinear)
    assert compressed[0] is compressed[2]
    assert compressed.also == [compressed[0]]
    (choice,) = compression_of(compressed).layers
    assert choice.seconds == {"dense": 6.0, "csr": 2.0}  # it is called twice
    assert_same(compressed, model, torch.randn(2, 6))


def test_inference_mode_leaves_no_inference_tensors() -> None:
    with torch.inference_mode():
        compressed = compress(mlp(), torch.randn(2, 12), "csr")
    assert not any(value.is_inference() for value in compressed.state_dict().values())


def test_a_trained_lightning_module_needs_no_trainer() -> None:
    class Model(TinyModel):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch)

    model = fit([RigL(density=0.2, update_interval=4)], Model, max_epochs=1).model
    compressed = compress(model, torch.randn(8, 1, 6, 6), "csr")
    assert isinstance(compressed, Model)
    assert compressed._trainer is None
    assert model._trainer is not None
    assert isinstance(compressed.net[5], CompressedLinear)
    assert_same(compressed, model, torch.randn(5, 1, 6, 6))
    batches = torch.utils.data.DataLoader(torch.randn(4, 1, 6, 6), batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    first, _ = trainer.predict(compressed, batches)  # type: ignore[misc]
    assert first.shape == (2, 4)


# The choice


@pytest.mark.usefixtures("csr_wins")
def test_auto_takes_the_fastest() -> None:
    model = mlp()
    compressed = compress(model, torch.randn(2, 12))
    found = compression_of(compressed)
    assert found.layouts == {"0": "csr", "2": "csr"}
    assert [choice.seconds for choice in found.layers] == [{"dense": 3.0, "csr": 1.0}] * 2
    assert_same(compressed, model, torch.randn(2, 12))


@pytest.mark.parametrize(
    ("csr", "bsr", "fastest"), [(1.0, 0.5, "bsr"), (0.5, 1.0, "csr"), (0.96, 2.0, "dense")]
)
def test_dense_stays_where_it_is_as_fast(
    csr: float, bsr: float, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _times(monkeypatch, {"dense": 1.0, "csr": csr, "bsr": bsr})
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data.mul_(blocks(16, 16, 4))
    found = compression_of(compress(model, torch.randn(2, 16)))
    assert found.layouts == {"0": fastest}
    told = "0 is dense: csr takes 960 ms, bsr takes 2.00 s."
    assert (told in str(found)) == (fastest == "dense")


def test_what_was_measured_decides() -> None:
    choices = compression_of(compress(mlp(), torch.randn(2, 12))).layers
    for choice in choices:
        assert choice.seconds.keys() == {"dense", "csr"}
        assert all(0 < seconds < 1 for seconds in choice.seconds.values())
        bound = 0.95 * choice.seconds["dense"]
        assert (choice.layout == "csr") == (choice.seconds["csr"] <= bound)


def test_a_race_finds_the_shortest_times() -> None:
    x = torch.randn(200, 200)
    calls = []

    def slow() -> None:
        calls.append(1)
        for _ in range(20):
            x @ x

    fast, slower = race([lambda: x @ x, slow], torch.device("cpu"), 0.02)
    assert 0 < fast < slower
    assert len(calls) >= 5
    calls.clear()
    race([slow], torch.device("cpu"), 0.0)
    assert len(calls) < 20  # a function that takes longer than the time there is


def test_every_input_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = pruned(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc(x[:1]) + self.fc(input=x[:1])

    measured: list[tuple[int, ...]] = []

    def race(runs: Any, device: torch.device, seconds: float) -> list[float]:
        measured.extend({tuple(run.args[0].shape) for run in runs if len(run.args) == 1})
        return [1.0 for _ in runs]

    monkeypatch.setattr(compression, "race", race)
    (choice,) = compression_of(compress(Twice(), torch.randn(5, 6), "csr")).layers
    assert measured == [(5, 6), (1, 6)]
    assert choice.seconds == {"dense": 3.0, "csr": 3.0}


def test_the_report_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    _times(monkeypatch, {"dense": 0.004, "csr": 0.001, "bsr": 0.002})
    model = nn.Sequential(nn.Linear(100, 100), nn.LSTM(100, 1))
    model[0].weight.data.fill_(1).tril_(-80)
    model[1].weight_ih_l0.data[:, 1:] = 0
    model[1].weight_hh_l0.data.fill_(1)
    report = compression_of(compress(model, torch.randn(4, 100)))
    assert re.sub("-+", "-", str(report).replace(" ", "")) == (
        "layer|shape|density|layout|timedense|now|bytesdense|now\n"
        "-\n"
        "0|100x100|0.0210|csr|4.00ms|1.00ms|40.0kB|2.08kB\n"
        "1.weight_ih_l0|4x100|0.0100|dense|||1.60kB|1.60kB\n"
        "-\n"
        "wholemodel||||4.00ms|4.00ms|41.6kB|3.68kB\n"
        "1.weight_ih_l0isdense:LSTMisnoneofLinear,Conv1d,Conv2d,Conv3d."
    )
    assert report.layers[0].bytes == 210 * 8 + 101 * 4
    assert report.layouts == {"0": "csr"}


def test_weights_with_few_zeros_are_none_of_its_business() -> None:
    model = pruned(nn.Sequential(nn.Linear(50, 50)), 0.9)
    assert compression_of(compress(model, torch.randn(2, 50), "csr")).layers == ()
    by_name = compress(model, torch.randn(2, 50), {"0": "csr"})
    assert compression_of(by_name).layouts == {"0": "csr"}


def test_layouts_are_given_by_name_and_again() -> None:
    model = mlp()
    once = compress(model, torch.randn(2, 12), {"0": "csr", "2": "dense"})
    assert compression_of(once).layouts == {"0": "csr", "2": "dense"}
    again = compress(model, torch.randn(2, 12), compression_of(once).layouts)
    again.load_state_dict(once.state_dict())
    assert type(again[2]) is nn.Linear
    assert compression_of(compress(model, torch.randn(2, 12), "dense")).seconds > 0


def test_what_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _times(monkeypatch, {"dense": 3.0, "csr": 1.0})
    right = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: right(*args) + 0.1)
    report = compression_of(compress(mlp(), torch.randn(2, 12)))
    assert report.layouts == {"0": "dense", "2": "dense"}
    assert "0 is dense: no csr: torch computes something else with it here." in str(report)


def test_what_torch_cannot_do_stays_dense_and_cannot_be_forced() -> None:
    model = mlp().to(torch.bfloat16)
    x = torch.randn(2, 12, dtype=torch.bfloat16)
    try:
        CompressedLinear(model[0], "csr")(x)
    except RuntimeError:
        assert "0 is dense: no csr: " in str(compression_of(compress(model, x)))
        with pytest.raises(ValueError, match=r"not possible for 2 of the layers.*\n0: .*\n2: "):
            compress(model, x, "csr")
    else:
        pytest.skip("this torch multiplies sparse matrices of bfloat16 on a CPU")


# What stays dense


class OwnLinear(nn.Linear):
    pass


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    return layer


def with_other_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) + 3  # type: ignore[method-assign]
    return layer


def unused() -> nn.Module:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.head = nn.Linear(6, 6)

    return Unused()


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied": (tied, "0 is dense: 0.weight and 1.weight are one weight."),
    "hooked": (hooked, "(the model) is dense: it has hooks."),
    "other forward": (with_other_forward, "(the model) is dense: its forward method was"),
    "unused": (unused, "head is dense: the example does not reach it"),
    "own class": (lambda: OwnLinear(6, 6), "weight is dense: OwnLinear is none of Linear"),
    "transposed": (lambda: nn.ConvTranspose1d(6, 2, 1), "weight is dense: ConvTranspose1d is none"),
    "recurrent": (lambda: nn.GRU(6, 6), "weight_ih_l0 is dense: GRU is none of Linear"),
    "pruned by torch": (
        lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", 30),
        "is dense: its weight is computed by a hook (after pruning with torch, prune.remove",
    ),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        "parametrizations.weight.original1 is dense: ParametrizationList is none of",
    ),
}


@pytest.mark.parametrize("case", STAY)
def test_stays_dense_with_the_reason(case: str) -> None:
    make, reason = STAY[case]
    model = pruned(make(), 0.4)
    x = torch.randn(6, 6)
    compressed = compress(model, x, "csr")
    assert reason in str(compression_of(compressed))
    assert compression_of(compressed).layouts == {}
    expected, found = model(x), compressed(x)
    assert torch.equal(*(out[0] if isinstance(out, tuple) else out for out in (expected, found)))


def test_a_weight_tied_to_an_embedding_stays_dense_and_tied() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    compressed = compress(pruned(model), torch.arange(5), "csr")
    assert compressed[0].weight is compressed[1].weight
    assert "1 is dense: 0.weight and 1.weight are one weight." in str(compression_of(compressed))


def test_a_fused_operation_gets_the_weight_that_it_reads() -> None:
    model = pruned(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    fused = compression_of(compress(model, x, "csr"))
    assert "linear1 is dense: the example does not reach it, or a fused" in str(fused)
    assert "self_attn.in_proj_weight is dense: MultiheadAttention is none" in str(fused)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compressed = compress(model, x, "csr")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert compression_of(compressed).layouts == {"linear1": "csr", "linear2": "csr"}
    assert_same(compressed, model, x)


# Refusals


def test_blocks_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layout='bsr'.*2 of the layers.*\n0: its zeros do not"):
        compress(mlp(), torch.randn(2, 12), "bsr")


def test_layers_are_named_that_break_the_two_of_four_pattern() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    for layer in model:
        layer.weight.data.fill_(0)
        layer.weight.data[:, :2] = 1
    model[0].weight.data[:2, :3] = 1
    message = (
        r"3 of the layers.*\n0: 2 of 8 groups of 4 inputs.*\n1: it needs a CUDA .*\n2: .*linear"
    )
    with pytest.raises(ValueError, match=message):
        compress(model, torch.randn(4, 8), "semi_structured")


def test_the_pattern_runs_along_the_inputs_of_a_kernel_too() -> None:
    weight = torch.zeros(2, 4, 3)
    weight[:, :2] = 1
    assert groups_above_two(weight) == ""
    weight[0, 2, 1] = 1
    assert groups_above_two(weight).startswith("1 of 6 groups")
    assert groups_above_two(weight[:, :3]) == "its 3 inputs are no multiple of 4"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("coo", r"compress\(layout='coo'\): layouts are auto, dense, csr, bsr, semi_structured"),
        ({"0": "fast"}, r"compress\(layout='fast'\)"),
        ({"5": "csr"}, r"layout=\{'5': ...\}\): there is no such .* layer; there are 0, 2\."),
        ({"0": "bsr"}, r"1 of the layers; give these another layout by name"),
    ],
    ids=str,
)
def test_layouts_that_do_not_exist_or_fit_are_refused(layout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(mlp(), torch.randn(2, 12), layout)


def test_a_layer_that_must_stay_dense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\n0: 0.weight and 1.weight are one weight$"):
        compress(pruned(tied()), torch.randn(2, 6), {"0": "csr"})


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"compress\(model=dict\)"):
        compress({}, torch.randn(1))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"compress\(layout=3\)"):
        compress(mlp(), torch.randn(2, 12), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compression_of\(Sequential\)"):
        compression_of(mlp())
    compiled = mlp()
    compiled.compile(backend="eager")
    for model in (compiled, torch.compile(mlp(), backend="eager")):
        with pytest.raises(ValueError, match="compile what comes out"):
            compress(model, torch.randn(2, 12))


# Saving, copying, exporting


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16, bias=False)
    )
    pruned(model)
    model[3].weight.data.normal_().mul_(blocks(16, 128, 8))
    return model


X = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
LAYOUTS = {"0": "csr", "3": "bsr"}


def test_the_state_dict_is_of_plain_tensors_and_loads_into_its_like() -> None:
    model = net()
    compressed = compress(model, X, LAYOUTS)
    state = compressed.state_dict()
    assert list(state) == [
        *("0.bias", "0.values", "0.crow", "0.columns", "3.values", "3.crow", "3.columns")
    ]
    assert all(type(v) is Tensor and v.layout == torch.strided for v in state.values())
    assert {state[key].dtype for key in ("0.crow", "0.columns")} == {torch.int32}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = net()
    other[0].weight.data = other[0].weight.data.flip(0)
    other[3].weight.data = other[3].weight.data.flip(1)
    copied = compress(other, X, LAYOUTS)
    assert copied[3].values.shape != compressed[3].values.shape
    copied.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(copied(X), compressed(X))
    with pytest.raises(RuntimeError, match="Missing key"):
        copied.load_state_dict(model.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "assign"])
def test_copies_are_independent_and_compute_the_same(how: str) -> None:
    compressed = compress(net(), X, LAYOUTS)
    expected = compressed(X)
    if how == "deepcopy":
        copied = copy.deepcopy(compressed)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(compressed))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(compressed, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = compress(net(), X, LAYOUTS)
        copied.load_state_dict(copy.deepcopy(compressed.state_dict()), assign=True)
    compressed[0].values.zero_()
    assert torch.equal(copied(X), expected)
    assert compression_of(copied).layouts == LAYOUTS


def test_dtypes_change_with_the_model() -> None:
    compressed = compress(net(), X, LAYOUTS)
    expected = compressed(X)
    compressed.double()
    assert compressed[0].crow.dtype == torch.int32
    torch.testing.assert_close(compressed(X.double()), expected.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_torch_export(tmp_path: Path) -> None:
    model = net()
    compressed = compress(model, X, LAYOUTS)
    program = torch.export.export(
        compressed, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for x in (X, torch.randn(7, 4, 4, 4)):
        torch.testing.assert_close(loaded(x), compressed(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"lightning_sparsity.linear.default", "lightning_sparsity.convolution.default"} <= names


@pytest.mark.slow
def test_torch_compile_without_graph_breaks() -> None:
    compressed = compress(net(), X, LAYOUTS)
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), compressed(X))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_operations_say_truly_what_they_give(name: str) -> None:
    layer = compress(net(), X, LAYOUTS)[3 if name == "linear" else 0]
    tensors = (layer.crow, layer.columns, layer.values, layer.bias)
    arguments: tuple[Any, ...] = (torch.randn(2, 128), *tensors, 128)
    if name == "convolution":
        arguments = (X, *tensors, [3, 3], [1, 1], [1, 1], [1, 1, 1, 1], "constant")
    torch.library.opcheck(
        getattr(torch.ops.lightning_sparsity, name).default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    page = (Path(lightning_sparsity.__file__).parents[1] / "docs" / "export.md").read_text()
    found = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(found) >= 3
    names: dict[str, object] = {}
    for block in found:
        exec(block, names)


# On a GPU


@pytest.mark.parametrize("layout", [pytest.param(x, marks=gpu) for x in ("csr", "bsr")])
def test_layouts_on_a_gpu(layout: str) -> None:
    layer = nn.Linear(128, 64, device="cuda")
    layer.weight.data.mul_(blocks(64, 128, 16).cuda())
    x = torch.randn(8, 128, device="cuda")
    compressed = compress(layer, x, layout)
    torch.testing.assert_close(compressed(x), layer(x).detach(), atol=1e-3, rtol=1e-3)
    moved = compressed.cpu()
    torch.testing.assert_close(moved(x.cpu()), layer.cpu()(x.cpu()).detach(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [pytest.param(x, marks=gpu) for x in ("float16", "bfloat16")])
def test_semi_structured_on_a_gpu(dtype: str) -> None:
    layer = nn.Linear(256, 128, device="cuda", dtype=getattr(torch, dtype))
    layer.weight.data.view(-1, 4)[:, 2:] = 0
    x = torch.randn(64, 256, device="cuda", dtype=layer.weight.dtype)
    compressed = compress(layer, x, "semi_structured")
    torch.testing.assert_close(compressed(x), layer(x).detach(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(compressed.weight, layer.weight.detach())
    assert all(type(value) is Tensor for value in compressed.state_dict().values())
    copied = copy.deepcopy(compressed)
    copied.load_state_dict(compressed.state_dict())
    assert torch.equal(copied(x), compressed(x))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_auto_on_a_gpu_measures_all_that_fits(device: str) -> None:
    layer = nn.Linear(256, 256, device=device, dtype=torch.float16)
    layer.weight.data.view(-1, 4)[:, 2:] = 0
    (choice,) = compression_of(compress(layer, torch.randn(64, 256, device=device).half())).layers
    assert {"dense", "semi_structured"} <= choice.seconds.keys()
