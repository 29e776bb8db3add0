"""Compressed storage beside dense and masked storage, and beside the peer `sparselab`.

RigL on perceptrons 784-H-H-10, trained by Lightning: the time of a step between mask updates and
of an update, the latency of one example, and memory. Within one process dense and sparse trainings
take turns, and a round gives a ratio; the peer, which bears one model per process, has processes of
its own, with dense training in them. Every measurement of memory is a process too. What is
finished is not measured again: an interrupted command goes on where it was.

    python benchmarks/sparse_compute.py
    python benchmarks/sparse_compute.py --only peer --peer DIR
    python benchmarks/sparse_compute.py --paper
    python benchmarks/sparse_compute.py --table --plot

The peer is looked for in DIR (from `pip install --target DIR --no-deps sparselab`), or where other
packages are. The last command measures nothing. With `--paper`, the nets are those whose memory
and seconds Eibensteiner reports for his sparse trainings.

A mask update is timed as all that it adds to its step and to the next one, which computes with a
new pattern for the first time.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from dynamic_mnist import finished
from overhead import Repeat, machine, spread
from torch import Tensor, nn

import lightning_sparsity as ls
from lightning_sparsity.starts import sparse_uniform, spread_inputs

RESULTS = Path(__file__).parent / "results" / "sparse_compute.csv"
KEY = ("measure", "net", "batch", "optimizer", "density", "rule", "storage")
FIELDS = (*KEY, "quantity", "median", "min", "max")

PEER = "sparselab"
OURS = ("masked", "csr", "native", "auto")
MEMORY_STEPS = 11  # the last changes no mask, so that all of a pattern exists
WARM_UP = 3

# The nets of the dissertation: its KMNIST net with wide layers, for memory, and its HIGGS net, for
# time. Of each the batch, and the steps from one redistribution to the next: an epoch.
WIDE, HIGGS = "784-4096-4096-10", "21-256-256-256-1"
BATCH = {WIDE: 512, HIGGS: 128}
EPOCH = {WIDE: 98, HIGGS: 3907}
REDR = ("StaticSparse", "RedrRandom", "RedrGradient", "RedrGradientGlobal")
PAPER_DENSITIES = (0.1, 0.06, 0.03)

# What it reports: MB on KMNIST at these densities, and seconds per epoch on HIGGS at the first.
PUBLISHED_MB = {
    "dense": (456.7,) * 3,
    "StaticSparse": (151.3, 129.1, 111.2),
    "RedrRandom": (305.1, 265.9, 237.0),
    "RedrGradient": (320.4, 271.2, 241.3),
    "RedrGradientGlobal": (354.5, 297.5, 254.2),
}
PUBLISHED_SECONDS = {
    "dense": 9.80,
    "StaticSparse": 13.64,
    "RedrRandom": 21.45,
    "RedrGradientGlobal": 22.20,
}

Quantities = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Args:
        measure: "time" or "memory".
        net: Widths of all layers, inputs and outputs included.
        batch: Examples per step.
        optimizer: "sgd", which has momentum, or "adam".
        density: Live share of every sparse layer.
        rule: The method that makes the masks; that of the peer has the peer's name.
        storages: "dense", "masked", "csr", "native" (csr with the kernels in C), "auto" or the
            peer; "nothing": only imports.
        steps: Of every training; the masks change after a quarter, a half and three quarters.
        rounds: How often dense and sparse trainings take turns.
    """

    measure: str
    net: str = ""
    batch: int = 0
    optimizer: str = ""
    density: float = 1.0
    rule: str = ""
    storages: tuple[str, ...] = ()
    steps: int = MEMORY_STEPS
    rounds: int = 1

    @property
    def widths(self) -> list[int]:
        """Of all layers."""
        return [int(width) for width in self.net.split("-")]

    @property
    def every(self) -> int:
        """Steps from one mask update to the next."""
        return self.steps // 4

    def key(self, storage: str) -> tuple[str, ...]:
        """What a row of the results is found by, as a file shows it."""
        mine = (self.measure, self.net, self.batch, self.optimizer, self.density, self.rule)
        return (*map(str, mine), storage)

    def __str__(self) -> str:
        shape = (self.net, self.batch, self.optimizer, self.density) if self.net else ()
        names = dict.fromkeys(name for name in (self.rule, *self.storages) if name)
        return ", ".join((self.measure, *map(str, shape), " ".join(names)))


