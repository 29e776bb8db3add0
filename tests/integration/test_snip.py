"""SNIP: what it keeps, its controls, and other callbacks before and after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import (
    FORCE,
    SET,
    SNIP,
    IterSNIP,
    Magnitude,
    MaskCallback,
    NeuralTangentTransfer,
    RigL,
    Rows,
    SparseCompute,
    StaticSparse,
    SynFlow,
    uniform,
)
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


def output_of(model: Any, batch: Any) -> Tensor:
    """The logits."""
    logits: Tensor = model.net(batch[0])
    return logits


def transfer(density: float, **options: Any) -> MaskCallback:
    """Neural tangent transfer, in few steps."""
    return NeuralTangentTransfer(
        density, steps=3, mask_interval=1, samples=4, forward_fn=output_of, **options
    )


# Some prune in rounds, and one moves weights; controls look at what was there before all that.
STARTS: dict[str, Callable[..., MaskCallback]] = {
    "SNIP": SNIP,
    "IterSNIP": functools.partial(IterSNIP, rounds=3),
    "FORCE": functools.partial(FORCE, rounds=3),
    "NeuralTangentTransfer": transfer,
}


@pytest.mark.parametrize("structure", [None, Rows()], ids=["weights", "rows"])
@pytest.mark.parametrize("name", STARTS)
def test_shuffling_revives_nothing(name: str, structure: Any) -> None:
    first = StaticSparse(0.5, distribution=uniform, structure=structure)

    def run(**options: Any) -> Any:
        method = STARTS[name](0.25, data=Batches(2), distribution=uniform, **options)
        return fit([first, method], max_epochs=1)

    plain, shuffled, found = run(), run(shuffle=True), fit([first], max_epochs=1)
    assert counts(shuffled) == counts(plain)
    for key, mask in found.masks.items():
        assert not (shuffled.masks[key] & ~mask).any()
    assert any(not torch.equal(shuffled.masks[key], mask) for key, mask in plain.masks.items())


def test_shuffling_draws_from_all_that_was_there() -> None:
    def kept(**options: Any) -> Tensor:
        first = StaticSparse(0.5, distribution=uniform)
        method = IterSNIP(0.1, rounds=2, data=Batches(2), distribution=uniform, **options)
        return fit([first, method], max_epochs=1).masks["net.5.weight"]

    # 205 of 1024: by chance a fifth of them lies where the scores would have put it.
    assert 20 < int((kept() & kept(shuffle=True)).sum()) < 65


@pytest.mark.parametrize("storage", ["dense", "csr"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_reinitializing_deals_out_what_was_live(name: str, shuffle: bool, storage: str) -> None:
    sparse = fit([StaticSparse(0.2)], max_epochs=1).weights

    def loaded() -> TinyModel:
        model = TinyModel(optimizer=still)
        model.load_state_dict(sparse)
        return model

    method = STARTS[name](0.1, data=Batches(2), shuffle=shuffle, reinitialize=True)
    kept = [SparseCompute("csr")] if storage == "csr" else []
    result = fit([StaticSparse(), method, *kept], loaded, max_epochs=1)
    assert result.live == round(0.1 * NUMEL)
    for key, mask in result.masks.items():
        assert result.weights[key][mask].all()
        if name != "NeuralTangentTransfer":
            assert set(result.weights[key][mask].tolist()) <= set(sparse[key].flatten().tolist())


def test_controls_of_a_start_that_moves_weights() -> None:
    for options in ({"shuffle": True}, {"reinitialize": True}):
        result = fit([transfer(0.1, data=Batches(2), **options)], max_epochs=1)
        assert all(result.weights[key][mask].all() for key, mask in result.masks.items())


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


def without_data_or_gradients() -> list[Any]:
    return [
        SynFlow(density=0.05, rounds=5, data=Batches(2), forward_fn=output_of),
        SET(density=0.05),
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [4, 8, 12])
@pytest.mark.parametrize("callbacks", [combination, without_data_or_gradients])
def test_resuming_the_combination_equals_not_stopping(
    callbacks: Callable[[], list[Any]], step: int, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([*callbacks(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    assert whole.live == round(0.05 * NUMEL)
    assert whole.changes == {combination: 3, without_data_or_gradients: 2}[callbacks]
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
