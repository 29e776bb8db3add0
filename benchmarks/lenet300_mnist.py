"""Extreme sparsity on MNIST: LeNet-300-100 at 95 to 99.6 %, beside the table of the ESPN paper.

The protocol is that of Cho, Joshi and Hegde (2020, Table 1): 160 epochs of SGD with batches of
256, momentum 0.9, weight decay 5e-4 and a learning rate of 0.1 that falls tenfold at epochs 80
and 120. ESPN has its own phases: fine-tuning begins with the dense network of the same seed, which
is trained first, and rewinding takes as many epochs more as its joint training needs. Finished
trainings are not run again: an interrupted command goes on where it was.


    python benchmarks/lenet300_mnist.py --data-dir DIR --jobs 2
    python benchmarks/lenet300_mnist.py --table

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from dynamic_mnist import Count, Shuffled, finished
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from tqdm import tqdm

import lightning_sparsity as ls

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mnist_rigl import read_digits

RESULTS = Path(__file__).parent / "results" / "lenet300_mnist.csv"
FIELDS = ("method", "density", "seed", "epochs", "trained", "accuracy", "live", "seconds")
WEIGHTS = 266200
DENSITIES = [0.05, 0.02, 0.01, 0.004]

# What the paper reports at these densities, in percent.
PUBLISHED = {
    "dense": [98.80] * 4,
    "SNIP": [97.86, 97.15, 95.27, 86.57],
    "GraSP": [97.96, 96.96, 93.54, 45.02],
    "ESPN-Rewind": [98.57, 98.39, 97.94, 97.24],
    "ESPN-Finetune": [98.52, 98.35, 98.24, 97.28],
    "LotteryTicket": [98.26, 97.74, 96.95, 92.90],
}

# The strength of ESPN's penalty at these densities, as in the authors' program.
ALPHA = dict(zip(DENSITIES, [8e-5, 8e-5, 1.5e-4, 4e-4], strict=True))

# What makes methods without a density about as sparse, found by short trainings: the weight decay
# of STR's thresholds, and the price of a mask in continuous sparsification.
DECAY = dict(zip(DENSITIES, [8e-3, 2e-2, 3.2e-2, 5e-2], strict=True))
PRICE = dict(zip(DENSITIES, [1.1e-6, 3e-6, 6e-6, 3e-5], strict=True))

Batches = list[tuple[Tensor, Tensor]]
Make = Callable[[float, Batches], Callback]


@dataclass(frozen=True)
class Entry:
    """A row of the table: how a method is trained.

    Args:
        make: The callback, from the density and the training batches; None: dense.
        longer: Epochs that it may take beyond those of the protocol.
        trained: Whether it begins with the dense network of the same seed, at its end.
    """

    make: Make | None
    longer: int = 0
    trained: bool = False


METHODS: dict[str, Entry] = {
    "dense": Entry(None),
    "GMP": Entry(lambda d, data: ls.GMP(d)),
    "OptG": Entry(lambda d, data: ls.OptG(d)),
    "ESPN-Finetune": Entry(
        lambda d, data: ls.ESPNFinetune(d, alpha=ALPHA[d], joint_lr=0.05, on_missed="warn"),
        longer=190,
        trained=True,
    ),
    "ESPN-Rewind": Entry(
        lambda d, data: ls.ESPNRewind(d, alpha=ALPHA[d], joint_lr=0.05, on_missed="warn"),
        longer=300,
    ),
    "STR": Entry(lambda d, data: ls.STR(s_init=-20.0, weight_decay=DECAY[d], momentum=0.9)),
    "ContinuousSparsification": Entry(
        lambda d, data: ls.ContinuousSparsification(lam=PRICE[d], lr_scale=0.1)
    ),
    "random ERK": Entry(lambda d, data: ls.StaticSparse(d)),
    "SNIP": Entry(lambda d, data: ls.SNIP(d, data=data)),
    "GraSP": Entry(lambda d, data: ls.GraSP(d, data=data)),
    "SynFlow": Entry(lambda d, data: ls.SynFlow(d, data=data)),
    "IterSNIP": Entry(lambda d, data: ls.IterSNIP(d, data=data)),
    "FORCE": Entry(lambda d, data: ls.FORCE(d, data=data)),
}


class LeNet300(pl.LightningModule):
    """LeNet-300-100: 266200 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``(batch, 784)`` images."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        epochs = 160 if self.trainer.max_epochs is None else min(self.trainer.max_epochs, 160)
        milestones = [epochs // 2, 3 * epochs // 4]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)]


def train(
    name: str, density: float, seed: int, epochs: int, data_dir: Path, networks: Path
) -> dict[str, Any]:
    """One training, from its seed to a row of the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.seed_everything(seed, verbose=False)
    model = LeNet300()
    images, labels = read_digits(data_dir, "train").tensors
    batches = Shuffled(images, labels, 256, seed)
    entry, count = METHODS[name], Count()
    made = [entry.make(density, list(Shuffled(images, labels, 256, seed)))] if entry.make else []
    if entry.trained:
        model.load_state_dict(torch.load(networks / f"dense-{seed}-{epochs}.pt"))
    trainer = pl.Trainer(
        max_epochs=epochs + entry.longer,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*made, count],
    )
    began = time.process_time()
    trainer.fit(model, batches)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    if name == "dense":
        networks.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), networks / f"dense-{seed}-{epochs}.pt")
    images, labels = read_digits(data_dir, "t10k").tensors
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum()
    return {
        "method": name,
        "density": density,
        "seed": seed,
        "epochs": epochs,
        "trained": trainer.current_epoch,
        "accuracy": round(100 * int(right) / len(labels), 2),
        "live": count.live,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation of the test accuracy, by method and sparsity.

    Where a method has not arrived at the sparsity, the one that it has stands behind.
    """
    shown = [f"{100 * (1 - density):g} %" for density in DENSITIES]
    lines = [f"| method | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for name in METHODS:
        cells = []
        for density in DENSITIES:
            mine = [
                row
                for row in rows
                if row["method"] == name and float(row["density"]) in (density, 1.0)
            ]
            values = [float(row["accuracy"]) for row in mine]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cell = f"{statistics.mean(values):.2f}{spread} ({len(values)})" if values else ""
            if mine and name != "dense":
                live = statistics.mean(int(row["live"]) for row in mine) / WEIGHTS
                cell += f" at {100 * (1 - live):.2f} %" if abs(live - density) > 1e-4 else ""
            cells.append(cell)
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if any(cells) and name in PUBLISHED:
            numbers = " | ".join(f"{value:.2f}" for value in PUBLISHED[name])
            lines.append(f"| {name}, as published | {numbers} |")
    return "\n".join(lines)


def _train(task: tuple[Any, ...]) -> dict[str, Any]:
    return train(*task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="where the four files of MNIST are")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--networks", type=Path, default=Path("lenet300_networks"))
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
        (name, 1.0 if name == "dense" else density, seed, args.epochs)
        for seed in args.seeds
        for name in args.methods
        for density in args.densities
    ]
    tasks = [task for task in dict.fromkeys(tasks) if task not in done]
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1)
    new = not args.output.exists()
    with pool, args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        work = pool.imap_unordered(
            _train, [(*task, args.data_dir, args.networks) for task in tasks]
        )
        for row in tqdm(work, total=len(tasks)):
            writer.writerow(row)
            file.flush()
    print(table(finished(args.output)))


if __name__ == "__main__":
    main()
