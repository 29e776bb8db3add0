"""GraNet: how much lives at every update, where, and what grows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity import NM, GraNet, StaticSparse, cubic, erk, keep_dense, linear
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.method import Share
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import ManualModel, Result, fit

SIZE = 2184
ENDS = 110 / 160


def totals(result: Result) -> list[int]:
    return [sum(live.values()) for _, live in result.history]


def ramp(step: int, start: float = 0.5, end: float = 0.1, last: int = 24) -> int:
    return round(SIZE * cubic(start, end)(min(step / last / ENDS, 1.0)))


def layer(name: str, weight: Tensor, density: float, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[: round(density * len(mask))]] = True
    mask = mask.view(weight.shape)
    grad = torch.randn(weight.shape, generator=generator)
    return Layer(name, weight * mask, mask, grad=grad, generator=generator)


def two_layers(density: float = 0.5) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(2, 20, 30, generator=generator)
    return [layer("small", small, density, 1), layer("large", 3 * large, density, 2)]


def share_of(layers: Layers, **changes: Any) -> Share:
    names = tuple(layer.name for layer in layers)
    start = {layer.name: layer.live for layer in layers}
    sizes = (sum(layer.size for layer in layers),)
    return replace(Share(names, sizes, 0, False, start), **changes)


# how much ------------------------------------------------------------------------------


def test_the_density_follows_the_ramp_then_holds_while_weights_are_exchanged() -> None:
    result = fit([GraNet(0.1, update_interval=4)])
    live = totals(result)
    assert live[0] == round(0.5 * SIZE)
    for step in range(4, 25):
        assert live[step - 1] == ramp(step - step % 4)
    digests = [digest for digest, _ in result.history]
    changed = [step + 2 for step in range(23) if digests[step] != digests[step + 1]]
    assert changed == [4, 8, 12, 16, 20]  # nothing would train after step 24
    assert live[19] == live[16] == round(0.1 * SIZE)


def test_the_layers_drift_from_the_start() -> None:
    result = fit([GraNet(0.1, update_interval=4)])
    start, end = result.history[0][1], result.history[-1][1]
    assert [start[name] for name in start] == [72, 956, 64]  # ERK
    assert end["net.0.weight"] / 72 > end["net.5.weight"] / 2048
    assert end["net.7.weight"] < 64


@pytest.mark.parametrize("found", [0.4, 0.1])
def test_found_masks_are_where_the_ramp_begins(found: float) -> None:
    result = fit([StaticSparse(found), GraNet(0.1, update_interval=4)])
    live = totals(result)
    assert live[0] == round(found * SIZE)
    began = live[0] / SIZE
    for step in range(4, 25):
        assert live[step - 1] == ramp(step - step % 4, began)
    assert result.changes >= 5


def test_the_density_never_rises() -> None:
    with pytest.raises(MisconfigurationException, match=r"GraNet\(density=0.1\) only prunes"):
        fit([StaticSparse(0.05), GraNet(0.1)])


def test_every_optimizer_reaches_its_part() -> None:
    result = fit([GraNet(0.1, update_interval=4, update_end=24)], ManualModel)
    assert totals(result)[-1] == round(0.1 * SIZE)
    for step in range(4, 25):
        live = result.history[step - 1][1]
        assert sum(live.values()) == ramp(step - step % 4)
        assert live["net.0.weight"] == pytest.approx(sum(live.values()) * 72 / SIZE, abs=1)


@pytest.mark.parametrize("distribution", [erk, keep_dense(erk, ["net.7"])])
def test_the_distribution_is_only_that_of_the_start(distribution: Any) -> None:
    result = fit([GraNet(0.1, distribution=distribution, update_interval=2)])
    assert result.history[0][1]["net.7.weight"] == 64
    assert totals(result)[-1] == totals(result)[17] == round(0.1 * SIZE)
    assert result.history[-1][1]["net.7.weight"] < 64


def test_sums_are_exact_after_layers_have_drifted() -> None:
    callback = GraNet(0.1)
    layers: Layers = two_layers()
    share = share_of(layers)
    size = sum(share.sizes)
    for step in range(1, 40):
        trained = [replace(layer, weight=layer.weight + 0.1 * layer.mask) for layer in layers]
        layers = callback.update(trained, share, step / 40)
        wanted = cubic(0.5, 0.1)(min(step / 40 / ENDS, 1.0))
        assert sum(layer.live for layer in layers) == round(wanted * size)
        assert all(layer.live for layer in layers)
    assert layers[0].live != layers[1].live


def test_what_is_below_the_ramp_because_a_layer_was_left_out_stays() -> None:
    callback = GraNet(0.1)
    layers = two_layers(0.05)
    share = share_of(two_layers(0.5))
    after = callback.update([layers[0]], share, 0.9)
    assert after[0].live == layers[0].live
    layers[1] = replace(layers[1], weight=torch.zeros(20, 30))  # all just grown
    after = callback.update(layers, share, 0.9)
    assert [layer.live for layer in after] == [30, 30]


def test_dense_to_sparse() -> None:
    result = fit([GraNet(0.1, initial_density=1.0, update_interval=4)])
    assert totals(result)[:4] == [SIZE] * 3 + [ramp(4, 1.0)]
    assert totals(result)[-1] == round(0.1 * SIZE)


def test_another_ramp_and_another_end() -> None:
    result = fit([GraNet(0.1, ramp=linear, prune_end=1.0, update_interval=6)])
    live = [totals(result)[step - 1] for step in (6, 12, 18, 24)]
    assert live == [round(SIZE * density) for density in (0.4, 0.3, 0.2, 0.1)]


@pytest.mark.filterwarnings("ignore:GraNet goes to its density in a single update")
def test_a_training_shorter_than_the_interval_arrives() -> None:
    result = fit([GraNet(0.1)])
    assert totals(result)[-2:] == [round(0.5 * SIZE), round(0.1 * SIZE)]


def test_patterns_get_sparser_group_by_group() -> None:
    pattern = NM(1, 4)
    result = fit([GraNet(structure=pattern, exclude="net.0", update_interval=4)])
    start, end = result.history[0][1], result.history[-1][1]
    assert start == {"net.5.weight": 1024, "net.7.weight": 32}
    assert end == {"net.5.weight": 512, "net.7.weight": 16}
    assert result.changes >= 5
    for mask in result.masks.values():
        assert (pattern.group(mask, Layout()).sum(1) == 1).all()


# where ----------------------------------------------------------------------------------


def test_the_smallest_weights_of_the_whole_network_go() -> None:
    layers = two_layers()
    after = GraNet(0.1, drop_fraction=0.0).update(layers, share_of(layers), 0.5)
    kept = [x for old, new in zip(layers, after, strict=True) for x in old.weight[new.mask].abs()]
    gone = [
        x
        for old, new in zip(layers, after, strict=True)
        for x in old.weight[old.mask & ~new.mask].abs()
    ]
    assert len(kept) == round(1200 * cubic(0.5, 0.1)(0.5 / ENDS))
    assert min(kept) > max(gone)


def test_each_layer_regrows_what_it_dropped_where_gradients_are_largest() -> None:
    layers = two_layers(0.1)  # nothing is left to prune
    after = GraNet(0.1).update(layers, share_of(layers), 0.5)
    for old, new in zip(layers, after, strict=True):
        assert new.live == old.live
        # half way down the cosine, rounded up
        count = math.ceil(old.live * 0.2525)
        kept = (old.weight.abs() * old.mask).view(-1).topk(old.live - count).indices
        assert old.grad is not None
        room = old.grad.abs().clone().view(-1)
        room[kept] = -1
        expected = torch.zeros(600, dtype=torch.bool)
        expected[kept] = expected[room.topk(count).indices] = True
        assert torch.equal(new.mask.view(-1), expected)


def test_the_last_update_only_prunes() -> None:
    layers = two_layers()
    after = GraNet(0.1).update(layers, share_of(layers), 1.0)
    assert sum(layer.live for layer in after) == 120
    for old, new in zip(layers, after, strict=True):
        assert not (new.mask & ~old.mask).any()
    assert GraNet(0.1).drop_fraction_at(0.5) == pytest.approx(0.2525)
    assert GraNet(0.1).drop_fraction_at(1.0) == 0


# arguments -------------------------------------------------------------------------------


def test_the_default_start() -> None:
    assert GraNet(0.1).initial_density == 0.5
    assert GraNet(0.7).initial_density == 0.7
    assert GraNet(structure=NM(3, 4)).initial_density == 0.75


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"initial_density": 0.2}, ValueError, "initial_density must be at least density"),
        ({"initial_density": 1.5}, ValueError, "initial_density must lie in"),
        ({"prune_end": 0.0}, ValueError, "prune_end must lie in"),
        ({"prune_end": 110}, ValueError, "prune_end must lie in"),
        ({"prune_end": "110"}, TypeError, "prune_end must be a number"),
        ({"drop_fraction": 1.5}, ValueError, "drop_fraction must lie in"),
        ({"growth": None}, TypeError, "growth=None"),
        ({"ramp": None}, TypeError, "ramp=None"),
        ({"ramp": cubic(1.0, 0.3)}, TypeError, r"not cubic\(1.0, 0.1\)"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GraNet\(.*{message}"):
        GraNet(0.3, **bad)


def test_densities_by_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GraNet\(distribution=.*over all layers; .* use GMP"):
        fit([GraNet(0.1, distribution={"net.*": 0.3})])
