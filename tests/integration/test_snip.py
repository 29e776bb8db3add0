"""SNIP: what it keeps, its controls, and other callbacks before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import SNIP, Magnitude, RigL, Rows, StaticSparse, uniform
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.testing import Batches, TinyModel, fit, quiet_trainer

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def counts(result: Any) -> list[int]:
    return [int(mask.sum()) for mask in result.masks.values()]


def linear_model(weight: list[list[float]]) -> TinyModel:
    """A linear layer whose loss, in the tests, is a sum of its outputs."""
    model = TinyModel(nn.Linear(len(weight[0]), len(weight), bias=False))
    model.net.load_state_dict({"weight": torch.tensor(weight)})
    return model


def scores(callback: SNIP, model: TinyModel, batches: list[Any]) -> dict[str, Tensor]:
    layers = [
        Layer(name, p.detach(), torch.ones_like(p, dtype=torch.bool))
        for name, p in model.named_parameters()
        if p.ndim > 1
    ]
    with ModelView(quiet_trainer([]), model).open(layers, mode=callback.mode) as opened:
        return callback.score(opened, layers, batches)


def test_gradients_are_averaged_before_the_absolute_value() -> None:
    def total(model: Any, batch: Tensor) -> Tensor:
        value: Tensor = model.net(batch).sum()
        return value

    # d(sum of outputs)/dw = x, so the mean gradient of the two batches is (0, 2)
    model = linear_model([[3.0, -2.0]])
    batches = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-5.0, 3.0]])]
    found = scores(SNIP(0.5, loss_fn=total), model, batches)
    assert found["net.weight"].tolist() == [[0.0, 4.0]]
    assert scores(SNIP(0.5, loss_fn=total), model, batches[:1])["net.weight"].tolist() == [[15, 2]]


def test_the_scored_weights_are_those_that_train() -> None:
    start = fit([], max_epochs=0).model.state_dict()
    after = fit([SNIP(0.3, data=Batches(2))], lambda: TinyModel(optimizer=still), max_epochs=1)
    for name, mask in after.masks.items():
        assert torch.equal(after.weights[name], start[name] * mask)


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_layers_are_ranked_together_and_none_dies() -> None:
    result = fit([SNIP(3 / NUMEL, data=Batches(2))])
    assert counts(result) == [1, 1, 1]
    local = fit([SNIP(0.3, distribution=uniform, data=Batches(2))])
    assert counts(local) == [22, 614, 19] != counts(fit([SNIP(0.3, data=Batches(2))]))


def test_the_training_data_is_read_if_none_is_given() -> None:
    pictures = torch.cat([x for x, _ in Batches()._batches])
    labels = torch.cat([y for _, y in Batches()._batches])

    def run(shuffle: bool, **options: Any) -> Any:
        loader = DataLoader(TensorDataset(pictures, labels), batch_size=8, shuffle=shuffle)
        return fit([SNIP(0.1, **options)], data=loader, max_epochs=1)

    given = run(False, data=Batches(2), batches=2)
    assert given.history == run(False, batches=2).history
    assert given.history != run(False, batches=1).history
    assert run(True, seed=1).history == run(True, seed=1).history != run(True, seed=2).history


def test_more_batches_than_there_are() -> None:
    few = fit([SNIP(0.1, data=Batches(2), batches=2)], max_epochs=1)
    assert fit([SNIP(0.1, data=Batches(2), batches=9)], max_epochs=1).history == few.history


# Controls -------------------------------------------------------------------------


def test_shuffling_keeps_the_counts_of_layers_only() -> None:
    plain = fit([SNIP(0.1, data=Batches(2))])
    shuffled = fit([SNIP(0.1, data=Batches(2), shuffle=True)])
    assert counts(shuffled) == counts(plain)
    for name, mask in plain.masks.items():
        assert not torch.equal(shuffled.masks[name], mask)


def test_reinitializing_keeps_the_places_only() -> None:
    def run(**options: Any) -> Any:
        snip = SNIP(0.1, data=Batches(2), **options)
        return fit([snip], lambda: TinyModel(optimizer=still), max_epochs=1)

    plain, again = run(), run(reinitialize=True)
    for name, mask in plain.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert not torch.equal(again.weights[name][mask], plain.weights[name][mask])


# With other callbacks ---------------------------------------------------------------


def combination() -> list[Any]:
    return [
        SNIP(density=0.05, data=Batches(2)),
        RigL(density=0.05, update_interval=4),
    ]


def test_a_dynamic_method_goes_on_from_its_masks() -> None:
    alone, both = fit(combination()[:1]), fit(combination())
    assert both.history[0] == alone.history[0]
    assert counts(both) == counts(alone)
    assert sum(counts(both)) == round(0.05 * NUMEL)
    assert both.changes == 3  # the share that the fourth update drops comes to no weight


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
def test_resuming_the_combination_equals_not_stopping(step: int, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([*combination(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_it_prunes_what_an_earlier_callback_left() -> None:
    start = fit([StaticSparse(0.5, distribution=uniform)])
    both = fit([StaticSparse(0.5, distribution=uniform), SNIP(0.1, data=Batches(2))])
    assert sum(counts(both)) == round(0.1 * NUMEL)
    for name, mask in both.masks.items():
        assert not (mask & ~start.masks[name]).any()
    alone = fit([SNIP(0.1, data=Batches(2))])
    assert any(not torch.equal(mask, alone.masks[name]) for name, mask in both.masks.items())


def test_without_a_density_it_leaves_what_it_finds() -> None:
    start = fit([StaticSparse(0.5)])
    fit([StaticSparse(0.5), SNIP()]).assert_equal(start)  # its data is not even looked for


def test_pruning_goes_on_after_it() -> None:
    result = fit([SNIP(0.5, data=Batches(2)), Magnitude(0.1, at=0.5)])
    assert result.live == round(0.1 * NUMEL)
    assert result.changes == 1


def test_units_are_ranked_by_the_sum_of_their_weights() -> None:
    def total(model: Any, batch: Tensor) -> Tensor:
        value: Tensor = model.net(batch).sum()
        return value

    model = linear_model([[1.0, -1.0], [3.0, 0.0], [0.5, 1.0]])
    found = scores(SNIP(loss_fn=total), model, [torch.ones(1, 2)])["net.weight"]
    layer = Layer("net.weight", found, torch.ones(3, 2, dtype=torch.bool), structure=Rows())
    assert layer.reduce(found).tolist() == [2.0, 3.0, 1.5]


# Arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"batches": 0}, ValueError, r"^SNIP\(batches=0\): must be at least 1"),
        ({"batches": 1.5}, TypeError, r"^SNIP\(batches=1.5\): must be an int"),
        ({"data": 3}, TypeError, r"^SNIP\(data=3\): must be batches"),
        ({"loss_fn": 3}, TypeError, r"^SNIP\(loss_fn=3\): must be a function"),
        ({"mode": "test"}, ValueError, r"^SNIP\(mode='test'\): must be \"train\" or \"eval\""),
        ({"shuffle": 1}, TypeError, r"^SNIP\(shuffle=1\): must be True or False"),
        ({"reinitialize": None}, TypeError, r"^SNIP\(reinitialize=None\): must be True or False"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SNIP(0.5, **bad)
