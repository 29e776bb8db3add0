"""Several processes, FSDP2, DDP and tensor parallelism: the masks of one process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_training import (
    METHODS,
    SAME_DATA,
    WITH_DATA,
    WITHOUT_GATHERING,
    Halves,
    train,
    train_even,
)

from lightning_sparsity.testing import Result

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:ACDC. the phases change"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes have left what came of every training."""
    folder = tmp_path_factory.mktemp("fsdp")
    script = Path(__file__).with_name("fsdp_training.py")
    for part in ("two", "four", "one"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(folder), part],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """The same, by process, of two."""
    return [torch.load(folder / f"two{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    """The same, by process, of four."""
    return [torch.load(folder / f"four{rank}.pt", weights_only=True) for rank in range(4)]


@cache
def alone(name: str, even: bool = False) -> Result:
    """One process."""
    made = METHODS[name]() if name in METHODS else {**WITH_DATA, **SAME_DATA}[name](Halves())
    return train_even(made, None) if even else train(made, 1)


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_those_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    assert alone(name).changes > 0 or name == "StaticSparse"
    for rank in ranks:
        assert_equal(rank[name], alone(name))
        assert_equal(rank[f"{name}, DDP"], alone(name))
        assert_equal(rank[f"{name}, TP"], alone(name, even=True))


@pytest.mark.parametrize("name", WITHOUT_GATHERING)
def test_no_update_gathers(name: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[name]["gathered"] for rank in ranks] == [0, 0]
    assert ranks[0]["SRigL"]["gathered"] > 0, "what sees whole layers gathers them"


@pytest.mark.parametrize("name", WITH_DATA)
def test_scores_of_data_are_those_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank[name], alone(name))
        assert_equal(rank[f"{name}, DDP"], alone(name))
        assert_equal(rank[f"{name}, TP"], alone(name, even=True))


@pytest.mark.parametrize("name", ["SNIP", "FORCE", "SynFlow"])
def test_one_weight_at_a_time_is_whole_while_scoring(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    assert all(rank[name]["most"] in (1, 2) for rank in ranks), "of four layers"


@pytest.mark.parametrize("name", SAME_DATA)
def test_scores_of_the_same_data(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank[f"{name}, even"], alone(name, even=True))
        assert_equal(rank[f"{name}, TP"], alone(name, even=True))


@pytest.mark.parametrize("name", ["RigL, ERK", "GMP, global", "SNIP", "GraSP"])
def test_cut_both_ways(name: str, four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert_equal(rank[name], alone(name, even=True))
        assert_equal(rank[f"{name}, copies"], alone(name, even=True))


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


@pytest.mark.parametrize("cuts", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_folder_of_parts_resumes_however_it_is_cut(cuts: tuple[int, int], folder: Path) -> None:
    part = {1: "one", 2: "two", 4: "four"}[cuts[0] * cuts[1]]
    for file in sorted(folder.glob(f"{part}?.pt")):
        resumed = torch.load(file, weights_only=True)[f"resumed from parts {cuts}"]
        assert resumed["history"] == alone("RigL, ERK", even=True).history[-8:]
        for key, weight in alone("RigL, ERK", even=True).weights.items():
            torch.testing.assert_close(resumed["weights"][key], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("damage", ["flipped", "cut", "meta", "metadata"])
def test_a_damaged_folder_is_refused_by_all(damage: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[damage].startswith("RuntimeError: ")
        assert f"{damage}.ckpt is damaged: " in rank[damage]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OptG", "OptG learns masks of whole weights, and net.0.weight lies in parts"),
        ("SparseCompute", "SparseCompute compresses whole weights"),
        ("uneven", "SNIP: there are 3, 4 batches for scoring on the processes"),
    ],
)
def test_what_cannot_be_done_is_refused(
    name: str, message: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert rank[name].startswith(f"MisconfigurationException: {message}")
