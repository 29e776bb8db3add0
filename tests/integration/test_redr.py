"""The Redr algorithms that drop by magnitude: what each grows, and how they start."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sparsity import (
    Block,
    RedrGradient,
    RedrGradientGlobal,
    RedrLoss,
    RedrRandom,
    StaticSparse,
    fan_in,
    global_by,
)
from lightning_sparsity.callbacks.dynamic.redr import grow_at_loss, grow_best
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import grow
from lightning_sparsity.scores import gradient
from lightning_sparsity.starts import sparse_uniform, spread_inputs
from lightning_sparsity.testing import Batches, Result, TinyModel, fit

ALL = [RedrRandom, RedrGradient, RedrGradientGlobal, RedrLoss]


class Mlp(TinyModel):
    def __init__(self) -> None:
        layers = [nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(12, 4)))


class Steps(Callback):
    """The masks after every step, and the dense gradients before it."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.grads.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.masks.append({n: w != 0 for n, w in self.weights[-1].items()})


def run(method: Callback, **options: Any) -> tuple[Result, Steps]:
    steps = Steps()
    return fit([method, steps], Mlp, **options), steps


@pytest.mark.parametrize("cls", ALL)
def test_half_of_the_live_weights_by_a_cosine_until_three_quarters(cls: Any) -> None:
    result, steps = run(cls(0.3), max_epochs=8)
    budget = result.history[0][1]
    assert sum(budget.values()) == round(0.3 * (36 * 20 + 20 * 12 + 12 * 4))
    digests = [digest for digest, _ in result.history]
    # after epochs 1 to 5 of 8; at the sixth, three quarters, the fraction is 0
    changed = [i + 1 for i in range(63) if digests[i] != digests[i + 1]]
    assert changed == [7, 15, 23, 31, 39]
    assert cls(0.3).drop_fraction_at(0) == 0.5
    assert cls(0.3).drop_fraction_at(0.5) == pytest.approx(0.25)
    if cls is not RedrGradientGlobal:
        assert {tuple(live.values()) for _, live in result.history} == {tuple(budget.values())}


