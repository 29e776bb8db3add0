"""run_imp: a Trainer per round, what goes back, and going on after every kind of death."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import (
    NM,
    DensityMonitor,
    LotteryTicket,
    RigL,
    Rows,
    StaticSparse,
    uniform,
)
from lightning_sparsity.core import files
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.lottery import Round, Ticket, run_imp
from lightning_sparsity.testing import Batch, Batches, ManualModel, TinyModel, fit, quiet_trainer

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SPARSE = ["net.0.weight", "net.5.weight", "net.7.weight"]
HIDDEN = "net.5.weight"


class Scheduled(TinyModel):
    """A learning rate that falls in every step of a round of 16; logs its loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Steps(Callback):
    """State as every batch begins; dies where it is told to."""

    def __init__(self, dies_at: int = -1) -> None:
        self.dies_at = dies_at
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.momentum: list[Tensor | None] = []
        self.inputs: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self.dies_at:
            raise Killed
        optimizer = trainer.optimizers[0]
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})
        self.rates.append(optimizer.param_groups[0]["lr"])
        state = optimizer.state.get(pl_module.net[5].weight, {}).get("momentum_buffer")
        self.momentum.append(None if state is None else state.clone())
        self.inputs.append(batch[0])


class Killed(Exception):
    """Stands for the end of the process."""


def shuffled() -> DataLoader[Any]:
    """Batches in an order that the global generator draws."""
    pictures, labels = zip(*Batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(pictures), torch.cat(labels)), 8, shuffle=True)


def run(
    directory: Path,
    seen: list[Steps] | None = None,
    *,
    data: Callable[[], Any] = shuffled,
    module: Callable[[], pl.LightningModule] = Scheduled,
    callbacks: Callable[[], list[Callback]] = list,
    dies: tuple[int, int] | None = None,
    random: int = 3,
    checkpoints: bool = False,
    **options: Any,
) -> list[Round]:
    """Two epochs of 8 batches per round; ``dies``: in which training, before which step."""
    seen = [] if seen is None else seen

    def make_trainer() -> pl.Trainer:
        seen.append(Steps(dies[1] if dies and len(seen) == dies[0] else -1))
        return quiet_trainer(
            [seen[-1], *callbacks()], max_epochs=2, enable_checkpointing=checkpoints
        )

    pl.seed_everything(random, verbose=False)
    options = {"rounds": 2, "density": 0.1, **options}
    return run_imp(make_trainer, module, data(), directory=directory, **options)


def assert_same(first: list[Round], second: list[Round]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one.number, one.live, one.density) == (other.number, other.live, other.density)
        assert one.metrics == other.metrics
        for a, b in (
            (one.ticket.masks, other.ticket.masks),
            (one.ticket.weights, other.ticket.weights),
            (one.weights, other.weights),
        ):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


# rounds and what goes back ------------------------------------------------------------


def test_every_round_prunes_the_same_share_of_what_is_left(tmp_path: Path) -> None:
    rounds = run(tmp_path)
    assert [r.live for r in rounds] == [NUMEL, round(NUMEL * 0.1**0.5), round(NUMEL * 0.1)]
    assert [r.number for r in rounds] == [0, 1, 2]
    tickets = [r.ticket for r in rounds]
    for found, ticket, after in zip(rounds, tickets, tickets[1:], strict=False):
        sizes = torch.cat([found.weights[name].abs().flatten() for name in SPARSE])
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        chosen[sizes.topk(after.live).indices] = True
        assert torch.equal(torch.cat([after.masks[n].flatten() for n in SPARSE]), chosen)
        assert all(not (after.masks[n] & ~ticket.masks[n]).any() for n in SPARSE)
        assert ticket.density == found.density
    for found, ticket in zip(rounds, tickets, strict=True):
        for name in SPARSE:
            assert not found.weights[name][~ticket.masks[name]].any()
            assert not ticket.weights[name][~ticket.masks[name]].any()
            assert ticket.weights[name][ticket.masks[name]].all()
        assert list(ticket.weights) == list(TinyModel().state_dict())
        assert set(found.metrics) == {"loss"}
    assert sorted(file.name for file in (tmp_path / "round_01").iterdir()) == [
        "ticket.pt",
        "trained.pt",
    ]


