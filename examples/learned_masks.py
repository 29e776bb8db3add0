"""Learn which weights live: OptG and the two endings of ESPN beside pruning by magnitude.

Run ``python examples/learned_masks.py --density 0.02 --epochs 40``. The digits come with
scikit-learn; it takes about a minute on a CPU.
"""

import argparse
import csv
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from quickstart import Digits, DigitsData

from lightning_sparsity import GMP, DensityMonitor, ESPNFinetune, ESPNRewind, OptG


class SgdDigits(Digits):
    """The perceptron of the quickstart, trained by SGD as in the papers of the methods."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def methods(density: float, epochs: int) -> dict[str, tuple[Callback, int]]:
    """Each method, and the most epochs that it may train for."""
    # On so few batches per epoch the factors of ESPN need a stronger penalty than the paper's.
    strong = {"alpha": 5e-3, "joint_lr": 0.1, "on_missed": "warn"}
    return {
        "GMP": (GMP(density, update_interval=20), epochs),
        "OptG": (OptG(density, alpha="auto"), epochs),
        "ESPNFinetune": (
            ESPNFinetune(
                density, warmup_epochs=epochs // 2, tune_epochs=epochs // 4, tune_lr=0.01, **strong
            ),
            3 * epochs,
        ),
        "ESPNRewind": (
            ESPNRewind(density, rewind_to=1, tune_epochs=epochs - 1, **strong),
            3 * epochs,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.02, help="live share of all weights")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/learned_masks"))
    args = parser.parse_args()
    data = DigitsData()
    rows = []
    for name, (method, most) in methods(args.density, args.epochs).items():
        seed_everything(args.seed, verbose=False)
        model = SgdDigits()
        trainer = Trainer(
            max_epochs=most,
            accelerator="cpu",
            callbacks=[method, DensityMonitor(print_tables=False)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        found = trainer.test(model, data, verbose=False)[0]
        # After fit the model is plain: its parameters are the effective weights.
        weights = [p for n, p in model.net.named_parameters() if n.endswith("weight")]
        live = sum(int(w.count_nonzero()) for w in weights)
        density = live / sum(w.numel() for w in weights)
        rows.append((name, trainer.current_epoch, live, density, found["test_accuracy"]))
        print(
            f"{name:13} {rows[-1][1]:4} epochs, {live} live weights ({density:.4f}), "
            f"test accuracy {rows[-1][4]:.3f}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "epochs", "live", "density", "test_accuracy"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
