"""Callbacks together on one model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparsity import (
    GMP,
    NM,
    SET,
    Magnitude,
    RigL,
    Rows,
    StaticSparse,
    erk,
    global_by,
    keep_dense,
    uniform,
)
from lightning_sparsity.scores import magnitude
from lightning_sparsity.testing import Batch, Batches, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def counts(result: Any) -> list[int]:
    return [int(mask.sum()) for mask in result.masks.values()]


# Initial, then updater ------------------------------------------------------------


def test_an_updater_keeps_the_budgets_it_finds() -> None:
    start = fit([StaticSparse(0.3, distribution=uniform)])
    both = fit([StaticSparse(0.3, distribution=uniform), RigL(update_interval=4)])
    assert counts(both) == counts(start) == [22, 614, 19]
    assert both.changes == 4


def test_a_density_scales_the_budgets_that_were_found() -> None:
    both = fit([StaticSparse(0.4, distribution=uniform), RigL(0.2, update_interval=4)])
    assert counts(both) == [15, 409, 13]  # halves of 29, 819, 26
    assert {sum(live.values()) for _, live in both.history} == {round(0.2 * NUMEL)}
    more = fit([StaticSparse(0.2, distribution=uniform), RigL(0.4, update_interval=4)])
    assert sum(counts(more)) == round(0.4 * NUMEL)


def test_a_distribution_replaces_the_budgets_that_were_found() -> None:
    found = fit(
        [StaticSparse(0.3, distribution=uniform), RigL(distribution=erk, update_interval=4)]
    )
    assert counts(found) == counts(fit([StaticSparse(0.3, distribution=erk)]))


def test_order_of_the_list_does_not_put_updaters_first() -> None:
    turned = fit([RigL(update_interval=4), StaticSparse(0.3)])
    turned.assert_equal(fit([StaticSparse(0.3), RigL(update_interval=4)]))


def test_initial_callbacks_prune_what_the_one_before_left() -> None:
    result = fit([StaticSparse(0.5, distribution=uniform), Magnitude(0.25)])
    first = fit([StaticSparse(0.5, distribution=uniform)])
    assert result.live == round(0.25 * NUMEL)
    for name, mask in result.masks.items():
        assert not (mask & ~first.masks[name]).any()


def test_gmp_starts_from_the_density_it_finds() -> None:
    result = fit([StaticSparse(0.5), GMP(0.1, update_interval=4)])
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[0] == round(0.5 * NUMEL)
    assert live[-1] == round(0.1 * NUMEL)
    assert live == sorted(live, reverse=True)
    for step in (4, 8, 12, 16):
        x = step / 18
        assert live[step - 1] == round((0.1 + 0.4 * (1 - x) ** 3) * NUMEL)


def test_a_structure_is_inherited() -> None:
    result = fit(
        [
            Magnitude(structure=NM(2, 4), exclude="net.0"),
            RigL(update_interval=4, exclude="net.0"),
        ]
    )
    for mask in result.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert result.changes > 0


# Two updaters ---------------------------------------------------------------------


def test_two_updaters_on_different_parameters() -> None:
    result = fit(
        [
            RigL(0.5, include="net.5", update_interval=4),
            SET(0.25, include=["net.0", "net.7"]),
        ]
    )
    assert counts(result)[1] == round(0.5 * 2048)
    assert counts(result)[0] + counts(result)[2] == round(0.25 * 136)


def test_two_updaters_in_separate_windows() -> None:
    result = fit(
        [
            RigL(0.4, update_interval=4, update_end=12),
            GMP(0.1, update_interval=4, update_start=12, update_end=24),
        ]
    )
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[:12] == [round(0.4 * NUMEL)] * 12
    assert live[15] == round((0.1 + 0.3 * (1 - 4 / 12) ** 3) * NUMEL)
    assert live[-1] == round(0.1 * NUMEL)


def test_a_density_is_scaled_at_the_hand_over() -> None:
    result = fit(
        [
            SET(0.4, update_end=0.5),
            RigL(0.2, update_interval=4, update_start=0.5, update_end=1.0),
        ]
    )
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[:11] == [round(0.4 * NUMEL)] * 11
    assert live[11:] == [round(0.2 * NUMEL)] * 13


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [RigL(0.3), GMP(0.1)],
        lambda: [RigL(0.3, update_end=0.8), SET(update_start=0.5)],
        lambda: [RigL(0.3, update_end=20), GMP(0.1, update_start=0.5)],
        lambda: [GMP(0.1), Magnitude(0.05, at=0.5)],
    ],
)
def test_overlapping_windows_name_both(callbacks: Any) -> None:
    made = callbacks()
    first, second = (type(callback).__name__ for callback in made)
    message = rf"{first} works on net\.0\.weight from step .*{second} from step .*update_start="
    with pytest.raises(MisconfigurationException, match=message):
        fit(made)


def test_overlapping_twins_are_told_apart() -> None:
    with pytest.raises(MisconfigurationException, match=r"RigL works .* and RigL\[1\] from"):
        fit([RigL(0.3), RigL(0.3, include="net.5")])


def test_two_structures_on_one_weight_name_both() -> None:
    message = r"StaticSparse cuts net\.0\.weight in units of Rows\(\), but RigL in units of NM"
    with pytest.raises(MisconfigurationException, match=message):
        fit([StaticSparse(0.5, structure=Rows()), RigL(structure=NM(2, 4))])


def test_half_found_masks_are_refused() -> None:
    message = r"RigL: an earlier callback made masks for net\.5\.weight but none for net\.0\.weight"
    with pytest.raises(MisconfigurationException, match=message):
        fit([StaticSparse(0.5, include="net.5"), RigL(0.5)])


# Windows and budgets --------------------------------------------------------------


class Endless(IterableDataset[Batch]):
    def __iter__(self) -> Any:
        while True:
            yield from ((x[0], y[0]) for x, y in Batches())


@pytest.mark.parametrize("trainer", [{"max_epochs": -1, "max_time": "00:00:01:00"}, {}])
def test_a_fraction_of_endless_training(trainer: dict[str, Any]) -> None:
    data = Batches() if trainer else DataLoader(Endless(), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"RigL: 0\.75 is a fraction.*max_steps"):
        fit([RigL(0.3)], data=data, **trainer)


def test_steps_work_in_endless_training() -> None:
    data = DataLoader(Endless(), batch_size=4)
    result = fit([RigL(0.3, update_interval=4, update_end=20)], data=data, limit_train_batches=10)
    assert result.changes == 4


def test_an_unreachable_budget_names_the_largest_sparsity() -> None:
    with pytest.raises(
        ValueError, match=r"RigL: 2 live units.*largest reachable sparsity is 0\.99"
    ):
        fit([RigL(0.001)])
    with pytest.raises(ValueError, match=r"largest sparsity is 0\.0"):
        fit([RigL(0.3, distribution=keep_dense(erk, "net.5.weight", charge=True))])


def test_a_pattern_without_a_match_is_a_typing_error() -> None:
    with pytest.raises(ValueError, match=r"RigL\(distribution=.*'fc1' matches no sparse layer"):
        fit([RigL(0.3, distribution=keep_dense(erk, "fc1"))])


def test_a_window_that_never_opens_says_so() -> None:
    with pytest.warns(UserWarning, match=r"RigL makes no update: training has 24 optimizer steps"):
        fit([RigL(0.3, update_interval=100)])


def test_a_ramp_that_does_not_finish_says_so() -> None:
    with pytest.warns(UserWarning, match=r"GMP: training ended at step 8.*density is .*not 0\.1"):
        fit([GMP(0.1, update_interval=4, update_end=16)], max_epochs=1)


def test_global_pruning_is_one_ranking() -> None:
    result = fit([Magnitude(0.2, at=0.5, distribution=global_by(magnitude))])
    local = fit([Magnitude(0.2, at=0.5, distribution=uniform)])
    assert result.live == local.live == round(0.2 * NUMEL)
    assert counts(local) == [14, 410, 13]
    assert counts(result) != counts(local)


# Gradients that are not numbers ---------------------------------------------------


class Sick(TinyModel):
    """NaN gradients at the first update step; the user's hook saves the weights."""

    bad = 3

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * math.nan if self.trainer.global_step == self.bad else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                parameter.grad.zero_()


