"""Train a sparse digit classifier, stop, resume, and load it without this library.

Run ``python examples/quickstart.py --density 0.1 --epochs 15``. The data set, 1797 digits
of 8 x 8 pixels, comes with scikit-learn. It takes a few seconds on a CPU.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparsity import DensityMonitor, RigL


class Digits(LightningModule):
    """A multilayer perceptron. Nothing in it knows about sparsity.

    Args:
        hidden: Width of the two hidden layers.
        lr: Learning rate of Adam.
    """

    def __init__(self, hidden: int = 256, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = make_net(hidden)
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _measure(self, batch: list[Tensor], name: str) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log(name, self.accuracy, prog_bar=True)


class DigitsData(LightningDataModule):
    """The digits of scikit-learn: 1297 to train, 200 to validate, 300 to test.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        parts = random_split(
            TensorDataset(images, torch.tensor(digits.target)),
            [1297, 200, 300],
            generator=torch.Generator().manual_seed(0),
        )
        self.train, self.val, self.test = parts

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 200)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 300)


class StopAfter(Callback):
    """Stop as if the machine had been taken away.

    Args:
        epochs: How many epochs to train.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def make_net(hidden: int) -> nn.Sequential:
    """The network in bare PyTorch."""
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def make_trainer(args: argparse.Namespace, run: str, *callbacks: Callback) -> Trainer:
    """A Trainer with sparse training, a dashboard and checkpoints."""
    sparse = RigL(density=args.density, update_interval=20)
    monitor = DensityMonitor(print_tables=run == "whole")
    last = ModelCheckpoint(args.output / run, filename="last", enable_version_counter=False)
    return Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(args.output, "tensorboard", version=run),
        callbacks=[sparse, monitor, last, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.1, help="live share of all weights")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    data = DigitsData()

    # 1. Train from the first step to the last at the density asked for.
    seed_everything(args.seed)
    model = Digits()
    trainer = make_trainer(args, "whole")
    trainer.fit(model, data)
    trainer.test(model, data)

    # 2. Stop halfway, resume in a new Trainer: the same weights, to the last bit.
    seed_everything(args.seed)
    make_trainer(args, "halves", StopAfter(args.epochs // 2)).fit(Digits(), data)
    resumed = Digits()
    checkpoint = args.output / "halves" / "last.ckpt"
    make_trainer(args, "halves").fit(resumed, data, ckpt_path=checkpoint)
    same = all(
        torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True)
    )
    print(f"\nThe resumed run ends with the weights of the uninterrupted one: {same}")

    # 3. The checkpoint is an ordinary one: bare PyTorch reads it and finds zeros.
    state = torch.load(args.output / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    net = make_net(hidden=256)
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
    weights = [module.weight for module in net if isinstance(module, nn.Linear)]
    live = sum(int(w.count_nonzero()) for w in weights)
    total = sum(w.numel() for w in weights)
    print(f"In bare PyTorch {live} of {total} weights are not zero: density {live / total:.4f}")
    print(f"Dashboard: tensorboard --logdir {args.output / 'tensorboard'}")


if __name__ == "__main__":
    main()
