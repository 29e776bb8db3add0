"""FLOPs against hand-computed numbers and torch's own counter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparsity import flops as module
from lightning_sparsity.flops import FlopCounter, Flops, is_compiled


def count(model, *inputs, samples=1, call=None, names=None):
    """Count one forward and backward pass over the weights of ``model``."""
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    counter = FlopCounter({n: weights[n] for n in names or weights})
    with counter:
        (call or model)(*inputs).sum().backward()
    return counter.per_sample(samples)


def torch_total(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (3, 5), 2 * 5 * 7),
        (nn.Linear(5, 7, bias=False), (3, 5), 2 * 5 * 7),
        (nn.Linear(5, 7), (3, 4, 5), 2 * 5 * 7 * 4),
        (nn.Linear(5, 7, bias=False), (3, 4, 5), 2 * 5 * 7 * 4),
        (nn.Conv1d(4, 6, 3), (3, 4, 10), 2 * 4 * 3 * 6 * 8),
        (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5), 2 * 4 * 9 * 6 * 25),
        (nn.Conv2d(4, 6, 3, stride=2), (3, 4, 7, 7), 2 * 4 * 9 * 6 * 9),
        (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5), 2 * 2 * 9 * 6 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5), 2 * 9 * 4 * 9),
        (nn.Conv3d(2, 3, 2), (3, 2, 3, 3, 3), 2 * 2 * 8 * 3 * 8),
        (nn.ConvTranspose2d(4, 6, 3), (3, 4, 5, 5), 2 * 4 * 9 * 6 * 25),
    ],
)
def test_layers_by_hand(layer, shape, expected):
    found = count(layer, torch.randn(shape), samples=shape[0])
    assert found.layers == {"weight": expected}
    assert found.dense == expected == torch_total(layer, torch.randn(shape)) / shape[0]
    assert not found.unknown


def test_a_network_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))
    x = torch.randn(6, 1, 6, 6)
    found = count(net, x, samples=6)
    assert found.layers == {"0.weight": 2 * 9 * 8 * 16, "3.weight": 2 * 128 * 4}
    assert found.other == 0
    assert found.dense == torch_total(net, x) / 6


def test_what_is_not_sparse_counts_as_other():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = count(net, torch.randn(2, 4), samples=2, names=["2.weight"])
    assert found == Flops({"2.weight": 48.0}, other=64.0)


def test_attention_reads_slices_of_one_parameter():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    found = count(attention, x, samples=3, call=lambda x: attention(x, x, x, need_weights=False)[0])
    assert found.layers == {"in_proj_weight": 2 * 5 * 8 * 24, "out_proj.weight": 2 * 5 * 8 * 8}
    assert found.other == 2 * (2 * 5 * 5 * 8)  # queries by keys, probabilities by values
    assert not found.unknown


def test_encoder_agrees_with_torch():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = count(encoder, x)
        with FlopCounterMode(display=False) as counter:
            encoder(x)
    assert found.dense == counter.get_total_flops()
    assert set(found.layers) == {n for n, p in encoder.named_parameters() if p.ndim > 1}


def test_casts_and_products_of_the_weight_are_the_weight():
    layer = nn.Linear(5, 7)
    mask = torch.rand(7, 5) > 0.5
    x = torch.randn(2, 5)

    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    for call in (
        autocast,
        lambda x: F.linear(x, layer.weight * mask),
        lambda x: x @ layer.weight.T,
    ):
        assert count(layer, x, samples=2, call=call).layers == {"weight": 70.0}


def test_shared_weights_count_every_use():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert count(net, torch.randn(1, 4)).layers == {"0.weight": 64.0}


def test_embeddings_are_lookups():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    found = count(net, torch.tensor([[1, 2, 3]]))
    assert found == Flops({"0.weight": 0.0, "1.weight": 48.0})


def test_an_operation_on_two_sparse_weights_counts_as_other():
    net = nn.ParameterDict({"a": torch.randn(3, 4), "b": torch.randn(4, 5)})
    found = count(net, call=lambda: net["a"] @ net["b"])
    assert found.other == 2 * 3 * 4 * 5
    assert found.unknown == "no countable operation read a and 1 more in the first batch"


def test_a_gradient_inside_the_forward_pass_is_not_counted():
    layer = nn.Linear(4, 4)

    def slope(x):
        loss = layer(x).square().sum()
        return torch.autograd.grad(loss, layer.weight, create_graph=True)[0]

    assert count(layer, torch.randn(2, 4), samples=2, call=slope).dense == 32


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_in_the_backward_pass_is_not_counted(reentrant):
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    found = count(layer, x, call=lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert found.dense == 64


def test_what_is_never_read_is_unknown():
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.LSTM(2, 2)])
    found = count(net, torch.randn(1, 2), call=net[0])
    assert found.layers == {"0.weight": 8.0}
    assert found.unknown == "no countable operation read 1.weight and 2 more in the first batch"
    assert "no countable operation was seen" in FlopCounter({}).per_sample(1).unknown


def test_parameters_in_one_storage_are_unknown():
    whole = torch.randn(8, 4)
    counter = FlopCounter({"a": whole[:4], "b": whole[4:]})
    with counter:
        torch.randn(2, 4) @ whole[:4]
    assert counter.per_sample(1).unknown.startswith("no countable operation read a")


def test_a_formula_that_fails_disturbs_nothing(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no formula")

    monkeypatch.setitem(module._FORMULAS, torch.ops.aten.addmm, broken)
    layer = nn.Linear(2, 2)
    found = count(layer, torch.randn(1, 2))
    assert layer.weight.grad is not None
    assert found.unknown == "aten.addmm.default could not be counted (no formula)"


def test_nothing_is_counted_when_switched_off():
    counter = FlopCounter({})
    with counter:
        counter.counting = False
        torch.randn(2, 2) @ torch.randn(2, 2)
    assert not counter.found


def test_counting_changes_no_bit():
    def run(counted):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(64, 4))
        x = torch.randn(2, 1, 6, 6)
        if counted:
            count(net, x)
        else:
            net(x).sum().backward()
        return [p.grad for p in net.parameters()] + [torch.rand(1)]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.slow
def test_compiled_functions_stay_compiled():
    from torch._dynamo.testing import CompileCounterWithBackend

    net = nn.Linear(4, 4)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net.forward, backend=backend)
    x = torch.randn(2, 4)
    with FlopCounter({"weight": net.weight}):
        compiled(x).sum().backward()
    compiled(x).sum().backward()
    assert backend.frame_count == 1
    torch.compiler.reset()


def test_is_compiled():
    plain = nn.Sequential(nn.Linear(2, 2))
    assert not is_compiled(plain)
    assert is_compiled(nn.Sequential(torch.compile(plain, backend="eager")))
    plain[0].compile(backend="eager")
    assert is_compiled(plain)


def test_formulas():
    flops = Flops({"a": 100.0, "b": 50.0}, other=10.0)
    densities = {"a": 0.1, "b": 0.5}
    assert flops.dense == 160
    assert flops.inference(densities) == 10 + 25 + 10
    # One training step of RigL with an update: 2 sparse passes and a dense one.
    sparse, dense = flops.inference(densities), flops.dense
    step = 3 * sparse + flops.off_mask(densities, ["a", "b"])
    assert step == 2 * sparse + dense
    assert flops.off_mask(densities, ["b"]) == 25
