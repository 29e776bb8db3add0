"""Test accuracy of all dynamic methods on MNIST: LeNet-300-100, three densities, three seeds.

Every method runs with its defaults (SGD with momentum, 60 epochs, batches of 256, cosine
learning rate), beside dense, static and pruned networks. Seconds are those of one processor
core. Finished trainings are not run again: an interrupted command goes on where it was.


    python benchmarks/dynamic_mnist.py --data-dir DIR --jobs 2
    python benchmarks/dynamic_mnist.py --table

"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from tqdm import tqdm

import lightning_sparsity as ls
from lightning_sparsity.scores import drawn_by, momentum, nearby, unexplored

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mnist_rigl import read_digits

RESULTS = Path(__file__).parent / "results" / "dynamic_mnist.csv"
FIELDS = ("method", "density", "seed", "epochs", "accuracy", "live", "seconds_per_epoch")

METHODS: dict[str, Callable[[float], Callback] | None] = {
    "dense": None,
    "StaticSparse": ls.StaticSparse,
    "GMP": ls.GMP,
    "SET": ls.SET,
    "SET, local growth": lambda d: ls.SET(d, growth=drawn_by(nearby(0.1))),
    "RigL": ls.RigL,
    "RigL, momentum growth": lambda d: ls.RigL(d, growth=momentum(0.9)),
    "RigL-ITOP": lambda d: ls.RigL(d, drop_fraction=ls.cosine(0.5, 0.005), update_end=1.0),
    "SET-ITOP": lambda d: ls.SET(d, drop_fraction=ls.cosine(0.5, 0.005), growth=unexplored()),
    "GSE": ls.GSE,
    "DeepR": ls.DeepR,
    "DeepR, T=1e-7": lambda d: ls.DeepR(d, temperature=1e-7),
    "DSR": ls.DSR,
    "SNFS": ls.SNFS,
    "GraNet": ls.GraNet,
    "MEST": ls.MEST,
    "MEST, soft": lambda d: ls.MEST(d, soft=True),
    "SRigL": ls.SRigL,
    "ACDC": ls.ACDC,
    "CHT": ls.CHT,
    "CHT, soft": lambda d: ls.CHT(d, soft=True),
    "NeST": ls.NeST,
    "RedrRandom": ls.RedrRandom,
    "RedrGradient": ls.RedrGradient,
    "RedrGradientGlobal": ls.RedrGradientGlobal,
    "RedrLoss": ls.RedrLoss,
    "RedrWoodfisher": ls.RedrWoodfisher,
    "RedrWoodtaylor": ls.RedrWoodtaylor,
}


class LeNet300(pl.LightningModule):
    """LeNet-300-100: 266200 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Shuffled:
    """All images in batches, in an order drawn anew for every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int) -> None:
        self._data = images, labels
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._data[1]) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._data[1]), generator=self._generator)
        for part in order.split(self._size):
            yield self._data[0][part], self._data[1][part]


class Count(Callback):
    """The live weights at the end, those included that are zero for now."""

    live = 266200

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: Any
    ) -> None:
        self._masks = keeper.masks

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.live = self._masks.live if hasattr(self, "_masks") else self.live


def train(name: str, density: float, seed: int, epochs: int, data_dir: Path) -> dict[str, Any]:
    """One training, from its seed to a row of the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.seed_everything(seed, verbose=False)
    model = LeNet300()
    make = METHODS[name]
    count = Count()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[make(density), count] if make else [count],
    )
    images, labels = read_digits(data_dir, "train").tensors
    began = time.process_time()
    trainer.fit(model, Shuffled(images, labels, 256, seed))  # type: ignore[arg-type]
    seconds = (time.process_time() - began) / epochs
    images, labels = read_digits(data_dir, "t10k").tensors
    with torch.no_grad():
        right = (model.net(images).argmax(1) == labels).sum()
    return {
        "method": name,
        "density": density,
        "seed": seed,
        "epochs": epochs,
        "accuracy": round(100 * int(right) / len(labels), 2),
        "live": count.live,
        "seconds_per_epoch": round(seconds, 3),
    }


def finished(path: Path) -> list[dict[str, str]]:
    """The rows that there are."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def summary(values: Sequence[float]) -> str:
    """Mean, standard deviation and number of some accuracies; nothing of none."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})" if values else ""


def collect(
    work: Callable[[Any], list[dict[str, Any]]],
    tasks: Sequence[Any],
    output: Path,
    fields: Sequence[str],
    jobs: int,
    tasks_per_process: int,
) -> None:
    """Do tasks in processes of one thread each, and add their rows to a file as they come."""
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=tasks_per_process)
    new = not output.exists() or output.stat().st_size == 0
    with pool, output.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        for rows in tqdm(pool.imap_unordered(work, tasks), total=len(tasks)):
            writer.writerows(rows)
            file.flush()


def table(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation of the test accuracy, by method and density."""
    densities = sorted({float(row["density"]) for row in rows}, reverse=True)
    sparse = [density for density in densities if density < 1]
    lines = [
        f"| method | {' | '.join(map(str, sparse))} | s/epoch |",
        "|---|" + "---|" * (len(sparse) + 1),
    ]
    for name in METHODS:
        cells, seconds = [], []
        for density in sparse:
            mine = [
                row
                for row in rows
                if row["method"] == name and float(row["density"]) in (density, 1.0)
            ]
            values = [float(row["accuracy"]) for row in mine]
            seconds += [float(row["seconds_per_epoch"]) for row in mine]
            cells.append(summary(values) or "–")
        if seconds:
            lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.2f} |")
    return "\n".join(lines)


def _train(task: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [train(*task)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="where the four files of MNIST are")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.02, 0.01])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    if args.table:
        print(table(finished(args.output)))
        return
    if args.data_dir is None:
        parser.error("--data-dir is needed: the directory with the four files of MNIST")

    done = {
        (row["method"], float(row["density"]), int(row["seed"]), int(row["epochs"]))
        for row in finished(args.output)
    }
    tasks = [
        (name, density if METHODS[name] else 1.0, seed, args.epochs)
        for seed in args.seeds
        for density in args.densities
        for name in args.methods
    ]
    tasks = [task for task in dict.fromkeys(tasks) if task not in done]
    given = [(*task, args.data_dir) for task in tasks]
    collect(_train, given, args.output, FIELDS, args.jobs, tasks_per_process=8)
    print(table(finished(args.output)))


if __name__ == "__main__":
    main()
