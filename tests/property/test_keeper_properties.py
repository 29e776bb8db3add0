"""Short trainings of random configurations: exact counts, and masks that move when due.

The probe inside ``fit`` checks weights and optimizer state after every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sparsity import (
    GMP,
    NM,
    SET,
    Block,
    Magnitude,
    MaskCallback,
    RigL,
    Rows,
    StaticSparse,
)
from lightning_sparsity.structures import Layout, Structure, Unstructured
from lightning_sparsity.testing import Batches, ManualModel, Result, TinyModel, fit

SHAPES = {"net.1.weight": (8, 36), "net.3.weight": (8, 8), "net.5.weight": (4, 8)}
BATCHES = 10


@dataclass
class Setting:
    """One configuration of a training of at most ten steps."""

    method: str
    density: float
    interval: int
    start: int
    end: int
    structure: Structure
    optimizer: str
    accumulate: int
    two_optimizers: bool

    @property
    def steps(self) -> int:
        """Real steps of each optimizer."""
        return math.ceil(BATCHES / self.accumulate)

    @property
    def due(self) -> set[int]:
        """Steps that an update follows, as the documentation has it."""
        window = range(max(self.start, 1), min(self.end, self.steps) + 1)
        regular = {t for t in window if (t - self.start) % self.interval == 0}
        if self.method == "GMP":
            return regular | ({self.end} if self.end <= self.steps else set())
        if self.method == "Magnitude":
            return {self.end} if self.end <= self.steps else set()
        if self.method == "StaticSparse":
            return set()
        return regular - (set() if self.two_optimizers else {BATCHES})

    def callback(self) -> MaskCallback:
        """The method."""
        pattern = isinstance(self.structure, NM)
        common: dict[str, Any] = {"structure": self.structure, "seed": 1}
        density = None if pattern else self.density
        window: dict[str, Any] = {
            "update_interval": self.interval,
            "update_start": self.start,
            "update_end": self.end,
        }
        if self.method == "StaticSparse":
            return StaticSparse(density, **common)
        if self.method == "Magnitude":
            return Magnitude(density, at=self.end, **common)
        return {"RigL": RigL, "SET": SET, "GMP": GMP}[self.method](density, **window, **common)

    def model(self) -> Any:
        """The model, with one optimizer or two."""
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
        )
        make = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
            "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
        }[self.optimizer]
        if self.two_optimizers:
            return ManualModel(net=net, optimizer=make, accumulate=self.accumulate)
        return TinyModel(net, make)

    def units(self, live: dict[str, int]) -> dict[str, int]:
        """Live weights in units."""
        sizes = {
            name: math.prod(shape) // self.structure.size(shape, Layout())
            for name, shape in SHAPES.items()
        }
        assert all(live[name] % sizes[name] == 0 for name in live)
        return {name: live[name] // sizes[name] for name in live}

    @property
    def total(self) -> int:
        """Units of the whole model."""
        return sum(self.structure.size(shape, Layout()) for shape in SHAPES.values())


@st.composite
def configurations(draw: st.DrawFn) -> Setting:
    start = draw(st.integers(0, 5))
    two = draw(st.booleans())
    accumulate = draw(st.sampled_from([1, 2, 5] if two else [1, 2, 3]))
    method = draw(st.sampled_from(["RigL", "SET", "GMP", "Magnitude", "StaticSparse"]))
    last = BATCHES // accumulate
    ramps = method in ("GMP", "Magnitude")
    structure = draw(st.sampled_from([Unstructured(), Rows(), Block(2, 4), NM(2, 4)]))
    densities = [0.25, 0.37, 0.5, 0.9, 1.0]
    if structure != Rows():  # a tenth of 20 rows is too few for three layers
        densities.append(0.1)
    # A ramp must end within the training; other windows may lie anywhere.
    end = draw(st.integers(min(max(start, 2), last), last if ramps else 12))
    return Setting(
        method=method,
        density=draw(st.sampled_from(densities)),
        interval=draw(st.integers(1, 4)),
        start=min(start, end),
        end=max(end, 2),
        structure=structure,
        optimizer=draw(st.sampled_from(["sgd", "adamw", "rmsprop", "adagrad"])),
        accumulate=accumulate,
        two_optimizers=two,
    )


# On the way down 18 of 20 rows are 15 and 3 at one density, 14 and 4 at a lower one.
PARADOX = Setting("GMP", 0.9, 1, 1, 6, Rows(), "sgd", 1, True)


def train(chosen: Setting) -> Result:
    options: dict[str, Any] = {"max_epochs": 1}
    if not chosen.two_optimizers:
        options["accumulate_grad_batches"] = chosen.accumulate
    return fit([chosen.callback()], chosen.model, data=Batches(BATCHES, size=4), **options)


@pytest.mark.filterwarnings("ignore:.*makes no update")
@settings(max_examples=20, deadline=None, derandomize=True)
@example(PARADOX)
@given(chosen=configurations())
def test_counts_are_exact_and_masks_move_when_they_should(chosen: Setting) -> None:
    result = train(chosen)
    assert len(result.history) == BATCHES
    assert result.history[-1][1] == {name: int(m.sum()) for name, m in result.masks.items()}

    # Only the batches whose step is due may end with another mask than they began with.
    digests = [digest for digest, _ in result.history]
    due = {
        batch
        for batch in range(1, BATCHES)
        if _step_after(batch, chosen) in chosen.due
        and _step_after(batch, chosen) != _step_after(batch - 1, chosen)
    }
    moved = {batch for batch in range(1, BATCHES) if digests[batch] != digests[batch - 1]}
    assert moved <= due

    whole = [chosen.units(live) for _, live in result.history]
    pattern = isinstance(chosen.structure, NM)
    wanted = chosen.total // 2 if pattern else round(chosen.density * chosen.total)
    if chosen.method in ("GMP", "Magnitude"):
        totals = [sum(live.values()) for live in whole]
        assert totals == sorted(totals, reverse=True), "pruned weights do not come back"
        assert totals[-1] == wanted
        if chosen.method == "Magnitude":
            assert set(totals) <= {chosen.total, wanted}
    else:
        assert {sum(live.values()) for live in whole} == {wanted}
        assert all(live == whole[0] for live in whole), "per layer too"
    if pattern:
        for mask in result.masks.values():
            assert (chosen.structure.group(mask, Layout()).sum(1) == 2).all()  # type: ignore[attr-defined]


def _step_after(batch: int, chosen: Setting) -> int:
    """Real steps after the batch of this number, counted from 0."""
    done = (batch + 1) // chosen.accumulate
    last = batch + 1 == BATCHES and not chosen.two_optimizers
    return math.ceil((batch + 1) / chosen.accumulate) if last else done
