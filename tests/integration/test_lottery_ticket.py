"""LotteryTicket: rounds in one fit, what goes back and when."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity import DensityMonitor, LotteryTicket, Rows, SparseCompute, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.testing import Batches, Result, TinyModel, fit

HIDDEN = "net.5.weight"


class Scheduled(TinyModel):
    """A learning rate that falls in every step of a round of 8."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Steps(Callback):
    """State as every batch begins."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.momentum: list[Tensor | None] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})
        self.rates.append(optimizer.param_groups[0]["lr"])
        state = optimizer.state.get(pl_module.net[5].weight, {}).get("momentum_buffer")
        self.momentum.append(None if state is None else state.clone())


def run(ticket: LotteryTicket, **options: Any) -> tuple[Result, Steps]:
    steps = Steps()
    return fit([ticket, steps], Scheduled, **options), steps


def test_every_round_prunes_the_same_share_of_what_is_left() -> None:
    result, _ = run(LotteryTicket(0.1, rounds=2, round_epochs=1))
    live = [sum(counts.values()) for _, counts in result.history]
    assert live == [2184] * 8 + [round(2184 * 0.1**0.5)] * 8 + [218] * 8


class Validated(Callback):
    """How many weights were live in each validation, and in the file that was written after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live: list[int] = []
        self.saved: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.live.append(sum(int(p.count_nonzero()) for p in sparse(pl_module.state_dict())))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "now.ckpt")
        weights = torch.load(self.folder / "now.ckpt", weights_only=True)["state_dict"]
        self.saved.append(sum(int(p.count_nonzero()) for p in sparse(weights)))


def sparse(weights: dict[str, Tensor]) -> list[Tensor]:
    return [weights[name] for name in ("net.0.weight", HIDDEN, "net.7.weight")]


