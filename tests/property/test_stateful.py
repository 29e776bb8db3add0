"""Random trainings and all that befalls them: a short run of ``tests/endurance/stateful.py``."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "endurance"))
from stateful import ALL, Leg, Life, Refused, Stage, draw, live, main

from lightning_sparsity.callbacks import budget
from lightning_sparsity.core import masks, state
from lightning_sparsity.core.engine import Engine
from lightning_sparsity.core.storage import Storage


@pytest.mark.slow
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(chance=st.randoms(use_true_random=False))
def test_what_is_promised_holds_after_every_step(chance: random.Random) -> None:
    life = draw(chance)
    note(repr(life))
    try:
        live(life)
    except Refused:
        reject()


@pytest.mark.slow
def test_every_method_is_drawn() -> None:
    drawn = Counter(
        stage.name for number in range(2000) for stage in draw(random.Random(number)).stages
    )
    assert drawn.keys() == ALL.keys()


@pytest.mark.slow
def test_the_program_counts(tmp_path: Path) -> None:
    output = tmp_path / "stateful.json"
    assert main(["--only", "0", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["failed"] == []
    assert found["sequences"] + sum(found["refused"].values()) >= 2
    assert found["batches"] == max(found["batches"], 1)


# What breaks a promise is seen ------------------------------------------------------


def life(storage: str = "dense") -> Life:
    """Trained, resumed from its middle, broken off, and fitted again."""
    return Life(
        stages=(Stage("SET", {"density": 0.3, "update_interval": 2}),),
        legs=(
            Leg(storage=storage, saves=((1, 0),)),
            Leg("resume", storage=storage, seed=5, interruption=(2, 1, "batch end")),
            Leg("again", storage=storage),
        ),
    )


@pytest.mark.parametrize("storage", ["dense", "csr"])
def test_a_sound_training_is_found_sound(storage: str) -> None:
    counts = live(life(storage)).counts
    assert counts["trainings"] == 3
    assert counts["resumes"] == counts["exceptions"] == counts["again"] == counts["saves"] == 1
    assert counts["batches"] == 12 + 5 + 4


def one_less(real: Callable[..., int]) -> Callable[..., int]:
    return lambda *args: real(*args) - 1


def other_masks(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda mask: real(mask.roll(1, -1))


def no_state(real: Any) -> Callable[..., list[torch.Tensor]]:
    return lambda *args: []


def forgetful(real: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda run: {**real(run), "updates": 0}


def nothing(real: Any) -> Callable[..., None]:
    return lambda *args: None


@pytest.mark.parametrize(
    ("where", "name", "broken", "storage", "said"),
    [
        (budget, "_part", one_less, "dense", "SET: .*not"),
        (state, "pack", other_masks, "dense", "masks are not those that were left"),
        (masks, "optimizer_state", no_state, "dense", "optimizer state off the mask"),
        (state, "_save_run", forgetful, "dense", "of a resumed training"),
        (Engine, "release", nothing, "dense", "hooks of an optimizer"),
        (Storage, "release", nothing, "csr", "is a <class"),
    ],
    ids=["budget", "masks in files", "momentum", "counters in files", "hooks", "storage"],
)
def test_what_is_broken_is_found(
    where: Any, name: str, broken: Any, storage: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    with pytest.raises(AssertionError, match=said):
        live(life(storage))
