"""FSDP2 on a CUDA device: the masks of the same training without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_training import EVERY, Model, doubles
from lightning_sparsity.testing import fit

accelerator, names = sys.argv[2], sys.argv[3:]
where = {"accelerator": accelerator, "devices": 1, "deterministic": True}
alone = {name: fit([EVERY[name]()], Model, data=doubles(), **where) for name in names}
for name in names:
    strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)
    parted = fit([EVERY[name]()], Model, data=doubles(), strategy=strategy, **where)
    assert parted.history == alone[name].history, name
    for key, weight in alone[name].weights.items():
        torch.testing.assert_close(parted.weights[key], weight, rtol=0, atol=1e-9)
    print("SAME", name, flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("names", [["RigL", "SET", "GMP", "RedrGradientGlobal"], ["SNIP", "GraSP"]])
def test_parts_train_as_the_whole(names: list[str], tmp_path: Path) -> None:
    done = run("gpu", names, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("SAME")] == [
        f"SAME {name}" for name in names
    ]


def run(accelerator: str, names: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, in a process of its own, which may have a process group."""
    contract = Path(__file__).parents[1] / "contract"
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(contract), accelerator, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
