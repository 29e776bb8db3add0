"""Two processes: the same masks on every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from lightning_sparsity import GMP, SET, Magnitude, RigL, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import TinyModel, fit

torch.set_num_threads(1)
method = {
    "RigL": lambda: RigL(0.3, update_interval=4),
    "SET": lambda: SET(0.3),
    "GMP": lambda: GMP(0.3, update_interval=4),
    "Magnitude": lambda: Magnitude(0.3, at=0.5),
    "StaticSparse": lambda: StaticSparse(0.3),
}[sys.argv[1]]


class Ranks(Callback):
    def on_train_batch_end(self, trainer, *args):
        mine = MaskKeeper.of(trainer).masks.digest()
        both = [None, None]
        torch.distributed.all_gather_object(both, mine)
        assert both[0] == both[1], both


generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(128, 1, 6, 6, generator=generator), torch.randint(4, (128,), generator=generator)
)
result = fit(
    [method(), Ranks()], data=DataLoader(data, batch_size=8), strategy="ddp", devices=2
)
if result.trainer.is_global_zero:
    live = {name: int(mask.sum()) for name, mask in result.masks.items()}
    print("RESULT", json.dumps([live, result.changes, len(result.history)]), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["RigL", "SET", "GMP", "Magnitude", "StaticSparse"])
def test_masks_agree_on_two_ranks(name: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    live, changes, steps = json.loads(line.removeprefix("RESULT"))
    assert sum(live.values()) == round(0.3 * 2184)
    assert steps == 24
    assert changes == {"StaticSparse": 0, "Magnitude": 1, "SET": 2, "RigL": 4, "GMP": 5}[name]


DIFFERENT = """
import os
import torch
from lightning_sparsity import RigL
from lightning_sparsity.testing import Batches, fit

torch.set_num_threads(1)
rank = int(os.environ.get("LOCAL_RANK", 0))
try:
    fit([RigL(0.3, seed=rank)], data=Batches(), strategy="ddp", devices=2)
except RuntimeError as error:
    os.write(1, f"RAISED {rank} {error}\\n".encode())  # at once, not between the other's lines
torch.distributed.destroy_process_group()
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_masks_that_differ_are_an_error_that_names_parameter_and_rank(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DIFFERENT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    said = [x for x in done.stdout.splitlines() if x.startswith("RAISED")]
    assert len(said) == 2, done.stderr[-3000:]
    for line in said:
        assert "net.0.weight: at the start the mask of rank 1 is not that of rank 0" in line
