"""The comparison of the Redr algorithms: its runs are on equal terms, and none is lost."""

import csv
import gzip
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = 784 * 256 + 256 * 256 + 256 * 10
SPARSE = ["RedrRandom", "RedrGradientGlobal", "RedrWoodtaylor", "static"]
SMALL = ["--epochs", "4", "--batch-size", "64", "--lr", "0.003", "--densities", "0.05"]
Study = Callable[..., None]
Row = dict[str, str]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("redr_comparison")


def write_digits(directory: Path, seed: int = 0) -> Path:
    """A data set in the form of MNIST: 240 pictures to train, 40 to test; some files packed."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 256, (10, 28, 28), generator=generator)
    for part, count in (("train", 240), ("t10k", 40)):
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 256, (count, 28, 28), generator=generator)
        for name, tensor in (
            (f"{part}-labels-idx1-ubyte", labels),
            (f"{part}-images-idx3-ubyte", (2 * kinds[labels] + noise) // 3),
        ):
            sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
            content = bytes([0, 0, 8, tensor.ndim]) + sizes + bytes(tensor.flatten().tolist())
            packed = part == "train"
            path = directory / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return directory


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def finished(example: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small study of all kinds of methods and two seeds leaves behind."""
    output = tmp_path_factory.mktemp("study")
    arguments = ["--data-dir", digits, "--output", output, "--seeds", 0, 1, *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        methods = [*SPARSE, "dense-small", "dense"]
        patch.setattr(sys, "argv", ["x", *map(str, arguments), "--methods", *methods])
        example.main()
    return output


@pytest.fixture
def study(
    example: ModuleType, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Study:
    """Run the example on the small data, with one seed, in a folder of its own."""

    def study(*arguments: object, output: Path = tmp_path / "out") -> None:
        given = ["--data-dir", digits, "--output", output, "--seeds", 0, *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", ["redr_comparison.py", *map(str, given)])
        example.main()

    return study


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path: Path) -> list[Row]:
    return [{**row, "seconds": ""} for row in read(path)]


# -------------------------------------------------------------------------- what it writes


def test_every_run_has_a_row_per_epoch(finished: Path) -> None:
    rows = read(finished / "epochs.csv")
    runs = {(row["method"], row["seed"]) for row in rows}
    assert runs == {(m, s) for m in [*SPARSE, "dense-small", "dense"] for s in "01"}
    assert len(rows) == 4 * len(runs)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4] * len(runs)
    assert all(bool(row["test_accuracy"]) == (row["epoch"] == "4") for row in rows)
    assert all(float(row["seconds"]) > 0 for row in rows)
    ends = read(finished / "runs.csv")
    assert [(r["method"], r["seed"]) for r in ends] == sorted((m, s) for m, s in runs)
    assert all(row["test_accuracy"] and row["epoch"] == "4" for row in ends)
    first = [float(row["seconds"]) for row in rows[:4]]
    assert float(ends[0]["seconds"]) == pytest.approx(sum(first) / 4)
    assert {path.name for path in finished.iterdir()} == {
        "accuracy.png",
        "epochs.csv",
        "induced_loss.png",
        "runs",
        "runs.csv",
        "settings.json",
    }
    assert (finished / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in (finished / "runs").iterdir() if path.is_dir()]


def test_budgets(finished: Path) -> None:
    rows = read(finished / "epochs.csv")
    live = {row["method"]: [int(n) for n in row["live"].split()] for row in rows}
    for method in SPARSE:
        assert abs(sum(live[method]) - 0.05 * WEIGHTS) <= 1.5  # rounding of three layers
    assert live["dense"] == [784 * 256, 256 * 256, 256 * 10]
    assert live["dense-small"] == [784 * 17, 17 * 17, 17 * 10]
    moved = [row["live"] for row in rows if row["method"] == "RedrGradientGlobal"]
    assert len(set(moved)) > 1
    assert len({row["live"] for row in rows if row["method"] in ("static", "RedrRandom")}) == 1


def test_all_sparse_nets_start_alike(finished: Path) -> None:
    rows = [r for r in read(finished / "epochs.csv") if r["method"] in SPARSE]
    before = {(r["seed"], r["train_loss"]) for r in rows if r["epoch"] == "1"}
    assert len(before) == 2  # one per seed: nothing was redistributed yet
    assert len({loss for _, loss in before}) == 2
    later = {r["train_loss"] for r in rows if r["epoch"] == "2"}
    assert len(later) == 2 * len(SPARSE)


def test_they_learn(finished: Path) -> None:
    rows = read(finished / "epochs.csv")
    first, last = ([float(r["train_loss"]) for r in rows if r["epoch"] == e] for e in "14")
    assert all(b < a for a, b in zip(first, last, strict=True))
    assert all(
        float(r["test_accuracy"]) > 0.5
        for r in rows
        if r["test_accuracy"] and r["method"] == "dense"
    )


def test_losses_are_measured_at_redistributions_only(finished: Path) -> None:
    for row in read(finished / "epochs.csv"):
        redistributes = row["method"].startswith("Redr") and int(row["epoch"]) <= 3
        assert bool(row["loss_before"]) == bool(row["loss_after"]) == redistributes
    changed = [r for r in read(finished / "epochs.csv") if r["loss_before"] != r["loss_after"]]
    assert {row["epoch"] for row in changed} == {"1", "2"}  # at 3 the drop fraction is zero


def test_the_table_has_mean_and_deviation(
    example: ModuleType, finished: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    study("--figures-only", output=finished)
    printed = capsys.readouterr().out
    values = [
        100 * float(row["test_accuracy"])
        for row in read(finished / "runs.csv")
        if row["method"] == "static"
    ]
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
    line = next(line for line in printed.splitlines() if line.startswith("static"))
    assert f"{mean:.2f} ± {half * 2**0.5:.2f}" in line
    assert str(finished / "accuracy.png") in printed


# ------------------------------------------------------------------------------ equal terms


def test_loss_before_and_after_are_exact(example: ModuleType, digits: Path) -> None:
    """Nothing but the redistribution lies between the two measurements."""
    data = example.Data.read(digits)
    probe = (data.train[0][:50], data.train[1][:50])
    sparse = example.Run("RedrRandom", 0.05).callbacks()
    net = example.Net((784, 256, 256, 10), 0.003)
    seen: dict[str, list[float]] = {"before": [], "after": []}
    redistribute = sparse[1].update

    def update(*arguments: Any) -> Any:
        seen["before"].append(net.measure(probe)[0])
        changed = redistribute(*arguments)
        assert net.measure(probe)[0] == seen["before"][-1]  # rules are pure
        return changed

    class AfterBatch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen["after"].append(net.measure(probe)[0])

    sparse[1].update = update
    recorder = example.Recorder(data, sparse[1], probe=50)
    batches = example.Batches(data.train, 100, 0, lambda: trainer.current_epoch)
    trainer = trainer_of(4, [*sparse, recorder, AfterBatch()])
    trainer.fit(net, batches)
    assert [row.get("loss_before") for row in recorder.rows] == [*seen["before"], None]
    ends = seen["after"][1::2]  # two batches per epoch
    assert [row.get("loss_after") for row in recorder.rows] == [*ends[:3], None]
    assert ends[0] != seen["before"][0]


def trainer_of(epochs: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("method", ["RedrLoss", "dense"])
def test_measuring_changes_nothing(example: ModuleType, digits: Path, method: str) -> None:
    data = example.Data.read(digits)
    trained = []
    for measured in (False, True):
        seed_everything(0, verbose=False)
        run = example.Run(method, 0.05)
        net, sparse = example.Net(run.widths, 0.003), run.callbacks()
        if measured:
            sparse.append(example.Recorder(data, sparse[-1] if sparse else None))
        batches = example.Batches(data.train, 64, 0, lambda: trainer.current_epoch)  # noqa: B023
        trainer = trainer_of(3, sparse)
        trainer.fit(net, batches)
        trained.append(net.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name])


def test_batches(example: ModuleType) -> None:
    part = (torch.arange(10.0).unsqueeze(1), torch.arange(10))

    def order(seed: int, epoch: int) -> list[int]:
        batches = list(example.Batches(part, 4, seed, lambda: epoch))
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        assert all(torch.equal(images[:, 0].long(), labels) for images, labels in batches)
        return torch.cat([labels for _, labels in batches]).tolist()

    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_parts_are_fixed_and_disjoint(example: ModuleType, digits: Path) -> None:
    data = example.Data.read(digits)
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [200, 40, 40]
    images = torch.cat([data.train[0], data.val[0]])
    assert len(images.unique(dim=0)) == 240
    assert images.min() >= 0
    assert 0.9 < images.max() <= 1
    assert torch.equal(example.Data.read(digits).val[0], data.val[0])


@pytest.mark.parametrize(
    ("density", "hidden", "width"),
    [(0.1, (256, 256), 33), (1.0, (256, 256), 256), (0.1, (256, 128, 128, 128), 30)],
)
def test_the_small_dense_net_has_as_many_weights(
    example: ModuleType, density: float, hidden: tuple[int, ...], width: int
) -> None:
    widths = example.Run("dense-small", density, hidden).widths
    assert widths == (784, *[width] * len(hidden), 10)
    wanted = density * example.weights((784, *hidden, 10))
    off = [
        abs(example.weights((784, *[width + more] * len(hidden), 10)) - wanted)
        for more in (-1, 0, 1)
    ]
    assert min(off) == off[1]
    assert example.Run("dense", density, hidden).widths == (784, *hidden, 10)


def test_depths_are_of_nearly_as_many_weights(example: ModuleType) -> None:
    counts = [example.weights((784, *hidden, 10)) for hidden in example.DEPTHS.values()]
    assert counts == [268800, 267520, 265472]


def test_plan(example: ModuleType) -> None:
    args = SimpleNamespace(
        seeds=[0, 1],
        densities=[0.1, 0.03],
        methods=["RedrLoss", "static", "dense"],
        intervals=[1, 5],
    )
    accuracy = example.plan(["accuracy"], args)
    assert len(accuracy) == 2 * (2 * 2 + 1)  # dense nets have no density
    frequency = example.plan(["frequency"], args)
    assert {(run.method, run.interval) for run in frequency} == {("RedrLoss", 1), ("RedrLoss", 5)}
    assert len(frequency) == 2 * 2 * 2
    depth = example.plan(["depth"], args)
    assert len(depth) == 3 * len(accuracy)
    every = example.plan(["accuracy", "frequency", "depth"], args)
    assert every[: len(accuracy)] == accuracy
    assert len(every) == len(set(every)) == 30 + 4  # what studies share is made once
    assert len({run.name for run in every}) == len(every)


# -------------------------------------------------------------------------- frequency, depth


def test_frequency(study: Study, tmp_path: Path) -> None:
    arguments = ("--methods", "RedrRandom", "static", "--study", "frequency", "--intervals", 1, 2)
    study(*arguments)
    rows = read(tmp_path / "out" / "epochs.csv")
    assert {(row["method"], row["interval"]) for row in rows} == {
        ("RedrRandom", "1"),
        ("RedrRandom", "2"),
    }
    updates = [row["epoch"] for row in rows if row["interval"] == "2" and row["loss_after"]]
    assert updates == ["2"]
    assert (tmp_path / "out" / "frequency.png").exists()
    assert not (tmp_path / "out" / "depth.png").exists()


@pytest.mark.slow
def test_depth(study: Study, tmp_path: Path) -> None:
    study("--methods", "RedrGradient", "dense-small", "--study", "depth", "--epochs", 2)
    rows = read(tmp_path / "out" / "runs.csv")
    assert {len(row["live"].split()) for row in rows} == {3, 5, 12}
    assert (tmp_path / "out" / "depth.png").exists()
    assert not (tmp_path / "out" / "frequency.png").exists()


# ---------------------------------------------------------------------------------- resuming


def test_finished_runs_are_not_made_again(
    example: ModuleType, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study("--methods", "static")
    made: list[str] = []
    train = example.train
    monkeypatch.setattr(
        example, "train", lambda run, *rest: (made.append(run.method), train(run, *rest))
    )
    study("--methods", "static", "dense-small")
    assert made == ["dense-small"]
    assert len(read(tmp_path / "out" / "runs.csv")) == 2


@pytest.mark.parametrize("method", ["RedrRandom", "RedrWoodfisher", "dense"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    example: ModuleType,
    study: Study,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    study("--methods", method, output=tmp_path / "whole")
    epochs = []
    start = example.Recorder.on_train_epoch_start

    def interrupt(self: Any, trainer: Trainer, *args: Any) -> None:
        epochs.append(trainer.current_epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt
        start(self, trainer, *args)

    monkeypatch.setattr(example.Recorder, "on_train_epoch_start", interrupt)
    with pytest.raises(SystemExit):
        study("--methods", method)
    runs = tmp_path / "out" / "runs"
    assert [path.name for path in runs.rglob("*") if path.is_file()] == ["last.ckpt"]
    study("--methods", method)
    assert epochs == [0, 1, 2, 2, 3]
    (path,) = runs.iterdir()
    assert without_seconds(path) == without_seconds(tmp_path / "whole" / "runs" / path.name)


def test_a_run_that_stopped_before_its_rows_were_written(
    example: ModuleType, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study("--methods", "RedrRandom", output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(example, "write_csv", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            study("--methods", "RedrRandom")
    study("--methods", "RedrRandom")
    whole, again = (without_seconds(tmp_path / name / "runs.csv") for name in ("whole", "out"))
    assert whole == again


@pytest.mark.slow
def test_several_processes_give_the_same(digits: Path, finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "redr_comparison.py", "--data-dir", digits, *SMALL]
    command += ["--output", tmp_path / "out", "--jobs", 2, "--seeds", 0, 1]
    command += ["--methods", "RedrRandom", "dense-small"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "RedrRandom" in done.stdout
    made = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(made) == 4
    for path in made:
        assert without_seconds(path) == without_seconds(finished / "runs" / path.name)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "--epochs must be at least 1"),
        (("--jobs", 0), "--jobs must be at least 1"),
        (("--batch-size", -1), "--batch-size must be at least 1"),
        (("--densities", 0.1, 1.5), "--densities must lie in (0, 1]"),
        (("--densities", 0), "--densities must lie in (0, 1]"),
        (("--seeds", -1), "--seeds must not be negative"),
        (("--methods", "RigL"), "invalid choice: 'RigL'"),
        (("--study", "width"), "invalid choice: 'width'"),
        (("--study", "frequency", "--intervals", 4), "between 1 and 75% of the 4 epochs"),
        (("--study", "all", "--intervals", 0, 1), "between 1 and 75% of the 4 epochs"),
        (("--data-dir", "nowhere"), "is absent"),
        (("--figures-only",), "holds no finished run"),
    ],
)
def test_bad_arguments(
    study: Study, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        study(*arguments)
    assert message in capsys.readouterr().err


def test_data_are_needed(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["redr_comparison.py"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--data-dir is needed" in capsys.readouterr().err


def test_quick_changes_defaults_only(example: ModuleType) -> None:
    _, args = example.parse(["--quick", "--figures-only", "--seeds", "3"])
    assert (args.epochs, args.densities, args.seeds, args.intervals) == (4, [0.1], [3], [1, 2])
    _, args = example.parse(["--figures-only"])
    assert (args.epochs, args.densities, args.seeds) == (80, [0.1, 0.06, 0.03], [0, 1, 2])
    assert args.methods == example.METHODS


def test_runs_of_other_settings_are_not_mixed(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study("--methods", "dense-small")
    with pytest.raises(SystemExit):
        study("--methods", "dense-small", "--epochs", 5)
    assert "epochs 4 (not 5); give another --output" in capsys.readouterr().err
    other = write_digits(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        study("--methods", "dense-small", "--data-dir", other)
    assert "holds runs with data" in capsys.readouterr().err
    assert len(read(tmp_path / "out" / "runs.csv")) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x0d\x01\0\0\0\x01", b"<html>", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x08\3"],
)
def test_broken_files(example: ModuleType, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="not a file of bytes in the IDX format"):
        example.read_idx(tmp_path / "file")
    (tmp_path / "packed.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="broken gzip file"):
        example.read_idx(tmp_path / "packed")


def test_parts_of_two_data_sets(example: ModuleType, tmp_path: Path) -> None:
    mixed = write_digits(tmp_path / "mixed")
    (mixed / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x01\0")
    with pytest.raises(ValueError, match="Are they of one data set"):
        example.Data.read(mixed)