def test_a_round_is_validated_and_saved_before_it_is_pruned(tmp_path: Path) -> None:
    class WithValidation(TinyModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def val_dataloader(self) -> Any:
            return Batches()

    look = Validated(tmp_path)
    fit([LotteryTicket(0.1, rounds=2), look], WithValidation)
    assert look.live == look.saved == [2184, round(2184 * 0.1**0.5), 218]


class OnePolicy(TinyModel):
    """A schedule that raises when it is stepped beyond one round of 32 steps, and its rates."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=32)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("treatment", ["rewind", "learning_rate"])
@pytest.mark.parametrize("rewind_to", [0, 1, 3])
def test_the_schedule_spans_one_round(treatment: Any, rewind_to: int) -> None:
    ticket = LotteryTicket(0.1, rounds=2, round_epochs=4, rewind_to=rewind_to, treatment=treatment)
    steps = Steps()
    fit([ticket, steps], OnePolicy, max_epochs=4 + 2 * (4 - rewind_to))
    first = steps.rates[:32]
    assert steps.rates == first + 2 * first[8 * rewind_to :]


@pytest.mark.parametrize("rewind_to", [0, 1])
def test_everything_goes_back(rewind_to: int) -> None:
    ticket = LotteryTicket(0.1, rounds=2, round_epochs=2, rewind_to=rewind_to)
    _, steps = run(ticket, max_epochs=2 + 2 * (2 - rewind_to))
    k = 8 * rewind_to
    for start in (16, 32 - k):
        for name, value in steps.states[start].items():
            early = steps.states[k][name]
            if name in ("net.0.weight", HIDDEN, "net.7.weight"):
                alive = value != 0
                assert torch.equal(value[alive], early[alive])
                assert (~alive).any()
            else:
                assert torch.equal(value, early), name
        assert steps.rates[start] == steps.rates[k]
        momentum = steps.momentum[start]
        if k == 0:
            assert momentum is None
        else:
            assert momentum is not None
            assert torch.equal(momentum, steps.momentum[k] * (steps.states[start][HIDDEN] != 0))
    assert steps.rates[k:16] == steps.rates[16 : 32 - k]


def test_the_survivors_are_the_largest_of_the_whole_net() -> None:
    names = ["net.0.weight", HIDDEN, "net.7.weight"]
    ticket = LotteryTicket(0.1, rounds=1, round_epochs=1, treatment="fine_tune")
    result, steps = run(ticket, max_epochs=2)
    dense = fit([], Scheduled, max_epochs=1).weights
    sizes = torch.cat([dense[name].abs().flatten() for name in names])
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[sizes.topk(218).indices] = True
    kept = torch.cat([(steps.states[8][name] != 0).flatten() for name in names])
    assert torch.equal(kept, chosen)
    assert result.live == 218


def test_learning_rate_rewinding_keeps_the_weights() -> None:
    ticket = LotteryTicket(0.1, rounds=1, round_epochs=1, treatment="learning_rate")
    _, steps = run(ticket, max_epochs=2)
    dense = fit([], Scheduled, max_epochs=1).weights
    assert torch.equal(steps.states[8]["net.5.bias"], dense["net.5.bias"])
    assert steps.rates[8] == steps.rates[0]
    assert steps.momentum[8] is None


def test_fine_tuning_sends_nothing_back() -> None:
    _, steps = run(
        LotteryTicket(0.1, rounds=1, round_epochs=1, treatment="fine_tune"), max_epochs=2
    )
    assert steps.rates[8] != steps.rates[0]
    assert steps.momentum[8] is not None


class Rounds(Callback):
    """Masks and weights at the first batch of every epoch."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        keeper = MaskKeeper.of(trainer)
        if batch_idx == 0 and keeper is not None and keeper.masks is not None:
            state = pl_module.state_dict()
            self.masks.append({kept.name: kept.mask.clone() for kept in keeper.masks})
            self.weights.append({name: state[name].clone() for name in self.masks[-1]})


@pytest.mark.parametrize("storage", [[], [SparseCompute("csr")]], ids=["dense", "csr"])
@pytest.mark.parametrize("before", [[], [StaticSparse(0.5)]], ids=["alone", "after another"])
def test_reinitialized_weights_are_those_of_the_start_in_other_places(
    before: list[Callback], storage: list[Callback]
) -> None:
    ticket, look = LotteryTicket(0.1, rounds=2, treatment="reinitialize"), Rounds()
    steps = Steps()
    fit([*copy.deepcopy([*before, ticket, *storage]), look, steps], Scheduled)
    drawn: list[Tensor] = []
    for masks, weights in zip(look.masks[1:], look.weights[1:], strict=True):
        for name, mask in masks.items():
            start = look.weights[0][name]
            live = weights[name][mask]
            assert 0 < len(live) < mask.numel()
            assert (live != 0).all()
            assert set(live.tolist()) <= set(start.flatten().tolist())
            assert (live != start[mask]).float().mean() > 0.8
            assert not weights[name][~mask].any()
        drawn.append(weights[HIDDEN])
    both = (drawn[0] != 0) & (drawn[1] != 0)
    assert (drawn[0] != drawn[1])[both].float().mean() > 0.8  # another draw for every round
    for begins in (8, 16):
        assert steps.rates[begins] == steps.rates[0]
        assert steps.momentum[begins] is None
        assert torch.equal(steps.states[begins]["net.5.bias"], steps.states[0]["net.5.bias"])


def test_another_trainer_begins_anew() -> None:
    ticket, model = LotteryTicket(0.1, rounds=2), TinyModel()
    for _ in range(2):
        look = Rounds()
        fit([ticket, look], lambda: model)
        live = [sum(int(m.count_nonzero()) for m in masks.values()) for masks in look.masks]
        assert live == [2184, round(2184 * 0.1**0.5), 218]


def test_weights_that_are_no_numbers_end_the_training() -> None:
    class Broken(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.net[5].weight.data[0, 0] = torch.nan

    with pytest.raises(NonFiniteScoreError, match=r"^LotteryTicket: scores.1.: 1 of 2048"):
        fit([LotteryTicket(0.1, rounds=2), Broken()])


def test_there_is_one_ticket() -> None:
    class Mine(LotteryTicket):
        pass

    first = LotteryTicket(0.1, rounds=2, exclude=HIDDEN)
    with pytest.raises(MisconfigurationException, match="has two"):
        fit([first, Mine(0.1, rounds=2, include=HIDDEN)])


def test_data_without_a_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Batches())

    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert fit([LotteryTicket(0.1, rounds=2)], data=data).live == 218


def test_schedules_in_a_row_go_back() -> None:
    class InARow(TinyModel):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
            falls = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
            both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, falls], [2])
            return [optimizer], [{"scheduler": both, "interval": "step"}]

    steps = Steps()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter in")  # torch's own call
        fit([LotteryTicket(0.1, rounds=2), steps], InARow)
    assert len(set(steps.rates[:8])) > 3
    assert steps.rates == 3 * steps.rates[:8]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    "other",
    [
        {"rewind_to": 1, "max_epochs": 4},
        {"rounds": 5, "round_epochs": 1},
        {"treatment": "fine_tune"},
    ],
)
def test_a_checkpoint_of_other_rounds_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    rounds = {"rounds": 2, "round_epochs": 2}
    ticket = LotteryTicket(0.1, **rounds)  # type: ignore[arg-type]
    fit([ticket, saver], Scheduled, max_epochs=6, enable_checkpointing=True)
    epochs = other.pop("max_epochs", 6)
    changed = LotteryTicket(0.1, **{**rounds, **other})
    path = str(tmp_path / "step=12.ckpt")
    with pytest.raises(MisconfigurationException, match=r"was made with .*'rounds': 2"):
        fit(
            [changed, saver],
            Scheduled,
            max_epochs=epochs,
            enable_checkpointing=True,
            ckpt_path=path,
        )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_middle_of_an_epoch_is_not_its_start(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="dense", every_n_train_steps=3)
    fit([saver], Scheduled, max_epochs=1, max_steps=3, enable_checkpointing=True)
    path = str(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match=r"epoch 0 with batch 3.*not known"):
        run(LotteryTicket(0.1, rounds=2), ckpt_path=path)


