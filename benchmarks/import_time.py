"""What importing the package adds to importing Lightning, in fresh processes.

python benchmarks/import_time.py --runs 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PROBE = """
import time
start = time.perf_counter()
import lightning.pytorch
middle = time.perf_counter()
import lightning_sparsity
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    pairs = []
    for _ in range(args.runs):
        printed = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        pairs.append([float(word) for word in printed.split()])
    base, added = zip(*pairs, strict=True)
    report = {
        "runs": args.runs,
        "lightning_s": round(statistics.median(base), 3),
        "added_s": round(statistics.median(added), 3),
        "added_max_s": round(max(added), 3),
    }
    print(json.dumps(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
