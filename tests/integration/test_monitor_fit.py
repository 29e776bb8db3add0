"""DensityMonitor in real training: what it logs, prints, saves, and that it changes nothing."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_sparsity import GMP, SET, DensityMonitor, RigL, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Batches, ManualModel, Result, TinyModel, fit, tiny_net

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

LAYERS = ["net.0.weight", "net.5.weight", "net.7.weight"]
FORWARD = {"net.0.weight": 2 * 9 * 8 * 16, "net.5.weight": 2 * 128 * 16, "net.7.weight": 2 * 16 * 4}


class Memory(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "memory"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    @property
    def ours(self) -> dict[int, dict[str, float]]:
        rows = [(step, row) for step, row in self.rows if "density/total" in row]
        assert len(dict(rows)) == len(rows), "a step was logged twice"
        return dict(rows)


class Loud(TinyModel):
    """Logs its loss, to compare steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def rigl(**kwargs: Any) -> RigL:
    return RigL(0.2, **{"update_interval": 4, **kwargs})


def run(*callbacks: Callback, log_every: int = 1, **kwargs: Any) -> tuple[Memory, Result]:
    memory = Memory()
    monitor = DensityMonitor()
    result = fit([*callbacks, monitor], logger=memory, log_every_n_steps=log_every, **kwargs)
    return memory, result


# ------------------------------------------------------------------------------ metrics


def test_what_is_logged() -> None:
    memory, result = run(rigl())
    rows = memory.ours
    assert list(rows) == list(range(24))
    for kind in ("density", "churn", "itop"):
        assert {f"{kind}/total", *(f"{kind}/{name}" for name in LAYERS)} <= set(rows[0])
    ours = {"density", "churn", "itop", "collapse", "drop_fraction", "flops"}
    assert {key.partition("/")[0] for key in rows[0]} == ours
    assert {frozenset(row) for row in rows.values()} == {frozenset(rows[0])}
    for step, row in rows.items():
        live = result.history[step][1]
        assert row["density/total"] == sum(live.values()) / 2184
        for name in LAYERS:
            assert row[f"density/{name}"] == live[name] / result.masks[name].numel()


def test_churn_and_exploration() -> None:
    rows = run(rigl())[0].ours
    assert rows[0]["itop/total"] == rows[0]["density/total"]
    rates = [row["itop/total"] for row in rows.values()]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]
    # updates follow steps 4, 8, 12 and 16; the loggers count from 0
    assert [row["churn/total"] > 0 for row in rows.values()] == [False] * 3 + [True] * 21
    changes = [a != b for a, b in zip(rates, rates[1:], strict=False)]
    assert [place + 1 for place, changed in enumerate(changes) if changed] == [3, 7, 11, 15]


def test_drop_fraction() -> None:
    rows = run(rigl(drop_fraction=0.3, update_start=4))[0].ours
    found = [row["drop_fraction/RigL"] for row in rows.values()]
    assert found[:3] == [0, 0, 0]
    assert found[3] == pytest.approx(0.3)
    assert all(a > b for a, b in zip(found[3:17], found[4:18], strict=True))
    assert found[17:] == [0] * 7


def test_static_masks_have_no_drop_fraction() -> None:
    row = run(StaticSparse(0.2))[0].ours[23]
    assert not any(key.startswith("drop_fraction") for key in row)
    assert row["itop/total"] == row["density/total"]
    assert row["churn/total"] == 0


def test_flops() -> None:
    row = run(StaticSparse(0.2))[0].ours[23]
    dense = sum(FORWARD.values())
    sparse = sum(FORWARD[name] * row[f"density/{name}"] for name in LAYERS)
    assert row["flops/inference"] == pytest.approx(sparse)
    assert row["flops/inference_ratio"] == pytest.approx(sparse / dense)
    assert row["flops/training"] == pytest.approx(3 * sparse)
    assert row["flops/training_ratio"] == pytest.approx(sparse / dense)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_cost_a_dense_gradient(accumulate: int) -> None:
    row = run(rigl(), accumulate_grad_batches=accumulate)[0].ours
    last = row[max(row)]
    dense = sum(FORWARD.values())
    sparse = last["flops/inference"]
    updates = 4 if accumulate == 1 else 2  # of 24 and 12 steps, every 4, up to three quarters
    extra = updates * accumulate * (dense - sparse)
    assert last["flops/training"] == pytest.approx((24 * 3 * sparse + extra) / 24)


