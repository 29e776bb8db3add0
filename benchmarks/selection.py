"""How fast and how large is the exact selection of the k largest scores?

Compares ``top_k`` with ``torch.topk`` (``sorted=False``), which gives indices, and with
the mask that a port of it has to scatter them into. Times are the best of some runs in
one process, taken in turn; peak memory is measured in a fresh process for each.

    python benchmarks/selection.py [--numel 33000000] [--density 0.1] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def cases(numel: int, density: float) -> dict[str, Run]:
    """What is measured, by name; the scores are made here and shared."""
    import torch

    from lightning_sparsity.ops.selection import sample, top_k, top_k_counts

    scores = torch.empty(numel).normal_(generator=torch.Generator().manual_seed(0)).abs_()
    pieces = list(scores.tensor_split(10))
    k = round(density * numel)
    free = torch.ones(numel, dtype=torch.bool)
    free[::10] = False

    def scatter() -> object:
        mask = torch.zeros(numel, dtype=torch.bool)
        mask[scores.topk(k, sorted=False).indices] = True
        return mask

    return {
        "torch.topk": lambda: scores.topk(k, sorted=False),
        "torch.topk and mask": scatter,
        "top_k": lambda: top_k([scores], k),
        "top_k, 10 tensors": lambda: top_k(pieces, k),
        "top_k, 90% candidates": lambda: top_k([scores], k, [free]),
        "top_k_counts, 10 tensors": lambda: top_k_counts(pieces, k),
        "sample, k/3 of 90%": lambda: sample(free, k // 3, torch.Generator()),
    }


def best_times(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Shortest time of each, in seconds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_memory() -> int:
    """Largest resident size of this process since the last reset, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def reset_peak_memory() -> None:
    """Make the present resident size the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def extra_memory(name: str, numel: int, density: float) -> int:
    """Bytes by which one run, its result included, raises the peak of this process."""
    cases(1_000_000, density)[name]()  # loads what is loaded once
    run = cases(numel, density)[name]
    reset_peak_memory()
    before = peak_memory()
    result = run()
    after = peak_memory()
    del result
    return after - before


def machine() -> str:
    """Processor, threads and versions."""
    import torch

    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--numel", type=int, default=33_000_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", metavar="CASE", help="print the extra bytes of one case")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    if options.memory:
        print(extra_memory(options.memory, options.numel, options.density))
        return
    print(machine())
    print(f"{options.numel} float32 scores, density {options.density}")
    times = best_times(cases(options.numel, options.density), options.repeats)
    print(f"{'':28}{'ms':>8}{'ratio':>8}{'extra memory / input':>24}")
    for name, seconds in times.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
        extra = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        print(
            f"{name:28}{seconds * 1e3:8.1f}{times['torch.topk'] / seconds:8.1f}"
            f"{extra / (4 * options.numel):24.2f}"
        )


if __name__ == "__main__":
    main()