@pytest.mark.parametrize("rewind_to", [0, 3, 8, 0.25])
def test_everything_goes_back(rewind_to: float, tmp_path: Path) -> None:
    seen: list[Steps] = []
    # a stateful loader, so that the middle of an epoch can be gone back to
    rounds = run(tmp_path, seen, rewind_to=rewind_to, data=Batches)
    k = 4 if rewind_to == 0.25 else int(rewind_to)
    first = seen[0]
    assert [len(s.rates) for s in seen] == [16, 16 - k, 16 - k]
    for later, found in zip(seen[1:], rounds[1:], strict=True):
        ticket = found.ticket
        for name, value in later.weights[0].items():
            mask = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            expected = first.weights[k][name].masked_fill(~mask, 0)
            assert torch.equal(value, expected), name
            assert torch.equal(ticket.weights[name], expected), name
        assert later.rates == first.rates[k:]
        momentum = later.momentum[0]
        if k == 0:
            assert momentum is None
        else:
            assert torch.equal(momentum, first.momentum[k] * ticket.masks[HIDDEN])  # type: ignore[arg-type, operator]
        for a, b in zip(later.inputs, first.inputs[k:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rewind_to", [0, 8])
def test_the_order_of_the_data_is_that_of_the_first_round(rewind_to: int, tmp_path: Path) -> None:
    seen: list[Steps] = []
    run(tmp_path, seen, rewind_to=rewind_to)
    for later in seen[1:]:
        pairs = zip(later.inputs, seen[0].inputs[rewind_to:], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(seen[0].inputs[0], seen[0].inputs[8])


@pytest.mark.parametrize("rewind_to", [0, 3])
def test_learning_rate_rewinding_keeps_the_weights(rewind_to: int, tmp_path: Path) -> None:
    seen: list[Steps] = []
    rounds = run(tmp_path, seen, rewind_to=rewind_to, treatment="learning_rate", data=Batches)
    for before, later, found in zip(rounds, seen[1:], rounds[1:], strict=False):
        ticket = found.ticket
        for name, value in later.weights[0].items():
            mask = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, before.weights[name].masked_fill(~mask, 0)), name
            assert torch.equal(value, ticket.weights[name]), name
        assert later.rates == seen[0].rates[rewind_to:]


@pytest.mark.slow
def test_weights_drawn_anew(tmp_path: Path) -> None:
    rounds = run(tmp_path / "a", treatment="reinitialize", seed=5)
    # whatever the global generator draws, and wherever it stands
    again = run(tmp_path / "b", treatment="reinitialize", seed=5, module=noisy_module)
    other = run(tmp_path / "c", treatment="reinitialize", seed=6)
    rewound = run(tmp_path / "d")
    first, *others = (r[1].ticket for r in (rounds, again, other, rewound))
    for number, ticket in enumerate(others):
        both = first.masks[HIDDEN] & ticket.masks[HIDDEN]
        mine, theirs = (t.weights[HIDDEN][both] for t in (first, ticket))
        assert torch.equal(mine, theirs) == (number == 0)
    assert all(torch.equal(first.masks[n], others[2].masks[n]) for n in SPARSE)
    live = rounds[2].ticket.masks[HIDDEN]
    new, old = rounds[2].ticket.weights[HIDDEN][live], rounds[1].ticket.weights[HIDDEN][live]
    assert not torch.equal(new, old), "every round draws its own"
    assert new.abs().max() < 0.1, "as a linear layer with 128 inputs starts"


def noisy_module() -> Scheduled:
    module = Scheduled()
    torch.rand(7)
    return module


def test_drawing_anew_leaves_random_numbers_alone(tmp_path: Path) -> None:
    states: list[Tensor] = []

    def callbacks() -> list[Callback]:
        states.append(torch.get_rng_state())
        return []

    for treatment in ("rewind", "reinitialize"):
        run(tmp_path / treatment, treatment=treatment, callbacks=callbacks)
    assert all(torch.equal(a, b) for a, b in zip(states[:3], states[3:], strict=True))


# against what there was ---------------------------------------------------------------


def test_the_first_ticket_is_that_of_the_callback(tmp_path: Path) -> None:
    (_, found) = run(tmp_path, rounds=1, module=TinyModel, data=Batches)
    inside = fit([LotteryTicket(0.1, rounds=1, round_epochs=2)], max_epochs=4)
    ticket = found.ticket
    assert all(torch.equal(inside.masks[name], ticket.masks[name]) for name in SPARSE)


@pytest.mark.parametrize("treatment", ["rewind", "learning_rate", "reinitialize"])
def test_static_training_of_the_last_ticket(treatment: str, tmp_path: Path) -> None:
    found = run(tmp_path, treatment=treatment)[-1]

    def module() -> Scheduled:
        made = Scheduled()
        made.load_state_dict(found.ticket.weights)
        return made

    trained = fit([StaticSparse()], module, data=shuffled(), max_epochs=2)
    assert all(torch.equal(trained.masks[n], found.ticket.masks[n]) for n in SPARSE)
    assert trained.weights.keys() == found.weights.keys()
    for name, value in trained.weights.items():
        assert torch.equal(value, found.weights[name]), name


def test_weights_that_are_zero_are_live_all_the_same(tmp_path: Path) -> None:
    def module() -> Scheduled:
        made = Scheduled()
        nn.init.zeros_(made.net[7].weight)
        return made

    found = run(tmp_path, module=module)[-1]
    last = found.ticket.masks["net.7.weight"]
    assert last.any()
    assert not found.ticket.weights["net.7.weight"].any()
    assert torch.equal(found.weights["net.7.weight"] != 0, last)


def test_files_are_plain(tmp_path: Path) -> None:
    found = run(tmp_path)[-1]
    ticket = torch.load(tmp_path / "round_02" / "ticket.pt", weights_only=True)
    bare = TinyModel()
    bare.load_state_dict(ticket["weights"])
    assert sum(int(mask.sum()) for mask in ticket["masks"].values()) == found.live
    trained = torch.load(tmp_path / "round_02" / "trained.pt", weights_only=True)
    bare.load_state_dict(trained["weights"])
    assert trained["metrics"] == found.metrics


def test_tickets_are_saved_and_loaded(tmp_path: Path) -> None:
    ticket = Ticket({"w": torch.tensor([True, False])}, {"w": torch.tensor([2.0, 0.0])})
    ticket.save(tmp_path / "deep" / "ticket.pt")
    again = Ticket.load(tmp_path / "deep" / "ticket.pt")
    assert torch.equal(again.masks["w"], ticket.masks["w"])
    assert torch.equal(again.weights["w"], ticket.weights["w"])
    assert (again.live, again.density) == (1, 0.5)


# what is pruned -----------------------------------------------------------------------


def lives(found: Round) -> list[int]:
    return [int(mask.sum()) for mask in found.ticket.masks.values()]


def test_a_fifth_of_what_is_left_is_the_default(tmp_path: Path) -> None:
    assert [r.live for r in run(tmp_path, density=None)] == [2184, 1747, 1397]


def test_a_density_for_every_round(tmp_path: Path) -> None:
    found = run(tmp_path, rounds=None, density=[0.6, 0.5, 0.05])
    assert [r.live for r in found] == [NUMEL, round(0.6 * NUMEL), NUMEL // 2, round(0.05 * NUMEL)]


def test_a_density_for_every_round_of_a_distribution(tmp_path: Path) -> None:
    found = run(tmp_path, distribution=uniform, rounds=2, density=(0.5, 0.25))
    assert lives(found[1]) == [36, 1024, 32]
    assert lives(found[2]) == [18, 512, 16]


def test_layer_by_layer(tmp_path: Path) -> None:
    found = run(tmp_path, distribution=uniform, density=0.25)
    assert lives(found[-1]) == [18, 512, 16]
    assert lives(found[1]) == [36, 1024, 32]


def test_densities_by_name(tmp_path: Path) -> None:
    found = run(tmp_path, distribution={"net.7": 0.5, "*": 0.25}, density=None)
    assert lives(found[-1]) == [18, 512, 32]
    assert lives(found[0]) == [72, 2048, 64]


def test_units(tmp_path: Path) -> None:
    found = run(tmp_path, structure=Rows(), density=0.5)[-1]
    rows = [mask.flatten(1) for mask in found.ticket.masks.values()]
    assert sum(int(mask.any(1).sum()) for mask in rows) == 14
    assert all(torch.equal(mask.any(1), mask.all(1)) for mask in rows)


def test_patterns(tmp_path: Path) -> None:
    found = run(tmp_path, structure=NM(1, 4), density=None, exclude="net.0")
    counts = [r.ticket.masks[HIDDEN].view(-1, 4).sum(1).unique().tolist() for r in found]
    assert counts == [[4], [2], [1]]
    assert list(found[-1].ticket.masks) == SPARSE[1:]


# going on -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    return run(tmp_path_factory.mktemp("whole"), rewind_to=8)


@pytest.mark.parametrize("step", [8, 11, 15])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_killed_inside_a_round(number: int, step: int, whole: list[Round], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, rewind_to=8, dies=(number, step))
    seen: list[Steps] = []
    # another seed: nothing may depend on where the second process starts
    assert_same(run(tmp_path, seen, rewind_to=8, random=77), whole)
    assert [len(s.rates) for s in seen] == [8] * (3 - number)


@pytest.mark.parametrize("step", [0, 5])
def test_killed_before_the_moment_to_go_back_to(
    step: int, whole: list[Round], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, rewind_to=8, dies=(0, step))
    seen: list[Steps] = []
    assert_same(run(tmp_path, seen, rewind_to=8, random=77), whole)
    assert len(seen[0].rates) == 16


def test_killed_again_and_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_every": 3, "data": Batches, "rounds": 1}
    expected = run(tmp_path / "whole", **options)
    # in the second training, and then in the first that there is: finished rounds make none
    for dies in ((1, 4), (0, 8), (0, 13)):
        with pytest.raises(Killed):
            run(tmp_path / "killed", dies=dies, **options)
    seen: list[Steps] = []
    found = run(tmp_path / "killed", seen, random=77, **options)
    assert len(seen[0].rates) == 16 - 12
    for one, other in zip(found, expected, strict=True):  # metrics are those of what was left
        assert all(torch.equal(one.weights[n], other.weights[n]) for n in one.weights)
        assert all(torch.equal(one.ticket.masks[n], other.ticket.masks[n]) for n in SPARSE)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_between_rounds(number: int, whole: list[Round], tmp_path: Path) -> None:
    made = 0

    def callbacks() -> list[Callback]:
        nonlocal made
        made += 1
        if made == number + 1:
            raise Killed
        return []

    with pytest.raises(Killed):
        run(tmp_path, rewind_to=8, callbacks=callbacks)
    seen: list[Steps] = []
    assert_same(run(tmp_path, seen, rewind_to=8, random=77), whole)
    assert len(seen) == 3 - number


@pytest.mark.parametrize("nth", range(11))
def test_killed_in_the_middle_of_a_file(
    nth: int, whole: list[Round], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    replace = files.os.replace

    def half(unfinished: Path, path: Path) -> None:
        nonlocal written
        if path.suffix in (".pt", ".ckpt"):
            written += 1
            if written == nth + 1:
                content = unfinished.read_bytes()
                unfinished.write_bytes(content[: len(content) // 2])
                raise Killed
        replace(unfinished, path)

    monkeypatch.setattr(files.os, "replace", half)
    with pytest.raises(Killed):
        run(tmp_path, rewind_to=8)
    monkeypatch.undo()
    assert_same(run(tmp_path, rewind_to=8, random=3 if nth < 2 else 77), whole)


@pytest.mark.parametrize("name", ["round_01/trained.pt", "round_02/ticket.pt"])
def test_a_file_cut_short_is_no_finished_round(
    name: str, whole: list[Round], tmp_path: Path
) -> None:
    run(tmp_path, rewind_to=8)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-30])
    seen: list[Steps] = []
    assert_same(run(tmp_path, seen, rewind_to=8, random=77), whole)
    assert len(seen) == 1


def test_a_resume_point_cut_short_begins_the_round_again(
    whole: list[Round], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, dies=(1, 12))
    last = tmp_path / "round_01" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    seen: list[Steps] = []
    found = run(tmp_path, seen, random=77)
    assert len(seen[0].rates) == 16
    assert_same(found, run(tmp_path.parent / f"{tmp_path.name}_whole"))


def test_a_finished_call_trains_nothing(tmp_path: Path) -> None:
    first, seen = run(tmp_path), []  # type: ignore[var-annotated]
    assert_same(run(tmp_path, seen, random=77), first)
    assert seen == []


def test_a_folder_moves(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "here", dies=(1, 12))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_same(run(tmp_path / "there", random=77), run(tmp_path / "whole"))


# what Trainers bring ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_other_callbacks(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            DensityMonitor(print_tables=False),
            EarlyStopping("loss", patience=9, check_on_train_epoch_end=True),
            ModelCheckpoint(tmp_path / str(len(seen)), monitor="loss", filename="best"),
        ]

    seen: list[Steps] = []
    options: dict[str, Any] = {"callbacks": callbacks, "checkpoints": True, "rewind_to": 8}
    with pytest.raises(Killed):
        run(tmp_path / "imp", seen, dies=(2, 12), **options)
    found = run(tmp_path / "imp", seen, **options)
    assert [r.metrics["density"] for r in found] == pytest.approx([r.density for r in found])
    for one, other in zip(found, run(tmp_path / "plain", rewind_to=8), strict=True):
        assert all(torch.equal(other.weights[name], value) for name, value in one.weights.items())
    best = torch.load(next((tmp_path / "4").glob("*.ckpt")), weights_only=True)["state_dict"]
    assert not best[HIDDEN][~found[-1].ticket.masks[HIDDEN]].any()


@pytest.mark.parametrize("treatment", ["rewind", "learning_rate"])
def test_averaged_weights(treatment: str, tmp_path: Path) -> None:
    seen: list[Steps] = []
    rounds = run(
        tmp_path,
        seen,
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)],
        rewind_to=8,
        treatment=treatment,
    )
    for before, later, found in zip(rounds, seen[1:], rounds[1:], strict=False):
        start = seen[0].weights[8] if treatment == "rewind" else before.weights
        for name, mask in found.ticket.masks.items():
            assert torch.equal(later.weights[0][name], start[name] * mask)
            assert not found.weights[name][~mask].any()


def test_two_optimizers_are_ranked_together(tmp_path: Path) -> None:
    found = run(tmp_path, module=lambda: ManualModel(), data=Batches, rewind_to=6)
    assert [r.live for r in found] == [NUMEL, round(NUMEL * 0.1**0.5), round(NUMEL * 0.1)]


def test_layers_made_late(tmp_path: Path) -> None:
    class Late(Scheduled):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.net, nn.Identity):
                self.net = TinyModel().net

    for treatment in ("rewind", "reinitialize"):
        found = run(tmp_path / treatment, module=Late, treatment=treatment)
        assert found[-1].live == round(0.1 * NUMEL)


