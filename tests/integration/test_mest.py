"""MEST: what dies, how much mutates, and the soft bound."""

from typing import Any

import pytest
import torch

from lightning_sparsity import MEST, NM, StaticSparse, constant, cosine, epochs
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.testing import Batches, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def layer_of(size: int = 100, live: int = 50) -> Layer:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(size) < live
    return Layer(
        "w",
        torch.randn(size, generator=generator) * mask,
        mask,
        grad=torch.randn(size, generator=generator),
        generator=generator,
    )


@pytest.mark.parametrize("weight_of_gradient", [0.0, 0.01, 1.0])
def test_the_least_important_live_weights_die(weight_of_gradient: float) -> None:
    layer = layer_of()
    assert layer.grad is not None
    score = layer.weight.abs() + weight_of_gradient * layer.grad.abs()
    expected = set(score[:50].argsort()[:10].tolist())
    rule = MEST(0.5, gradient_weight=weight_of_gradient).rule
    (dropped,) = rule.rules[0]([layer], [50], 0.0)  # type: ignore[union-attr]
    assert set((layer.mask & ~dropped.mask).nonzero().view(-1).tolist()) == expected
    (after,) = rule([layer], [50], 0.0)  # type: ignore[misc]
    assert after.live == 50
    assert not after.weight[after.mask & ~layer.mask].any()


def test_gradients_are_kept_only_where_they_count() -> None:
    assert MEST(0.5).needs_gradient
    assert not MEST(0.5, gradient_weight=0).needs_gradient


def test_mutation_falls_in_steps() -> None:
    method = MEST(0.1)
    epochs_of_160 = [0, 89, 90, 119, 120, 160]
    fractions = [method.drop_fraction_at(epoch / 160) for epoch in epochs_of_160]
    assert fractions == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]
    assert MEST(0.1, mutation=cosine(0.4)).drop_fraction_at(0.5) == pytest.approx(0.2)
    assert method.window.every == epochs(5)


def test_elastic_mutation_keeps_the_density_and_stops_changing() -> None:
    result = fit([MEST(0.3, update_interval=2)])
    assert {sum(live.values()) for _, live in result.history} == {round(0.3 * NUMEL)}
    digests = [digest for digest, _ in result.history]
    changed = [i + 1 for i in range(1, 24) if digests[i] != digests[i - 1]]
    assert changed == [2, 4, 6, 8, 10, 12, 14, 16]  # 18 of 24 is 120 of 160


def test_the_default_interval_is_five_epochs() -> None:
    result = fit([MEST(0.3)], data=Batches(2), max_epochs=16)
    digests = [digest for digest, _ in result.history]
    assert [i + 1 for i in range(1, 32) if digests[i] != digests[i - 1]] == [10, 20]


# the soft bound ---------------------------------------------------------------------


def test_a_soft_bound_trains_above_the_density_and_ends_at_it() -> None:
    result = fit([MEST(0.3, soft=True, update_interval=2)])
    lives = [sum(live.values()) for _, live in result.history]
    above, half, end = (round(d * NUMEL) for d in (0.36, 0.33, 0.3))
    # milestones: 13.5 and 18 of 24 steps, so updates at 14 and 18
    assert lives == [above] * 13 + [half] * 4 + [end] * 7


@pytest.mark.parametrize("density", [0.013, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("mutation", [0.0, 0.2, 1.0, constant(0.5)])
def test_a_soft_bound_ends_exactly_at_the_density(density: float, mutation: Any) -> None:
    result = fit([MEST(density, soft=True, mutation=mutation, update_interval=4)])
    assert result.live == round(density * NUMEL)
    rate = mutation(0.0) if callable(mutation) else mutation
    first = sum(result.history[0][1].values())
    assert first == round(min(1.0, density * (1 + rate)) * NUMEL)


def test_a_soft_bound_drops_to_the_density_before_it_grows() -> None:
    method = MEST(0.5, soft=True, gradient_weight=0.0, mutation=constant(0.2))
    layer = layer_of(live=60)
    share = Share(("w",), (100,), 0, found=False, start={"w": 60})
    (after,) = method.update([layer], share, 0.25)
    best = layer.weight.abs().argsort(descending=True)[:50]
    assert after.live == 60
    assert after.mask[best].all()
    grown = after.mask.clone()
    grown[best] = False
    assert int(grown.sum()) == 10
    assert (grown & ~layer.mask).any()
    (end,) = method.update([layer], share, 1.0)
    assert end.mask.nonzero().view(-1).tolist() == sorted(best.tolist())


def test_a_soft_bound_with_n_of_m() -> None:
    method = MEST(structure=NM(1, 4), soft=True, exclude="net.0", update_interval=4)
    result = fit([method])
    size = 128 * 16 + 16 * 4
    assert sum(result.history[0][1].values()) == size // 2  # 1.2 of 4 is 2 of 4
    assert result.live == size // 4


def test_a_soft_bound_over_masks_that_were_found() -> None:
    result = fit([StaticSparse(0.3), MEST(0.3, soft=True, update_interval=4)])
    lives = [sum(live.values()) for _, live in result.history]
    assert lives[:3] == [round(0.3 * NUMEL)] * 3
    assert lives[3] == round(0.36 * NUMEL)
    assert result.live == round(0.3 * NUMEL)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mutation": 1.5}, ValueError, r"MEST\(mutation=1.5\)"),
        ({"mutation": "0.2"}, TypeError, r"MEST\(mutation='0.2'\)"),
        ({"soft": 1}, TypeError, r"MEST\(soft=1\): must be True or False"),
        ({"gradient_weight": -1}, ValueError, r"MEST\(gradient_weight=-1\)"),
        ({"gradient_weight": "a"}, TypeError, r"MEST\(gradient_weight='a'\)"),
        ({"density": None, "soft": True}, ValueError, r"MEST\(density=None\).*density=0.1"),
        ({"density": 1.5, "soft": True}, ValueError, r"MEST\(density=1.5\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        MEST(**{"density": 0.3, **arguments})


def test_a_soft_bound_needs_a_distribution_that_follows_a_density() -> None:
    with pytest.raises(ValueError, match=r"^MEST\(soft=True, distribution=.*uniform and erk"):
        fit([MEST(soft=True, distribution={"*": 0.3})])


def test_elastic_mutation_over_densities_by_name() -> None:
    result = fit([MEST(distribution={"net.0": 1.0, "*": 0.2}, update_interval=4)])
    assert result.masks["net.0.weight"].all()
    assert int(result.masks["net.5.weight"].sum()) == round(0.2 * 2048)
    assert result.changes == 4
    assert isinstance(result.model, TinyModel)
