"""Every way of stepping: the full matrix for some methods, all pairs for the rest.

The probe inside ``fit`` checks weights and optimizer state after every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import FULL_MATRIX, INITIAL, METHODS, expected_live, made, stored
from optimizers import OPTIMIZERS, Smearing
from torch import Tensor

from lightning_sparsity.testing import Batch, ManualModel, TinyModel, fit

AUTOMATIC: dict[str, list[Any]] = {
    "optimizer": list(OPTIMIZERS),
    "weight_decay": [0.0, 0.01],
    "clip": [None, "norm", "value"],
    "accumulate": [1, 3],
    "precision": ["32-true", "bf16-mixed", "scaler"],
}
MANUAL: dict[str, list[Any]] = {
    "optimizer": list(OPTIMIZERS),
    "weight_decay": [0.0, 0.01],
    "accumulate": [1, 3],
    "way": ["32-true", "bf16-mixed", "scaler", "raw"],
}
COMPRESSED = ["RigL"]


def pairwise(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of two axes occurs."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    missing = {pair for row in rows for pair in pairs(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & set(pairs(row))))
        chosen.append(best)
        missing -= set(pairs(best))
    return chosen


def pairs(row: dict[str, Any]) -> Iterator[Any]:
    """All pairs of (axis, value) in a combination."""
    return itertools.combinations(row.items(), 2)


def table(axes: dict[str, list[Any]]) -> list[Any]:
    """Method, storage and combination, as pytest parameters."""
    full = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    few = pairwise(axes)
    rows = [
        pytest.param(*case.values, row, id="-".join([str(case.id), *map(str, row.values())]))
        for case in stored(METHODS, COMPRESSED)
        for row in (full if case.values[0] in FULL_MATRIX else few)
    ]
    return [row for row in rows if "dense" in row.values or row.values[2]["optimizer"] != "unknown"]


# A method made for SGD says so, and works.
OTHER_OPTIMIZERS = pytest.mark.filterwarnings("ignore:GSM. weights are stepped by")


class Overflowing(TinyModel):
    """One batch whose gradients overflow, so that a GradScaler skips the step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * float("inf") if self.trainer.current_epoch == 1 and batch_idx == 5 else loss


class ManualOverflowing(ManualModel):
    """The same under manual optimization."""

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        bad = self.trainer.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 5
        return loss * float("inf") if bad else loss


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


def test_pairwise_covers_all_pairs() -> None:
    rows = pairwise(AUTOMATIC)
    for (a, av), (b, bv) in itertools.combinations(AUTOMATIC.items(), 2):
        for x, y in itertools.product(av, bv):
            assert any(row[a] == x and row[b] == y for row in rows)
    assert len(rows) < 30


@OTHER_OPTIMIZERS
@pytest.mark.parametrize(("name", "storage", "row"), table(AUTOMATIC))
def test_automatic(name: str, storage: str, row: dict[str, Any]) -> None:
    make = partial(OPTIMIZERS[row["optimizer"]], weight_decay=row["weight_decay"])
    overflows = row["precision"] == "scaler"
    options: dict[str, Any] = {"accumulate_grad_batches": row["accumulate"]}
    options |= {"plugins": [scaler()]} if overflows else {"precision": row["precision"]}
    if row["clip"]:
        options |= {"gradient_clip_val": 0.5, "gradient_clip_algorithm": row["clip"]}
    kind = Overflowing if overflows else TinyModel
    result = fit(made(name, storage), lambda: kind(optimizer=make), **options)
    check(name, result)


@OTHER_OPTIMIZERS
@pytest.mark.parametrize(("name", "storage", "row"), table(MANUAL))
def test_manual(name: str, storage: str, row: dict[str, Any]) -> None:
    make = partial(OPTIMIZERS[row["optimizer"]], weight_decay=row["weight_decay"])
    overflows = row["way"] == "scaler"
    kind = ManualOverflowing if overflows else ManualModel
    options: dict[str, Any] = {}
    if overflows:
        options["plugins"] = [scaler()]
    elif row["way"] == "bf16-mixed":
        options["precision"] = "bf16-mixed"
    # Lightning cannot know how often manual optimization steps, so windows are in steps
    window: dict[str, Any] = {"Magnitude": {"at": 3}, "GSM": {"update_end": 6}}.get(name, {})
    if name == "DSD":
        window = {"update_start": 2, "update_end": 6}
    if name in (
        "RigL",
        "SRigL",
        "ACDC",
        "NeST",
        "GMP",
        "GraNet",
        "IHT",
        "OptG",
        "DPF",
        "MovementPruning",
    ):
        window = {"update_end": 6, "update_interval": 2}
    result = fit(
        made(name, storage, **window),
        lambda: kind(optimizer=make, raw=row["way"] == "raw", accumulate=row["accumulate"]),
        **options,
    )
    check(name, result, parts=[["net.0.weight"], ["net.5.weight", "net.7.weight"]])


@pytest.mark.parametrize("kind", [TinyModel, ManualModel])
def test_an_optimizer_that_reads_shapes_is_refused_compressed_weights(kind: Any) -> None:
    with pytest.raises(MisconfigurationException, match="Smearing steps net.0.weight, and it is"):
        fit(made("RigL", "csr"), lambda: kind(optimizer=Smearing))


def check(name: str, result: Any, parts: Any = None) -> None:
    assert result.live == expected_live(name, 0.3, result.masks, parts)
    assert all(torch.isfinite(value).all() for value in result.weights.values())
    assert (result.changes > 0) == (name not in INITIAL)
