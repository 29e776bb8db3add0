"""Faults that readers and users found, each of which once was real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import get_protocol_members

from lightning_sparsity import (
    GMP,
    NM,
    SET,
    Magnitude,
    MaskCallback,
    RigL,
    StaticSparse,
    erk,
    global_by,
    inverse_power,
    linear,
)
from lightning_sparsity.core.method import Method
from lightning_sparsity.core.storage import StoragePolicy
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import gradient, magnitude, momentum, random
from lightning_sparsity.testing import Batch, Batches, ManualModel, Result, TinyModel, fit

NUMEL = 2184


# Averaged weights -----------------------------------------------------------------


def test_a_file_saved_after_fit_holds_no_average_off_the_masks(tmp_path: Path) -> None:
    result = fit([EMAWeightAveraging(decay=0.9), RigL(0.3, update_interval=4)])
    result.trainer.save_checkpoint(tmp_path / "after.ckpt")
    file = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    for name, mask in result.masks.items():
        assert not file[name][~mask].any()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
@pytest.mark.parametrize("method", [lambda: RigL(0.3, update_interval=4), lambda: SET(0.3)])
def test_averages_resume_to_the_last_bit(method: Any, step: int, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [method(), EMAWeightAveraging(decay=0.9), saver]
        return fit(callbacks, enable_checkpointing=True, **kwargs)

    whole = run()
    run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77).assert_equal(whole)


# Resume ---------------------------------------------------------------------------


class Scheduled(TinyModel):
    """Asks for the number of steps before anything is restored, as schedules need it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def shuffled() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(64, 1, 6, 6, generator=generator)
    return DataLoader(
        TensorDataset(pictures, torch.randint(4, (64,), generator=generator)), 8, shuffle=True
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("data", "step"), [(shuffled, 8), (shuffled, 16), (Batches, 12)])
def test_a_model_that_asks_for_the_number_of_steps_resumes(
    data: Any, step: int, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [RigL(0.3, update_interval=4), saver]
        return fit(callbacks, Scheduled, data=data(), enable_checkpointing=True, **kwargs)

    whole = run()
    run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77).assert_equal(whole)


# Observation ----------------------------------------------------------------------


class ByMomentum(MaskCallback):
    """Grows where the running mean of the dense gradient is largest."""

    def __init__(self, update_end: int | float = 0.75) -> None:
        super().__init__(
            density=0.3,
            default_distribution=erk,
            initial=drop(random),
            update=chain(drop(magnitude, fraction=0.3), grow(momentum(0.9))),
            observe=momentum(0.9).observe,
            update_interval=4,
            update_end=update_end,
        )


def test_a_skipped_step_is_not_observed() -> None:
    class Overflowing(TinyModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            return loss * float("inf") if self.trainer.fit_loop.total_batch_idx == 2 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert fit([ByMomentum()], Overflowing, plugins=[plugin]).changes == 4


# Budgets of ramps -----------------------------------------------------------------


@pytest.mark.parametrize(
    "late",
    [
        lambda: [GMP(0.0009, update_interval=4)],
        lambda: [Magnitude(0.0009, at=0.9)],
        lambda: [
            GMP(0.3, update_interval=4, update_end=8),
            RigL(0.0009, update_interval=4, update_start=12),
        ],
    ],
)
def test_what_cannot_be_reached_is_refused_before_the_first_step(late: Any) -> None:
    made = late()
    name = type(made[-1]).__name__
    with pytest.raises(ValueError, match=rf"^{name}: .*largest reachable sparsity is 0\.9986"):
        fit(made)


@pytest.mark.parametrize("make", [lambda: GMP(), lambda: Magnitude(at=0.5)])
def test_a_ramp_needs_a_density_even_on_found_masks(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\(density=None\).*density=0\.1"):
        make()


@pytest.mark.parametrize("ramp", [inverse_power, lambda a, b: linear(a, 0.4)])
def test_a_ramp_must_arrive(ramp: Any) -> None:
    with pytest.raises(ValueError, match=r"GMP\(ramp=.*ends at"):
        GMP(0.1, ramp=ramp)


def test_a_ramp_over_no_window_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="GMP: its density .* never be reached"):
        fit([GMP(0.3, update_end=0)])
    with pytest.raises(MisconfigurationException, match="Magnitude: its density"):
        fit([Magnitude(0.3, at=10**6)])


def test_a_window_that_lies_behind_a_dense_training_is_refused(tmp_path: Path) -> None:
    fit([], max_epochs=2).trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match="from step 16 to 24"):
        fit([Magnitude(0.3, at=0.5)], ckpt_path=str(tmp_path / "dense.ckpt"))


