"""Metrics that DensityMonitor logs on request: their values, resuming, and what is refused."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import double, doubles
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparsity import DensityMonitor, OptG, RigL, SparseCompute, StaticSparse
from lightning_sparsity.metrics import (
    ITOP,
    Churn,
    CompressionRatio,
    Density,
    FLOPs,
    GradientFlow,
    HardnessNormalizedEfficiency,
    MaskSimilarity,
    ParameterEfficiency,
    live_masks,
)
from lightning_sparsity.testing import Batches, ManualModel, Result, TinyModel, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

LAYERS = ["net.0.weight", "net.5.weight", "net.7.weight"]


class Memory(Logger):
    """A logger that keeps what it is given, by step."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "density/total" in metrics:
            assert step is not None
            self.rows[step] = metrics


class Watching(Callback):
    """Copies gradients before anybody masks them, and masks before every batch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.masks.append(live_masks(pl_module))


def run(
    *callbacks: Callback, metrics: Any, log_every: int = 1, monitor: Any = None, **kwargs: Any
) -> tuple[dict[int, dict[str, float]], Result]:
    memory = Memory()
    asked = {"metrics": metrics, "print_tables": False, **(monitor or {})}
    options = {"logger": memory, "log_every_n_steps": log_every, **kwargs}
    result = fit([*callbacks, DensityMonitor(**asked)], **options)
    return memory.rows, result


def rigl() -> RigL:
    return RigL(0.2, update_interval=4)


def norm(gradient: Tensor, mask: Tensor | None = None) -> float:
    return float((gradient if mask is None else gradient[mask]).norm())


# --------------------------------------------------------------------------------- masks


def test_metrics_of_masks_are_logged_by_their_tags() -> None:
    watching = Watching()
    metrics: dict[str, Metric] = {
        "compression/csr": CompressionRatio("csr"),
        "compression/bitmap": CompressionRatio("bitmap"),
        "similarity/start": MaskSimilarity("overlap"),
        "similarity/last": MaskSimilarity("overlap", to="last"),
        "churn/logged": Churn(),
        "explored": ITOP(),
    }
    rows, result = run(rigl(), watching, metrics=metrics, log_every=8)
    assert list(rows) == [7, 15, 23]
    start = before = watching.masks[0]
    for step, row in rows.items():
        now = [*watching.masks, result.masks][step + 1]
        assert row["compression/csr"] == float(CompressionRatio("csr")(now))
        live = sum(int(mask.sum()) for mask in now.values())
        assert row["compression/bitmap"] == pytest.approx(2184 * 32 / (live * 32 + 2184))
        assert row["similarity/start"] == pytest.approx(overlap(start, now))
        assert row["similarity/last"] == pytest.approx(overlap(before, now))
        assert row["churn/logged"] == pytest.approx(1 - overlap(before, now))
        before = now
    assert rows[23]["similarity/start"] < rows[7]["similarity/start"] < 1
    assert rows[23]["explored"] > rows[7]["explored"] > rows[7]["density/total"]


def overlap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    both = sum(int((mask & second[name]).sum()) for name, mask in first.items())
    return both / sum(int(mask.sum()) for mask in first.values())


def test_metrics_change_nothing() -> None:
    metrics = {"csr": CompressionRatio(), "same": MaskSimilarity(), "flow": GradientFlow()}
    _, watched = run(rigl(), metrics=metrics)
    watched.assert_equal(fit([rigl()]))


@pytest.mark.parametrize("step", [8, 12])
def test_a_resumed_run_logs_the_same_numbers(step: int, tmp_path: Path) -> None:
    def go(**kwargs: Any) -> dict[int, dict[str, float]]:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        metrics = {
            "start": MaskSimilarity(),
            "last": MaskSimilarity(to="last"),
            "churn/mine": Churn(),
            "mine": ITOP(),
            "flow": GradientFlow(),
        }
        return run(rigl(), saver, metrics=metrics, enable_checkpointing=True, **kwargs)[0]

    whole = go()
    rest = go(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    assert rest == {s: row for s, row in whole.items() if s >= step}
    assert 0 < rest[23]["start"] <= rest[step]["start"] < 1


def test_another_model_starts_anew() -> None:
    memory, metric = Memory(), MaskSimilarity()
    monitor = DensityMonitor(metrics={"start": metric}, print_tables=False)
    for _ in range(2):
        fit([rigl(), monitor], logger=memory, log_every_n_steps=1, max_epochs=1)
        assert memory.rows[0]["start"] == 1
        assert memory.rows[7]["start"] < 1


def test_metrics_that_are_at_work_elsewhere_are_left_alone() -> None:
    class Own(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.own = Density()
            self.seen: list[int] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.own.update(self)
            self.seen.append(int(self.own.weights))

    model, churn = Own(), Churn()
    metrics = {"own": model.own, "one": churn, "two": churn}
    rows, _ = run(rigl(), model=lambda: model, metrics=metrics)
    assert model.seen == [2184 * (batch + 1) for batch in range(24)]
    assert any(row["one"] > 0 for row in rows.values())
    assert all(row["one"] == row["two"] for row in rows.values())


class Pair(Metric):
    """A metric of two numbers."""

    def update(self, model: Any) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {"a": 1.0, "b": 2.0}


def test_a_metric_must_be_a_number() -> None:
    with pytest.raises(
        TypeError, match=r"\{'pair': \.\.\.\}\): its value is a dict, and must be a"
    ):
        run(rigl(), metrics={"pair": Pair()})


def test_without_a_method_the_zeros_count() -> None:
    rows, _ = run(metrics={"csr": CompressionRatio("csr"), "flow": GradientFlow()})
    assert rows[0]["csr"] < 1
    assert rows[0]["flow"] ** 2 == pytest.approx(sum(rows[0][f"flow/{k}"] ** 2 for k in LAYERS))


# ----------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_the_step(accumulate: int) -> None:
    watching = Watching()
    metrics = {"flow": GradientFlow(), "every": GradientFlow(live=False)}
    rows, _ = run(
        rigl(), watching, metrics=metrics, log_every=3, accumulate_grad_batches=accumulate
    )
    assert list(rows)[:-1] == list(range(2, 24 // accumulate - 1, 3))
    for step, row in rows.items():
        if "flow" not in row:
            assert step == max(rows)  # that it was the last was not known before
            continue
        gradients, masks = watching.gradients[step], watching.masks[accumulate * step]
        for name in LAYERS:
            expected = norm(gradients[name], masks[name])
            assert row[f"flow/{name}"] == pytest.approx(expected, rel=1e-5)
            assert row[f"every/{name}"] == pytest.approx(norm(gradients[name]), rel=1e-5)
        total = sum(row[f"flow/{name}"] ** 2 for name in LAYERS) ** 0.5
        assert row["flow"] == pytest.approx(total)
        assert row["every"] > row["flow"] > 0


def test_gradients_of_layers_are_left_out_with_totals_only() -> None:
    rows, _ = run(rigl(), metrics={"flow": GradientFlow()}, monitor={"per_layer": False})
    ours = [key for key in rows[0] if key.startswith("flow")]
    assert ours == ["flow"]


def test_gradients_are_those_of_the_optimizer_that_steps() -> None:
    watching = Watching()
    rows, _ = run(rigl(), watching, model=ManualModel, metrics={"flow": GradientFlow()})
    before, after = watching.gradients[10:12]  # of all weights, and of those of the second
    assert before.keys() > after.keys()
    for name in LAYERS:
        expected = norm(before[name], watching.masks[5][name])
        assert rows[5][f"flow/{name}"] == pytest.approx(expected, rel=1e-5)
    assert rows[5]["flow"] == pytest.approx(
        sum(rows[5][f"flow/{name}"] ** 2 for name in LAYERS) ** 0.5
    )


def test_steps_past_lightning_show_no_gradient() -> None:
    rows, _ = run(rigl(), model=lambda: ManualModel(raw=True), metrics={"flow": GradientFlow()})
    assert len(rows) == 24
    assert not any(key.startswith("flow/") or key == "flow" for row in rows.values() for key in row)


@pytest.mark.parametrize("fused", [False, True])
def test_the_factor_of_a_scaler_is_not_in_it(fused: bool) -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, fused=fused))

    plain, _ = run(rigl(), model=model, metrics={"flow": GradientFlow()}, precision="bf16-mixed")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    rows, _ = run(rigl(), model=model, metrics={"flow": GradientFlow()}, plugins=[plugin])
    assert rows[0]["flow"] == pytest.approx(plain[0]["flow"], rel=0.05)


def test_learned_masks() -> None:
    metrics = {"csr": CompressionRatio(), "flow": GradientFlow(), "same": MaskSimilarity()}
    rows, _ = run(OptG(0.3, update_interval=4), metrics=metrics)
    assert rows[23]["csr"] > rows[0]["csr"]
    assert rows[23]["flow"] > 0
    assert rows[23]["same"] < 1


# ------------------------------------------------------------------- compressed weights


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_compressed_weights_give_the_same_numbers() -> None:
    found = []
    for more in ([], [SparseCompute("csr")]):
        metrics = {
            "csr": CompressionRatio("csr"),
            "same": MaskSimilarity(),
            "churn/mine": Churn(),
            "mine": ITOP(),
            "flow": GradientFlow(),
        }
        options = {"model": double, "data": doubles(), "monitor": {"connectivity": True}}
        rows, _ = run(rigl(), *more, metrics=metrics, **options)
        found.append(rows)
    dense, packed = found
    assert dense.keys() == packed.keys()
    for step, row in dense.items():
        assert packed[step] == pytest.approx(row, rel=1e-6)
    assert {"flops/inference", "effective_density/total", *(f"flow/{k}" for k in LAYERS)} <= set(
        packed[0]
    )


def test_gradients_off_the_mask_of_compressed_weights_are_not_known() -> None:
    message = r"'every': GradientFlow\(live=False\).*compressed have no gradient off the mask"
    with pytest.raises(MisconfigurationException, match=message):
        run(rigl(), SparseCompute("csr"), metrics={"every": GradientFlow(live=False)})


# ---------------------------------------------------------------------------- efficiency


class Accurate(TinyModel):
    """Logs an accuracy in validation, which rises."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.25 * (self.current_epoch + 1))

    def val_dataloader(self) -> Any:
        return Batches(1)


