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
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from tqdm import tqdm

import lightning_sparsity
from lightning_sparsity import MaskCallback, StaticSparse, uniform
from lightning_sparsity.starts import sparse_uniform, spread_inputs

REDR = {
    name: getattr(lightning_sparsity, name)
    for name in (
        "RedrRandom",
        "RedrGradient",
        "RedrGradientGlobal",
        "RedrLoss",
        "RedrWoodfisher",
        "RedrWoodtaylor",
    )
    if hasattr(lightning_sparsity, name)
}
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
    start = 4 + 4 * content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
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

    def callbacks(self, steps: int) -> list[MaskCallback]:
        """What makes the net sparse: the start that all share, then the method.

        Args:
            steps: Optimizer steps per epoch.
        """
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
            update_interval="epoch" if self.interval == 1 else self.interval * steps,
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
    after the optimizer step, the second at the end of the same batch. The seconds are those of
    training without any measuring.

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
        self._started = time.perf_counter()

    def _update(self, *args: Any) -> Any:
        self._note_loss("loss_before")
        return self._redistribute(*args)

    def _note_loss(self, name: str) -> None:
        began = time.perf_counter()
        self._losses[name] = self._net.measure(self._probe)[0]
        self._started += time.perf_counter() - began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Part, *args: Any
    ) -> None:
        self._loss += outputs["loss"] * (len(batch[1]) / len(self._data.train[1]))
        if len(self._losses) == 1:
            self._note_loss("loss_after")
        self._ended = time.perf_counter()

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
    batches = Batches(
        data.train, settings["batch_size"], run.seed, lambda: trainer.current_epoch
    )
    sparse = run.callbacks(len(batches))
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
        warnings.filterwarnings("ignore", "The number of training batches")
        trainer.fit(net, batches, ckpt_path=last if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
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
