"""Bad input: whatever is wrong is refused before the first step, and the error says what."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arguments import (
    ARGUMENTS,
    CONTRADICTIONS,
    MISFITS,
    PARTS,
    Kind,
    arguments,
    callbacks,
    entry,
    needed,
    parts,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import APART, METHODS

from lightning_sparsity import NM, StaticSparse
from lightning_sparsity.core.layer import call_of
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.distributions import per_layer
from lightning_sparsity.testing import TinyModel, fit

METHODS_OF_ALL = {**METHODS, **APART}
EVERY = [(name, argument) for name, kind in callbacks().items() for argument in arguments(kind)]
EVERY_PART = [(name, argument) for name, kind in parts().items() for argument in arguments(kind)]


def test_every_argument_has_an_entry_and_every_entry_an_argument() -> None:
    used = {entry(ARGUMENTS, name, argument) for name, argument in EVERY}
    assert used == set(ARGUMENTS)
    used = {entry(PARTS, name, argument) for name, argument in EVERY_PART}
    assert used == set(PARTS)


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_arguments_of_callbacks(name: str, argument: str) -> None:
    check(callbacks()[name], argument, ARGUMENTS[entry(ARGUMENTS, name, argument)])


@pytest.mark.parametrize(("name", "argument"), EVERY_PART)
def test_arguments_of_what_callbacks_are_given(name: str, argument: str) -> None:
    check(parts()[name], argument, PARTS[entry(PARTS, name, argument)].loosely())


@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, many in CONTRADICTIONS.items() for given in many]
)
def test_arguments_that_contradict_each_other(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b") as caught:
        ({**callbacks(), **parts()})[name](**given)
    said = str(caught.value)
    assert any(argument in said and repr(plain(value)) in said for argument, value in given.items())


MISFIT = [
    (name, argument)
    for name in [*METHODS_OF_ALL, "SparseCompute", "Powerpropagation"]
    for argument in MISFITS
    if argument in arguments(callbacks()[name])
]


@pytest.mark.parametrize(("name", "argument"), MISFIT)
def test_what_does_not_fit_the_model(name: str, argument: str) -> None:
    faults = []
    for value in MISFITS[argument]:
        faults += misfit(name, argument, value)
    assert not faults, "\n".join(faults)


def misfit(name: str, argument: str, value: Any) -> list[str]:
    """What is wrong with how a Trainer with a bad value starts."""

    class Steps(Callback):
        taken = 0

        def on_train_batch_start(self, *args: Any) -> None:
            self.taken += 1

    steps, models, before = Steps(), [], {}

    def make() -> TinyModel:
        model = TinyModel()
        models.append(model)
        before.update({key: tensor.clone() for key, tensor in model.state_dict().items()})
        before.update({f"class of {key}": type(m) for key, m in model.named_modules()})
        return model

    where = f"{value!r}:"
    try:
        fit([*method(name, argument, value), steps], make)
    except (TypeError, ValueError, MisconfigurationException) as caught:
        said = str(caught)
    except Exception as caught:
        return [f"{where} {type(caught).__name__}: {caught}"]
    else:
        return [f"{where} is taken"]
    faults = [f"{where} {steps.taken} steps"] if steps.taken else []
    for model in models:
        now = {**model.state_dict(), **{f"class of {k}": type(m) for k, m in model.named_modules()}}
        same = now.keys() == before.keys() and all(
            torch.equal(now[k], v) if isinstance(v, torch.Tensor) else now[k] is v
            for k, v in before.items()
        )
        faults += [] if same else [f"{where} the model is changed"]
    faults += [] if said.startswith(name) else [f"{where} the class not named: {said!r}"]
    shown = call_of(
        per_layer(value) if argument == "distribution" and isinstance(value, dict) else value
    )
    named = argument in said or shown in said
    return faults + ([] if named else [f"{where} neither argument nor value named: {said!r}"])


@pytest.mark.parametrize("name", METHODS_OF_ALL)
def test_numbers_of_numpy_train_as_those_of_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, given = callbacks()[name], {}
    plainly = kind.__init__

    def note(self: Any, *args: Any, **options: Any) -> None:
        if type(self) is kind and not given:
            bound = inspect.signature(plainly).bind(self, *args, **options)
            bound.apply_defaults()
            given.update(bound.arguments)
        plainly(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__init__", note)
        METHODS_OF_ALL[name](seed=7)
    given.pop("self")
    theirs = {argument: numpy_of(value) for argument, value in given.items()}
    assert sum(isinstance(value, np.generic) for value in theirs.values()) > 1
    ours = {argument: plain_of(value) for argument, value in theirs.items()}
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([kind(**theirs), saver], enable_checkpointing=True)
    result.assert_equal(fit([kind(**ours)]))
    torch.load(tmp_path / "end.ckpt", weights_only=True)  # refuses numbers of NumPy


def numpy_of(value: Any) -> Any:
    """The number, or the numbers in a tuple, as NumPy has them."""
    if isinstance(value, tuple):
        return tuple(map(numpy_of, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def plain_of(value: Any) -> Any:
    """The same number of Python."""
    return tuple(map(plain_of, value)) if isinstance(value, tuple) else plain(value)


def method(name: str, argument: str, value: Any) -> list[Callback]:
    """The callback with one argument, and who makes masks for it if it makes none."""
    if name in ("SparseCompute", "Powerpropagation"):
        return [StaticSparse(0.3), callbacks()[name](**{argument: value})]
    given = {"density": None} if isinstance(value, NM) and name in METHODS else {}
    return [METHODS_OF_ALL[name](**given, **{argument: value})]


def check(kind: Any, argument: str, allowed: Kind) -> None:
    """Try every value of the table."""
    given = needed(kind, argument)
    faults = []
    for value in allowed.good:
        try:
            kind(**{**given, argument: value})
        except (TypeError, ValueError) as error:
            faults.append(f"{value!r} is allowed: {error}")
    for value, error in allowed.bad:
        faults += fault(kind, argument, value, error, given)
    assert not faults, "\n".join(faults)


def fault(kind: Any, argument: str, value: Any, error: Any, given: dict[str, Any]) -> list[str]:
    """What is wrong with how ``value`` is refused."""
    try:
        kind(**{**given, argument: value})
    except (TypeError, ValueError) as caught:
        said = str(caught)
        if not isinstance(caught, error):
            return [f"{value!r}: {type(caught).__name__}, not {error}: {said}"]
        return [
            f"{value!r}: {lack} not named: {said!r}" for lack in lacks(said, kind, argument, value)
        ]
    except Exception as caught:
        return [f"{value!r}: {type(caught).__name__}: {caught}"]
    return [f"{value!r} is taken"]


def lacks(said: str, kind: Any, argument: str, value: Any) -> list[str]:
    """What a message does not say, of class, argument, value and what is allowed."""
    return [
        what
        for what, there in {
            "the class": said.startswith(kind.__name__),
            "the argument": re.search(rf"\b{argument}\b", said),
            "the value": any(
                text in said for text in (repr(value), repr(plain(value)), call_of(value))
            ),
            "what is allowed": re.search(r"\b(must|need(s|ed)?|leave|only|write|use|lies)\b", said),
        }.items()
        if not there
    ]
