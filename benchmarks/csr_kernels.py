"""Products of a linear layer: dense, torch's compressed rows, and the kernels in C.

Each case times the forward product, the gradient of the inputs, and the gradient of the weights,
of which compressed ones are sampled at the live weights. The three ways take turns in one
process, and the fastest of many repeats counts, as other processes may disturb any of them.
Compressed gradients of inputs include the copy of the values in the order of the transpose.

    python benchmarks/csr_kernels.py --sizes 1024 4096 --output benchmarks/results/csr_kernels.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Pattern

PRODUCTS = ("forward", "inputs", "weights")
WAYS = ("dense", "torch", "native")


def sampled(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    torch.sparse.sampled_addmm(matrix, left, right.t(), out=matrix)
    return matrix.values()


def jobs(size: int, batch: int, density: float, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call for each product and way, ``"forward torch"`` and so on."""
    torch.manual_seed(0)
    pattern = Pattern(torch.rand(size, size) < density)
    values = torch.randn(pattern.nnz, dtype=dtype)
    weight = pattern.scatter(values)
    x, g = torch.randn(size, batch, dtype=dtype), torch.randn(size, batch, dtype=dtype)
    inputs, slopes = x.t().contiguous(), g.t().contiguous()
    matrix = pattern.matrix(values)
    return {
        "forward dense": lambda: inputs @ weight.t(),
        "forward torch": lambda: matrix @ x,
        "forward native": lambda: native.multiply(matrix, x),
        "inputs dense": lambda: slopes @ weight,
        "inputs torch": lambda: pattern.transposed(values) @ g,
        "inputs native": lambda: native.multiply(pattern.transposed(values), g),
        "weights dense": lambda: slopes.t() @ inputs,
        "weights torch": lambda: sampled(pattern.matrix(torch.zeros_like(values)), g, x),
        "weights native": lambda: native.sample(matrix, g, x),
    }


def fastest(calls: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, float]:
    """Milliseconds of each call: the least of the repeats, which take turns."""
    least = dict.fromkeys(calls, float("inf"))
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.03, 0.01])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, for one case")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if reason := native.unavailable():
        raise SystemExit(f"no native kernels: {reason}")
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)

    print("ms: dense, torch, native (dense / native, torch / native)")
    results = []
    cases = product(arguments.sizes, arguments.batches, arguments.densities)
    for size, batch, density in cases:
        ms = fastest(jobs(size, batch, density, dtype), arguments.repeats, arguments.seconds)
        print(f"{size} x {size}, batch {batch}, density {density}")
        for kind in PRODUCTS:
            dense, theirs, mine = (ms[f"{kind} {way}"] for way in WAYS)
            print(
                f"  {kind:8s} {dense:8.3f} {theirs:8.3f} {mine:8.3f}"
                f"  ({dense / mine:5.2f}, {theirs / mine:5.2f})",
                flush=True,
            )
        results.append({"size": size, "batch": batch, "density": density, "ms": ms})
    if arguments.output:
        record = {
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            "results": results,
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