def test_efficiency_takes_the_accuracy_that_was_logged() -> None:
    metrics = {"per_million": ParameterEfficiency(), "hard": HardnessNormalizedEfficiency()}
    rows, result = run(
        StaticSparse(0.25),
        model=Accurate,
        metrics=metrics,
        monitor={"accuracy": "val_acc"},
        num_sanity_val_steps=0,
    )
    assert not any("per_million" in rows[step] for step in range(8))
    millions = (result.live + 44) / 1e6  # biases and normalisation are dense
    assert rows[8]["per_million"] == pytest.approx(25 / millions)
    assert rows[16]["per_million"] == pytest.approx(50 / millions)
    assert rows[16]["hard"] == pytest.approx(2.718281828 ** ((25_000 - 30_908) / 5704.7) / millions)


def test_an_accuracy_in_per_cent_is_told_and_left_out() -> None:
    class PerCent(Accurate):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 25.0 * (self.current_epoch + 1))

    with pytest.warns(UserWarning, match=r"accuracy='val_acc'\): the model logged 25; ") as told:
        rows, _ = run(
            StaticSparse(0.25),
            model=PerCent,
            metrics={"per_million": ParameterEfficiency()},
            monitor={"accuracy": "val_acc"},
            num_sanity_val_steps=0,
        )
    assert sum("the model logged" in str(w.message) for w in told) == 1
    assert not any("per_million" in row for row in rows.values())


