"""Train a wide digit classifier dense, sparse, and sparse with compressed weights.

Run ``python examples/sparse_compute.py --density 0.05``. The data set, 1797 digits of 8 x 8
pixels, comes with scikit-learn. It takes less than a minute on two cores of a CPU.
"""

import argparse
import statistics
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from quickstart import Digits, DigitsData

from lightning_sparsity import RigL, SparseCompute


class Clock(Callback):
    """Seconds of every batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class Bytes(Callback):
    """Bytes of parameters and optimizer state in the last epoch."""

    total = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = [t for entry in trainer.optimizers[0].state.values() for t in entry.values()]
        self.total = sum(t.nbytes for t in [*pl_module.parameters(), *state])


def train(name: str, callbacks: list[Callback], args: argparse.Namespace) -> LightningModule:
    """Train once, and say how long a step took and how good the result is."""
    seed_everything(args.seed, verbose=False)
    model, data = Digits(hidden=args.hidden), DigitsData(batch_size=128)
    clock, size = Clock(), Bytes()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[*callbacks, clock, size],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    accuracy = trainer.test(model, data, verbose=False)[0]["test_accuracy"]
    milliseconds = 1000 * statistics.median(clock.seconds)
    print(
        f"{name}: {milliseconds:.1f} ms per step, {size.total / 2**20:.0f} MiB of parameters and "
        f"optimizer state, test accuracy {accuracy:.3f}"
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.05, help="live share of all weights")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the hidden layers")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def sparse() -> RigL:
        return RigL(density=args.density, update_interval=20)

    train("dense", [], args)
    train("sparse, stored densely", [sparse()], args)
    model = train("sparse, compressed", [sparse(), SparseCompute()], args)

    # After training the weights are ordinary again: dense tensors with zeros in place.
    weight = model.net[2].weight
    print(f"{tuple(weight.shape)}, live: {torch.count_nonzero(weight) / weight.numel():.4f}")


if __name__ == "__main__":
    main()
