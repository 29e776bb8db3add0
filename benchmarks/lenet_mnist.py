"""Extreme sparsity on MNIST: LeNets at 95 to 99.6 %, beside the table of the ESPN paper.

The protocol is that of Cho, Joshi and Hegde (2020, Table 1): 160 epochs of SGD with batches of
256, momentum 0.9, weight decay 5e-4 and a learning rate of 0.1 that falls tenfold at epochs 80
and 120. ESPN has its own phases: fine-tuning begins with the dense network of the same seed, which
is trained first, and rewinding takes as many epochs more as its joint training needs. The lottery
ticket is pruned after every training, three times down to 95 % and once for every sparsity after
that, or once from the dense network ("one shot"), and goes back to the end of epoch 1. Finished
trainings are not run again: an interrupted command goes on where it was.

    python benchmarks/lenet_mnist.py --data-dir DIR --jobs 2
    python benchmarks/lenet_mnist.py --table
"""

from __future__ import annotations

import argparse
import logging
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
from dynamic_mnist import Count, Shuffled, collect, finished, summary
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightning_sparsity as ls
from lightning_sparsity.lottery import run_imp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mnist_rigl import read_digits

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "method",
    "density",
    "seed",
    "epochs",
    "trained",
    "accuracy",
    "live",
    "seconds",
    "storage",
)
DENSITIES = [0.05, 0.02, 0.01, 0.004]

# What the paper reports at these densities, in percent.
PUBLISHED = {
    "LeNet-300-100": {
        "dense": [98.80] * 4,
        "SNIP": [97.86, 97.15, 95.27, 86.57],
        "GraSP": [97.96, 96.96, 93.54, 45.02],
        "ESPN-Rewind": [98.57, 98.39, 97.94, 97.24],
        "ESPN-Finetune": [98.52, 98.35, 98.24, 97.28],
        "lottery ticket": [98.26, 97.74, 96.95, 92.90],
    },
    "LeNet-5-Caffe": {
        "dense": [99.32] * 4,
        "SNIP": [99.33, 99.06, 98.93, 97.24],
        "GraSP": [99.26, 99.21, 98.47, 97.08],
        "lottery ticket": [99.27, 99.27, 99.17, 98.30],
    },
}

# The live share in every training of the lottery ticket but the dense one.
ROUNDS = [0.37, 0.14, *DENSITIES]

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
        kaiming: Whether weights begin Kaiming-normal, as in the program of GraSP's authors, and
            not as torch draws them, with a standard deviation 2.4 times smaller.
        rounds: Of a lottery ticket, the densities that it is pruned to in turn, each to a row of
            the table if that has it; empty: none before the density that is asked for.
    """

    make: Make | None = None
    longer: int = 0
    trained: bool = False
    kaiming: bool = False
    rounds: list[float] | None = None


METHODS: dict[str, Entry] = {
    "dense": Entry(),
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
    "GraSP, Kaiming": Entry(lambda d, data: ls.GraSP(d, data=data), kaiming=True),
    "SynFlow": Entry(lambda d, data: ls.SynFlow(d, data=data)),
    "IterSNIP": Entry(lambda d, data: ls.IterSNIP(d, data=data)),
    "FORCE": Entry(lambda d, data: ls.FORCE(d, data=data)),
    "lottery ticket": Entry(rounds=ROUNDS),
    "lottery ticket, one shot": Entry(rounds=[]),
}

# The networks, and how many weights of each are counted: all but biases.
NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "LeNet-300-100": (
        lambda: [
            nn.Linear(784, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        ],
        266200,
    ),
    "LeNet-5-Caffe": (
        lambda: [
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, 10),
        ],
        430500,
    ),
}


class LeNet(pl.LightningModule):
    """One of the two networks, with the protocol's optimizer."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.net = nn.Sequential(*NETWORKS[network][0]())

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


@dataclass(frozen=True)
class Task:
    """A training, or all of a lottery ticket, in a process of its own.

    Args:
        network: Of :data:`NETWORKS`.
        method: Of :data:`METHODS`.
        density: To train at; of a lottery ticket, the last.
        seed: Of weights, masks and the order of the images.
        epochs: Of the protocol.
        compressed: Whether the zeros of the masks are not stored either.
        data_dir: Where the four files of MNIST are.
        networks: Where trained networks are kept.
    """

    network: str
    method: str
    density: float
    seed: int
    epochs: int
    compressed: bool
    data_dir: Path
    networks: Path

    @property
    def entry(self) -> Entry:
        return METHODS[self.method]

    @property
    def is_ticket(self) -> bool:
        return self.entry.rounds is not None

    @property
    def dense(self) -> Path:
        """The dense network of the same seed."""
        return self.networks / f"dense-{self.seed}-{self.epochs}.pt"

    def batches(self) -> Shuffled:
        """The training images."""
        return Shuffled(*read_digits(self.data_dir, "train").tensors, 256, self.seed)

    def trainer(self, epochs: int, *callbacks: Callback) -> pl.Trainer:
        # The first round of a ticket is dense, where rows of live values would take long.
        layout = "auto" if self.is_ticket else "csr"
        storage = [ls.SparseCompute(layout)] if self.compressed else []
        return pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, *storage],
        )

    def row(self, model: LeNet, density: float, trained: int, live: int) -> dict[str, Any]:
        """A row of the table, with the accuracy of ``model`` on the test images."""
        images, labels = read_digits(self.data_dir, "t10k").tensors
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).sum()
        return {
            "method": self.method,
            "density": density,
            "seed": self.seed,
            "epochs": self.epochs,
            "trained": trained,
            "accuracy": round(100 * int(right) / len(labels), 2),
            "live": live,
            "storage": "compressed" if self.compressed else "dense",
        }