# -------------------------------------------------------------------------------- training


class Net(pl.LightningModule):
    """Linear layers with ReLU between them.

    Args:
        widths: Of all layers, inputs and outputs included.
        optimizer: "sgd" or "adam".
        linear: Makes a layer.
    """

    def __init__(self, widths: Sequence[int], optimizer: str, linear: Any = nn.Linear) -> None:
        super().__init__()
        layers = [linear(a, b) for a, b in pairwise(widths)]
        between = [module for layer in layers for module in (layer, nn.ReLU())]
        self.net = nn.Sequential(*between[:-1])
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        if outputs.shape[1] == 1:
            wanted = batch[1][:, None].to(outputs.dtype)
            return nn.functional.binary_cross_entropy_with_logits(outputs, wanted)
        return nn.functional.cross_entropy(outputs, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=5e-4)
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class PeerNet(Net):
    """The same of the peer's layers, with its RigL; all have one density."""

    def __init__(self, task: Task) -> None:
        peer = importlib.import_module(PEER)
        layer = partial(peer.SparseLinear, sparsity=1 - task.density)
        super().__init__(task.widths, task.optimizer, layer)
        self._rigl = peer.RigL(1 - task.density, update_freq=task.every)
        self.net.apply(self._rigl)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._rigl.step()


def make_net(task: Task, storage: str) -> Net:
    return PeerNet(task) if storage == PEER else Net(task.widths, task.optimizer)


def callbacks(task: Task, storage: str) -> list[pl.Callback]:
    """What makes a net sparse: the method, and how weights are kept."""
    if storage in ("dense", PEER):
        return []
    # A single output is dense, as in the dissertation.
    last = f"net.{2 * len(task.widths) - 4}.weight"
    exclude = (last,) if task.widths[-1] == 1 else ()
    updates: dict[str, Any] = {"update_interval": task.every, "update_end": 10**6}
    if task.rule == "RigL":
        rules: list[pl.Callback] = [ls.RigL(task.density, distribution=ls.uniform, **updates)]
    else:
        rules = [
            ls.StaticSparse(
                task.density,
                topology=spread_inputs,
                distribution=ls.uniform,
                weight_init=sparse_uniform(),
                exclude=exclude,
            )
        ]
        if task.rule != "StaticSparse":
            method = getattr(ls, task.rule)
            rules.append(method(drop_fraction=0.5, exclude=exclude, **updates))
    if storage == "native":
        rules.append(ls.SparseCompute("csr", kernels="native"))
    elif storage != "masked":
        rules.append(ls.SparseCompute(storage))
    return rules


def fit(task: Task, storage: str, model: Net, watcher: pl.Callback) -> None:
    outputs = max(2, task.widths[-1])
    batch = (torch.randn(task.batch, task.widths[0]), torch.randint(outputs, (task.batch,)))
    trainer = pl.Trainer(
        max_steps=task.steps,
        callbacks=[*callbacks(task, storage), watcher],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, Repeat(batch, task.steps))


# ------------------------------------------------------------------------------------ time


class Laps(pl.Callback):
    """Seconds of all steps but the last, and of one example.

    A step lasts until the next one starts, so that nothing of it is left out. One example is
    computed after the last step, while weights are still as they are kept in training.

    Args:
        task: What is measured.
    """

    def __init__(self, task: Task) -> None:
        self.latency = 0.0
        self._task = task
        self._starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self._task.steps:
            self.latency = latency(pl_module.net, self._task.widths[0])

    @property
    def step(self) -> float:
        """Median of the steps that neither change masks nor follow such a one."""
        seconds, every = self._seconds, self._task.every
        return statistics.median(
            lap
            for number, lap in enumerate(seconds, 1)
            if number > WARM_UP and number % every > (1 if number > every else 0)
        )

    @property
    def update(self) -> float:
        """Median of what an update adds to its step and to the next."""
        seconds, every = self._seconds, self._task.every
        both = [sum(seconds[at - 1 : at + 1]) for at in range(every, len(seconds), every)]
        return statistics.median(both) - 2 * self.step

    @property
    def _seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self._starts)]


