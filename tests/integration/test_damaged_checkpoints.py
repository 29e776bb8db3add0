"""Checkpoints that are damaged or of another training: refused, and nothing half loaded."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparsity import (
    GMP,
    SET,
    OptG,
    RigL,
    Rows,
    SparseCompute,
    StaticSparse,
)
from lightning_sparsity.core.intact import Checked, check
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.ops.packing import pack
from lightning_sparsity.testing import Batch, Batches, ManualModel, TinyModel, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")

KEEPER = "MaskKeeper"


def rigl(density: float | None = 0.3, **options: Any) -> RigL:
    return RigL(density, update_interval=4, **options)


def optg() -> OptG:
    return OptG(0.3, alpha=1.0, update_interval=4)


class Evaluated(TinyModel):
    """With all four stages."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits: Tensor = self.net(batch[0])
        return logits


def save(path: Path, callbacks: Sequence[Callback], model: pl.LightningModule) -> Path:
    """Train for 12 of 24 steps."""
    trainer = quiet_trainer([*callbacks, Saving(path)])
    trainer.fit(model, Batches())
    return path


class Saving(Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step // len(trainer.optimizers) == 12:
            trainer.save_checkpoint(self._path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pl.seed_everything(3, verbose=False)
    return save(tmp_path_factory.mktemp("whole") / "whole.ckpt", [rigl()], Evaluated())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of learned masks."""
    pl.seed_everything(3, verbose=False)
    return save(tmp_path_factory.mktemp("other") / "other.ckpt", [optg()], Evaluated())


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Whether two nested values have the same bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def assert_nothing_is_left(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Raise ``AssertionError`` if anything of ours is still at work."""
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is None
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert {type(module) for module in model.net} == {type(m) for m in TinyModel().net}
    assert all(p.dim() != 1 for name, p in model.named_parameters() if "5.weight" in name)
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks


# ------------------------------------------------------------------------- damaged files


def storages(file: Path) -> dict[str, bytes]:
    """Bytes of a file that hold one thing each."""
    saved = torch.load(file, weights_only=True)
    kept = saved["callbacks"][KEEPER]["parameters"]["net.5.weight"]
    held = {
        "weight": saved["state_dict"]["net.5.weight"],
        "mask": kept["mask"],
        "optimizer state": saved["optimizer_states"][0]["state"][4]["momentum_buffer"],
        "random state": saved["callbacks"][KEEPER]["rng"]["torch"],
    }
    return {name: tensor.numpy().tobytes() for name, tensor in held.items()}


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("what", ["weight", "mask", "optimizer state", "random state"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_flipped_bit_is_refused_before_anything_is_loaded(
    file: Path, what: str, stage: str, tmp_path: Path
) -> None:
    data = file.read_bytes()
    place = data.index(storages(file)[what]) + 40
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(flipped(data, place))
    model = Evaluated()
    before = copied(model)
    trainer = quiet_trainer([rigl()])
    message = r"bad\.ckpt is damaged: archive/data/\d+ does not fit its checksum"
    with pytest.raises(RuntimeError, match=message):
        getattr(trainer, stage)(model, Batches(), ckpt_path=bad)
    assert same(before, copied(model))
    assert trainer.global_step == 0
    assert_nothing_is_left(trainer, model)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(file: Path, share: float, tmp_path: Path) -> None:
    data = file.read_bytes()
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(data[: int(share * len(data))])
    model = Evaluated()
    before = copied(model)
    trainer = quiet_trainer([rigl()])
    with pytest.raises(RuntimeError, match=r"bad\.ckpt is damaged: it cannot be read to its end"):
        trainer.fit(model, Batches(), ckpt_path=bad)
    assert same(before, copied(model))
    assert_nothing_is_left(trainer, model)


def test_no_flipped_bit_anywhere_changes_what_is_loaded(file: Path, tmp_path: Path) -> None:
    data, whole = file.read_bytes(), torch.load(file, weights_only=True)
    bad = tmp_path / "bad.ckpt"
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        bad.write_bytes(flipped(data, chance.randrange(len(data)), chance.randrange(8)))
        try:
            check(bad)
            assert same(torch.load(bad, weights_only=True), whole)  # in the padding
        except RuntimeError:
            refused += 1
    assert refused > 100


def test_a_broken_end_of_the_directory_is_refused_too(file: Path, tmp_path: Path) -> None:
    data, whole = file.read_bytes(), torch.load(file, weights_only=True)
    bad = tmp_path / "bad.ckpt"
    said = []
    for place in range(len(data) - 98, len(data)):  # zipfile reads less of it than torch
        bad.write_bytes(flipped(data, place))
        try:
            assert same(Checked(TorchCheckpointIO()).load_checkpoint(bad), whole)
        except RuntimeError as error:
            said.append(str(error))
    assert all("bad.ckpt is damaged: " in message for message in said)
    assert any("its directory is broken" in message for message in said)


def test_an_entry_that_torch_takes_for_a_folder_is_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/1"))
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(flipped(data, entry + 38, bit=4))
    torch.load(bad, weights_only=True)  # without a word, and what it gives is whatever was there
    with pytest.raises(RuntimeError, match=r"archive/data/\d+ is marked as a folder"):
        check(bad)


def test_other_errors_in_loading_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        quiet_trainer([rigl()]).fit(Evaluated(), Batches(), ckpt_path=tmp_path / "none.ckpt")
    torch.save({"state_dict": print}, tmp_path / "code.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        quiet_trainer([rigl()]).fit(Evaluated(), Batches(), ckpt_path=tmp_path / "code.ckpt")


@pytest.mark.parametrize("how", ["without checksums", "in the old format"])
def test_files_that_cannot_be_checked_pass(file: Path, how: str, tmp_path: Path) -> None:
    path = tmp_path / "unchecked.ckpt"
    saved = torch.load(file, weights_only=True)
    torch.serialization.set_crc32_options(how != "without checksums")
    try:
        torch.save(saved, path, _use_new_zipfile_serialization=how != "in the old format")
    finally:
        torch.serialization.set_crc32_options(True)
    trainer = quiet_trainer([rigl()])
    trainer.fit(Evaluated(), Batches(), ckpt_path=path)
    assert trainer.global_step == 24


class Counting(TorchCheckpointIO):
    """A user's own."""

    loads = 0

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.loads += 1
        return super().load_checkpoint(*args, **kwargs)


def test_what_a_user_loads_with_still_loads(file: Path, tmp_path: Path) -> None:
    own = Counting()
    trainer = quiet_trainer([rigl()], plugins=[own])
    trainer.fit(Evaluated(), Batches(), ckpt_path=file)
    assert own.loads == 1
    assert trainer.strategy.checkpoint_io is own
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").is_file()


def test_after_a_refused_file_the_one_before_resumes(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(file.read_bytes()[:-1])
    ends = []
    for tries in ([file], [bad, file]):
        pl.seed_everything(5, verbose=False)
        model, trainer = Evaluated(), quiet_trainer([rigl()])
        for path in tries:
            try:
                trainer.fit(model, Batches(), ckpt_path=path)
            except RuntimeError:
                assert path == bad
        ends.append(copied(model))
    assert trainer.global_step == 24
    assert same(*ends)


# ---------------------------------------------------------------- files of other trainings

REFUSED: dict[str, tuple[Callable[[], list[Callback]], str]] = {
    "density": (lambda: [rigl(0.2)], r"'RigL\(density=0.3\)'\] in the checkpoint.*density=0.2"),
    "method": (lambda: [SET(0.3)], r"'RigL\(density=0.3\)'\] in the checkpoint.*'SET\("),
    "ramp": (lambda: [GMP(0.3, update_interval=4)], r"in the checkpoint, \['GMP\("),
    "learned": (lambda: [optg()], r"in the checkpoint, \['OptG\("),
    "one more": (lambda: [StaticSparse(0.3), rigl(None)], r"'StaticSparse\(density=0.3\)', 'RigL'"),
    "structure": (lambda: [rigl(structure=Rows())], r"net\.5\.weight: .*Unstructured\(\).*Rows"),
    "parameters": (
        lambda: [rigl(exclude=("net.7.weight",))],
        r"net\.7\.weight: \(4, 16\) Unstructured\(\) in the checkpoint, absent now",
    ),
    "compressed": (lambda: [rigl(0.2), SparseCompute("csr")], r"density=0.3.*density=0.2"),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_a_file_of_another_training_is_refused(file: Path, which: str) -> None:
    make, message = REFUSED[which]
    model = Evaluated()
    trainer = quiet_trainer(make())
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, Batches(), ckpt_path=file)
    # Lightning loads weights before it says what made them; the error says so
    assert same(copied(model), torch.load(file, weights_only=True)["state_dict"])
    assert trainer.global_step == 0
    assert_nothing_is_left(trainer, model)


@pytest.mark.parametrize("which", list(REFUSED))
def test_a_refused_file_leaves_nothing_but_weights_behind(file: Path, which: str) -> None:
    ends = []
    for refused in (True, False):
        model, callbacks = Evaluated(), REFUSED[which][0]()
        if refused:
            with pytest.raises(MisconfigurationException):
                quiet_trainer(callbacks).fit(model, Batches(), ckpt_path=file)
        else:
            model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        pl.seed_everything(5, verbose=False)
        quiet_trainer(callbacks).fit(model, Batches())
        ends.append(copied(model))
    assert same(*ends)


def test_a_file_of_one_optimizer_is_refused_by_two(file: Path) -> None:
    with pytest.raises(MisconfigurationException, match="optimizers: 1 in the checkpoint, 2 now"):
        quiet_trainer([rigl()]).fit(ManualModel(), Batches(), ckpt_path=file)


def test_a_learned_file_is_refused_in_place(other: Path) -> None:
    model = Evaluated()
    trainer = quiet_trainer([rigl()])
    with pytest.raises(MisconfigurationException, match=r"'OptG\(density=0.3\)'.*'RigL\("):
        trainer.fit(model, Batches(), ckpt_path=other)
    assert same(copied(model), torch.load(other, weights_only=True)["state_dict"])


def test_a_file_of_another_model_is_refused_by_lightning(file: Path) -> None:
    model = TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Linear(16, 4)))
    trainer = quiet_trainer([rigl()])
    with pytest.raises(RuntimeError, match="Error.s. in loading state_dict"):
        trainer.fit(model, Batches(), ckpt_path=file)
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is None
    assert not keeper.state_dict()


def test_a_state_of_another_version_is_refused(file: Path, tmp_path: Path) -> None:
    saved = torch.load(file, weights_only=True)
    saved["callbacks"][KEEPER] = {"version": 2, "parameters": "in another form"}
    torch.save(saved, tmp_path / "later.ckpt")
    with pytest.raises(MisconfigurationException, match="version 2 in the checkpoint, 1 now"):
        quiet_trainer([rigl()]).fit(Evaluated(), Batches(), ckpt_path=tmp_path / "later.ckpt")


def test_a_mask_that_does_not_fit_is_refused_before_any_is_set(file: Path, tmp_path: Path) -> None:
    saved = torch.load(file, weights_only=True)
    kept = saved["callbacks"][KEEPER]["parameters"]["net.7.weight"]
    kept["mask"] = pack(torch.ones(3, dtype=torch.bool))
    torch.save(saved, tmp_path / "edited.ckpt")
    with pytest.raises(MisconfigurationException, match=r"net\.7\.weight: .*1 bytes.*8"):
        quiet_trainer([rigl()]).fit(Evaluated(), Batches(), ckpt_path=tmp_path / "edited.ckpt")


ACCEPTED: dict[str, Callable[[], list[Callback]]] = {
    "other storage": lambda: [rigl(), SparseCompute("csr")],
    "other interval": lambda: [RigL(0.3, update_interval=2)],
    "no callbacks": list,
}


@pytest.mark.parametrize("which", list(ACCEPTED))
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_what_may_differ(file: Path, which: str) -> None:
    trainer = quiet_trainer(ACCEPTED[which]())
    trainer.fit(Evaluated(), Batches(), ckpt_path=file)
    assert trainer.global_step == 24


def test_a_dense_file_begins_a_sparse_training(tmp_path: Path) -> None:
    dense = save(tmp_path / "dense.ckpt", [], Evaluated())
    model, trainer = Evaluated(), quiet_trainer([rigl()])
    trainer.fit(model, Batches(), ckpt_path=dense)
    assert sum(int((model.net[i].weight != 0).sum()) for i in (0, 5, 7)) <= round(0.3 * 2184)


# ------------------------------------------------------------------------ only evaluating

WATCHING: dict[str, Callable[[], list[Callback]]] = {
    "the same": lambda: [rigl()],
    "another density": lambda: [rigl(0.2)],
    "learned": lambda: [optg()],
    "compressed": lambda: [rigl(), SparseCompute("csr")],
}


@pytest.mark.parametrize("which", list(WATCHING))
@pytest.mark.parametrize("learned", [False, True], ids=["in place", "learned file"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_file_is_evaluated_as_it_is_whatever_callbacks_are_there(
    file: Path, other: Path, learned: bool, stage: str, which: str
) -> None:
    path = other if learned else file
    found = []
    for make in (list, WATCHING[which]):
        model, trainer = Evaluated(), quiet_trainer(make())
        found.append(getattr(trainer, stage)(model, Batches(), ckpt_path=path))
        assert same(copied(model), torch.load(path, weights_only=True)["state_dict"])
    assert same(*found)
    assert_nothing_is_left(trainer, model)