class Start(Callback):
    """The linear layers as training starts."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            layers = [layer for layer in pl_module.net if isinstance(layer, nn.Linear)]
            self.weights = [layer.weight.detach().clone() for layer in layers]
            self.biases = [layer.bias.detach().clone() for layer in layers]


def test_every_neuron_starts_with_equally_many_inputs() -> None:
    start = Start()
    fit([RedrRandom(0.25, distribution=fan_in), start], Mlp)
    for weight, bias in zip(start.weights, start.biases, strict=True):
        k = max(1, round(0.25 * weight.shape[1]))
        assert ((weight != 0).sum(1) == k).all()
        assert 0.8 / k < weight.abs().max() <= 1 / k
        assert 0.5 * k**-0.5 < bias.abs().max() <= k**-0.5


@pytest.mark.parametrize("cls", ALL)
def test_all_start_as_the_static_net_of_the_comparison_does(cls: Any) -> None:
    one, other = Start(), Start()
    spread = StaticSparse(0.25, topology=spread_inputs, weight_init=sparse_uniform())
    fit([spread, cls(), one], Mlp)
    fit([spread, other], Mlp)
    for mine, static in zip(one.weights, other.weights, strict=True):
        assert torch.equal(mine, static)
        live = (mine != 0).sum(1)
        assert live.max() - live.min() <= 1


def test_gradient_grows_at_the_largest_gradients_of_the_layer() -> None:
    _, steps = run(RedrGradient(0.2))
    before, after, grads = steps.masks[6], steps.masks[7], steps.grads[7]
    for name in ("net.1.weight", "net.3.weight"):
        grown = after[name] & ~before[name]
        left = ~after[name] & ~before[name]
        new = steps.weights[7][name] == 0
        assert (before[name] & ~after[name]).any()
        # what grew has weight 0 after the update, so it is seen one step later
        assert not grown.any()
        assert new[left].all()
        alive = steps.masks[8][name] & ~before[name]
        if alive.any():
            assert grads[name].abs()[alive].min() >= grads[name].abs()[left & ~alive].max()


def test_global_growth_moves_weights_and_is_the_one_shot_choice() -> None:
    result, _ = run(RedrGradientGlobal(0.2), max_epochs=4)
    totals = {sum(live.values()) for _, live in result.history}
    assert totals == {round(0.2 * 1008)}
    assert len({tuple(live.values()) for _, live in result.history}) > 1


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_growing_one_layer_at_a_time_equals_the_one_shot_choice(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    layers = [
        Layer(
            name,
            torch.zeros(shape),
            torch.rand(shape, generator=generator) < 0.5,
            grad=torch.randint(-4, 5, shape, generator=generator).float(),  # with many ties
        )
        for name, shape in {"a": (6, 9), "b": (4, 5), "c": (3, 2, 2, 2)}.items()
    ]
    budget = [layer.live for layer in layers]
    budget[0] += count
    streamed = grow_best(gradient)(layers, budget, 0.0)
    at_once = grow(gradient, share=global_by(gradient, min_per_layer=0))(layers, budget, 0.0)
    for one, other in zip(streamed, at_once, strict=True):
        assert torch.equal(one.mask, other.mask)


def test_global_growth_keeps_one_score_at_a_time() -> None:
    alive = []

    class Score:
        needs_gradient = True

        def __call__(self, layer: Layer) -> Tensor:
            assert not any(ref() is not None for ref in alive), "an earlier score is still held"
            score = gradient(layer)
            import weakref

            alive.append(weakref.ref(score))
            return score

    layers = [
        Layer(name, torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool), grad=torch.rand(4, 4))
        for name in "abc"
    ]
    after = grow_best(Score())(layers, [5, 0, 0], 0.0)
    assert len(alive) == 3
    assert sum(layer.live for layer in after) == 5


# Redr-Loss ------------------------------------------------------------------------


def loss_layer(**changes: Any) -> Layer:
    layer = Layer(
        "fc.weight",
        torch.zeros(10, 6),
        torch.zeros(10, 6, dtype=torch.bool),
        grad=torch.arange(60.0).reshape(10, 6),
        statistics={"output_grads": (torch.arange(10.0).repeat(3, 1),)},
    )
    return dataclasses.replace(layer, **changes)


def counts(count: int, layer: Layer, neurons: float = 0.3) -> list[int]:
    (after,) = grow_at_loss(neurons)([layer], [layer.live + count], 0.0)
    assert after.live == layer.live + count
    return (after.mask & ~layer.mask).sum(1).tolist()


def test_the_neurons_with_the_largest_loss_share_equally() -> None:
    assert counts(6, loss_layer()) == [0] * 7 + [2, 2, 2]
    assert counts(7, loss_layer()) == [0] * 7 + [2, 2, 3], "the largest loss takes the rest"
    assert counts(1, loss_layer()) == [0] * 9 + [1]
    assert counts(4, loss_layer(), neurons=0.01) == [0] * 9 + [4]


def test_a_neuron_places_its_part_at_its_largest_gradients() -> None:
    (after,) = grow_at_loss()([loss_layer()], [6], 0.0)
    assert after.mask[7:].tolist() == [[False] * 4 + [True] * 2] * 3


def test_a_full_neuron_passes_its_part_on() -> None:
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[9] = True
    assert counts(6, loss_layer(mask=mask)) == [0] * 7 + [3, 3, 0]
    # 7 and 8 have room for 12 only: 6 and 5, the next by loss, share with them
    assert counts(20, loss_layer(mask=mask)) == [0] * 5 + [5, 5, 5, 5, 0]
    assert sum(counts(54, loss_layer(mask=mask))) == 54


def test_losses_add_up_over_micro_batches_and_positions() -> None:
    one = torch.zeros(2, 10)
    one[:, 3] = -5
    two = torch.zeros(4, 10)
    two[:, 6] = 1
    layer = loss_layer(statistics={"output_grads": (one, two)})
    assert counts(2, layer, neurons=0.1)[3] == 2
    pictures = torch.zeros(2, 10, 3, 3)
    pictures[:, 4] = 1
    conv = loss_layer(
        weight=torch.zeros(10, 2, 1, 3),
        mask=torch.zeros(10, 2, 1, 3, dtype=torch.bool),
        grad=torch.rand(10, 2, 1, 3),
        statistics={"output_grads": (pictures, pictures[0])},
    )
    (after,) = grow_at_loss(0.1)([conv], [6], 0.0)
    assert after.mask[4].all()


def test_a_layer_that_was_not_called_grows_at_its_largest_gradients() -> None:
    (after,) = grow_at_loss()([loss_layer(statistics={})], [3], 0.0)
    assert after.mask.flatten().nonzero().flatten().tolist() == [57, 58, 59]


def test_loss_growth_in_training_is_at_the_neurons_with_the_largest_loss() -> None:
    seen: list[Tensor] = []

    class Watched(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].register_forward_hook(self._watch)

        @staticmethod
        def _watch(module: nn.Module, args: Any, out: Tensor) -> None:
            out.register_hook(seen.append)

    steps = Steps()
    fit([RedrLoss(0.2), steps], Watched, data=Batches(8), max_epochs=4)
    losses = seen[7].abs().sum(0)
    before, after = steps.masks[6]["net.1.weight"], steps.masks[8]["net.1.weight"]
    neurons = (after & ~before).any(1).nonzero().squeeze(1).tolist()
    assert neurons
    assert set(neurons) <= set(losses.topk(6).indices.tolist())


def options(cls: Any) -> Sequence[tuple[dict[str, Any], str]]:
    return [
        ({"drop_fraction": 1.5}, "drop_fraction"),
        ({"drop_fraction": "half"}, "drop_fraction"),
        ({"weight_init": 3}, "weight_init"),
        ({"update_end": -1}, "update_end"),
    ]


@pytest.mark.parametrize("cls", ALL)
def test_bad_arguments(cls: Any) -> None:
    for bad, name in options(cls):
        with pytest.raises((TypeError, ValueError), match=rf"{cls.__name__}.*{name}"):
            cls(0.1, **bad)


def test_blocks_move_whole() -> None:
    result, _ = run(RedrGradientGlobal(0.25, structure=Block(2, 4)))
    for mask in result.masks.values():
        blocks = mask.reshape(mask.shape[0] // 2, 2, mask.shape[1] // 4, 4)
        assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
