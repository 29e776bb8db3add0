"""Iterative SNIP and FORCE: rounds, what comes back, counts on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparsity import FORCE, NM, IterSNIP, StaticSparse, cubic, linear, uniform
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.view import Pass
from lightning_sparsity.testing import Batches, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
METHODS = pytest.mark.parametrize("method", [IterSNIP, FORCE])


def counts(result: Any) -> list[int]:
    return [int(mask.sum()) for mask in result.masks.values()]


def watched(method: Any, *args: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A callback, and the weights that are live in the copy whenever it scores."""
    seen: list[dict[str, Any]] = []

    class Watched(method):  # type: ignore[misc]
        def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = super().score(opened, layers, batches)
            live = {layer.name: opened.weights[layer.name].detach() != 0 for layer in layers}
            masks = {layer.name: layer.mask for layer in layers}
            seen.append({"live": live, "mask": masks, "score": found})
            return found

    return Watched(*args, **{"data": Batches(2), **options}), seen


def total(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def came_back(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(bool((after[name] & ~before[name]).any()) for name in before)


def test_rounds_prune_what_the_rounds_before_have_left() -> None:
    callback, seen = watched(IterSNIP, 0.1, rounds=5)
    result = fit([callback])
    assert [total(each["live"]) for each in seen] == [
        round(0.1 ** (k / 5) * NUMEL) for k in range(5)
    ]
    for before, after in zip(seen, seen[1:], strict=False):
        assert not came_back(before["live"], after["live"])
    assert not came_back(seen[-1]["live"], result.masks)
    assert all(not each["score"][k][~each["live"][k]].any() for each in seen for k in each["live"])


def test_what_was_pruned_may_come_back_in_force() -> None:
    callback, seen = watched(FORCE, 0.05, rounds=6)
    result = fit([callback])
    live = [total(each["live"]) for each in seen]
    assert live == [round(0.05 ** (k / 6) * NUMEL) for k in range(6)]
    assert result.live == round(0.05 * NUMEL)
    masks = [each["live"] for each in seen] + [result.masks]
    assert any(came_back(a, b) for a, b in zip(masks, masks[1:], strict=False))


def test_force_scores_dense_weights_by_gradients_of_the_pruned_network() -> None:
    seen: list[bool] = []

    class Checked(FORCE):
        def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
            found = super().score(opened, layers, batches)
            grads = opened.gradients(list(found), batches, self.loss_fn)
            for layer in layers:
                pruned = opened.weights[layer.name] == 0
                assert torch.equal(found[layer.name], (start[layer.name] * grads[layer.name]).abs())
                seen.append(bool(found[layer.name][pruned].any()))
            return found

    start = fit([], max_epochs=0).model.state_dict()
    fit([Checked(0.3, rounds=2, data=Batches(2), mode="eval")])
    assert seen == [False, False, False, True, True, True]


@METHODS
def test_weights_that_an_earlier_callback_pruned_stay_so(method: Any) -> None:
    start = fit([StaticSparse(0.5, distribution=uniform)]).masks
    callback, seen = watched(method, 0.05, rounds=6)
    result = fit([StaticSparse(0.5, distribution=uniform), callback])
    assert result.live == round(0.05 * NUMEL)
    assert not came_back(start, result.masks)
    # of the densities 1, 0.61, 0.37, ... those above a half prune nothing and are passed over
    assert [total(each["live"]) for each in seen] == [
        round(0.5 * NUMEL),
        *(round(0.05 ** (k / 6) * NUMEL) for k in (2, 3, 4, 5)),
    ]


@METHODS
@pytest.mark.parametrize("density", [1.0, None])
def test_nothing_to_prune_takes_one_look_at_most(method: Any, density: float | None) -> None:
    callback, seen = watched(method, density)
    before = [] if density else [StaticSparse(0.5)]
    result = fit([*before, callback])
    assert len(seen) == (1 if density else 0)
    assert result.live == round((density or 0.5) * NUMEL)


@METHODS
def test_counts_are_exact_where_scores_are_equal(method: Any) -> None:
    def nothing(model: TinyModel, batch: Any) -> Tensor:
        return 0 * model.loss(batch)

    callback, seen = watched(method, 0.1, rounds=4, loss_fn=nothing)
    assert fit([callback]).live == round(0.1 * NUMEL)
    assert not any(score.any() for each in seen for score in each["score"].values())
    assert [total(each["live"]) for each in seen] == [
        round(0.1 ** (k / 4) * NUMEL) for k in range(4)
    ]


@METHODS
def test_counts_are_exact_where_a_round_kills_the_network(method: Any) -> None:
    def dies(model: TinyModel, batch: Any) -> Tensor:
        whole = all((p != 0).all() for p in model.parameters() if p.ndim > 1)
        return model.loss(batch) * whole

    callback, seen = watched(method, 0.3, rounds=3, loss_fn=dies)
    assert fit([callback]).live == round(0.3 * NUMEL)
    assert [total(each["live"]) for each in seen] == [
        round(0.3 ** (k / 3) * NUMEL) for k in range(3)
    ]
    assert [any(s.any() for s in each["score"].values()) for each in seen] == [True, False, False]


@METHODS
def test_densities_by_name_are_reached_in_rounds(method: Any) -> None:
    callback, seen = watched(
        method, distribution={"net.0": 0.5, "net.5": 0.1, "net.7": 1.0}, rounds=4
    )
    assert counts(fit([callback])) == [36, 205, 64]
    end, found = 305 / NUMEL, [[72, 2048, 64]]
    for k in (1, 2, 3):
        left = (end ** (k / 4) - end) / (1 - end)
        found.append([round(36 + 36 * left), round(205 + 1843 * left), 64])
    ours = [[int(mask.sum()) for mask in each["live"].values()] for each in seen]
    assert ours == found


@METHODS
def test_patterns_are_filled_up_in_rounds(method: Any) -> None:
    callback, seen = watched(method, structure=NM(1, 4), exclude="net.0", rounds=8)
    result = fit([callback])
    assert counts(result) == [512, 16]
    live = [total(each["live"]) for each in seen]
    assert live[0] == 4 * 528
    assert {n // 528 for n in live} == {4, 3, 2}
    for mask in result.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 1).all()


@METHODS
def test_linear_rounds_end_elsewhere(method: Any) -> None:
    runs = [fit([method(0.05, rounds=6, data=Batches(2), ramp=ramp)]) for ramp in (linear, cubic)]
    plain = fit([method(0.05, rounds=6, data=Batches(2))])
    assert all(run.live == plain.live for run in runs)
    assert all(run.history != plain.history for run in runs)


def test_sixty_rounds_are_the_default() -> None:
    for method in (IterSNIP, FORCE):
        densities = method(0.01).rounds(0.01)
        assert len(densities) == 60
        ratios = [b / a for a, b in zip(densities, densities[1:], strict=False)]
        assert ratios == pytest.approx([0.01 ** (1 / 60)] * 59)


def test_rules_do_not_leave_scores_behind() -> None:
    layers: list[Layer] = []

    class Kept(FORCE):
        def begin(self, given: Layers, share: Any) -> Layers:
            layers.extend(super().begin(given, share))
            return layers

    fit([Kept(0.1, rounds=2, data=Batches(2))])
    assert len(layers) == 3
    assert not any(layer.slots for layer in layers)


@METHODS
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"rounds": 0}, ValueError, r"\(rounds=0\): must be at least 1"),
        ({"rounds": 2.0}, TypeError, r"\(rounds=2.0\): must be an int >= 1"),
        ({"ramp": None}, TypeError, r"\(ramp=None\): must make a schedule"),
        ({"ramp": cubic(1.0, 0.1)}, TypeError, r"\(ramp=cubic\(.*such as cubic, not cubic"),
        ({"ramp": lambda a, b: linear(b, a)}, ValueError, r"ends at 1.0, not at the final"),
    ],
)
def test_bad_arguments(
    method: Any, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{method.__name__}.*{message}"):
        method(0.5, **bad)


def test_passes_leave_no_trace_in_many_rounds() -> None:
    def still(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    start = fit([], max_epochs=0).model.state_dict()
    result = fit(
        [FORCE(0.1, rounds=5, data=Batches(2))], lambda: TinyModel(optimizer=still), max_epochs=1
    )
    for name, mask in result.masks.items():
        assert torch.equal(result.weights[name], start[name] * mask)