def test_an_accuracy_that_nobody_logs_is_told() -> None:
    with pytest.warns(UserWarning, match=r"accuracy='acc'\): the model logged nothing so named"):
        run(metrics={"pe": ParameterEfficiency()}, monitor={"accuracy": "acc"}, max_epochs=1)


# ----------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([CompressionRatio()], r"^DensityMonitor\(metrics=\[CompressionRatio\(\)\]\): must be met"),
        ({"csr": "csr"}, r"^DensityMonitor\(metrics=\{'csr': 'csr'\}\): must be a name and a "),
        ({1: CompressionRatio()}, r"^DensityMonitor\(metrics=\{1: CompressionRatio\(\)\}\): must"),
        ({"acc": MulticlassAccuracy(3)}, r"MulticlassAccuracy\(\)\}\): its update needs other arg"),
        ({"cost": FLOPs()}, r"\{'cost': FLOPs\(\)\}\): its update needs other arguments than a"),
    ],
)
def test_metrics_that_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DensityMonitor(metrics=metrics)


@pytest.mark.parametrize("tag", ["density/total", "flops/training", "collapse/total"])
def test_tags_of_the_monitor_are_taken(tag: str) -> None:
    with pytest.raises(ValueError, match="itself; take another tag"):
        DensityMonitor(metrics={tag: CompressionRatio()})


