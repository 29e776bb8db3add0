"""Train LeNet-300-100 sparsely on MNIST, Fashion-MNIST or KMNIST.

Put the four files of the data set, as they are published, into one directory
(train-images-idx3-ubyte.gz and so on, or unpacked), then run
``python examples/mnist_rigl.py --data-dir DIR --method rigl --density 0.05``.
"""

import argparse
import gzip
from functools import partial
from math import prod
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparsity import GMP, SET, DensityMonitor, Magnitude, RigL, StaticSparse

METHODS = {
    "rigl": RigL,
    "set": SET,
    "static": StaticSparse,
    "gmp": GMP,
    "magnitude": partial(Magnitude, at=0.5),
    "dense": None,
}


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
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise ValueError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, and a file of bytes in the IDX "
            "format starts with 000008 and the number of dimensions; is it another file?"
        )
    dimensions, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path}: ends inside its header; download it again.")
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(content) - start != prod(shape):
        raise ValueError(
            f"{path}: holds {len(content) - start} bytes of data, and its header promises "
            f"{prod(shape)} ({' x '.join(map(str, shape))}); download it again."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def read_digits(directory: Path, part: str) -> TensorDataset:
    """Images, float in [0, 1], and labels of one ``part``: "train" or "t10k"."""
    images = read_idx(directory / f"{part}-images-idx3-ubyte")
    labels = read_idx(directory / f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{directory}: the {part} images have the shape {tuple(images.shape)} and their labels "
            f"{tuple(labels.shape)}; expected (n, 28, 28) and (n,). Are they of one data set?"
        )
    return TensorDataset(images.flatten(1).float() / 255, labels.long())


class Mnist(LightningDataModule):
    """A twelfth of the training images (5000 of 60000) is kept for validation.

    Args:
        directory: Where the four files are.
        batch_size: Images per batch.
    """

    def __init__(self, directory: Path, batch_size: int = 128) -> None:
        super().__init__()
        self.batch_size = batch_size
        known = read_digits(directory, "train")
        held_out = len(known) // 12
        split = torch.Generator().manual_seed(0)
        self.train, self.val = random_split(known, [len(known) - held_out, held_out], split)
        self.test = read_digits(directory, "t10k")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 1000)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 1000)


class LeNet300(LightningModule):
    """LeNet-300-100: 266200 weights in three linear layers.

    Args:
        lr: Learning rate of SGD with momentum 0.9, decayed to zero by a cosine.
        weight_decay: L2 penalty.
    """

    def __init__(self, lr: float = 0.1, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure(batch, "val_accuracy")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._measure(batch, "test_accuracy")

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["lr"],
            momentum=0.9,
            weight_decay=self.hparams["weight_decay"],
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _measure(self, batch: list[Tensor], name: str) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log(name, self.accuracy, prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="where the four files are")
    parser.add_argument("--method", choices=METHODS, default="rigl")
    parser.add_argument("--density", type=float, default=0.05, help="live share of all weights")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/mnist"))
    args = parser.parse_args()

    run = f"{args.method}-{args.density}-{args.seed}"
    checkpoints = args.output / run
    if args.resume and not (checkpoints / "last.ckpt").exists():
        parser.error(f"--resume: there is no {checkpoints / 'last.ckpt'}")
    try:
        data = Mnist(args.data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))

    seed_everything(args.seed)
    model = LeNet300()
    method = METHODS[args.method]
    sparse = [method(density=args.density), DensityMonitor()] if method else []
    trainer = Trainer(
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.output, name="tensorboard", version=run),
        callbacks=[
            *sparse,
            ModelCheckpoint(checkpoints, filename="last", enable_version_counter=False),
        ],
    )
    trainer.fit(model, data, ckpt_path=checkpoints / "last.ckpt" if args.resume else None)
    trainer.test(model, data)

    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    live = sum(int(w.count_nonzero()) for w in weights)
    total = sum(w.numel() for w in weights)
    print(f"{run}: {live} of {total} weights are not zero: density {live / total:.4f}")


if __name__ == "__main__":
    main()
