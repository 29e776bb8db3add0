"""Trainings that are killed and resumed: a short run of ``tests/endurance/kill.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "endurance" / "kill.py"
# What is not in the checkpoint is not resumed: the program must see that.
FORGETFUL = """
import sys
sys.path.insert(0, {folder!r})
import kill
import torch

class Forgetful(kill.Callback):
    steps = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps += 1
        pl_module.net[5].bias += 1e-3 * self.steps

kill.TRAININGS = {{"forgetful": kill.Training(lambda: [Forgetful(), kill.RigL(0.3)])}}
sys.exit(kill.main(["--cycles", "2", "--output", {output!r}]))
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(folder)},
    )


@pytest.mark.slow
def test_a_training_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    output = tmp_path / "kill.json"
    only = ("RigL", "OptG", "RigL (csr)")
    done = run(tmp_path, str(PROGRAM), "--cycles", "8", "--output", str(output), "--only", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["cycles"] >= 8
    assert found["resumes"] + found["restarts"] == found["cycles"]
    assert found["failed"] == 0
    assert all(found["by_training"][name]["trainings"] for name in only)


@pytest.mark.slow
def test_the_program_sees_what_is_not_resumed(tmp_path: Path) -> None:
    output = tmp_path / "kill.json"
    code = FORGETFUL.format(folder=str(PROGRAM.parent), output=str(output))
    done = run(tmp_path, "-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert any("weights" in said for said in found["by_training"]["forgetful"]["failed"])
