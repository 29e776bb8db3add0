"""Updates after every n-th epoch, in training, resumed and where none can come."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sparsity import GMP, SET, epochs
from lightning_sparsity.testing import Batch, Result, TinyModel, fit


def changed_after(result: Result) -> list[int]:
    """Batches, from 1, after which the masks were others than before."""
    digests = [digest for digest, _ in result.history]
    return [i + 1 for i in range(1, len(digests)) if digests[i] != digests[i - 1]]


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [8, 16, 24, 32, 40]), (2, [16, 32]), (3, [24]), (5, [40])]
)
def test_updates_follow_the_last_step_of_every_nth_epoch(number: int, expected: list[int]) -> None:
    result = fit([SET(0.3, update_interval=epochs(number))], max_epochs=6)
    assert changed_after(result) == expected


def test_one_epoch_is_epoch() -> None:
    fit([SET(0.3, update_interval=epochs(1))]).assert_equal(fit([SET(0.3)]))


def test_epochs_count_from_the_start_of_training_not_of_the_window() -> None:
    result = fit([SET(0.3, update_interval=epochs(2), update_start=20)], max_epochs=6)
    assert changed_after(result) == [32]


def test_a_ramp_arrives_all_the_same() -> None:
    result = fit([GMP(0.3, update_interval=epochs(2), update_end=28)], max_epochs=4)
    assert changed_after(result) == [16, 28]
    assert result.live == round(0.3 * (8 * 9 + 128 * 16 + 16 * 4))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [12, 16, 20, 24])
def test_resuming_is_exact(step: int, tmp_path: Path) -> None:
    def run(**options: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit(
            [SET(0.3, update_interval=epochs(2)), saver],
            enable_checkpointing=True,
            max_epochs=5,
            **options,
        )

    whole = run()
    assert changed_after(whole) == [16, 32]
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


class Skipping(TinyModel):
    """The last batch of every epoch makes no step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 7 else self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None")
def test_an_epoch_without_a_last_step_owes_its_update_only_if_it_counts() -> None:
    result = fit([SET(0.3, update_interval=epochs(2))], Skipping, max_epochs=5)
    assert changed_after(result) == [17, 33]


def test_an_interval_longer_than_training_is_told() -> None:
    with pytest.warns(UserWarning, match="SET makes no update.*every 5 epochs"):
        result = fit([SET(0.3, update_interval=epochs(5))])
    assert changed_after(result) == []


def test_weights_train_between_updates() -> None:
    result = fit([SET(0.3, update_interval=epochs(2))])
    start = fit([SET(0.3, update_interval=epochs(2))], max_epochs=0)
    assert not torch.equal(result.weights["net.5.weight"], start.model.state_dict()["net.5.weight"])