def test_a_ramp_costs_what_each_step_costs() -> None:
    rows = run(GMP(0.2, update_interval=4))[0].ours
    before = [sum(FORWARD.values())] + [row["flops/inference"] for row in rows.values()][:-1]
    assert rows[23]["flops/training"] == pytest.approx(3 * sum(before) / 24)
    assert rows[23]["flops/inference"] < before[0]


def test_totals_only() -> None:
    memory = Memory()
    fit([rigl(), DensityMonitor(per_layer=False)], logger=memory, log_every_n_steps=1)
    names = {key.partition("/")[2] for row in memory.ours.values() for key in row}
    assert names == {"total", "RigL", "inference", "inference_ratio", "training", "training_ratio"}


def test_two_methods() -> None:
    rows = run(rigl(include="net.0"), SET(0.3, include="net.5"))[0].ours
    assert {"drop_fraction/RigL", "drop_fraction/SET"} <= set(rows[0])
    assert "density/net.7.weight" not in rows[0]
    # SET updates at the end of the epoch and leaves the churn of the other layer as it was
    assert rows[6]["churn/net.0.weight"] > 0
    assert rows[6]["churn/net.5.weight"] == 0
    assert rows[7]["churn/net.5.weight"] > 0


# --------------------------------------------------------------------------------- when


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 5, 50])
def test_steps_are_those_of_lightning(every: int, accumulate: int) -> None:
    memory, _ = run(rigl(), model=Loud, log_every=every, accumulate_grad_batches=accumulate)
    lightnings = {step for step, row in memory.rows if "loss" in row}
    last = 23 if accumulate == 1 else 8  # 9 steps: 3 to an epoch of 8 batches
    assert set(memory.ours) == lightnings | {last}


def test_manual_optimization() -> None:
    for raw in (False, True):
        rows = run(rigl(), model=lambda raw=raw: ManualModel(raw=raw))[0].ours
        assert list(rows) == list(range(24))
        assert rows[23]["flops/inference"] < sum(FORWARD.values())
        assert rows[23]["itop/total"] > rows[0]["itop/total"]


def test_early_stop_logs_the_end() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 13

    memory, _ = run(rigl(), Stop(), log_every=50, min_steps=1)
    assert list(memory.ours) == [12]


# ------------------------------------------------------------------------------ loggers