def test_efficiency_and_accuracy_need_each_other() -> None:
    with pytest.raises(ValueError, match=r"accuracy=None\): must be the name under which"):
        DensityMonitor(metrics={"efficiency": ParameterEfficiency()})
    with pytest.raises(ValueError, match=r"accuracy='val_acc'\): must be the name under which"):
        DensityMonitor(metrics={"csr": CompressionRatio()}, accuracy="val_acc")
    with pytest.raises(TypeError, match=r"accuracy=1\): must be the name of a logged value"):
        DensityMonitor(metrics={"efficiency": ParameterEfficiency()}, accuracy=1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- two processes

SCRIPT = """
import json
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from lightning_sparsity import DensityMonitor, RigL, SparseCompute
from lightning_sparsity.metrics import GradientFlow, MaskSimilarity
from lightning_sparsity.testing import TinyModel, fit

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(128, 1, 6, 6, generator=generator).double(),
    torch.randint(4, (128,), generator=generator),
)
for name, more in (("dense", []), ("csr", [SparseCompute("csr")])):
    metrics = {"flow": GradientFlow(), "start": MaskSimilarity()}
    fit(
        [RigL(0.2, update_interval=4), DensityMonitor(metrics=metrics), *more],
        lambda: TinyModel().double(),
        data=DataLoader(data, batch_size=8),
        strategy="ddp",
        devices=2,
        max_epochs=1,
        logger=CSVLogger(".", name="", version=name),
        log_every_n_steps=2,
    )
torch.distributed.destroy_process_group()
"""

SHARDED = """
import json
import sys
import torch
from fsdp_training import train
from lightning.pytorch.loggers import CSVLogger
from lightning_sparsity import DensityMonitor, RigL
from lightning_sparsity.metrics import (
    Churn, CompressionRatio, EffectiveDensity, GradientFlow, MaskSimilarity
)

torch.set_num_threads(1)
for name, processes in (("sharded", 2), ("whole", 1)):
    metrics = {
        "flow": GradientFlow(),
        "every": GradientFlow(live=False),
        "csr": CompressionRatio("csr"),
        "effective": EffectiveDensity(),
        "start": MaskSimilarity(),
        "died": Churn(),
    }
    logger = CSVLogger(".", name="", version=name)
    methods = [RigL(0.3, update_interval=4), DensityMonitor(metrics=metrics)]
    train(methods, processes, max_epochs=2, logger=logger, log_every_n_steps=2)
torch.distributed.destroy_process_group()
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "names", "keys"),
    [
        (SCRIPT, ("csr", "dense"), ["flow", "start", *(f"flow/{layer}" for layer in LAYERS)]),
        (
            SHARDED,
            ("sharded", "whole"),
            ["flow", "flow/net.2.weight", "every", "csr", "effective", "start", "died"],
        ),
    ],
)
def test_two_ranks_log_what_one_would(
    script: str, names: tuple[str, str], keys: list[str], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "train.py"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for name in names:
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["flow"]]
        assert len(rows) >= 4
        found.append([float(row[key]) for row in rows for key in keys])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
