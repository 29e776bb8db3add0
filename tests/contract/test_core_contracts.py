"""The five core contracts, over every public mask method."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from doubles import assert_close, double, doubles
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import (
    APART,
    END_DENSE,
    FULL_MATRIX,
    IN_PLACE,
    INITIAL,
    LINEAR_ONLY,
    METHODS,
    MOVE_BETWEEN_LAYERS,
    SINGLE_WEIGHTS,
    UPDATERS,
    expected_live,
    made,
    public_callbacks,
    public_methods,
    stored,
)

from lightning_sparsity import NM, Block, Columns, Rows, StaticSparse
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Result, TinyModel, fit, tiny_net

STRUCTURES = {
    "rows": Rows(),
    "columns": Columns(),
    "block": Block(2, 4),
    "nm": NM(1, 4),
}


def test_the_table_is_complete() -> None:
    # Powerpropagation makes no masks; it has tests of its own.
    assert set(METHODS) | set(APART) == public_methods() - {"Powerpropagation"}
    # These two have contracts of their own, in tests/integration.
    assert public_callbacks() == public_methods() | {
        "MaskCallback",
        "LearnedMask",
        "DensityMonitor",
        "SparseCompute",
    }
    assert set(FULL_MATRIX) <= set(UPDATERS) < set(METHODS)


# 1. exact budget ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "storage", "density"),
    [
        pytest.param(*case.values, density, id=f"{case.id}-{density}")
        for case in stored(METHODS)
        for density in ([0.013, 0.1, 0.5, 0.9] if "dense" in case.values else [0.013])
    ],
)
def test_budget_is_exact(name: str, storage: str, density: float) -> None:
    if name == "SNAPit" and density < 0.1:  # three layers cannot live on one neuron
        with pytest.raises(ValueError, match="^SNAPit: 0 live units are too few for 3 layers"):
            fit(made(name, storage, density))
        return
    result = fit(made(name, storage, density))
    numel = sum(mask.numel() for mask in result.masks.values())
    assert numel == 8 * 9 * (name not in LINEAR_ONLY) + 128 * 16 + 16 * 4
    assert result.live == expected_live(name, density, result.masks)
    if name not in (
        "GMP",
        "GSM",
        "Magnitude",
        "ACDC",
        "NeST",
        "SRigL",
        "GraNet",
        "LotteryTicket",
        "DSD",
        "IHT",
        "OptG",
        "DPF",
        "MovementPruning",
    ):  # their density changes on the way
        assert {sum(live.values()) for _, live in result.history} == {result.live}
        assert name in MOVE_BETWEEN_LAYERS or len(_counts(result)) == 1


@pytest.mark.parametrize("density", [0.013, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", END_DENSE)
def test_budget_is_exact_before_the_dense_end(name: str, density: float) -> None:
    result = fit([METHODS[name](density)])
    numel = sum(mask.numel() for mask in result.masks.values())
    totals = {sum(live.values()) for _, live in result.history}
    assert totals == {numel, round(density * numel)}


def _counts(result: Result) -> set[tuple[int, ...]]:
    return {tuple(live.values()) for _, live in result.history}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_methods_never_update(name: str) -> None:
    assert fit([METHODS[name]()]).changes == 0


@pytest.mark.parametrize("name", UPDATERS)
def test_updates_happen(name: str) -> None:
    result = fit([METHODS[name]()])
    updates = {
        "RigL": 4,
        "SRigL": 4,
        "GSE": 3,
        "GMP": 5,
        "GSM": 1,
        "Magnitude": 1,
        "MEST": 4,
        "ACDC": 3,
        "NeST": 5,
        "DeepR": 22,
        "DSR": 5,
        "IHT": 5,
        "GraNet": 5,
        "OptG": 4,
        "DNW": 22,
        "SRSTE": 22,
        "TopKAST": 22,
        "DPF": 6,
        "EdgePopup": 4,
        "MovementPruning": 5,
    }  # the others: by epoch
    assert result.changes == updates.get(name, 2)


@pytest.mark.parametrize("name", SINGLE_WEIGHTS)
def test_structures_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\(structure=Rows\(\)\): .*single weights only"):
        METHODS[name](0.5, structure=Rows())
    with pytest.raises(ValueError, match=rf"^{name}: net.*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), METHODS[name](None)])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in (*SINGLE_WEIGHTS, *END_DENSE)]
)
def test_budget_is_exact_in_units(name: str, structure: str) -> None:
    unit = STRUCTURES[structure]
    density = None if isinstance(unit, NM) else 0.5
    # N:M and blocks run along inputs: the first convolution has one channel only
    extra: dict[str, Any] = {"exclude": "net.0"} if structure in ("nm", "block") else {}
    result = fit([METHODS[name](density, structure=unit, **extra)])
    counts = {}
    units = 0
    for key, mask in result.masks.items():
        whole = unit.live(mask, _layout())
        assert torch.equal(unit.expand(whole, tuple(mask.shape), _layout()), mask)
        counts[key] = int(whole.sum())
        units += whole.numel()
    if isinstance(unit, NM):
        for mask in result.masks.values():
            assert (unit.group(mask, _layout()).sum(1) == 1).all()
    else:
        assert sum(counts.values()) == round(0.5 * units)


def _layout() -> Any:
    from lightning_sparsity.structures import Layout

    return Layout()


# 2. zero off the mask: the probe inside ``fit`` checks it after every batch ---------


@pytest.mark.parametrize(("name", "storage"), stored(METHODS))
def test_saved_file_is_plain_and_zero_off_the_mask(name: str, storage: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([*made(name, storage), saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    bare = TinyModel()
    bare.load_state_dict(file["state_dict"], strict=True)
    bare.configure_optimizers().load_state_dict(file["optimizer_states"][0])
    momenta = [state["momentum_buffer"] for state in file["optimizer_states"][0]["state"].values()]
    stepped = [p for p in bare.parameters() if p.requires_grad]
    if name != "EdgePopup":  # its weights are never stepped
        assert [m.shape for m in momenta if m is not None] == [p.shape for p in stepped]
    assert list(file["state_dict"]) == list(TinyModel().state_dict())
    zeros = 0
    for key, mask in result.masks.items():
        assert not file["state_dict"][key][~mask].any()
        zeros += int((~mask).sum())
    assert (zeros > 0) == (name not in END_DENSE)
    moved = TinyModel.load_from_checkpoint(tmp_path / "end.ckpt")
    for key, mask in result.masks.items():
        assert not moved.state_dict()[key][~mask].any()


# 3. bit-exact resume --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("name", "storage", "step"),
    [
        pytest.param(*case.values, step, id=f"{case.id}-{step}")
        for case in stored(METHODS)
        # the end of an epoch, mid-epoch, the end of one
        for step in ([8, 12, 16] if "dense" in case.values else [8, 12])
    ],
)
def test_resume_equals_not_stopping(name: str, storage: str, step: int, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([*made(name, storage), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    # another seed: nothing may depend on where the second process starts
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert len(rest.history) == 24 - step
    assert rest.history == whole.history[step:]


# 4. density 1 is no callback ------------------------------------------------------


# A method that ends with another density, or with another learning rate, is told not to.
AT_ONE: dict[str, dict[str, Any]] = {
    "LotteryTicket": {"treatment": "fine_tune"},  # nothing goes back
    "DSD": {"lr_factor": 1.0},  # nor does the learning rate fall
}


@pytest.mark.parametrize("name", METHODS)
def test_density_one_is_bit_identical_to_no_callback(name: str) -> None:
    if name == "EdgePopup":  # its weights never move
        result = fit([METHODS[name](1.0, update_end=1.0)])
        pl.seed_everything(3, verbose=False)
        begun = TinyModel().state_dict()
        assert all(torch.equal(result.weights[key], begun[key]) for key in result.masks)
        return
    with_callback = fit([METHODS[name](1.0, **AT_ONE.get(name, {}))])
    without = fit([])
    assert all(mask.all() for mask in with_callback.masks.values())
    with_callback.masks = {}
    with_callback.assert_equal(without)


@pytest.mark.parametrize("name", IN_PLACE)
def test_density_one_is_no_callback_up_to_rounding_if_compressed(name: str) -> None:
    # products with compressed weights add numbers in another order
    with_callback = fit(made(name, "csr", 1.0, **AT_ONE.get(name, {})), double, data=doubles())
    assert all(mask.all() for mask in with_callback.masks.values())
    assert_close(with_callback, _without(), 1e-11)


@functools.cache
def _without() -> Result:
    return fit([], double, data=doubles())


# 5. bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("density", "error"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (1.5, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        ([0.1], TypeError),
    ],
)
def test_bad_density(name: str, density: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\(density=.*density"):
        METHODS[name](density)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"include": "net.9"}, ValueError, r"include='net.9' names no parameter"),
        ({"include": "nothing.*"}, ValueError, r"include='nothing\.\*' names no parameter"),
        ({"exclude": "net.99"}, ValueError, r"exclude='net.99' names no parameter"),
        ({"include": lambda candidate: False}, ValueError, "leaves no parameter"),
        ({"exclude": "*"}, ValueError, "leaves no parameter"),
        ({"include": 3}, TypeError, "must be a parameter name"),
        ({"structure": Block(3, 3)}, ValueError, r"net.0.weight: Block\(.*does not divide"),
        ({"distribution": {"net.0": 0.1}}, ValueError, "net.5.weight"),
    ],
)
def test_what_does_not_fit_the_model(
    name: str, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    if name in SINGLE_WEIGHTS and "structure" in bad:
        message = "single weights only"
    with pytest.raises(error, match=message) as caught:
        fit([METHODS[name](0.5, **bad)])
    assert str(caught.value).startswith(name) or "distribution" in bad


@pytest.mark.parametrize(("name", "storage"), stored(METHODS, ["RigL", "SNIP"]))
def test_a_failed_start_leaves_the_model_as_it_was(name: str, storage: str) -> None:
    torch.manual_seed(3)
    models = []

    def make() -> TinyModel:
        models.append(TinyModel(tiny_net()))
        return models[-1]

    with pytest.raises(ValueError, match="names no parameter"):
        fit(made(name, storage, include="nothing"), make)
    untouched = fit([], max_epochs=0)
    for key, value in models[-1].state_dict().items():
        assert torch.equal(value, untouched.model.state_dict()[key])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"structure": "rows"}, TypeError, "structure"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"distribution": 3}, TypeError, "distribution"),
        ({"structure": NM(2, 4)}, ValueError, "pattern fixes"),
    ],
)
def test_bad_arguments(
    name: str, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    if name in SINGLE_WEIGHTS and error is ValueError:
        message = "single weights only"
    with pytest.raises(error, match=rf"^{name}.*{message}"):
        METHODS[name](0.3, **bad)


@pytest.mark.parametrize("name", FULL_MATRIX)
@pytest.mark.parametrize(
    "bad",
    [
        {"update_interval": 0},
        {"update_interval": -5},
        {"update_interval": 2.5},
        {"update_interval": "step"},
        {"update_start": -1},
        {"update_start": 1.5},
        {"update_end": math.nan},
        {"update_end": 1},
        {"update_end": 0.1, "update_start": 0.5},
        {"update_end": "end"},
    ],
)
def test_bad_windows(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: update_"):
        METHODS[name](**bad)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "StaticSparse"])
def test_density_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}\(density=None\).*density=0.1"):
        fit([METHODS[name](None)])


def test_keeper_is_last_and_single() -> None:
    result = fit([METHODS["RigL"](include="net.5"), METHODS["SET"](include="net.7")])
    keepers = [c for c in result.trainer.callbacks if isinstance(c, MaskKeeper)]
    assert len(keepers) == 1
    assert result.trainer.callbacks[-1] is keepers[0]
    assert keepers[0].masks is None, "nothing of ours is left after fit"