def test_nothing_else_happens_at_density_one_without_going_back() -> None:
    one = fit([LotteryTicket(1.0, rounds=2, treatment="fine_tune")])
    one.masks = {}
    one.assert_equal(fit([]))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [2, 8, 12, 16, 20, 24, 28])
@pytest.mark.parametrize(
    ("treatment", "rewind_to"), [("rewind", 0), ("rewind", 1), ("reinitialize", 0)]
)
def test_resume_equals_not_stopping(
    treatment: Any, step: int, rewind_to: int, tmp_path: Path
) -> None:
    def train(**options: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        ticket = LotteryTicket(
            0.1, rounds=2, round_epochs=2, rewind_to=rewind_to, treatment=treatment
        )
        options = {"max_epochs": 2 + 2 * (2 - rewind_to), **options}
        return fit([ticket, saver], Scheduled, enable_checkpointing=True, **options)

    whole = train()
    rest = train(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_units_and_monitor() -> None:
    result, _ = run(LotteryTicket(0.5, rounds=2, structure=Rows()))
    assert sum(int(mask.flatten(1).any(1).sum()) for mask in result.masks.values()) == 14
    fit([LotteryTicket(0.2, rounds=2), DensityMonitor(print_tables=False)], Scheduled)


def test_the_rounds_must_fill_the_training() -> None:
    with pytest.raises(MisconfigurationException, match=r"LotteryTicket.*max_epochs=6.*not 3"):
        run(LotteryTicket(0.1, rounds=2, round_epochs=2))
    with pytest.raises(MisconfigurationException, match=r"LotteryTicket.*max_epochs=4.*not 3"):
        run(LotteryTicket(0.1, rounds=2, round_epochs=2, rewind_to=1))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_to_go_back_to_must_have_been_seen(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="dense")
    fit([saver], Scheduled, max_epochs=2, enable_checkpointing=True)
    path = str(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match=r"rewind_to=0.* epoch 2.*not known"):
        run(LotteryTicket(0.1, rounds=1, round_epochs=3), max_epochs=6, ckpt_path=path)
    ticket = LotteryTicket(0.1, rounds=1, round_epochs=3, rewind_to=2)
    assert run(ticket, max_epochs=4, ckpt_path=path)[0].live == 218


def test_weights_that_nobody_steps_are_pruned_too() -> None:
    class Partly(TinyModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(list(self.parameters())[1:], lr=0.1)

    assert fit([LotteryTicket(0.1, rounds=2)], Partly).live == 218


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"rounds": 0}, ValueError),
        ({"rounds": 1.5}, TypeError),
        ({"round_epochs": 0}, ValueError),
        ({"round_epochs": "all"}, TypeError),
        ({"rewind_to": -1}, ValueError),
        ({"rewind_to": 1}, ValueError),
        ({"rewind_to": 0.5}, TypeError),
        ({"rewind_to": "epoch"}, TypeError),
        ({"treatment": "reset"}, ValueError),
        ({"treatment": "fine_tune", "rewind_to": 1, "round_epochs": 2}, ValueError),
        ({"treatment": "reinitialize", "rewind_to": 1, "round_epochs": 2}, ValueError),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^LotteryTicket\({next(iter(bad))}="):
        LotteryTicket(0.1, **bad)