def test_a_single_cut_where_a_ramp_was_meant_is_told() -> None:
    with pytest.warns(UserWarning, match="GMP goes to its density in a single update, at step 18"):
        fit([GMP(0.3)])


@pytest.mark.parametrize("method", [lambda: Magnitude(0.3, at=0.01), lambda: GMP(0.3)])
def test_small_fractions_are_at_least_one_step(method: Any) -> None:
    made = method()
    if isinstance(made, GMP):
        made = GMP(0.3, update_end=0.01, update_interval=1)
    assert fit([made]).live == round(0.3 * NUMEL)


def test_ranking_by_gradient_over_the_ramp() -> None:
    made = GMP(0.3, distribution=global_by(gradient), update_interval=4)
    assert fit([StaticSparse(0.8), made]).live == round(0.3 * NUMEL)


def test_densities_by_pattern_do_not_grow_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"GMP.*only prunes, and net\.\d\.weight has"):
        fit([StaticSparse(0.2), GMP(distribution={"*": 0.3}, update_interval=4)])


def test_a_pattern_and_a_distribution_contradict() -> None:
    with pytest.raises(ValueError, match="leave distribution out"):
        RigL(structure=NM(2, 4), distribution={"*": 0.5})


# Zeros, ties, numbers -------------------------------------------------------------


def test_a_pattern_that_the_weights_have_is_kept() -> None:
    def two_of_four() -> TinyModel:
        model = TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 4)))
        with torch.no_grad():
            for layer in (model.net[1], model.net[2]):  # type: ignore[index]
                layer.weight.view(-1, 4)[:, ::2] = 0.0  # type: ignore[union-attr, operator]
        return model

    result = fit([StaticSparse(structure=NM(2, 4))], two_of_four)
    for mask in result.masks.values():
        assert torch.equal(
            mask.view(-1, 4), torch.tensor([[False, True] * 2]).expand(len(mask.view(-1, 4)), 4)
        )


class TiedHead(TinyModel):
    """An output layer that shares its weight with an embedding."""

    def __init__(self, embedding_first: bool) -> None:
        super().__init__(nn.Identity())
        embedding, head = nn.Embedding(4, 36), nn.Linear(36, 4)
        head.weight = embedding.weight
        parts = {"emb": embedding, "head": head}
        for name in parts if embedding_first else reversed(parts):
            self.add_module(name, parts[name])
        self.body = nn.Linear(36, 36)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0].flatten(1))), batch[1])


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_tied_to_an_embedding_is_dense_unless_named(embedding_first: bool) -> None:
    result = fit([StaticSparse(0.3)], lambda: TiedHead(embedding_first))
    assert list(result.masks) == ["body.weight"]
    for name in ("emb", "head", "head.weight"):
        named = fit([StaticSparse(0.3, include=name)], lambda: TiedHead(embedding_first))
        assert [int(mask.sum()) for mask in named.masks.values()] == [round(0.3 * 144)]


def test_numbers_of_numpy() -> None:
    made = RigL(
        np.float32(0.3),  # type: ignore[arg-type]
        update_interval=np.int64(4),  # type: ignore[arg-type]
        update_end=np.float64(0.75),
        seed=np.int64(5),  # type: ignore[arg-type]
    )
    fit([made]).assert_equal(fit([RigL(0.3, update_interval=4, seed=5)]))


def test_patterns_say_what_they_do_not_select() -> None:
    with pytest.raises(ValueError, match=r"patterns do not select, .*net\.0\.bias"):
        fit([RigL(0.3, include="*.bias")])


def test_manual_optimization_names_one_budget() -> None:
    made = RigL(0.3, update_interval=4, update_end=18)
    assert fit([made], ManualModel).live == round(0.3 * NUMEL)


def test_properties_of_other_callbacks_are_not_asked() -> None:
    def asked(self: Any) -> Any:
        raise RuntimeError("a property was asked")

    names = {name for kind in (Method, StoragePolicy) for name in get_protocol_members(kind)}
    assert {"update", "density", "layout"} <= names
    body = {name: property(asked) for name in names - {"exclude"}}
    stranger = type("Stranger", (Callback,), body)()
    assert fit([RigL(0.5, update_interval=4), stranger]).live == 1092
