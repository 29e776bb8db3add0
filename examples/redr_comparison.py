"""Compare the Redr algorithms with a static sparse net and with dense ones, on equal terms.

The experiments of Eibensteiner, Sec. 3, on any data set in the form of MNIST (his is KMNIST).
Put the four files of the data set into one directory and run
``python examples/redr_comparison.py --data-dir DIR --output OUT --jobs 4``. What an interrupted
study has finished is kept: run the same command again. OUT gets epochs.csv (a row per epoch),
runs.csv (a row per training) and the figures.

All sparse nets of one seed start from the same weights at the same places and see the same
batches; they differ in what is redistributed after each epoch. Of the training images 10000
are kept for validation; the files named t10k are used once, after the last epoch.
"""

import argparse
import csv
import gzip
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

from lightning_sparsity import (
    MaskCallback,
    RedrGradient,
    RedrGradientGlobal,
    RedrLoss,
    RedrRandom,
    RedrWoodfisher,
    RedrWoodtaylor,
    StaticSparse,
    epochs,
    uniform,
)
from lightning_sparsity.starts import sparse_uniform, spread_inputs

REDR = {
    method.__name__: method
    for method in (
        RedrRandom,
        RedrGradient,
        RedrGradientGlobal,
        RedrLoss,
        RedrWoodfisher,
        RedrWoodtaylor,
    )
}
STUDIES = ("accuracy", "frequency", "depth")
METHODS = [*REDR, "static", "dense-small", "dense"]
DEPTHS = {  # hidden layers of nets of nearly as many weights
    "2 x 256": (256, 256),
    "256, 3 x 128": (256, 128, 128, 128),
    "11 x 128": (128,) * 11,
}
DROP_FRACTION, UPDATE_END = 0.5, 0.75


# ------------------------------------------------------------------------------------ data


