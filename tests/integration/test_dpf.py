"""DPF: prunes along a ramp, and takes back what it pruned too early.

What it has in common with others, and a plain loop of it, are in test_straight_through.py.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparsity import cubic, linear, uniform
from lightning_sparsity.callbacks.learned.dpf import DPF
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.schedules import until
from lightning_sparsity.testing import Batches, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def counts(result):
    return [sum(live.values()) for _, live in result.history]


def expected(step, total):
    return round(NUMEL * (0.3 + 0.7 * (1 - step / total) ** 3))


def test_every_16_steps_along_the_cubic_ramp():
    result = fit([DPF(0.3)], data=Batches(25), max_epochs=2)
    steps = [0] * 15 + [16] * 16 + [32] * 16 + [48] * 2 + [50]  # and at the end, to the weight
    assert counts(result) == [expected(step, 50) for step in steps]
    assert result.live == round(0.3 * NUMEL)


class Masks(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(torch.cat([k.mask.flatten() for k in MaskKeeper.of(trainer).masks]))


def test_what_was_pruned_too_early_comes_back():
    masks = Masks()
    result = fit([DPF(0.3, update_interval=2), masks])
    assert counts(result) == sorted(counts(result), reverse=True)  # the density only falls
    pruned = torch.zeros(NUMEL, dtype=torch.bool)
    for mask in masks.seen[:-1]:
        pruned |= ~mask
    assert (pruned & masks.seen[-1]).sum() > 10


def test_after_the_ramp_masks_still_change():
    result = fit([DPF(0.3, ramp=until(cubic, 0.5), update_interval=2)])
    assert set(counts(result)[11:]) == {round(0.3 * NUMEL)}
    assert counts(result)[9] > round(0.3 * NUMEL)
    assert len({digest for digest, _ in result.history[11:]}) > 3


def test_other_ramps_and_distributions():
    result = fit([DPF(0.25, ramp=linear, distribution=uniform, update_interval=6)])
    assert counts(result)[11] == round(0.625 * NUMEL)
    assert [int(mask.sum()) for mask in result.masks.values()] == [18, 512, 16]


def test_all_layers_are_ranked_together():
    result = fit([DPF(0.25, update_interval=6)])
    live = torch.cat([result.weights[k][m] for k, m in result.masks.items()]).abs()
    assert live.min() > 0
    assert [int(mask.sum()) for mask in result.masks.values()] != [18, 512, 16]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"ramp": None}, TypeError, r"^DPF\(ramp=None\): must be a ramp .* such as cubic"),
        ({"ramp": cubic(1.0, 0.1)}, TypeError, r"^DPF\(ramp=cubic\(.*\)\): must make a schedule"),
        ({"density": None}, ValueError, r"^DPF\(density=None\): .*pass DPF\(density=0.1\)"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message):
        DPF(**{"density": 0.3, **bad})
