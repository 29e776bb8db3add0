"""IHT: turns of sparse and dense phases, counted in update intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import ACDC, IHT, StaticSparse, epochs, uniform
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import optimizer_state
from lightning_sparsity.testing import Batches, Result, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
FEW = round(0.3 * NUMEL)


def phases(result: Result) -> str:
    """One letter per step: what the network was after it."""
    return "".join({NUMEL: "D", FEW: "S"}[sum(live.values())] for _, live in result.history)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"update_interval": 4}, "DDD SSSS DDDD SSSS DD SSSSSSS"),  # the window ends at step 18
        ({"update_interval": 2}, "D SS DD SS DD SS DD SS DD SSSSSSS"),
        ({"update_interval": 2, "sparse_intervals": 2}, "D SSSS DD SSSS DD SSSS SSSSSSS"),
        (
            {"update_interval": 3, "sparse_intervals": 1, "dense_intervals": 2},
            "DD SSS DDDDDD SSS DDD SSSSSSS",
        ),
        ({}, "DDDDDDD SSSSSSSS DD SSSSSSS"),
        ({"update_interval": 4, "update_start": 6}, "DDDDD SSSS DDDD SSS SSSSSSSS"),
        ({"update_interval": 4, "update_start": 2, "update_end": 10}, "D SSSS DDDD " + "S" * 15),
        ({"update_interval": epochs(2)}, "D" * 15 + "SS" + "S" * 7),
    ],
)
def test_turns(arguments: dict[str, Any], expected: str) -> None:
    assert phases(fit([IHT(0.3, **arguments)])) == expected.replace(" ", "")


def test_the_last_threshold_is_a_new_one() -> None:
    digests = [digest for digest, _ in fit([IHT(0.3, update_interval=4)]).history]
    assert len(set(digests[3:7])) == len(set(digests[17:])) == 1
    assert len({digests[3], digests[11], digests[17]}) == 3


def test_the_same_phases_as_acdc() -> None:
    # thresholds after steps 4, 12 and 18, everything live after 8 and 16
    like = ACDC(0.3, update_interval=2, compressed=[(4 / 24, 8 / 24), (0.5, 16 / 24), (0.75, 1)])
    fit([IHT(0.3, update_interval=4)]).assert_equal(fit([like]))


def test_each_layer_alike() -> None:
    result = fit([IHT(0.25, distribution=uniform)])
    assert [int(mask.sum()) for mask in result.masks.values()] == [18, 512, 16]


def test_dense_phases_are_dense_whatever_was_found() -> None:
    result = fit([StaticSparse(0.5), IHT(0.3, update_interval=4)])
    counts = [sum(live.values()) for _, live in result.history]
    assert (
        counts == [NUMEL // 2] * 3 + [FEW] * 4 + [NUMEL] * 4 + [FEW] * 4 + [NUMEL] * 2 + [FEW] * 7
    )


def test_pruned_weights_come_back_at_zero_without_momentum() -> None:
    pruned, seen = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            keeper = MaskKeeper.of(trainer)
            assert keeper is not None
            assert keeper.masks is not None
            kept = keeper.masks["net.5.weight"]
            if trainer.global_step == 7:
                pruned.append(~kept.mask)
            if trainer.global_step == 8:
                (momentum,) = optimizer_state(kept, trainer.optimizers[0])
                seen.extend([kept.weight.clone(), momentum.clone()])

    result = fit([IHT(0.3, update_interval=4), Watch()])
    for tensor in seen:
        assert not tensor[pruned[0]].any()
        assert tensor[~pruned[0]].any()
    assert (result.masks["net.5.weight"] & pruned[0]).any(), "some of them are large in the end"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [6, 9])
def test_turns_are_resumed(step: int, tmp_path: Path) -> None:
    def train(**options: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        method = IHT(0.3, update_interval=2, sparse_intervals=2)
        return fit([method, saver], enable_checkpointing=True, **options)

    whole = train(data=Batches())
    rest = train(data=Batches(), ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_nothing_is_kept_when_the_window_is_over(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit([IHT(0.3, update_interval=4), saver], enable_checkpointing=True)

    def slots(step: int) -> list[dict[str, torch.Tensor]]:
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]
        return [saved["slots"] for saved in state["MaskKeeper"]["parameters"].values()]

    assert slots(8) == [{"turn": 2}] * 3
    assert slots(24) == [{}] * 3


@pytest.mark.parametrize("name", ["sparse_intervals", "dense_intervals"])
@pytest.mark.parametrize(
    ("bad", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError), ("epoch", TypeError)]
)
def test_bad_arguments(name: str, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^IHT\({name}="):
        IHT(0.3, **{name: bad})
