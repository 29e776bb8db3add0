"""AC/DC: phases, restarts at zero, and the dense network on the side."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparsity import ACDC, StaticSparse, uniform
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import optimizer_state
from lightning_sparsity.testing import ManualModel, Result, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
PHASES = ((0.3, 0.6), (0.8, 1.0))
Short = partial(ACDC, compressed=PHASES, update_interval=4)


def lives(result: Result) -> list[int]:
    return [sum(live.values()) for _, live in result.history]


def test_phases_alternate_and_training_ends_compressed() -> None:
    few = round(0.3 * NUMEL)
    assert lives(fit([Short(0.3)])) == [NUMEL] * 7 + [few] * 8 + [NUMEL] * 4 + [few] * 5


def test_masks_are_fixed_in_a_phase_and_chosen_anew_in_the_next() -> None:
    digests = [digest for digest, _ in fit([Short(0.3)]).history]
    assert len(set(digests[7:15])) == len(set(digests[19:])) == 1
    assert digests[7] != digests[19]


def test_the_largest_of_all_layers_stay() -> None:
    dense = fit([], max_steps=8)
    pruned = fit([Short(0.3)], max_steps=24, max_epochs=3)
    assert pruned.history[7][1] != pruned.history[0][1]
    names = ["net.0.weight", "net.5.weight", "net.7.weight"]
    weights = torch.cat([dense.weights[name].abs().reshape(-1) for name in names])
    threshold = weights.sort(descending=True).values[round(0.3 * NUMEL) - 1]
    kept = {name: int((dense.weights[name].abs() >= threshold).sum()) for name in names}
    assert pruned.history[7][1] == kept
    assert len({n / dense.weights[name].numel() for name, n in kept.items()}) == 3


def test_each_layer_alike() -> None:
    result = fit([Short(0.25, distribution=uniform)])
    assert [int(mask.sum()) for mask in result.masks.values()] == [18, 512, 16]


class Restart(Callback):
    """Looks at the weights and their momentum after the step that follows decompression."""

    def __init__(self) -> None:
        self.pruned: torch.Tensor | None = None
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks["net.5.weight"]
        if trainer.global_step == 15:
            self.pruned = ~kept.mask
        if trainer.global_step == 16:  # decompressed after this step
            assert self.pruned is not None
            (momentum,) = optimizer_state(kept, trainer.optimizers[0])
            self.seen = [(kept.weight.clone(), momentum.clone())]


def test_pruned_weights_come_back_at_zero_without_momentum_and_train() -> None:
    watch = Restart()
    result = fit([Short(0.3), watch])
    ((weight, momentum),) = watch.seen
    assert watch.pruned is not None
    assert not weight[watch.pruned].any()
    assert not momentum[watch.pruned].any()
    assert weight[~watch.pruned].all()
    assert momentum[~watch.pruned].any()
    # some of them are among the largest in the end
    assert (result.masks["net.5.weight"] & watch.pruned).any()


def test_dense_phases_are_dense_whatever_was_found() -> None:
    result = fit([StaticSparse(0.5), Short(0.3)])
    few, half = round(0.3 * NUMEL), round(0.5 * NUMEL)
    assert lives(result) == [half] * 3 + [NUMEL] * 4 + [few] * 8 + [NUMEL] * 4 + [few] * 5


def test_densities_by_name_come_back_dense_too() -> None:
    result = fit([Short(distribution={"net.5": 0.1, "*": 1.0})])
    few = 8 * 9 + 205 + 16 * 4
    assert lives(result) == [NUMEL] * 7 + [few] * 8 + [NUMEL] * 4 + [few] * 5


# the dense network --------------------------------------------------------------------


def test_the_dense_network_before_the_last_compression_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "dense.pt"
    method = ACDC(0.3, compressed=[(0.5, 1.0)], update_interval=4, dense_checkpoint=path)
    result = fit([method])
    saved = torch.load(path, weights_only=True)
    dense = fit([], max_steps=12)
    assert list(saved) == list(dense.model.state_dict())
    for name, value in dense.model.state_dict().items():
        assert torch.equal(saved[name], value), name
    assert [file.name for file in path.parent.iterdir()] == ["dense.pt"], "no unfinished file"
    assert result.live == round(0.3 * NUMEL)


def test_the_last_dense_network_is_saved_not_an_earlier_one(tmp_path: Path) -> None:
    fit([Short(0.3, dense_checkpoint=str(tmp_path / "dense.pt"))])
    saved = torch.load(tmp_path / "dense.pt", weights_only=True)
    # some that were pruned get no gradient and are still zero, but most have grown
    assert saved["net.5.weight"].count_nonzero() > 0.5 * 2048
    assert saved["net.1.num_batches_tracked"] == 20


def test_saving_changes_nothing_in_training(tmp_path: Path) -> None:
    fit([Short(0.3, dense_checkpoint=tmp_path / "x.pt")]).assert_equal(fit([Short(0.3)]))


def test_a_second_optimizer_does_not_save_a_half_compressed_network(tmp_path: Path) -> None:
    phases, path = [(0.5, 1.0)], tmp_path / "dense.pt"
    method = Short(0.3, compressed=phases, dense_checkpoint=path, update_end=24)
    result = fit([method], ManualModel)
    assert result.live == round(0.3 * NUMEL)
    saved = torch.load(path, weights_only=True)
    assert all(saved[name].all() for name in result.masks)


def test_the_callback_pickles_in_training_and_lets_go_of_the_model(tmp_path: Path) -> None:
    method = Short(0.3, dense_checkpoint=tmp_path / "dense.pt")
    sizes = []

    class Pickling(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            sizes.append(len(pickle.dumps(method)))

    fit([method, Pickling()])
    assert set(sizes) == {len(pickle.dumps(method))}
    assert method._network is None


@pytest.mark.parametrize(
    ("compressed", "error"),
    [
        ([], ValueError),
        ([(0.2, 0.5)], ValueError),
        ([(0.5, 0.2), (0.8, 1.0)], ValueError),
        ([(0.2, 0.6), (0.5, 1.0)], ValueError),
        ([(0.2, 0.6), (0.6, 1.0)], ValueError),
        ([(-0.1, 1.0)], ValueError),
        ([(0.5, 1.5)], ValueError),
        ([(float("nan"), 1.0)], ValueError),
        ([0.5, 1.0], TypeError),
        ([(0.1, 0.2, 0.3)], TypeError),
        (0.5, TypeError),
        ("late", TypeError),
    ],
)
def test_bad_phases(compressed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^ACDC\(compressed="):
        ACDC(0.3, compressed=compressed)


def test_bad_paths() -> None:
    with pytest.raises(TypeError, match=r"^ACDC\(dense_checkpoint=3\): must be a path"):
        ACDC(0.3, dense_checkpoint=3)  # type: ignore[arg-type]


def test_phases_may_lie_beside_the_steps_they_mean() -> None:
    density = ACDC(0.3, compressed=[(0.1 + 0.2, 0.6), (0.8, 1.0)]).ramp(1.0, 0.3)  # type: ignore[misc]
    assert [density(k / 10) for k in (2, 3, 5, 6, 7, 8, 10)] == [1, 0.3, 0.3, 1, 1, 0.3, 0.3]
