"""Redr-Woodfisher and Redr-Woodtaylor: what is gathered, dropped, updated and grown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sparsity import RedrWoodfisher, RedrWoodtaylor, StaticSparse
from lightning_sparsity.callbacks.dynamic.redr_second_order import drop_by_loss, fisher_blocks
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.testing import TinyModel, fit

BOTH = [RedrWoodfisher, RedrWoodtaylor]
SLOTS = {"positions", "fisher", "gradients", "gradient_sum"}


def made(
    shape: tuple[int, ...], live: int, *, seed: int = 0, name: str = "fc", steps: int = 6
) -> Layer:
    """A layer with random live weights after some steps with random gradients."""
    own = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=own)[:live]] = True
    weight = torch.randn(shape, generator=own) * mask
    slots: dict[str, Tensor] = {}
    for _ in range(steps):
        grad = torch.randn(shape, generator=own)
        layer = Layer(name, weight, mask, grad=grad, slots=slots)
        slots = dict(fisher_blocks(5, mean=True).observe(layer))
    return Layer(name, weight, mask, slots=slots, generator=generator(seed, name))


def rule_of(cls: Any, fraction: float, **options: Any) -> Any:
    return cls(0.5, drop_fraction=lambda progress: fraction, block_size=5, **options).rule


def update(layers: list[Layer], cls: Any, fraction: float, **options: Any) -> list[Layer]:
    return list(rule_of(cls, fraction, **options)(layers, [0] * len(layers), 0.0))


# ------------------------------------------------------------------------------ gathering


@pytest.mark.parametrize("mean", [False, True])
def test_sums_run_over_live_weights_in_row_major_order(mean: bool) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    grads = [torch.randn(3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    slots: dict[str, Tensor] = {}
    for grad in grads:
        before = {name: tensor.clone() for name, tensor in slots.items()}
        layer = Layer("fc", torch.ones(3, 3) * mask, mask, grad=grad, slots=slots)
        new = dict(fisher_blocks(2, mean).observe(layer))
        assert all(torch.equal(slots[name], before[name]) for name in slots), "written in place"
        slots = new
    assert slots.keys() == (SLOTS if mean else SLOTS - {"gradient_sum"})
    assert slots["positions"].tolist() == [1, 2, 3, 6, 7]
    assert int(slots["gradients"]) == 3
    rows = torch.stack([nn.functional.pad(grad[mask], (0, 1)).view(3, 2) for grad in grads])
    torch.testing.assert_close(slots["fisher"], torch.einsum("nbi,nbj->bij", rows, rows))
    if mean:
        torch.testing.assert_close(slots["gradient_sum"], rows.sum(0))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_at_least_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    weight = torch.ones(2, 2, dtype=dtype)
    grad = torch.full((2, 2), 300.0, dtype=dtype)  # the square overflows in float16
    slots = fisher_blocks(4, mean=True).observe(Layer("fc", weight, weight > 0, grad=grad))
    assert slots["fisher"].dtype == slots["gradient_sum"].dtype == wide
    assert slots["fisher"].max() == pytest.approx(9e4, rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradients_that_are_not_finite_are_left_out(bad: float) -> None:
    layer = made((4, 4), 9)
    spoiled = torch.ones(4, 4)
    spoiled.view(-1)[layer.slots["positions"][4]] = bad
    seen = Layer("fc", layer.weight, layer.mask, grad=spoiled, slots=layer.slots)
    after = fisher_blocks(5, mean=True).observe(seen)
    assert all(torch.equal(after[name], layer.slots[name]) for name in SLOTS)
    # off the mask it does not matter
    off = torch.where(layer.mask, 1.0, bad)
    seen = Layer("fc", layer.weight, layer.mask, grad=off, slots=layer.slots)
    after = fisher_blocks(5, mean=True).observe(seen)
    assert int(after["gradients"]) == int(layer.slots["gradients"]) + 1
    assert bool(after["fisher"].isfinite().all())


def test_other_block_sizes_and_other_masks_begin_anew() -> None:
    layer = made((4, 4), 9)
    assert fisher_blocks(5, mean=True).of(layer) is layer.slots
    for size, mask in ((3, layer.mask), (5, layer.mask.flip(0))):
        other = Layer("fc", layer.weight, mask, grad=torch.ones(4, 4), slots=layer.slots)
        nothing = fisher_blocks(size, mean=True).of(other)
        assert int(nothing["gradients"]) == 0
        assert not nothing["fisher"].any()
        assert torch.equal(nothing["positions"], mask.view(-1).nonzero().view(-1))
    resized = fisher_blocks(3, mean=True).observe(
        Layer("fc", layer.weight, layer.mask, grad=torch.ones(4, 4), slots=layer.slots)
    )
    assert int(resized["gradients"]) == 1


# ------------------------------------------------------------------------ dropping, growing


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.5])
def test_counts_are_exact_and_shares_follow_the_sizes(
    cls: Any, fraction: float, joint: bool
) -> None:
    layers = [made((10, 12), 50, name="a"), made((8, 10), 31, seed=1, name="b")]
    after = update(layers, cls, fraction, joint=joint)
    gone = [int((old.mask & ~new.mask).sum()) for old, new in zip(layers, after, strict=True)]
    new = [int((new.mask & ~old.mask).sum()) for old, new in zip(layers, after, strict=True)]
    count = math.floor(fraction * 81)
    assert sum(gone) == sum(new) == count
    assert abs(new[0] - count * 120 / 200) < 1
    assert sum(layer.live for layer in after) == 81


@pytest.mark.parametrize("cls", BOTH)
def test_what_goes_has_the_least_predicted_loss_over_all_layers(cls: Any) -> None:
    layers = [made((10, 12), 50, name="a"), made((8, 10), 30, seed=1, name="b")]
    after = update(layers, cls, 0.4, damping=0.5)
    losses, gone = [], []
    for old, new in zip(layers, after, strict=True):
        positions = old.slots["positions"]
        size = len(positions)
        blocks = old.slots["fisher"].double() / 6
        fisher = torch.block_diag(*blocks)[:size, :size] + 0.5 * torch.eye(size)
        inverse = torch.linalg.inv(fisher)
        weight = old.weight.view(-1)[positions].double()
        if cls is RedrWoodtaylor:
            weight = weight - inverse @ old.slots["gradient_sum"].double().view(-1)[:size] / 6
        losses.append(weight.square() / (2 * inverse.diagonal()))
        gone.append(~new.mask.view(-1)[positions])
    least = torch.cat(losses).argsort()[:32]
    assert sorted(least.tolist()) == torch.cat(gone).nonzero().view(-1).tolist()
    assert all(0 < int(g.sum()) < len(g) for g in gone)


@pytest.mark.parametrize("cls", BOTH)
def test_every_layer_keeps_a_weight(cls: Any) -> None:
    large, small = made((10, 12), 50, name="a"), made((8, 10), 4, seed=1, name="b")
    worthless = Layer("b", small.weight * 1e-9, small.mask, generator=small.generator)
    for fraction in (0.5, 1.0):
        rule = drop_by_loss(fisher_blocks(5, cls.first_order), fraction, 1.0)
        after = rule([large, worthless], [0, 0], 0.0)
        assert after[1].live == 1
        assert after[0].live + 1 == max(54 - math.floor(54 * fraction), 2)


@pytest.mark.parametrize("cls", BOTH)
def test_what_goes_does_not_come_back_and_what_comes_is_zero(cls: Any) -> None:
    layers = [made((6, 6), 17, seed=seed, name=str(seed)) for seed in range(3)]
    for old, new in zip(layers, update(layers, cls, 0.5), strict=True):
        assert not new.weight[~old.mask].any()
        dropped = old.mask & ~new.mask
        assert not new.weight[dropped].any()
        assert int(dropped.sum()) > 0
        changed = (new.weight != old.weight)[old.mask & new.mask]
        assert changed.any(), "nothing made up for what went"


@pytest.mark.parametrize("cls", BOTH)
def test_no_more_goes_than_there_is_room_elsewhere(cls: Any) -> None:
    crowded = [made((6, 6), 34, name="a"), made((6, 6), 36, seed=1, name="b")]
    after = update(crowded, cls, 0.5)
    gone = sum(int((old.mask & ~new.mask).sum()) for old, new in zip(crowded, after, strict=True))
    assert gone == 2  # both free places of the first layer are filled
    assert sum(layer.live for layer in after) == 70
    assert bool((after[0].mask | crowded[0].mask).all())
    dense = [made((6, 6), 36, name="a")]
    (same,) = update(dense, cls, 0.5)
    assert same.weight is dense[0].weight
    assert same.mask is dense[0].mask


@pytest.mark.parametrize("cls", BOTH)
def test_growth_that_does_not_fit_goes_to_the_others(cls: Any) -> None:
    full, roomy = made((10, 20), 198, name="a"), made((4, 5), 5, seed=1, name="b")
    heavy = Layer("a", full.mask * 1e3, full.mask, slots=full.slots, generator=full.generator)
    after = update([heavy, roomy], cls, 0.02)  # four go, all of them from the light layer
    # of the four, 200 / 220 belong to the heavy layer, which has two places
    assert [layer.live for layer in after] == [200, 3]


@pytest.mark.parametrize("cls", BOTH)
def test_the_slots_are_emptied_and_those_of_others_stay(cls: Any) -> None:
    layer = made((6, 6), 17)
    mine = {**layer.slots, "momentum": torch.ones(6, 6)}
    given = Layer("fc", layer.weight, layer.mask, slots=mine, generator=generator(0))
    weight, mask = layer.weight.clone(), layer.mask.clone()
    for fraction in (0.0, 0.5):
        (after,) = update([given], cls, fraction)
        assert after.slots.keys() == {"momentum"}
        assert given.slots.keys() == SLOTS | {"momentum"}, "a rule is pure"
        assert torch.equal(given.weight, weight)
        assert torch.equal(given.mask, mask)
    (idle,) = update([given], cls, 0.0)
    assert torch.equal(idle.weight, weight)


@pytest.mark.parametrize("cls", BOTH)
def test_without_gradients_the_smallest_go_and_the_others_stay(cls: Any) -> None:
    layer = made((6, 6), 17, steps=0)
    (after,) = update([layer], cls, 0.5)
    order = layer.weight.abs().masked_fill(~layer.mask, math.inf).view(-1).argsort()
    gone = (layer.mask & ~after.mask).view(-1).nonzero().view(-1)
    assert sorted(order[:8].tolist()) == gone.tolist()
    kept = layer.mask & after.mask
    torch.testing.assert_close(after.weight[kept], layer.weight[kept], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_waits() -> None:
    layer = made((6, 6), 17)
    layer.weight.view(-1)[layer.slots["positions"][3]] = math.nan
    with pytest.raises(NonFiniteScoreError, match="predicted loss of fc is not finite"):
        update([layer], RedrWoodfisher, 0.5)


def test_the_update_pays_on_least_squares() -> None:
    """One layer is a linear model at its optimum, fed with the gradient of every sample."""
    own = torch.Generator().manual_seed(5)
    mix = torch.eye(24) + torch.randn(24, 24, generator=own) / 5
    inputs = torch.randn(600, 24, generator=own) @ mix * torch.logspace(-1, 0.5, 24)
    targets = inputs @ torch.randn(24, generator=own) + torch.randn(600, generator=own)
    weight = torch.linalg.lstsq(inputs, targets[:, None]).solution.view(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)

    def loss(weight: Tensor) -> float:
        return float((inputs @ weight.reshape(-1) - targets).square().mean() / 2)

    gathered = fisher_blocks(24)
    slots: dict[str, Tensor] = {}
    for x, error in zip(inputs, inputs @ weight.view(-1) - targets, strict=True):
        grad = (error * x).view(4, 6)
        slots = dict(gathered.observe(Layer("fc", weight, mask, grad=grad, slots=slots)))
    roomy = Layer("other", torch.ones(4, 6) * 100, torch.eye(4, 6, dtype=torch.bool))
    layer = Layer("fc", weight, mask, slots=slots)
    induced = {}
    for joint in (False, True):
        after, _ = drop_by_loss(gathered, 0.25, 1e-6, joint)([layer, roomy], [0, 0], 0.0)
        assert after.live == 24 - 7
        induced[joint] = loss(after.weight) - loss(weight)
    by_magnitude = torch.where(weight.abs() < weight.abs().view(-1).sort().values[7], 0, weight)
    assert int((by_magnitude != 0).sum()) == 24 - 7
    assert 0 < induced[True] <= induced[False]
    assert induced[False] < 0.5 * (loss(by_magnitude) - loss(weight))


# -------------------------------------------------------------------------------- training


class Gathered(Callback):
    """How many gradients the slots hold after every batch; -1 without slots."""

    def __init__(self, name: str = "net.5.weight") -> None:
        self.name = name
        self.counts: list[int] = []
        self.keys: set[str] = set()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        slots = keeper.masks[self.name].slots
        self.keys |= slots.keys()
        self.counts.append(int(slots["gradients"]) if "gradients" in slots else -1)


@pytest.mark.parametrize("cls", BOTH)
def test_gradients_are_gathered_from_update_to_update(cls: Any) -> None:
    gathered = Gathered()
    fit([cls(0.3), gathered])
    # updates at the end of epochs 1 and 2; the window ends after step 18 of 24
    assert gathered.counts == 2 * [*range(1, 8), -1] + [1] + 7 * [-1]
    assert gathered.keys == (SLOTS if cls.first_order else SLOTS - {"gradient_sum"})


@pytest.mark.parametrize("cls", BOTH)
def test_accumulated_batches_are_one_gradient(cls: Any) -> None:
    gathered = Gathered()
    fit([cls(0.3, update_interval=3, update_end=1.0), gathered], accumulate_grad_batches=2)
    assert gathered.counts[1::2][:6] == [1, 2, -1, 1, 2, -1]


class OnlyHalf(TinyModel):
    """One of its layers never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 8)


