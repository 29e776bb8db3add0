"""What sparse training on dense storage costs: RigL against dense training, in one process.

Dense and sparse runs take turns; each round gives the ratio of the median step times
(between updates), and what one mask update adds, in dense steps.

    python benchmarks/overhead.py --rounds 7 --output benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparsity import RigL


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 10),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    """ResNet-14 for 32x32 pictures, widths 32, 64, 128."""
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *[Block(*width) for width in widths],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Model(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer.startswith("adamw"):
            fused = self.optimizer == "adamw, fused"
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=fused)
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Repeat:
    """A loader that gives one batch again and again."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Any:
        return iter([self.batch] * self.times)


class Clock(pl.Callback):
    """Seconds of every batch, from its start to its end, device work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        _wait(module)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        _wait(module)
        self.seconds.append(time.perf_counter() - self._start)


def _wait(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def train(net: nn.Module, optimizer: str, batch: Any, steps: int, every: int | None) -> list[float]:
    """Seconds per step; ``every``: RigL's interval, None: dense."""
    clock = Clock()
    sparse = [] if every is None else [RigL(0.1, update_interval=every, update_end=10**6)]
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*sparse, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(net, optimizer), Repeat(batch, steps))
    return clock.seconds


def compare(
    make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Ratios of RigL to dense, a value per round."""
    every = steps // 4
    batch = (torch.randn(shape), torch.randint(10, (shape[0],)))
    between, update, dense_ms = [], [], []
    for _ in range(rounds):
        dense = train(make(), optimizer, batch, steps, None)[3:]
        sparse = train(make(), optimizer, batch, steps, every)
        ordinary = [s for i, s in enumerate(sparse, 1) if i % every and i > 3]
        updates = [s for i, s in enumerate(sparse, 1) if i % every == 0]
        step = statistics.median(dense)
        dense_ms.append(step * 1e3)
        between.append(statistics.median(ordinary) / step)
        update.append((statistics.median(updates) - statistics.median(ordinary)) / step)
    return {
        "dense_step_ms": spread(dense_ms),
        "step_between_updates_over_dense": spread(between),
        "update_in_dense_steps": spread(update),
    }


def adamw_on_zeros(fused: bool, repeats: int = 15) -> float:
    """Time of a plain AdamW step where 90% of everything is zero, over one where nothing is.

    No part of this package is in it: what it shows is how torch's arithmetic takes zeros.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    mask = (torch.rand(4096, 4096) < 0.1).float()
    for _ in range(repeats):
        for zeros in (True, False):
            weight = nn.Parameter(torch.randn(4096, 4096) * (mask if zeros else 1))
            optimizer = torch.optim.AdamW([weight], fused=fused)
            for _ in range(2):  # the first step makes the state
                weight.grad = torch.randn(4096, 4096) * (mask if zeros else 1)
                start = time.perf_counter()
                optimizer.step()
                took = time.perf_counter() - start
            seconds[zeros].append(took)
    return round(statistics.median(seconds[True]) / statistics.median(seconds[False]), 3)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return {
        "cpu": name,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="per run")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = {
        "mlp 784-4096-4096-10, batch 128, SGD momentum": (mlp, (128, 1, 28, 28), "sgd"),
        "mlp 784-4096-4096-10, batch 128, AdamW": (mlp, (128, 1, 28, 28), "adamw"),
        "mlp 784-4096-4096-10, batch 128, AdamW fused": (mlp, (128, 1, 28, 28), "adamw, fused"),
        "ResNet-14, 3x32x32, batch 64, SGD momentum": (resnet, (64, 3, 32, 32), "sgd"),
    }
    report: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "steps": args.steps}
    print(json.dumps(report["machine"]))
    for name, (make, shape, optimizer) in cases.items():
        report[name] = compare(make, shape, optimizer, args.rounds, args.steps)
        print(f"\n{name}")
        for what, numbers in report[name].items():
            print(f"  {what:34} {numbers}")
    control = {str(fused): adamw_on_zeros(fused) for fused in (False, True)}
    report["plain AdamW step on 90% zeros over none, by fused"] = control
    print(f"\nplain AdamW step on 90% zeros over none, by fused: {control}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