def test_nan_gradients_put_the_update_off() -> None:
    with pytest.warns(UserWarning, match="RigL: .*waits for the next step") as warned:
        sick = fit([RigL(0.3, update_interval=4)], Sick)
    assert sum("waits for the next step" in str(w.message) for w in warned) == 1
    digests = [digest for digest, _ in sick.history]
    assert digests[3] == digests[2], "step 4 was due, and its gradients were NaN"
    assert digests[4] != digests[3], "the update came one step later"
    assert sick.live == round(0.3 * NUMEL)
    assert digests[7] != digests[6], "the next update is on time"


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_a_loss_puts_the_update_off() -> None:
    class Silent(TinyModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None if self.trainer.fit_loop.total_batch_idx == 3 else self.loss(batch)

    digests = [digest for digest, _ in fit([RigL(0.3, update_interval=4)], Silent).history]
    assert digests[3] == digests[2]
    assert digests[4] != digests[3]


# A checkpoint of something else ---------------------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: [RigL(0.2, update_interval=4)], r"RigL\(density=0\.3\).*RigL\(density=0\.2\)"),
        (lambda: [SET(0.3)], r"RigL\(density=0\.3\).*SET"),
        (lambda: [RigL(0.3, include="net.5", update_interval=4)], r"net\.0\.weight: .*absent now"),
        (lambda: [RigL(0.3, structure=Rows(), update_interval=4)], r"Unstructured.*Rows"),
    ],
)
def test_another_checkpoint_says_what_differs(other: Any, said: str, tmp_path: Any) -> None:
    first = fit([RigL(0.3, update_interval=4)])
    first.trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match=f"nothing was restored(?s:.*){said}"):
        fit(other(), ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=4)