@pytest.mark.filterwarnings("ignore:.*idle.weight got no gradient")
@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("interval", [1, "epoch"])
def test_layers_without_gradients_and_first_steps(cls: Any, interval: Any) -> None:
    gathered = Gathered("idle.weight")
    result = fit([cls(0.3, update_interval=interval), gathered], OnlyHalf)
    assert set(gathered.counts) == {-1}
    assert {sum(live.values()) for _, live in result.history} == {round(0.3 * (2184 + 64))}
    assert all(bool(w.isfinite().all()) for w in result.weights.values())
    assert result.changes > (10 if interval == 1 else 1)
    assert {live["idle.weight"] for _, live in result.history} == {round(0.3 * 64)}


@pytest.mark.parametrize("cls", BOTH)
def test_takes_over_the_masks_of_an_earlier_callback(cls: Any) -> None:
    start = fit([StaticSparse(0.3)], max_epochs=1).masks
    result = fit([StaticSparse(0.3), cls(update_start=10)])
    assert result.live == round(0.3 * 2184)
    first = {name: int(mask.sum()) for name, mask in start.items()}
    assert [live for _, live in result.history[:9]] == [first] * 9
    assert result.changes > 0


def test_defaults_and_what_the_monitor_shows() -> None:
    assert RedrWoodfisher(0.1).drop_fraction_at(0.0) == 0.5
    assert RedrWoodtaylor(0.1).drop_fraction_at(0.5) == pytest.approx(0.25)
    dampings = [cls(0.1).rule.rules[0].rule.damping for cls in BOTH]
    assert dampings == [1e-5, 1.0]
    assert [cls(0.1).observe.__self__.size for cls in BOTH] == [34, 34]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"block_size": 0}, ValueError, r"block_size=0\): must be at least 1"),
        ({"block_size": 3.0}, TypeError, r"block_size=3.0\): must be an int"),
        ({"block_size": True}, TypeError, "block_size"),
        ({"damping": 0}, ValueError, r"damping=0\): damping must be above 0"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"damping": "1"}, TypeError, r"damping='1'\): damping must be a number"),
        ({"joint": 1}, TypeError, r"joint=1\): must be True or False"),
        ({"drop_fraction": 1.5}, ValueError, "drop_fraction"),
        ({"weight_init": 3}, TypeError, "weight_init"),
    ],
)
def test_bad_arguments(cls: Any, bad: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=rf"^{cls.__name__}\(.*{message}"):
        cls(0.1, **bad)
