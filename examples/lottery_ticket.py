"""Find a lottery ticket: train, prune, go back, train again; and two controls with its masks.

Run ``python examples/lottery_ticket.py --density 0.02 --rounds 6``. The digits come with
scikit-learn; it takes about half a minute on a CPU. Stop it and run it again: it goes on.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from quickstart import Digits, DigitsData

from lightning_sparsity import StaticSparse
from lightning_sparsity.lottery import Round, run_imp


def make_trainer(epochs: int, *callbacks: Callback) -> Trainer:
    """A new Trainer."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def accuracy(module: Digits, data: DigitsData) -> float:
    return make_trainer(1).test(module, data, verbose=False)[0]["test_accuracy"]


def controls(found: Round, epochs: int, data: DigitsData) -> dict[str, Digits]:
    """The ticket with the weights of another draw, and as many weights anywhere."""
    ticket = found.ticket
    redrawn = Digits()
    for name, weight in redrawn.named_parameters():
        if name in ticket.masks:
            weight.data *= ticket.masks[name]
    made = {"same masks, other weights": redrawn, "random masks": Digits()}
    methods = [StaticSparse(), StaticSparse(density=ticket.density)]
    for module, method in zip(made.values(), methods, strict=True):
        make_trainer(epochs, method).fit(module, data)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.02, help="live share in the last round")
    parser.add_argument("--rounds", type=int, default=6, help="prunings")
    parser.add_argument("--epochs", type=int, default=8, help="of one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/lottery_ticket"))
    args = parser.parse_args()
    data = DigitsData()
    seed_everything(args.seed, verbose=False)

    rounds = run_imp(
        lambda: make_trainer(args.epochs),
        Digits,
        data,
        directory=args.output,
        rounds=args.rounds,
        density=args.density,
    )
    for found in rounds:
        module = Digits()
        module.load_state_dict(found.weights)
        print(
            f"round {found.number}: {found.live:5} live weights ({found.density:.4f}), "
            f"test accuracy {accuracy(module, data):.3f}"
        )
    torch.manual_seed(args.seed + 1)
    for name, module in controls(rounds[-1], args.epochs, data).items():
        print(f"{name}: test accuracy {accuracy(module, data):.3f}")


if __name__ == "__main__":
    main()
