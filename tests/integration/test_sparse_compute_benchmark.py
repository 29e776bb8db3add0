"""The benchmark of compressed storage: it measures what it says, and goes on where it ended."""

import csv
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import Callback

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--hidden", "16", "--batches", "8", "--densities", "0.1", "--optimizers", "adam"]
FEW = ["--rounds", "1", "--steps", "16", "--threads", "1"]
NUMBERS = {"median": "1.0", "min": "0.5", "max": "2.0"}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("sparse_compute")


def tiny(benchmark: ModuleType, measure: str = "time", **changes: Any) -> Any:
    task = benchmark.Task(measure, "12-16-16-4", 8, "adam", 0.25, "RigL", ("csr",), steps=16)
    return dataclasses.replace(task, **changes)


class Changes(Callback):
    """The steps in which masks change, and the lengths of the parameters."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sizes: list[int] = []

    def on_masks_ready(self, trainer: Any, pl_module: Any, keeper: Any) -> None:
        self._masks, self._seen = keeper.masks, keeper.masks.changes

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.sizes = [p.numel() for p in pl_module.parameters() if p.ndim > 1 or p.numel() > 16]
        if self._masks.changes != self._seen:
            self.steps.append(trainer.global_step)
        self._seen = self._masks.changes


@pytest.mark.parametrize("rule", ["RigL", "RedrRandom", "RedrGradient", "RedrGradientGlobal"])
def test_masks_change_at_each_quarter_but_the_last(benchmark: ModuleType, rule: str) -> None:
    task, changes = tiny(benchmark, rule=rule), Changes()
    benchmark.fit(task, "csr", benchmark.make_net(task, "csr"), changes)
    assert changes.steps == [4, 8, 12]


@pytest.mark.parametrize(("storage", "sizes"), [("csr", [48, 64, 16]), ("masked", [192, 256, 64])])
def test_a_storage_is_what_its_name_says(
    benchmark: ModuleType, storage: str, sizes: list[int]
) -> None:
    kept = benchmark.measure_memory(tiny(benchmark, "memory", storages=(storage,), steps=11))
    found = {name: numbers["median"] for name, numbers in kept[storage].items()}
    numbers = sum(sizes) + 16 + 16 + 4  # and the biases
    assert found["parameters_mb"] == pytest.approx(4e-6 * numbers, abs=1e-4)
    assert (found["pattern_mb"] > 0) == (storage == "csr")
    assert found["peak_mb"] > 50


def test_bytes_are_exact(benchmark: ModuleType) -> None:
    task = tiny(benchmark, "memory", steps=11)
    kept = benchmark.Bytes(task)
    benchmark.fit(task, "csr", benchmark.make_net(task, "csr"), kept)
    live, biases = 48 + 64 + 16, 16 + 16 + 4
    rows = (16 + 1) + (16 + 1) + (4 + 1)
    across = (16 + 1) + (16 + 1)  # the first layer needs no transpose
    assert kept.found == {
        "parameters": 4 * (live + biases),
        "gradients": 4 * (live + biases),
        "optimizer": 2 * 4 * (live + biases) + 6 * 4,  # and a step count for each parameter
        "pattern": 4 * (rows + live) + 4 * (across + 2 * (64 + 16)),
        "mask": 0,  # the pattern says it all
    }


def test_a_single_output_stays_dense(benchmark: ModuleType) -> None:
    changes = Changes()
    task = tiny(benchmark, net="12-16-16-1", rule="RedrGradientGlobal")
    benchmark.fit(task, "csr", benchmark.make_net(task, "csr"), changes)
    assert sum(changes.sizes[:2]) == 48 + 64  # growth is global
    assert changes.sizes[2] == 16


def test_steps_and_updates_are_told_apart(benchmark: ModuleType) -> None:
    laps = benchmark.Laps(tiny(benchmark, steps=16))
    seconds = [9, 9, 9, 5, 3, 1, 1, 5, 3, 1, 1, 5, 3, 1, 1]  # after warming up; 4, 8, 12 update
    laps._starts = [sum(seconds[:n]) for n in range(len(seconds) + 1)]
    assert laps.step == 1
    assert laps.update == 5 + 3 - 2


def test_times_are_of_all_storages_and_ratios_of_single_rounds(benchmark: ModuleType) -> None:
    found = benchmark.measure_time(tiny(benchmark, storages=("auto",), rounds=2))
    assert list(found) == ["dense", "auto"]
    assert set(found["dense"]) == {"step_ms", "latency_ms"}
    wanted = {"speedup", "latency_speedup", "update_ms", "update_in_dense_steps"}
    assert set(found["auto"]) == {"step_ms", "latency_ms", *wanted}
    for numbers in (found["dense"]["step_ms"], found["auto"]["speedup"]):
        assert 0 < numbers["min"] <= numbers["median"] <= numbers["max"]


def test_a_static_net_has_epochs_but_no_updates(benchmark: ModuleType) -> None:
    class Timed:
        def __init__(self, step: float) -> None:
            self.step, self.update, self.latency = step, 98.0, 1.0

    task = tiny(benchmark, net=benchmark.WIDE, rule="StaticSparse")
    found = benchmark.times(task, [Timed(2.0)], [Timed(4.0)])
    assert found["epoch_over_dense"]["median"] == 0.5
    assert "update_ms" not in found
    redistributed = dataclasses.replace(task, rule="RedrRandom")
    found = benchmark.times(redistributed, [Timed(2.0)], [Timed(4.0)])
    assert found["epoch_over_dense"]["median"] == 0.75


def test_the_plan_is_that_of_the_docs(benchmark: ModuleType) -> None:
    _, args = benchmark.parse([])
    tasks = benchmark.plan(args)
    timed = [task for task in tasks if task.measure == "time"]
    assert len(timed) == 2 * 3 * 2 * 2 * 4  # ours and the peer's
    assert {task.batch for task in tasks if task.measure == "memory" and task.net} == {128}
    assert {task.steps for task in timed} == {24, 96, 384}
    keys = [task.key(storage) for task in tasks for storage in task.storages]
    assert len(keys) == len(set(keys))
    paper = benchmark.paper_plan(args)
    assert {task.density for task in paper if task.rule} == {0.1, 0.06, 0.03}
    assert sum(task.measure == "memory" for task in paper) == 2 + 4 * 3


@pytest.mark.parametrize(
    "arguments", [["--steps", "18"], ["--steps", "8"], ["--rounds", "0"], ["--densities", "2"]]
)
def test_arguments_are_checked(
    benchmark: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_ratios_of_memory_are_without_that_of_importing(benchmark: ModuleType) -> None:
    def row(key: tuple[str, ...], quantity: str, value: float) -> dict[str, str]:
        named = dict(zip(benchmark.KEY, key, strict=True))
        return named | NUMBERS | {"quantity": quantity, "median": str(value)}

    task = benchmark.Task("memory", "784-8-8-10", 8, "adam", 0.1, "RigL", ("csr",))
    dense = benchmark.Task("memory", "784-8-8-10", 8, "adam").key("dense")
    results = benchmark.Results(
        [
            row(benchmark.Task("memory").key("nothing"), "peak_mb", 100),
            row(dense, "peak_mb", 500),
            row(task.key("csr"), "peak_mb", 200),
            row(task.key("csr"), "kept_mb", 30),
            row(dense, "kept_mb", 300),
            row(dataclasses.replace(task, measure="time").key("csr"), "speedup", 3),
        ]
    )
    assert results.over_dense(task.key("csr"), "peak_mb") == 0.25
    assert results.over_dense(task.key("csr"), "kept_mb") == 0.1
    for measure, expected in (("time", 3.0), ("memory", 0.25)):
        case = (measure, "784-8-8-10", "8", "adam")
        assert results.by_density(case, "csr") == {0.1: expected}
        assert results.by_density(case, "sparselab") == {}
    shown = benchmark.table(results)
    assert "| 784-8-8-10 | 8 | adam | RigL | csr | 0.250 |" in shown
    assert "| 784-8-8-10 | 8 | adam | RigL | csr | 3.00 (0.50 to 2.00) |" in shown


@pytest.mark.slow
def test_an_interrupted_command_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "found" / "results.csv"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / "sparse_compute.py"), *TINY, *FEW]
        hidden = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [*command, "--output", str(output), *arguments],
            env=hidden,
            capture_output=True,
            text=True,
            check=False,
        )

    (tmp_path / "sparselab.py").write_text("raise ImportError('not here')")
    first = run("--only", "time", "peer")
    if first.returncode == 1:  # "1 measurements failed; the same command tries them again"
        first = run("--only", "time", "peer")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "sparselab is left out, exit code 1: ImportError: not here" in first.stdout
    assert "[1/1] time, 784-16-16-10, 8, adam, 0.1, RigL masked csr native auto" in first.stdout
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["storage"] for row in rows if row["quantity"] == "step_ms"] == [
        "dense",
        "masked",
        "csr",
        "native",
        "auto",
    ]

    again = run("--only", "time", "--plot")
    assert again.returncode == 0, again.stderr
    assert "[1/" not in again.stdout
    assert output.with_suffix(".png").stat().st_size > 0

    settings = json.loads(output.with_suffix(".json").read_text())
    assert settings["machine"]["threads"] == settings["rounds"] == 1
    other = run("--only", "time", "--rounds", "2")
    assert other.returncode == 2
    assert "was measured with {'rounds': 1}" in other.stderr
