"""What learning a mask costs: step time and memory of every such method beside dense training.

The network is a 784-1024-1024-10 perceptron, trained with SGD and momentum on batches of 128.
Dense and sparse runs take turns in one process; a ratio is that of their median step times.
Bytes are those of all tensors after a step, per weight; beside them the least that the method
needs: weight, gradient and momentum, its trained tensors with their momentum, and one bit of
mask.

    python benchmarks/learned_cost.py --rounds 5 --output benchmarks/results/learned_cost.json
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from overhead import Clock, Model, Repeat, machine, spread
from torch import nn

import lightning_sparsity as ls

WEIGHTS = 784 * 1024 + 1024 * 1024 + 1024 * 10


@dataclass(frozen=True)
class Entry:
    """A method, and the least that it keeps.

    Args:
        make: Gives the callback for a number of steps.
        trained: Floats per weight that it trains beside the weights.
        moments: Floats of optimizer state for each of them.
        frozen: Whether the weights themselves are not trained, and have no momentum.
    """

    make: Callable[[int], Callback]
    trained: int = 0
    moments: int = 1
    frozen: bool = False

    @property
    def least(self) -> float:
        """Bytes per weight: weight, gradient, momentum; what is trained; a bit of mask."""
        weights = 8.0 if self.frozen else 12.0
        return weights + 4.0 * self.trained * (1 + self.moments) + 1 / 8


METHODS: dict[str, Entry] = {
    "OptG, mask every 10 steps": Entry(
        lambda steps: ls.OptG(0.1, alpha="auto", update_interval=10, update_end=1.0), 1
    ),
    "ESPN, joint training": Entry(
        lambda steps: ls.ESPNFinetune(0.1, tune_epochs=1, on_missed="warn"), 1
    ),
    "STR": Entry(lambda steps: ls.STR(weight_decay=5e-4)),
    "ContinuousSparsification": Entry(lambda steps: ls.ContinuousSparsification(), 1),
    "DynamicThresholds": Entry(lambda steps: ls.DynamicThresholds()),
    "DNW, mask every step": Entry(lambda steps: ls.DNW(0.1)),
    "DPF, mask every 16 steps": Entry(lambda steps: ls.DPF(0.1)),
    "TopKAST, sets every step": Entry(lambda steps: ls.TopKAST(0.1)),
    "TopKAST, sets every 100 steps": Entry(lambda steps: ls.TopKAST(0.1, update_interval=100)),
    "SRSTE, mask every step": Entry(lambda steps: ls.SRSTE(exclude=())),
    "EdgePopup, mask every step": Entry(lambda steps: ls.EdgePopup(0.1), 1, frozen=True),
    "Supermask": Entry(lambda steps: ls.Supermask(), 1, frozen=True),
    "MovementPruning, mask every step": Entry(lambda steps: ls.MovementPruning(0.1), 1, 2),
    "SoftMovementPruning": Entry(lambda steps: ls.SoftMovementPruning(), 1, 2),
    "L0": Entry(lambda steps: ls.L0(0.1, examples=60000), 1, 2),
    "VariationalDropout": Entry(lambda steps: ls.VariationalDropout(examples=60000), 1, 2),
    "AutoPrune": Entry(lambda steps: ls.AutoPrune(), 1),
    "Powerpropagation": Entry(lambda steps: ls.Powerpropagation()),
}


class Bytes(Callback):
    """Bytes of all tensors per weight, when the last batch but one is over."""

    per_weight = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.num_training_batches - 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
                storages = {
                    s.data_ptr(): s.nbytes()
                    for t in found
                    if t.layout == torch.strided
                    for s in [t.untyped_storage()]
                }
            self.per_weight = sum(storages.values()) / WEIGHTS


def train(make: Callable[[int], Callback] | None, steps: int) -> tuple[float, float]:
    """Median seconds per step, and bytes per weight."""
    gc.collect()
    net = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    batch = (torch.randn(128, 784), torch.randint(10, (128,)))
    clock, memory = Clock(), Bytes()
    trainer = pl.Trainer(
        max_epochs=3,
        limit_train_batches=steps,
        callbacks=[*([make(steps)] if make else []), clock, memory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Model(net, "sgd"), Repeat(batch, steps))
    return statistics.median(clock.seconds[3:steps]), memory.per_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="per run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    report: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "steps": args.steps}
    print(json.dumps(report["machine"]))
    print(f"{'method':34} {'step / dense':>24} {'bytes / weight':>15} {'least':>7}")
    for name in args.methods:
        ratios, held = [], []
        for _ in range(args.rounds):
            dense, _ = train(None, args.steps)
            seconds, per_weight = train(METHODS[name].make, args.steps)
            ratios.append(seconds / dense)
            held.append(per_weight)
        report[name] = {
            "step_over_dense": spread(ratios),
            "bytes_per_weight": round(statistics.median(held), 2),
            "least_bytes_per_weight": METHODS[name].least,
        }
        said = report[name]["step_over_dense"]
        shown = f"{said['median']:.2f} ({said['min']:.2f} to {said['max']:.2f})"
        print(f"{name:34} {shown:>24} {statistics.median(held):15.1f} {METHODS[name].least:7.1f}")
    _, per_weight = train(None, args.steps)
    report["dense"] = {"bytes_per_weight": round(per_weight, 2), "least_bytes_per_weight": 12.0}
    print(f"{'dense':34} {'1.00':>24} {per_weight:15.1f} {12.0:7.1f}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
