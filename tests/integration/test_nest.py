"""NeST: what grows and where it starts, up to the peak and down again."""

import math
from typing import Any

import pytest
import torch

from lightning_sparsity import NM, NeST, StaticSparse
from lightning_sparsity.callbacks.dynamic.nest import (
    average_gradient,
    downhill,
    mean_gradient,
)
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import forget, grow
from lightning_sparsity.testing import fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
MASK = torch.tensor([True, True, False, False, False, False])
WEIGHT = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 0.0])
GRADS = (
    torch.tensor([9.0, 9.0, 3.0, -3.0, 1.0, 0.0]),
    torch.tensor([9.0, 9.0, -3.0, -1.0, 1.0, 0.0]),
)


def growth(scale: float) -> grow:
    """Growth as ``NeST`` has it."""
    return grow(mean_gradient, start=downhill(scale))


def gathered(*grads: torch.Tensor, lr: float | None = 0.1) -> Layer:
    slots: dict[str, torch.Tensor] = {}
    for grad in grads:
        slots |= average_gradient(Layer("w", WEIGHT, MASK, grad=grad, slots=slots))
    return Layer("w", WEIGHT, MASK, slots=slots, lr=lr)


def test_gradients_are_averaged() -> None:
    layer = gathered(*GRADS)
    assert mean_gradient(layer).tolist() == [9, 9, 0, 2, 1, 0]
    (fresh,) = forget("mean_gradient", "gradient_count", "absent")([layer], [2], 0.0)
    assert not fresh.slots
    assert layer.slots, "a rule writes nothing"


def test_growth_follows_the_mean_and_steps_down_it() -> None:
    (after,) = growth(1.0)([gathered(*GRADS)], [4], 0.0)
    assert after.mask.tolist() == [True, True, False, True, True, False]
    assert after.weight.tolist() == pytest.approx([0.5, -0.5, 0.0, 0.2, -0.1, 0.0])
    # the last gradient alone would have grown another
    (other,) = growth(1.0)([gathered(GRADS[1])], [4], 0.0)
    assert other.mask.tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize(("scale", "value"), [(0.0, 0.0), (3.0, 0.6)])
def test_the_step_scales(scale: float, value: float) -> None:
    (after,) = growth(scale)([gathered(*GRADS)], [3], 0.0)
    assert float(after.weight[3]) == pytest.approx(value)


def test_a_weight_dropped_and_regrown_at_once_keeps_its_value() -> None:
    layer = gathered(*GRADS)
    dropped = Layer("w", WEIGHT, torch.tensor([True] + [False] * 5), slots=layer.slots, lr=layer.lr)
    (after,) = growth(1.0)([dropped], [3], 0.0)
    assert after.mask.tolist() == [True, True, False, True, False, False]
    assert after.weight[:2].tolist() == [0.5, -0.5]


def test_every_update_begins_a_new_mean() -> None:
    for budget in (4, 2, 1):  # up, level and down
        (after,) = NeST(0.5).rule([gathered(*GRADS)], [budget], 0.0)  # type: ignore[misc]
        assert after.live == budget
        assert not after.slots


def test_a_layer_without_gradients_grows_all_the_same() -> None:
    layer = Layer("w", WEIGHT, MASK, lr=0.1)
    (after,) = NeST(0.5).rule([layer], [4], 0.0)  # type: ignore[misc]
    assert after.live == 4
    assert not after.weight[2:].any()


def test_the_density_rises_and_falls() -> None:
    method = NeST(0.1, seed_density=0.05, peak_density=0.25, update_interval=3)
    lives = [sum(live.values()) for _, live in fit([method]).history]
    density = {3: 0.05 + 0.2 / 3, 6: 0.05 + 0.4 / 3, 9: 0.25, 12: 0.2, 15: 0.15, 18: 0.1}
    at = 0
    for step, live in enumerate(lives, 1):
        at = step if step in density else at
        assert live == round(density.get(at, 0.05) * NUMEL)


def test_what_dies_on_the_way_down_stays_dead() -> None:
    masks = [m for _, m in masks_by_step(NeST(0.1, peak_density=0.4, update_interval=3))]
    for before, after in zip(masks[8:], masks[9:], strict=False):
        assert not (after & ~before).any()
    for before, after in zip(masks[:8], masks[1:9], strict=False):
        assert not (before & ~after).any()
    assert (masks[8] & ~masks[0]).any()
    assert (masks[8] & ~masks[-1]).any()


def masks_by_step(method: NeST) -> list[tuple[int, torch.Tensor]]:
    from lightning.pytorch.callbacks import Callback

    from lightning_sparsity.core.keeper import MaskKeeper

    class Recorder(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, torch.Tensor]] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            keeper = MaskKeeper.of(trainer)
            assert keeper is not None
            assert keeper.masks is not None
            self.seen.append((trainer.global_step, keeper.masks["net.5.weight"].mask.clone()))

    recorder = Recorder()
    fit([method, recorder])
    return recorder.seen


def test_seed_and_peak_by_default() -> None:
    ramp = NeST(0.1).ramp(0.1, 0.1)  # type: ignore[misc]
    assert [ramp(x) for x in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.1, 0.15, 0.2, 0.15, 0.1])
    assert NeST(0.1).initial_density == 0.1
    assert NeST(0.9).ramp(0.9, 0.9)(0.5) == 1.0  # type: ignore[misc]
    late = NeST(0.1, peak_density=0.5, growth_end=0.8).ramp(0.1, 0.1)  # type: ignore[misc]
    assert [late(x) for x in (0.4, 0.8, 0.9)] == pytest.approx([0.3, 0.5, 0.3])


def test_masks_of_an_earlier_callback_are_the_seed() -> None:
    result = fit([StaticSparse(0.05), NeST(0.1, peak_density=0.4, update_interval=3)])
    assert sum(result.history[0][1].values()) == round(0.05 * NUMEL)
    assert sum(result.history[8][1].values()) == round(0.4 * NUMEL)
    assert result.live == round(0.1 * NUMEL)


def test_n_of_m_grows_and_falls_in_every_group() -> None:
    method = NeST(structure=NM(1, 4), exclude="net.0", update_interval=3)
    result = fit([method])
    assert sum(result.history[8][1].values()) == (2048 + 64) // 2
    assert result.live == (2048 + 64) // 4


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"seed_density": 0}, ValueError, "seed_density=0"),
        ({"peak_density": 1.5}, ValueError, "peak_density=1.5"),
        ({"peak_density": 0.2}, ValueError, r"peak_density=0.2\): must be at least density \(0.3"),
        ({"seed_density": 0.8, "peak_density": 0.5}, ValueError, "peak_density=0.5.*seed_density"),
        ({"growth_end": 0}, ValueError, "growth_end=0"),
        ({"growth_end": 1.0}, ValueError, "growth_end=1.*below 1"),
        ({"new_weight_scale": -1}, ValueError, "new_weight_scale=-1"),
        ({"new_weight_scale": math.inf}, ValueError, "new_weight_scale=inf"),
        ({"new_weight_scale": None}, TypeError, "new_weight_scale=None"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^NeST\({message}"):
        NeST(0.3, **bad)


def test_the_distribution_must_follow_a_density() -> None:
    with pytest.raises(ValueError, match=r"^NeST\(distribution=.*uniform and erk"):
        fit([NeST(0.3, distribution={"*": 0.3})])