@torch.no_grad()
def latency(net: nn.Module, inputs: int, calls: int = 100, warm_up: int = 10) -> float:
    """Median seconds for one example."""
    example = torch.randn(1, inputs)
    net.eval()
    seconds = []
    for _ in range(warm_up + calls):
        start = time.perf_counter()
        net(example)
        seconds.append(time.perf_counter() - start)
    net.train()
    return statistics.median(seconds[warm_up:])


def measure_time(task: Task) -> dict[str, Quantities]:
    """Time by storage, that of dense training among them; ratios are those of single rounds."""
    laps: dict[str, list[Laps]] = {storage: [] for storage in ("dense", *task.storages)}
    the_peer = make_net(task, PEER) if PEER in task.storages else None
    for _ in range(task.rounds):
        for storage, mine in laps.items():
            gc.collect()
            model = the_peer if storage == PEER and the_peer else make_net(task, storage)
            mine.append(Laps(task))
            fit(task, storage, model, mine[-1])
    return {storage: times(task, mine, laps["dense"]) for storage, mine in laps.items()}


def times(task: Task, mine: Sequence[Laps], dense: Sequence[Laps]) -> Quantities:
    found = {
        "step_ms": [1e3 * lap.step for lap in mine],
        "latency_ms": [1e3 * lap.latency for lap in mine],
    }
    if mine is not dense:
        both = list(zip(mine, dense, strict=True))
        epoch = EPOCH.get(task.net, 0) if task.rule in REDR else 0
        changes = task.rule != "StaticSparse"
        found["speedup"] = [d.step / m.step for m, d in both]
        found["latency_speedup"] = [d.latency / m.latency for m, d in both]
        if changes:
            found["update_ms"] = [1e3 * m.update for m in mine]
            found["update_in_dense_steps"] = [m.update / d.step for m, d in both]
        if epoch:
            found["epoch_over_dense"] = [
                (epoch * m.step + changes * m.update) / (epoch * d.step) for m, d in both
            ]
    return {quantity: spread(values) for quantity, values in found.items()}


# ---------------------------------------------------------------------------------- memory


class Bytes(pl.Callback):
    """Bytes of what a training keeps from step to step, when the last step is over."""

    def __init__(self, task: Task) -> None:
        self.found: dict[str, int] = {}
        self._task = task
        self._masks: Iterable[Any] = ()

    def on_masks_ready(self, trainer: pl.Trainer, pl_module: Any, keeper: Any) -> None:
        self._masks = keeper.masks

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != self._task.steps:
            return
        parameters = list(pl_module.parameters())
        states = [trainer.optimizers[0].state[p] for p in parameters]
        patterns = [kept.compressed.pattern for kept in self._masks if kept.compressed]
        self.found = {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer": sum(t.nbytes for s in states for t in s.values() if hasattr(t, "nbytes")),
            "pattern": sum(p.nbytes for p in patterns) + peer_pattern(pl_module),
            "mask": sum(
                kept.mask.nbytes + kept.gate.nbytes for kept in self._masks if not kept.compressed
            ),
        }


def peer_pattern(model: nn.Module) -> int:
    """Bytes that say where the peer's values are, and of its transposed copies."""
    if PEER not in sys.modules:
        return 0
    ops = importlib.import_module(f"{PEER}.ops")
    transposed = [cached[2:] for cached in ops._transpose_cache.values()]
    own = [layer._csr for layer in model.modules() if hasattr(layer, "_csr")]
    index = ("row_start", "row_nnz", "row_capacity", "col_indices")
    held = [getattr(csr, name) for csr in (*own, *(t[0] for t in transposed)) for name in index]
    held += [values for csr, order in transposed for values in (csr.values, order)]
    return sum(memoryview(array).nbytes for array in held)


