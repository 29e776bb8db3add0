"""Every method on weights in parts: the masks of one process, or a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_training import CUTS, EVERY, train

from lightning_sparsity import LearnedMask

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every method in two processes, by its name and how weights were cut."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded_training.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder / "found.pt")],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return outcomes


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_parts_train_as_the_whole(name: str, cut: str, found: dict[str, Any]) -> None:
    outcome, method = found[f"{name} {cut}"], EVERY[name]()
    if isinstance(method, LearnedMask):
        assert f"{type(method).__name__} learns masks of whole weights, and net." in outcome
    elif method.statistics and cut == "tp":
        assert f"{type(method).__name__} looks at activations" in outcome
    else:
        alone = train(name)
        assert outcome["history"] == alone["history"]
        for key, weight in alone["weights"].items():
            torch.testing.assert_close(outcome["weights"][key], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("name", "storage"), [("RigL", "csr")])
def test_compressed_storage_is_refused(
    name: str, storage: str, cut: str, found: dict[str, Any]
) -> None:
    assert "SparseCompute compresses whole weights" in found[f"compressed {cut}"]