def run(task: Task) -> list[dict[str, Any]]:
    """From a seed to rows of the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.seed_everything(task.seed, verbose=False)
    began = time.process_time()
    rows = find_tickets(task) if task.is_ticket else [train(task)]
    seconds = round(time.process_time() - began, 1)
    return [{**row, "seconds": "" if task.is_ticket else seconds} for row in rows]


def train(task: Task) -> dict[str, Any]:
    """One training."""
    model = LeNet(task.network)
    entry, count = task.entry, Count()
    made = [entry.make(task.density, list(task.batches()))] if entry.make else []
    if entry.trained:
        model.load_state_dict(torch.load(task.dense))
    if entry.kaiming:
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight)
    trainer = task.trainer(task.epochs + entry.longer, *made, count)
    trainer.fit(model, task.batches())  # type: ignore[arg-type]
    if task.method == "dense":
        task.networks.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), task.dense)
    live = count.live if made else NETWORKS[task.network][1]
    return task.row(model, task.density, trainer.current_epoch, live)


def find_tickets(task: Task) -> list[dict[str, Any]]:
    """All trainings of a lottery ticket, each to a row if it is in the table."""
    batches = task.batches()
    densities = task.entry.rounds or [task.density]
    rounds = run_imp(
        lambda: task.trainer(task.epochs),
        lambda: LeNet(task.network),
        batches,
        directory=task.networks / f"{task.method}-{task.density}-{task.seed}-{task.epochs}",
        density=densities,
        rewind_to=len(batches),
        seed=task.seed,
    )
    rows = []
    for density, found in zip(densities, rounds[1:], strict=True):
        model = LeNet(task.network)
        model.load_state_dict(found.weights)
        if density in DENSITIES:
            rows.append(task.row(model, density, task.epochs, found.live))
    return rows


def table(rows: list[dict[str, str]], network: str, epochs: int) -> str:
    """Mean and standard deviation of the test accuracy, by method and sparsity.

    Where a method has not arrived at the sparsity, the one that it has stands behind.
    """
    rows = [row for row in rows if int(row["epochs"]) == epochs]
    trained = {float(row["density"]) for row in rows}
    shown = [density for density in DENSITIES if density in trained]
    header = [f"{100 * (1 - density):g} %" for density in shown]
    lines = [f"| method | {' | '.join(header)} |", "|---|" + "---|" * len(header)]
    for name in METHODS:
        cells = []
        for density in shown:
            mine = [
                row
                for row in rows
                if row["method"] == name and float(row["density"]) in (density, 1.0)
            ]
            values = [float(row["accuracy"]) for row in mine]
            cell = summary(values)
            if mine and name != "dense":
                live = statistics.mean(int(row["live"]) for row in mine) / NETWORKS[network][1]
                cell += f" at {100 * (1 - live):.2f} %" if abs(live - density) > 1e-4 else ""
            cells.append(cell)
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if any(cells) and name in PUBLISHED[network]:
            published = dict(zip(DENSITIES, PUBLISHED[network][name], strict=True))
            numbers = " | ".join(f"{published[density]:.2f}" for density in shown)
            lines.append(f"| {name}, as published | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="where the four files of MNIST are")
    parser.add_argument("--network", choices=NETWORKS, default="LeNet-300-100")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument(
        "--compressed", action="store_true", help="store and multiply live weights alone: faster"
    )
    parser.add_argument("--output", type=Path, help="CSV file; default: the committed one")
    parser.add_argument("--networks", type=Path, help="folder for trained networks")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    short = {"LeNet-300-100": "lenet300", "LeNet-5-Caffe": "lenet5"}[args.network]
    output = args.output or RESULTS / f"{short}_mnist.csv"
    if args.table:
        print(table(finished(output), args.network, args.epochs))
        return
    if args.data_dir is None:
        parser.error("--data-dir is needed: the directory with the four files of MNIST")

    done = {
        (row["method"], float(row["density"]), int(row["seed"]), int(row["epochs"]))
        for row in finished(output)
    }
    rounds = {name: entry.rounds[-1:] for name, entry in METHODS.items() if entry.rounds}
    densities = {"dense": [1.0], **rounds}
    tasks = [
        Task(
            args.network,
            name,
            density,
            seed,
            args.epochs,
            args.compressed and name != "dense",
            args.data_dir,
            args.networks or Path(f"{short}_networks"),
        )
        for seed in args.seeds
        for name in args.methods
        for density in densities.get(name, args.densities)
        if (name, density, seed, args.epochs) not in done
    ]
    collect(run, tasks, output, FIELDS, args.jobs, tasks_per_process=1)
    print(table(finished(output), args.network, args.epochs))


if __name__ == "__main__":
    main()