def measure_memory(task: Task) -> dict[str, Quantities]:
    """Bytes of what is kept, and the peak of the process, in MB (a million bytes)."""
    (storage,) = task.storages
    found: dict[str, float] = {}
    if storage != "nothing":
        kept = Bytes(task)
        fit(task, storage, make_net(task, storage), kept)
        found = {f"{name}_mb": amount / 1e6 for name, amount in kept.found.items()}
        found["kept_mb"] = sum(found.values())
    found["peak_mb"] = peak_bytes() / 1e6
    return {storage: {quantity: spread([value]) for quantity, value in found.items()}}


def peak_bytes() -> int:
    """Most memory that the process ever had.

    ``getrusage`` begins with the peak of the process that started this one; Linux has also that
    of this program alone.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ----------------------------------------------------------------------- processes and files


def work(described: str) -> None:
    """Measure one task in this process, and print what was found as the last line."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = Task(**json.loads(described))
    torch.manual_seed(0)
    found = measure_time(task) if task.measure == "time" else measure_memory(task)
    print(json.dumps(found))


def run(arguments: Sequence[str], environment: dict[str, str]) -> tuple[str, str]:
    """The last line that a Python process prints; or nothing, and why."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode == 0 and done.stdout:
        return done.stdout.splitlines()[-1], ""
    said = done.stderr.strip().splitlines() or ["nothing was said"]
    return "", f"exit code {done.returncode}: {said[-1]}"


def rows_of(task: Task, found: dict[str, Quantities]) -> list[dict[str, Any]]:
    return [
        dict(zip(KEY, task.key(storage), strict=True)) | {"quantity": quantity} | numbers
        for storage, quantities in found.items()
        for quantity, numbers in quantities.items()
    ]


def measure(tasks: Sequence[Task], output: Path, environment: dict[str, str]) -> int:
    """Measure what is not in the file yet, and add it there.

    Returns:
        How many tasks failed.
    """
    have = {tuple(row[name] for name in KEY) for row in finished(output)}
    due = [t for t in tasks if any(t.key(storage) not in have for storage in t.storages)]
    output.parent.mkdir(parents=True, exist_ok=True)
    new = not output.exists()
    failed = 0
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for number, task in enumerate(due, 1):
            began = time.perf_counter()
            described = json.dumps(asdict(task))
            printed, reason = run([__file__, "--worker", described], environment)
            failed += bool(reason)
            if printed:
                writer.writerows(rows_of(task, json.loads(printed)))
                file.flush()
            outcome = reason or f"{time.perf_counter() - began:.0f} s"
            print(f"[{number}/{len(due)}] {task}: {outcome}", flush=True)
    return failed


def plan(args: argparse.Namespace) -> list[Task]:
    """All tasks that were asked for."""
    tasks = [Task("memory", storages=("nothing",))] if "memory" in args.only else []
    for width, batch, optimizer in product(args.hidden, args.batches, args.optimizers):
        net: Any = {"net": f"784-{width}-{width}-10", "batch": batch, "optimizer": optimizer}
        timing: Any = {"steps": steps(args.steps, width), "rounds": args.rounds}
        weighs = "memory" in args.only and batch == args.batches[0]
        if weighs:
            tasks.append(Task("memory", **net, storages=("dense",)))
        for density in args.densities:
            case = {**net, "density": density}
            if "time" in args.only:
                tasks.append(Task("time", **case, rule="RigL", storages=OURS, **timing))
            if "peer" in args.only:
                tasks.append(Task("time", **case, rule=PEER, storages=(PEER,), **timing))
            if weighs:
                mine = [Task("memory", **case, rule="RigL", storages=(s,)) for s in OURS[:2]]
                other = Task("memory", **case, rule=PEER, storages=(PEER,))
                tasks += [*mine, other] if "peer" in args.only else mine
    return tasks


def paper_plan(args: argparse.Namespace) -> list[Task]:
    """The trainings of the dissertation: memory and time of the wide net, time of the other."""
    nets: Any = [{"net": n, "batch": BATCH[n], "optimizer": "adam"} for n in (WIDE, HIGGS)]
    cases: Any = [{"rule": rule, "density": d} for rule, d in product(REDR, PAPER_DENSITIES)]
    tasks = []
    if "memory" in args.only:
        tasks = [Task("memory", storages=("nothing",))]
        tasks.append(Task("memory", **nets[0], storages=("dense",)))
        tasks += [Task("memory", **nets[0], **case, storages=("csr",)) for case in cases]
    if "time" in args.only:
        for net, case in product(nets, cases):
            width = int(net["net"].split("-")[1])
            timing: Any = {"steps": steps(args.steps, width), "rounds": args.rounds}
            tasks.append(Task("time", **net, **case, storages=("csr", "auto"), **timing))
    return tasks


def steps(widest: int, width: int) -> int:
    """Per training: more of those that are quick."""
    return widest * min(16, max(1, 4096 // width))


# ----------------------------------------------------------------------- tables and pictures


class Results:
    """What was measured.

    Args:
        rows: Of the file.
    """

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self._found = {(tuple(row[name] for name in KEY), row["quantity"]): row for row in rows}
        self.keys = list(dict.fromkeys(key for key, _ in self._found))

    def value(self, key: tuple[str, ...], quantity: str) -> float | None:
        """The median, or None if it was not measured."""
        row = self._found.get((key, quantity))
        return float(row["median"]) if row else None

    def shown(self, key: tuple[str, ...], quantity: str) -> str:
        """Median, and lowest and highest round."""
        row = self._found.get((key, quantity))
        if row is None:
            return ""
        median, low, high = (float(row[name]) for name in ("median", "min", "max"))
        return f"{median:.2f} ({low:.2f} to {high:.2f})"

    def over_dense(self, key: tuple[str, ...], quantity: str) -> float | None:
        """Memory over that of dense training; of a peak, without that of importing."""
        measure, net, batch, optimizer, *_ = key
        dense = Task(measure, net, int(batch), optimizer).key("dense")
        idle = self.value(Task("memory").key("nothing"), "peak_mb")
        mine, other = self.value(key, quantity), self.value(dense, quantity)
        if mine is None or other is None or (idle is None and quantity == "peak_mb"):
            return None
        less = idle if idle is not None and quantity == "peak_mb" else 0.0
        return (mine - less) / (other - less)

    def by_density(self, case: tuple[str, ...], storage: str) -> dict[float, float]:
        """Speed-up, or peak memory over dense, of RigL or the peer.

        Args:
            case: What is measured, net, batch and optimizer.
            storage: The storage.
        """
        found: dict[float, float] = {}
        for key in self.keys:
            if key[:4] == case and key[5] in ("RigL", PEER) and key[6] == storage:
                timed = case[0] == "time"
                number = self.value(key, "speedup") if timed else self.over_dense(key, "peak_mb")
                found |= {} if number is None else {float(key[4]): number}
        return dict(sorted(found.items()))


def grid(title: str, cells: dict[tuple[str, ...], str]) -> list[str]:
    """A table with a column per density; keys are those of rows."""
    if not any(cells.values()):
        return []
    densities = sorted({key[4] for key, cell in cells.items() if cell}, key=float, reverse=True)
    lines = [
        f"\n{title}\n",
        f"| net | batch | optimizer | method | storage | {' | '.join(densities)} |",
        "|---|---|---|---|---|" + "---|" * len(densities),
    ]
    for case in dict.fromkeys((*key[1:4], *key[5:]) for key, cell in cells.items() if cell):
        mine = {key: cell for key, cell in cells.items() if cell}
        found = {k[4]: cell for k, cell in mine.items() if (*k[1:4], *k[5:]) == case}
        lines.append(f"| {' | '.join((*case, *(found.get(d, '') for d in densities)))} |")
    return lines


def table(results: Results) -> str:
    """All that was measured, by density."""
    sparse = [key for key in results.keys if key[6] not in ("dense", "nothing")]
    of_time = {
        "Steps between mask updates, times faster than dense (lowest to highest round)": "speedup",
        "A mask update, in dense steps": "update_in_dense_steps",
        "One example, times faster than dense": "latency_speedup",
        "An epoch with its redistribution, over a dense one": "epoch_over_dense",
    }
    of_memory = {
        "Peak memory over dense, without that of importing": "peak_mb",
        "Parameters, gradients, optimizer state, pattern and mask over dense": "kept_mb",
    }
    dense = [key for key in results.keys if key[6] == "dense"]
    steps_ms = {key: results.shown(key, "step_ms") for key in dense}
    lines = grid("A dense step beside each method, in ms", steps_ms)
    for title, quantity in of_time.items():
        lines += grid(title, {key: results.shown(key, quantity) for key in sparse})
    for title, quantity in of_memory.items():
        ratios = {key: results.over_dense(key, quantity) for key in sparse}
        lines += grid(title, {k: "" if r is None else f"{r:.3f}" for k, r in ratios.items()})
    if any(key[5] in REDR for key in sparse):
        lines += published()
    return "\n".join(lines)


def published() -> list[str]:
    """What the dissertation reports."""
    head = " | ".join(map(str, PAPER_DENSITIES))
    lines = [
        f"\nAs published, memory over dense, {WIDE}\n",
        f"| method | {head} |",
        "|---|---|---|---|",
    ]
    for rule in REDR:
        ratios = zip(PUBLISHED_MB[rule], PUBLISHED_MB["dense"], strict=True)
        lines.append(f"| {rule} | {' | '.join(f'{mine / dense:.3f}' for mine, dense in ratios)} |")
    lines += [
        f"\nAs published, an epoch over a dense one, {HIGGS}\n",
        "| method | 0.1 |",
        "|---|---|",
    ]
    for rule, seconds in PUBLISHED_SECONDS.items():
        if rule != "dense":
            lines.append(f"| {rule} | {seconds / PUBLISHED_SECONDS['dense']:.2f} |")
    return lines


def plot(results: Results, path: Path) -> None:
    """Speed-up and memory by density: ours in full lines, the others' broken."""
    from matplotlib.figure import Figure

    found = [key for key in results.keys if key[5] in ("RigL", PEER)]
    optimizers = [name for name in ("sgd", "adam") if any(key[3] == name for key in found)]
    names = {"sgd": "SGD with momentum", "adam": "Adam"}
    figure = Figure(figsize=(5.2 * (len(optimizers) + 1), 6), layout="constrained")
    *panels, memory = figure.subplots(1, len(optimizers) + 1)

    sizes = sorted({(len(key[1]), key[1], int(key[2])) for key in found if key[0] == "time"})
    for optimizer, panel in zip(optimizers, panels, strict=True):
        for number, (_, net, batch) in enumerate(sizes):
            case: tuple[str, ...] = ("time", net, str(batch), optimizer)
            label = f"{net.split('-')[1]} wide, batch {batch}"
            line(panel, results.by_density(case, "native"), "o-", number, f"{label}, native")
            line(panel, results.by_density(case, "auto"), "s:", number, f"{label}, auto")
            line(panel, results.by_density(case, PEER), "x--", number, f"{label}, {PEER}")
        panel.set_yscale("log")
        panel.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20])
        panel.yaxis.set_major_formatter("{x:g}")
        finish(panel, f"Training step, {names[optimizer]}", "times faster than dense")

    last = [key for key in found if key[0] == "memory" and key[3] == optimizers[-1]]
    for number, (_, case) in enumerate(sorted({(len(key[1]), key[:4]) for key in last})):
        for storage, style in (("csr", "o-"), ("masked", "s:"), (PEER, "x--")):
            label = f"{case[1].split('-')[1]} wide, {storage}"
            line(memory, results.by_density(case, storage), style, number, label)
    finish(memory, f"Peak memory, {names[optimizers[-1]]}", "over dense")
    memory.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def line(panel: Any, points: dict[float, float], style: str, color: int, label: str) -> None:
    if points:
        panel.plot(points.keys(), points.values(), style, color=f"C{color}", label=label)