def test_nothing_of_ours_is_left_in_the_module(tmp_path: Path) -> None:
    modules: list[TinyModel] = []

    def module() -> TinyModel:
        modules.append(Scheduled())
        return modules[-1]

    found = run(tmp_path, module=module)
    for made, left in zip(modules, found, strict=True):
        assert list(made.state_dict()) == list(TinyModel().state_dict())
        assert all(torch.equal(made.state_dict()[k], v) for k, v in left.weights.items())
        keeper = MaskKeeper.of(made.trainer)
        assert keeper is not None
        assert keeper.masks is None


# what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "must be at least 1"),
        ({"rounds": 1.5}, TypeError, "must be an int"),
        ({"density": 1.5}, ValueError, "density must lie in"),
        ({"density": "0.1"}, TypeError, "density must be a number"),
        ({"density": [0.1, 0.5], "rounds": None}, ValueError, "must fall"),
        ({"density": [], "rounds": None}, ValueError, "must fall"),
        ({"density": [0.5, 0.0], "rounds": None}, ValueError, "density must lie in"),
        ({"density": [0.5, "0.1"], "rounds": None}, TypeError, "density must be a number"),
        ({"rounds": 3, "density": [0.5, 0.1]}, ValueError, "2 densities are for 2 rounds"),
        ({"rounds": None}, TypeError, "must be an int"),
        ({"drop_fraction": 1.0, "density": None}, ValueError, "above 0 and below 1"),
        ({"drop_fraction": "a fifth", "density": None}, TypeError, "must be a number"),
        ({"drop_fraction": 0.2, "density": 0.1}, ValueError, "leave one of the two out"),
        ({"rewind_to": 1.0}, ValueError, "a fraction of a round"),
        ({"rewind_to": -1}, ValueError, "an optimizer step"),
        ({"rewind_to": "epoch"}, TypeError, "an optimizer step"),
        ({"treatment": "fine_tune"}, ValueError, "rewind, learning_rate, reinitialize"),
        ({"save_every": 0}, ValueError, "positive number"),
        ({"save_every": "step"}, ValueError, "positive number"),
        ({"distribution": 3}, TypeError, "must be a distribution"),
        ({"structure": "rows"}, TypeError, "must be a structure"),
        ({"seed": 0.5}, TypeError, "must be an int or None"),
    ],
)
def test_bad_arguments(
    bad: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    name = next(iter(bad))
    with pytest.raises(error, match=rf"^run_imp\({name}=.*{message}"):
        run(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists(), "nothing is written"


def test_new_weights_have_no_later_moment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_imp\(treatment=.*leave rewind_to out"):
        run(tmp_path, treatment="reinitialize", rewind_to=3)


def test_another_call_in_the_same_folder(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    with pytest.raises(MisconfigurationException, match="density: 0.1 then, 0.2 now") as caught:
        run(tmp_path, rounds=1, density=0.2, seed=9)
    assert "seed: 3 then, 9 now" in str(caught.value)
    assert "rounds" not in str(caught.value).partition("arguments:")[2].partition("\nGive")[0]


def test_mask_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="run_imp makes the masks.*leave RigL out"):
        run(tmp_path, callbacks=lambda: [RigL(0.1)])


def test_trainers_must_be_new(tmp_path: Path) -> None:
    trainer = quiet_trainer([], max_epochs=1)
    with pytest.raises(ValueError, match="the same Trainer"):
        run_imp(lambda: trainer, TinyModel, Batches(), directory=tmp_path, rounds=1)
    with pytest.raises(TypeError, match="must make a Trainer"):
        run_imp(list, TinyModel, Batches(), directory=tmp_path / "b", rounds=1)  # type: ignore[arg-type]


def test_the_moment_must_come(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewind_to=17\): round 0 made 16 optimizer steps"):
        run(tmp_path, rewind_to=17)


def test_names_that_match_nothing_are_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_imp\(distribution=.*'net.9' matches no"):
        run(tmp_path, distribution={"net.9": 0.5, "*": 0.25}, density=None)


SCRIPT = """
import json, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import seed_everything
from lightning_sparsity.lottery import run_imp
from lightning_sparsity.testing import TinyModel, quiet_trainer

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(64, 1, 6, 6, generator=generator), torch.randint(4, (64,), generator=generator)
)
seed_everything(3, verbose=False)
rounds = run_imp(
    lambda: quiet_trainer([], max_epochs=2, devices=2, strategy="ddp"),
    TinyModel,
    DataLoader(data, batch_size=8),
    directory=sys.argv[1],
    rounds=2,
    density=0.1,
    rewind_to=2,
)
print(json.dumps([found.live for found in rounds]))
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "imp")]
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "[2184, 691, 218]" in done.stdout
    for number in range(3):
        assert sorted(file.name for file in (tmp_path / "imp" / f"round_0{number}").iterdir()) == [
            "ticket.pt",
            "trained.pt",
        ]