def read_idx(path: Path) -> Tensor:
    """Read a file of unsigned bytes in the IDX format, packed with gzip or not.

    Args:
        path: Name of the file, without ``.gz``.

    Returns:
        uint8, in the shape that the file states.

    Raises:
        FileNotFoundError: If there is neither ``path`` nor ``path`` with ``.gz``.
        ValueError: If the file is not what its header says.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(
            f"{path} is absent, and so is {packed.name}. Download MNIST, Fashion-MNIST or KMNIST "
            f"from its authors (four files each) and put all four files into {path.parent}."
        )
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{packed}: broken gzip file ({error}); download it again.") from None
    start = 4 + 4 * content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not shape or len(content) - start != prod(shape):
        raise ValueError(
            f"{path}: is not a file of bytes in the IDX format, or not a whole one; download it "
            "again."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Images, float in [0, 1], ``(n, 784)``, and their labels, in three parts."""

    train: Part
    val: Part
    test: Part

    @classmethod
    def read(cls, directory: Path) -> "Data":
        """Read the four files; a sixth of the training images (10000 of 60000) is ``val``."""
        images, labels = cls._read(directory, "train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        val, train = order.tensor_split([len(labels) // 6])
        return cls(
            train=(images[train], labels[train]),
            val=(images[val], labels[val]),
            test=cls._read(directory, "t10k"),
        )

    @staticmethod
    def _read(directory: Path, part: str) -> Part:
        images = read_idx(directory / f"{part}-images-idx3-ubyte")
        labels = read_idx(directory / f"{part}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{directory}: the {part} images have the shape {tuple(images.shape)} and their "
                f"labels {tuple(labels.shape)}; expected (n, 28, 28) and (n,). Are they of one "
                "data set?"
            )
        return images.flatten(1).float() / 255, labels.long()

    def digest(self) -> str:
        """A short hash, to tell data sets apart."""
        total = hashlib.blake2b(digest_size=8)
        for tensor in (*self.train, *self.val, *self.test):
            total.update(tensor.numpy().tobytes())
        return total.hexdigest()


class Batches:
    """Shuffled batches; their order depends on the seed and the epoch alone.

    Args:
        part: Images and labels.
        size: Images per batch.
        seed: Of the order.
        epoch: Says which epoch it is, as the first batch is asked for.
    """

    def __init__(self, part: Part, size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._part, self._size, self._seed, self._epoch = part, size, seed, epoch

    def __len__(self) -> int:
        return -(-len(self._part[1]) // self._size)

    def __iter__(self) -> Iterator[Part]:
        images, labels = self._part
        generator = torch.Generator().manual_seed(100_000 * self._seed + self._epoch())
        for chosen in torch.randperm(len(labels), generator=generator).split(self._size):
            yield images[chosen], labels[chosen]


# ---------------------------------------------------------------------------- one training


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: One of ``METHODS``.
        density: Live share of the weights; for ``dense-small``, of those of the net that it
            equals in weights.
        hidden: Widths of the hidden layers.
        interval: Epochs from one redistribution to the next.
        seed: Of the start and of the order of the images.
    """

    method: str
    density: float
    hidden: tuple[int, ...] = (256, 256)
    interval: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{self.density}-{self.net}-every{self.interval}-seed{self.seed}"

    @property
    def net(self) -> str:
        """The hidden layers, as a word."""
        return "x".join(map(str, self.hidden))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all layers of the net that is trained."""
        if self.method != "dense-small":
            return (784, *self.hidden, 10)
        wanted = self.density * weights((784, *self.hidden, 10))
        small = [(784, *[width] * len(self.hidden), 10) for width in range(1, max(self.hidden) + 1)]
        return min(small, key=lambda widths: abs(weights(widths) - wanted))

    def callbacks(self) -> list[MaskCallback]:
        """What makes the net sparse: the start that all share, then the method."""
        if self.method.startswith("dense"):
            return []
        start = StaticSparse(
            self.density,
            topology=spread_inputs,
            distribution=uniform,
            weight_init=sparse_uniform(),
        )
        if self.method == "static":
            return [start]
        redistribution = REDR[self.method](
            drop_fraction=DROP_FRACTION,
            update_interval=epochs(self.interval),
            update_end=UPDATE_END,
        )
        return [start, redistribution]


def weights(widths: Sequence[int]) -> int:
    """Of a net of linear layers, without biases."""
    return sum(a * b for a, b in zip(widths, widths[1:], strict=False))


class Net(LightningModule):
    """Linear layers with ReLU between them, trained by Adam.

    Args:
        widths: Of all layers, inputs and outputs included.
        lr: Learning rate.
    """

    def __init__(self, widths: Sequence[int], lr: float) -> None:
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        between = [module for layer in layers for module in (layer, nn.ReLU())]
        self.net = nn.Sequential(*between[:-1])
        self.lr = lr

    def training_step(self, batch: Part, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    @torch.no_grad()
    def measure(self, part: Part) -> tuple[float, float]:
        """Mean loss and accuracy over images and labels; they do not change the net."""
        was_training = self.training
        self.eval()
        loss = correct = 0.0
        for images, labels in zip(*(tensor.split(2500) for tensor in part), strict=True):
            outputs = self.net(images)
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
            correct += int((outputs.argmax(1) == labels).sum())
        self.train(was_training)
        return loss / len(part[1]), correct / len(part[1])


class Recorder(Callback):
    """Notes a row per epoch; the rows are saved in checkpoints, so that resuming keeps them.

    The loss on some training images is measured before and after every redistribution, with
    nothing between the two but the redistribution: the first as the method is called, which is
    after the optimizer step, the second at the end of the same batch. The seconds are CPU time,
    which other processes do not lengthen, without that of measuring.

    Args:
        data: The data.
        method: What redistributes weights, if anything.
        probe: How many training images the loss is measured on.
    """

    def __init__(self, data: Data, method: MaskCallback | None, probe: int = 2048) -> None:
        self.rows: list[dict[str, Any]] = []
        self._data = data
        self._probe = (data.train[0][:probe], data.train[1][:probe])
        self._live: Callable[[], list[int]] | None = None
        self._net: Net | None = None
        self._losses: dict[str, float] = {}
        self._loss = torch.zeros(())
        self._started = self._ended = 0.0
        if method is not None:
            self._redistribute = method.update
            method.update = self._update

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Net)
        self._net = pl_module

    def on_masks_ready(self, trainer: Trainer, pl_module: LightningModule, keeper: Any) -> None:
        self._live = lambda: [parameter.live for parameter in keeper.masks]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._loss = {}, torch.zeros(())
        self._started = time.process_time()

    def _update(self, *args: Any) -> Any:
        self._note_loss("loss_before")
        return self._redistribute(*args)

    def _note_loss(self, name: str) -> None:
        began = time.process_time()
        self._losses[name] = self._net.measure(self._probe)[0]
        self._started += time.process_time() - began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Part, *args: Any
    ) -> None:
        self._loss += outputs["loss"] * (len(batch[1]) / len(self._data.train[1]))
        if len(self._losses) == 1:
            self._note_loss("loss_after")
        self._ended = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        linear = [layer for layer in pl_module.modules() if isinstance(layer, nn.Linear)]
        live = self._live() if self._live else [layer.weight.numel() for layer in linear]
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "train_loss": float(self._loss),
                "val_accuracy": self._net.measure(self._data.val)[1],
                **self._losses,
                "seconds": self._ended - self._started,
                "live": " ".join(map(str, live)),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


COLUMNS = {  # of the files of rows, and how to read them
    "method": str,
    "density": float,
    "hidden": str,
    "interval": int,
    "seed": int,
    "epoch": int,
    "train_loss": float,
    "val_accuracy": float,
    "test_accuracy": float,
    "loss_before": float,
    "loss_after": float,
    "seconds": float,
    "live": str,
}


def train(run: Run, data: Data, settings: dict[str, Any], folder: Path) -> None:
    """Make one training, from its last checkpoint if there is one, and write its rows.

    Args:
        run: What to train.
        data: The data.
        settings: Those that all runs share.
        folder: Where the rows and checkpoints of all runs are.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    for name in logging.root.manager.loggerDict:
        if name.startswith("lightning."):
            logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(run.seed, verbose=False)
    net = Net(run.widths, settings["lr"])
    batches = Batches(data.train, settings["batch_size"], run.seed, lambda: trainer.current_epoch)
    sparse = run.callbacks()
    recorder = Recorder(data, sparse[-1] if len(sparse) > 1 else None)
    checkpoints = folder / run.name
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=settings["epochs"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *sparse,
            recorder,
            ModelCheckpoint(
                checkpoints,
                filename="last",
                enable_version_counter=False,
                save_on_train_epoch_end=True,
            ),
        ],
    )
    last = checkpoints / "last.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own
        trainer.fit(net, batches, ckpt_path=last if last.exists() else None)
    recorder.rows[-1]["test_accuracy"] = net.measure(data.test)[1]
    about = {
        "method": run.method,
        "density": run.density,
        "hidden": run.net,
        "interval": run.interval,
        "seed": run.seed,
    }
    write_csv(folder / f"{run.name}.csv", [{**about, **row} for row in recorder.rows])
    shutil.rmtree(checkpoints)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a file that is never seen half written."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


# ---------------------------------------------------------------------------- many trainings


def plan(studies: Sequence[str], args: argparse.Namespace) -> list[Run]:
    """Every training that the studies need, once: seed by seed, so that all methods have one."""
    runs: dict[Run, None] = {}
    for study, seed, density, method in product(studies, args.seeds, args.densities, args.methods):
        run = Run(method, 1.0 if method == "dense" else density, seed=seed)
        if study == "accuracy":
            runs[run] = None
        elif study == "frequency" and method in REDR:
            runs |= {replace(run, interval=interval): None for interval in args.intervals}
        elif study == "depth":
            runs |= {replace(run, hidden=hidden): None for hidden in DEPTHS.values()}
    return list(runs)


_data: Data | None = None  # of a worker process


def _start_worker(directory: Path) -> None:
    global _data
    _data = Data.read(directory)


def _train_in_worker(run: Run, settings: dict[str, Any], folder: Path) -> None:
    assert _data is not None
    try:
        train(run, _data, settings, folder)
    except (KeyboardInterrupt, SystemExit):
        os._exit(1)  # or it would go on with the next run


def train_all(
    runs: Sequence[Run], data: Data, settings: dict[str, Any], args: argparse.Namespace
) -> None:
    """Make the trainings that are not finished, some at a time."""
    folder = args.output / "runs"
    todo = [run for run in runs if not (folder / f"{run.name}.csv").exists()]
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as bar:
        if args.jobs == 1:
            for run in todo:
                bar.set_postfix_str(run.name)
                train(run, data, settings, folder)
                bar.update()
            return
        with ProcessPoolExecutor(
            args.jobs, get_context("spawn"), _start_worker, (args.data_dir,)
        ) as pool:
            futures = {pool.submit(_train_in_worker, run, settings, folder): run for run in todo}
            try:
                for future in as_completed(futures):
                    bar.set_postfix_str(futures[future].name)
                    future.result()
                    bar.update()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def check_settings(settings: dict[str, Any], output: Path) -> None:
    """Refuse to mix runs that were made on other data or by other settings.

    Raises:
        ValueError: If there are such runs in ``output``.
    """
    path = output / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    if other := [name for name in settings if before.get(name) != settings[name]]:
        raise ValueError(
            f"{output} holds runs with "
            + ", ".join(f"{name} {before.get(name)} (not {settings[name]})" for name in other)
            + "; give another --output."
        )
    (output / "runs").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


# -------------------------------------------------------------------------------- results

Row = dict[str, Any]
BASE = Run("dense", 1.0).net
STYLES: dict[str, dict[str, Any]] = {
    "RedrRandom": {"color": "tab:orange"},
    "RedrGradient": {"color": "tab:blue"},
    "RedrGradientGlobal": {"color": "tab:green"},
    "RedrLoss": {"color": "tab:red"},
    "RedrWoodfisher": {"color": "tab:purple"},
    "RedrWoodtaylor": {"color": "tab:brown"},
    "static": {"color": "black"},
    "dense-small": {"color": "tab:gray", "linestyle": "--"},
    "dense": {"color": "black", "linestyle": "--"},
}
LABELS = {
    "static": "static sparse",
    "dense-small": "dense, as many weights",
    "dense": "dense, as many neurons",
}


def read_rows(output: Path) -> list[Row]:
    """The rows of all finished runs; columns that a row leaves empty are absent."""
    rows = []
    for path in sorted((output / "runs").glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                rows.append({name: COLUMNS[name](value) for name, value in row.items() if value})
    return rows


def finished(rows: Sequence[Row]) -> list[Row]:
    """The last row of every run, with the mean seconds of its epochs and no losses."""
    seconds = grouped(rows, key=lambda row: tuple(row[name] for name in list(COLUMNS)[:5]))
    return [
        {name: value for name, value in last.items() if not name.startswith("loss")}
        | {"seconds": mean(row["seconds"] for row in run)}
        for run in seconds.values()
        for last in run
        if "test_accuracy" in last
    ]


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows by ``key``."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def table(runs: Sequence[Row]) -> str:
    """Test accuracy of all methods: mean and standard deviation over the seeds."""
    lines = []
    groups = grouped(runs, lambda row: (len(row["hidden"]), row["hidden"], row["interval"]))
    for (_, net, interval), group in sorted(groups.items(), key=lambda group: group[0]):
        densities = sorted({row["density"] for row in group}, reverse=True)
        lines.append(f"\nTest accuracy in %, net {net}, epochs between redistributions: {interval}")
        lines.append(f"{'density':<20}" + "".join(f"{density:>16}" for density in densities))
        for method, mine in in_order(grouped(group, lambda row: row["method"])):
            cells = grouped(mine, lambda row: row["density"])
            lines.append(f"{method:<20}" + "".join(f"{cell(cells.get(d)):>16}" for d in densities))
    return "\n".join(lines)


def cell(runs: Sequence[Row] | None) -> str:
    """Mean and standard deviation of the test accuracy of some runs."""
    if runs is None:
        return ""
    values = [100 * run["test_accuracy"] for run in runs]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def in_order(groups: dict[str, list[Row]]) -> list[tuple[str, list[Row]]]:
    """Groups by method, in the order of ``METHODS``."""
    return sorted(groups.items(), key=lambda group: METHODS.index(group[0]))


@dataclass(frozen=True)
class Chart:
    """A figure with a panel per density, and in it a line per method.

    A line is the mean over seeds; the band goes from the lowest seed to the highest.

    Args:
        x: The value of a row on the horizontal axis.
        y: That on the vertical axis.
        labels: Of the two axes.
        ticks: Names of places on the horizontal axis.
        zoom: Whether the first epochs may leave the panel, to tell the last ones apart.
        symmetric_log: Unit of a vertical axis that is logarithmic on both sides of zero.
    """

    x: Callable[[Row], Any]
    y: Callable[[Row], float]
    labels: tuple[str, str]
    ticks: Mapping[int, str] = field(default_factory=dict)
    zoom: bool = False
    symmetric_log: float | None = None

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Draw rows into a file; methods of density 1 are in every panel."""
        densities = sorted({row["density"] for row in rows if row["method"] != "dense"})
        densities = densities[::-1] or [1.0]
        figure = Figure(figsize=(1 + 4.2 * len(densities), 4.4), layout="constrained")
        panels = figure.subplots(1, len(densities), squeeze=False)[0]
        entries = {}
        for panel, density in zip(panels, densities, strict=True):
            mine = [row for row in rows if row["density"] == density or row["method"] == "dense"]
            for method, group in in_order(grouped(mine, lambda row: row["method"])):
                entries[LABELS.get(method, method)] = self._draw_line(panel, method, group)
            self._finish(panel, mine)
            panel.set_title(f"density {density:g}")
        panels[0].set_ylabel(self.labels[1])
        order = sorted(entries, key=[LABELS.get(m, m) for m in METHODS].index)
        figure.legend(
            [entries[name] for name in order],
            order,
            loc="outside lower center",
            ncols=round(1.7 * len(densities)),
        )
        figure.savefig(path, dpi=150)

    def _draw_line(self, panel: Any, method: str, rows: Sequence[Row]) -> Any:
        seeds = sorted(grouped(rows, self.x).items())
        places = [place for place, _ in seeds]
        values = [[self.y(row) for row in group] for _, group in seeds]
        marker = "o" if len(places) <= 4 else None
        (line,) = panel.plot(places, [*map(mean, values)], marker=marker, **STYLES[method])
        panel.fill_between(
            places,
            [*map(min, values)],
            [*map(max, values)],
            color=line.get_color(),
            alpha=0.15,
            lw=0,
        )
        return line

    def _finish(self, panel: Any, rows: Sequence[Row]) -> None:
        panel.set_xlabel(self.labels[0])
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if self.ticks:
            panel.set_xticks(list(self.ticks), list(self.ticks.values()))
            panel.margins(x=0.12)
        if self.symmetric_log is not None:
            panel.set_yscale("symlog", linthresh=self.symmetric_log)
            panel.axhline(0, color="black", lw=0.5)
        last = [self.y(row) for row in rows if "test_accuracy" in row]
        if self.zoom and last:
            room = max(max(last) - min(last), 0.1)
            panel.set_ylim(min(last) - room, max(last) + room / 4)


def of_several(rows: Sequence[Row], column: str) -> list[Row]:
    """The rows of the methods and densities that have several values in a column."""
    groups = grouped(rows, lambda row: (row["method"], row["density"])).values()
    return [row for group in groups if len({r[column] for r in group}) > 1 for row in group]


def draw(rows: Sequence[Row], output: Path) -> list[Path]:
    """Draw every figure that there are runs for."""
    base = [row for row in rows if row["hidden"] == BASE]
    usual = [row for row in base if row["interval"] == 1]
    end = UPDATE_END * max(row["epoch"] for row in rows)  # where the drop fraction is zero
    changed = [row for row in usual if "loss_after" in row and row["epoch"] < end]
    ends = [row for row in rows if "test_accuracy" in row]
    intervals = [row for row in ends if row["hidden"] == BASE and row["method"] in REDR]
    nets = {"x".join(map(str, hidden)): name for name, hidden in DEPTHS.items()}
    places = list(nets)
    depths = [row for row in ends if row["interval"] == 1 and row["hidden"] in nets]
    charts = {
        "accuracy": (
            usual,
            Chart(
                x=lambda row: row["epoch"],
                y=lambda row: 100 * row["val_accuracy"],
                labels=("epoch", "validation accuracy in %"),
                zoom=True,
            ),
        ),
        "induced_loss": (
            changed,
            Chart(
                x=lambda row: row["epoch"],
                y=lambda row: row["loss_after"] - row["loss_before"],
                labels=("redistribution after epoch", "change of the training loss by it"),
                symmetric_log=1e-3,
            ),
        ),
        "frequency": (
            of_several(intervals, "interval"),
            Chart(
                x=lambda row: row["interval"],
                y=lambda row: 100 * row["test_accuracy"],
                labels=("epochs between redistributions", "test accuracy in %"),
                ticks={row["interval"]: str(row["interval"]) for row in intervals},
            ),
        ),
        "depth": (
            of_several(depths, "hidden"),
            Chart(
                x=lambda row: places.index(row["hidden"]),
                y=lambda row: 100 * row["test_accuracy"],
                labels=("hidden layers", "test accuracy in %"),
                ticks=dict(enumerate(nets.values())),
            ),
        ),
    }
    paths = []
    for name, (mine, chart) in charts.items():
        if mine:
            paths.append(output / f"{name}.png")
            chart.draw(mine, paths[-1])
    return paths


# ----------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, Any]:
    """The arguments of the command line, checked as far as can be without the data."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, help="where the four files are")
    add("--output", type=Path, default=Path("runs/redr"), help="where tables and figures go")
    add("--study", choices=[*STUDIES, "all"], default=STUDIES[0], help="what is varied")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="what runs")
    add(
        "--densities",
        nargs="+",
        type=float,
        default=[0.1, 0.06, 0.03],
        metavar="D",
        help="of the nets",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="a run each")
    add(
        "--intervals",
        nargs="+",
        type=int,
        default=[1, 2, 5, 10],
        metavar="N",
        help="epochs between redistributions, in the frequency study",
    )
    add("--epochs", type=int, default=80, help="of every training")
    add("--batch-size", type=int, default=512, help="images per step")
    add("--lr", type=float, default=5e-4, help="learning rate of Adam")
    add("--quick", action="store_true", help="other defaults: 4 epochs, one density, one seed")
    add("--jobs", type=int, default=1, help="trainings at a time, a process of one thread each")
    add("--figures-only", action="store_true", help="train nothing; draw what is finished")
    args = parser.parse_args(arguments)
    if args.quick:
        parser.set_defaults(epochs=4, densities=[0.1], seeds=[0], intervals=[1, 2])
        args = parser.parse_args(arguments)
    if args.data_dir is None and not args.figures_only:
        parser.error("--data-dir is needed, unless with --figures-only")
    for name in ("epochs", "batch_size", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not all(0 < density <= 1 for density in args.densities):
        parser.error("--densities must lie in (0, 1]")
    if min(args.seeds) < 0:
        parser.error("--seeds must not be negative")
    args.studies = STUDIES if args.study == "all" else (args.study,)
    if "frequency" in args.studies and not (
        1 <= min(args.intervals) <= max(args.intervals) <= UPDATE_END * args.epochs
    ):
        parser.error(
            f"--intervals must lie between 1 and {UPDATE_END:.0%} of the {args.epochs} epochs: "
            "later there is no redistribution"
        )
    return parser, args


def main() -> None:
    parser, args = parse()
    if not args.figures_only:
        try:
            data = Data.read(args.data_dir)
            settings = {
                "data": data.digest(),
                "epochs": args.epochs,
                "batch_size": args.batch_size,
                "lr": args.lr,
            }
            check_settings(settings, args.output)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        try:
            train_all(plan(args.studies, args), data, settings, args)
        except KeyboardInterrupt:
            sys.exit("Interrupted. Run the same command again to go on.")
    rows = read_rows(args.output)
    if not rows:
        parser.error(f"{args.output} holds no finished run")
    runs = finished(rows)
    write_csv(args.output / "epochs.csv", rows)
    write_csv(args.output / "runs.csv", runs)
    print(table(runs))
    for path in draw(rows, args.output):
        print(path)


if __name__ == "__main__":
    main()