def read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), {"images": 0, "scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard(tmp_path: Path) -> None:
    memory = Memory()
    board = TensorBoardLogger(tmp_path, name="", version="run")
    fit([rigl(), DensityMonitor()], Loud, logger=[board, memory], log_every_n_steps=2)
    events = read(tmp_path / "run")
    for step, row in memory.ours.items():
        for key, value in row.items():
            (found,) = (e.value for e in events.Scalars(key) if e.step == step)
            assert found == pytest.approx(value), key
    assert [e.step for e in events.Scalars("density/total")] == list(memory.ours)
    assert [e.step for e in events.Scalars("loss")] == list(memory.ours)

    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert [chart.title for chart in layout.category[0].chart][:2] == [
        "density",
        "density by layer",
    ]
    pictures = events.Images("density of each layer over time")
    assert [e.step for e in pictures] == [7, 15, 23]
    for name in LAYERS:
        found = events.Histograms(f"live weights/{name}")
        assert [e.step for e in found] == [7, 15, 23]
    start, end = (
        events.Tensors(f"sparsity at the {when}/text_summary") for when in ("start", "end")
    )
    assert b"net.5.weight" in start[0].tensor_proto.string_val[0]
    assert b"Measured" in end[0].tensor_proto.string_val[0]


def test_histograms_count_live_weights(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")
    result = fit([rigl(), DensityMonitor(histograms=5)], logger=board)
    events = read(tmp_path / "run").Histograms("live weights/net.5.weight")
    assert [e.step for e in events] == [4, 9, 14, 19, 23]
    mask = result.masks["net.5.weight"]
    live = result.weights["net.5.weight"][mask]
    assert events[-1].histogram_value.num == mask.sum()
    assert events[-1].histogram_value.min == pytest.approx(float(live.min()))
    assert events[-1].histogram_value.sum == pytest.approx(float(live.sum()), abs=1e-4)


def test_no_histograms(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")
    fit([rigl(), DensityMonitor(histograms=None)], logger=board)
    tags = read(tmp_path / "run").Tags()
    assert tags["histograms"] == tags["images"] == []


def test_prefix_of_the_logger(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run", prefix="mine")
    fit([rigl(), DensityMonitor()], logger=board)
    assert "mine-density/total" in read(tmp_path / "run").Tags()["scalars"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_csv(tmp_path: Path) -> None:
    memory = Memory()
    table = CSVLogger(tmp_path, name="", version="run")
    fit([rigl(), DensityMonitor()], Loud, logger=[memory, table], log_every_n_steps=3)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["density/total"]]
    assert [int(row["step"]) for row in rows] == list(memory.ours)
    for row in rows:
        for key, value in memory.ours[int(row["step"])].items():
            assert float(row[key]) == value


# ------------------------------------------------------------- it watches, nothing more


@pytest.mark.parametrize("model", [TinyModel, ManualModel])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical(model: Any, precision: Any, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")
    watched = fit([rigl(), DensityMonitor(histograms=3)], model, precision=precision, logger=board)
    drawn = torch.rand(1)
    alone = fit([rigl()], model, precision=precision)
    watched.assert_equal(alone)
    assert watched.history == alone.history
    assert torch.equal(drawn, torch.rand(1)), "the monitor drew random numbers"


def test_autocast_counts_the_same_flops() -> None:
    full = run(StaticSparse(0.2))[0].ours[0]
    half = run(StaticSparse(0.2), precision="bf16-mixed")[0].ours[0]
    assert full == half


# ----------------------------------------------------------------------------- resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
def test_a_resumed_run_logs_the_same_numbers(step: int, tmp_path: Path) -> None:
    def go(**kwargs: Any) -> Memory:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return run(rigl(), saver, enable_checkpointing=True, **kwargs)[0]

    whole = go()
    rest = go(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    assert rest.ours == {s: row for s, row in whole.ours.items() if s >= step}
    saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
    state = saved["callbacks"]["DensityMonitor"]
    fired = state["masks"]["net.5.weight"]["fired"]
    assert (fired.dtype, fired.numel()) == (torch.uint8, 2048 // 8)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_without_monitor_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end")
    fit([rigl(), saver], enable_checkpointing=True, max_epochs=1)
    memory, _ = run(rigl(), ckpt_path=str(tmp_path / "end.ckpt"))
    assert min(memory.ours) == 8


def test_the_same_model_goes_on_and_another_starts_anew() -> None:
    memory, monitor, method = Memory(), DensityMonitor(), rigl(update_end=1.0)
    model = TinyModel()
    for again in (model, model, TinyModel()):
        memory.rows.clear()
        fit([method, monitor], lambda again=again: again, logger=memory, log_every_n_steps=1)
        if again is model:
            end = memory.ours[23]
    first = memory.ours[0]
    assert first["itop/total"] == first["density/total"]
    assert end["itop/total"] > 1.5 * end["density/total"]


def test_it_can_be_pickled_and_copied() -> None:
    monitor = DensityMonitor()
    pickle.loads(pickle.dumps(monitor))
    fit([rigl(), monitor])
    for twin in (pickle.loads(pickle.dumps(monitor)), copy.deepcopy(monitor)):
        assert twin.state_dict()["masks"].keys() == set(LAYERS)
        assert twin._model() is None or isinstance(twin._model(), pl.LightningModule)


# ------------------------------------------------------------------------- what is shown


@pytest.fixture
def output(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_reports(output: Any) -> None:
    class First(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert "sparse parameter" not in output()

        def on_train_batch_start(self, *args: Any) -> None:
            assert "Dense: the other 5 parameters (44 weights)" in output()

    fit([rigl(), DensityMonitor(), First()])
    text = output()
    assert text.count("sparse parameter") == 3  # allocation, FLOPs, end
    assert text.count("Forward FLOPs per sample: 6.53 k dense") == 2
    for part in ("ever live", "Training FLOPs", "Measured:", "Memory of these parameters"):
        assert text.count(part) == 1


def test_no_reports(output: Any) -> None:
    fit([rigl(), DensityMonitor(print_tables=False)])
    assert "ever live" not in output()
    assert "FLOPs" not in output()
    assert output().count("sparse parameter") == 1, "the method itself says what it made"


def test_progress_bar() -> None:
    result = fit([rigl(), DensityMonitor()], max_epochs=1)
    assert float(result.trainer.progress_bar_metrics["density"]) == pytest.approx(437 / 2184)
    assert "density" in result.trainer.callback_metrics


def test_a_dense_model(output: Any) -> None:
    memory, result = run()
    assert "No parameter is sparse: all 8 are dense (2,228 weights)." in output()
    row = memory.ours[23]
    dense = float(sum(FORWARD.values()))
    assert row == {
        "density/total": 1.0,
        "churn/total": 0.0,
        "itop/total": 1.0,
        "collapse/total": 0.0,
        "flops/inference": dense,
        "flops/inference_ratio": 1.0,
        "flops/training": 3 * dense,
        "flops/training_ratio": 1.0,
    }
    result.assert_equal(fit([]))


# ------------------------------------------------------------------------ odd trainings


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"max_epochs": 0},
        {"limit_train_batches": 0},
        {"max_epochs": None, "barebones": True, "max_steps": 6},
        {"logger": False},
        {"log_every_n_steps": 0, "logger": Memory()},
    ],
)
@pytest.mark.filterwarnings("ignore:.*(barebones|steps=0)")
def test_trainings_that_log_nothing(options: dict[str, Any]) -> None:
    if options.get("barebones"):
        pl.Trainer(accelerator="cpu", callbacks=[rigl(), DensityMonitor()], **options).fit(
            TinyModel(), Batches()
        )
    else:
        fit([rigl(), DensityMonitor()], **options)


class Failing(TinyModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        raise KeyError("mine")


def test_an_error_leaves_nothing_behind() -> None:
    monitor = DensityMonitor()
    with pytest.raises(KeyError, match="mine"):
        fit([rigl(), monitor], Failing)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert monitor._watch is None


class Skipping(TinyModel):
    """Leaves the first batch out, in one of two ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        assert torch._C._len_torch_dispatch_stack() <= 1
        return -1 if self.how == "epoch" and self.current_epoch == 0 else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.how == "batch" and batch_idx == 0 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("how", ["epoch", "batch"])
def test_a_first_batch_that_is_skipped(how: str) -> None:
    memory, _ = run(rigl(), model=lambda: Skipping(how))
    assert torch._C._len_torch_dispatch_stack() == 0
    rows = memory.ours
    assert rows[max(rows)]["flops/inference"] < sum(FORWARD.values())


class Wrapped(TinyModel):
    """Enters a mode of its own around the whole step and leaves it after the backward pass."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            super().optimizer_step(*args, **kwargs)


def test_modes_of_the_user_are_left_alone() -> None:
    memory, result = run(rigl(), model=Wrapped)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert memory.ours[0]["flops/inference"] < sum(FORWARD.values())
    result.assert_equal(fit([rigl()], Wrapped))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model(whole: bool, output: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def train(*callbacks: Callback) -> tuple[Result, int]:
        backend = CompileCounterWithBackend("aot_eager")

        def model() -> Any:
            if whole:
                return torch.compile(TinyModel(), backend=backend)
            return TinyModel(torch.compile(tiny_net(), backend=backend))

        torch.compiler.reset()
        return fit([rigl(), *callbacks], model), backend.frame_count

    alone, frames = train()
    watched, frames_watched = train(DensityMonitor())
    watched.assert_equal(alone)
    assert frames_watched == frames > 0
    assert output().count("FLOPs are not known: the model is compiled.") == 2


def test_one_keeper() -> None:
    result = fit([DensityMonitor(), rigl()])
    assert sum(isinstance(c, MaskKeeper) for c in result.trainer.callbacks) == 1


SCRIPT = """
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from lightning_sparsity import DensityMonitor, RigL
from lightning_sparsity.testing import fit

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(128, 1, 6, 6, generator=generator), torch.randint(4, (128,), generator=generator)
)
fit(
    [RigL(0.2, update_interval=4), DensityMonitor()],
    data=DataLoader(data, batch_size=8),
    strategy="ddp",
    devices=2,
    logger=CSVLogger(".", name="", version="run"),
    log_every_n_steps=4,
)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_report_once(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "train.py"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("ever live") == 1
    assert done.stderr.count("Forward FLOPs per sample: 6.53 k dense") == 2
    with (tmp_path / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["density/total"]]
    assert steps == [3, 7, 11, 15, 19, 23]
