"""Two processes, FSDP2 and DDP: the masks of one process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_training import METHODS, WITH_DATA, train

from lightning_sparsity.testing import Result

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:ACDC. the phases change"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what came of every training."""
    folder = tmp_path_factory.mktemp("fsdp")
    script = Path(__file__).with_name("fsdp_training.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """The same, by process."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_those_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(METHODS[name](), 1)
    assert alone.changes > 0
    for rank in ranks:
        assert_equal(rank[name], alone)
        assert_equal(rank[f"{name}, DDP"], alone)


@pytest.mark.parametrize("name", WITH_DATA)
def test_scores_of_data_are_those_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(WITH_DATA[name](1), 1)
    for rank in ranks:
        assert_equal(rank[f"{name}, DDP"], alone)


def assert_equal(found: dict[str, Any], alone: Result) -> None:
    """Raise unless masks are equal to the bit after every batch, and weights to rounding."""
    assert found["history"] == alone.history
    for key, mask in alone.masks.items():
        assert torch.equal(found["masks"][key], mask), key
    for key, weight in alone.weights.items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-12)


def test_resuming_two_processes_equals_not_stopping(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, resumed = rank["RigL, ERK"], rank["resumed"]
        assert resumed["history"] == whole["history"][-8:]
        for key, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][key], weight), key


def test_the_file_of_two_processes_resumes_in_one(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    resumed = train(METHODS["RigL, ERK"](), 1, ckpt_path=str(folder / "half.ckpt"))
    assert resumed.history == ranks[0]["RigL, ERK"]["history"][-8:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OptG", "OptG learns masks of whole weights, and net.0.weight lies in parts"),
        ("SNIP", "SNIP: it passes data through a copy of the model"),
        ("SparseCompute", "SparseCompute compresses whole weights"),
    ],
)
def test_what_needs_whole_weights_is_refused(
    name: str, message: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert rank[name].startswith(f"MisconfigurationException: {message}")
