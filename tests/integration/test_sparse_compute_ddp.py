"""Compressed storage on two processes: the same on every rank, and as with dense storage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_sparsity import RigL, SparseCompute
from lightning_sparsity.core import storage
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import ManualModel, TinyModel, fit

torch.set_num_threads(1)

class Ranks(Callback):
    def __init__(self):
        self.kinds = set()

    def on_train_batch_end(self, trainer, module, *args):
        masks = MaskKeeper.of(trainer).masks
        stored = tuple(kept.compressed is not None for kept in masks)
        self.kinds.add(stored)
        mine = (masks.digest(), stored, [p.detach().tolist() for p in module.parameters()])
        both = [None, None]
        torch.distributed.all_gather_object(both, mine)
        assert both[0] == both[1], both


class Late(TinyModel):
    def configure_model(self):
        pass


generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(128, 1, 6, 6, generator=generator).double(),
    torch.randint(4, (128,), generator=generator),
)


def train(*more, kind=TinyModel, **options):
    return fit(
        [RigL(0.3, update_interval=2), *more, ranks := Ranks()],
        # a rank-dependent start, which the first process's weights replace
        lambda: started(kind().double()),
        data=DataLoader(data, batch_size=8),
        strategy="ddp",
        devices=2,
        **options,
    ), ranks


def started(model):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    return model


def distance(one, other):
    pairs = [(one.weights[key], value) for key, value in other.weights.items()]
    pairs += zip(one.state, other.state)
    return max(float((a - b).abs().max()) for a, b in pairs)


dense, _ = train()
packed, ranks = train(SparseCompute("csr"))
found = {
    "same history": packed.history == dense.history,
    "distance": distance(packed, dense),
    "changes": dense.changes,
    "kinds": sorted(ranks.kinds),
}
accumulating = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
other, _ = train(**accumulating)
found["accumulated"] = distance(train(SparseCompute("csr"), **accumulating)[0], other)

rank = torch.distributed.get_rank()
fast, slow = (2.0, 1.0), (1.0, 2.0)
storage.measure = lambda kept, *args: fast if (kept.numel > 100) == (rank == 0) else slow
auto, ranks = train(SparseCompute(kernels="torch"))
found["auto"] = sorted(ranks.kinds)
found["auto distance"] = distance(auto, dense)

for kind in (ManualModel, Late):
    try:
        train(SparseCompute("csr"), kind=kind)
    except MisconfigurationException as error:
        found[kind.__name__] = str(error)
if rank == 0:
    print("RESULT", json.dumps(found), flush=True)
torch.distributed.destroy_process_group()
"""


def run(folder: Path) -> Any:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_train_as_with_dense_storage(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found["changes"] >= 8
    assert found["same history"]
    assert found["distance"] < 1e-9
    assert found["accumulated"] < 1e-9
    assert found["kinds"] == [[True, True, True]]
    # both do what the first process has measured
    assert sorted(found["auto"]) == [[False, True, False]]
    assert found["auto distance"] < 1e-9
    assert "averages gradients when Lightning steps an optimizer" in found["ManualModel"]
    assert "cannot see the layers that configure_model makes" in found["Late"]