def test_resume_of_a_dense_checkpoint_begins_sparse(tmp_path: Any) -> None:
    dense = fit([])
    dense.trainer.save_checkpoint(tmp_path / "dense.ckpt")
    result = fit([Magnitude(0.3)], ckpt_path=str(tmp_path / "dense.ckpt"), max_epochs=4)
    assert result.live == round(0.3 * NUMEL)


def test_zeros_of_a_file_are_kept(tmp_path: Any) -> None:
    first = fit([RigL(0.3, update_interval=4)])

    def loaded() -> TinyModel:
        model = TinyModel()
        model.load_state_dict(first.weights)
        return model

    again = fit([StaticSparse()], loaded)
    for name, mask in again.masks.items():
        assert torch.equal(mask, first.weights[name] != 0)
    with pytest.raises(ValueError, match="no weight is zero"):
        fit([StaticSparse()])


def test_sharded_strategies_are_refused() -> None:
    from lightning_sparsity.core.keeper import _refuse

    class FSDPStrategy:
        pass

    class Fake:
        optimizers: tuple[Any, ...] = ()
        strategy = FSDPStrategy()

    with pytest.raises(MisconfigurationException, match='FSDPStrategy.*strategy="ddp"'):
        _refuse(Fake())  # type: ignore[arg-type]


class SickForAWhile(Sick):
    """NaN gradients in the steps 7 to 13."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * math.nan if 6 <= self.trainer.global_step < 13 else loss


@pytest.mark.filterwarnings("ignore:GMP. .*waits for the next step")
@pytest.mark.filterwarnings("ignore:.*The update waits for the next step")
def test_the_next_method_waits_for_the_last_update_of_the_one_before() -> None:
    saliency_of = lambda layer: layer.grad.abs()  # noqa: E731
    result = fit(
        [
            GMP(0.3, score=saliency_of, update_interval=2, update_end=8),
            SET(update_interval=2, update_start=8),
        ],
        SickForAWhile,
    )
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[5] == live[12] > round(0.3 * NUMEL), "nothing is done without finite gradients"
    assert live[13] == round(0.3 * NUMEL), "GMP ends, and SET only then begins"
    assert set(live[13:]) == {round(0.3 * NUMEL)}
    masks = [digest for digest, _ in result.history]
    assert len(set(masks[6:13])) == 1, "SET, due at steps 10 and 12, waits for GMP"
    assert len(set(masks[13:])) > 1, "SET is at work"