def finish(panel: Any, title: str, unit: str) -> None:
    panel.axhline(1, color="black", lw=1)
    panel.set_title(title)
    panel.set_xlabel("density")
    panel.set_ylabel(unit)
    panel.set_xscale("log")
    panel.set_xticks([0.01, 0.03, 0.06, 0.1], ["0.01", "0.03", "0.06", "0.1"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


# ------------------------------------------------------------------------------ command line


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    kinds = ["time", "peer", "memory"]
    add("--only", nargs="+", choices=kinds, default=kinds, help="what is measured")
    add("--hidden", nargs="+", type=int, default=[256, 1024, 4096], help="widths of the layers")
    add("--batches", nargs="+", type=int, default=[128, 512], help="memory: only the first")
    add("--densities", nargs="+", type=float, default=[0.1, 0.06, 0.03, 0.01])
    add("--optimizers", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"])
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=24, help="per training of 4096 wide layers; else more")
    add("--threads", type=int, default=os.cpu_count(), help="of every process")
    add("--peer", type=Path, help=f"the folder that {PEER} is in")
    add("--paper", action="store_true", help="measure the nets of the dissertation instead")
    add("--output", type=Path, default=RESULTS)
    add("--table", action="store_true", help="measure nothing; print what there is")
    add("--plot", action="store_true", help="draw a picture beside the results")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.steps < 16 or args.steps % 4:
        parser.error("--steps must be a multiple of 4, and 16 at least")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be 1 at least")
    if not all(0 < density <= 1 for density in args.densities):
        parser.error("--densities must lie in (0, 1]")
    return parser, args


def environment_for(args: argparse.Namespace) -> dict[str, str]:
    """Of the processes that measure: threads for all libraries, and the peer's folder."""
    mine = dict(os.environ)
    mine["OMP_NUM_THREADS"] = mine["MKL_NUM_THREADS"] = str(args.threads)
    if args.peer:
        paths = [str(args.peer.resolve()), mine.get("PYTHONPATH", "")]
        mine["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return mine


def note_settings(args: argparse.Namespace, peer: str | None) -> str | None:
    """Write beside the results what they were measured with; or say what was another thing."""
    path = args.output.with_suffix(".json")
    now = {
        "machine": machine() | {"threads": args.threads},
        "rounds": args.rounds,
        "steps": args.steps,
    }
    before = json.loads(path.read_text()) if path.exists() else now
    other = [name for name in now if before[name] != now[name]]
    if other:
        was = {name: before[name] for name in other}
        return f"{args.output} was measured with {was}; measure on with that, or give --output."
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {PEER: peer} if peer else {}
    path.write_text(json.dumps(before | versions, indent=2) + "\n")
    return None


def main() -> None:
    parser, args = parse()
    if args.worker:
        work(args.worker)
        return
    failed = 0
    if not args.table:
        environment = environment_for(args)
        version = None
        if "peer" in args.only and not args.paper:
            ask = f"import {PEER}; print({PEER}.__version__)"
            version, reason = run(["-W", "ignore", "-c", ask], environment)
            if reason:
                print(f"{PEER} is left out, {reason}")
                args.only = [kind for kind in args.only if kind != "peer"]
        if problem := note_settings(args, version):
            parser.error(problem)
        tasks = paper_plan(args) if args.paper else plan(args)
        failed = measure(tasks, args.output, environment)
    results = Results(finished(args.output))
    print(table(results))
    if args.plot:
        picture = args.output.with_suffix(".png")
        plot(results, picture)
        print(f"\n{picture}")
    if failed:
        sys.exit(f"{failed} measurements failed; the same command tries them again.")


if __name__ == "__main__":
    main()
