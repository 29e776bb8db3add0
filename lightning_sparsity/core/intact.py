"""Intact: damaged checkpoints are refused before anything of them is loaded.

``torch.save`` writes a zip archive with a CRC-32 of every tensor and of all else, but
``torch.load`` does not look at them: a flipped bit in a weight or a mask goes unnoticed.
A folder of ``torch.distributed.checkpoint`` has such an archive for every tensor.
"""

from __future__ import annotations

import zipfile
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sparsity.ops.ranks import gather_from_ranks

_FOLDER = 0x10
"""The attribute of a folder: torch reads nothing from such an entry, and does not say so."""


def check(path: Path) -> None:
    """Raise if a file that ``torch.save`` has written is not as it was.

    It is read once, at some GB/s. Files in the format of torch before 1.6, and those written
    without checksums (``torch.serialization.set_crc32_options(False)``), pass unread.

    Args:
        path: Of a local file.

    Raises:
        RuntimeError: If the file is empty, cut short, or a checksum does not fit.
    """
    if damage := _damage_of(path):
        raise _refused(path, damage)


def check_together(path: Path) -> None:
    """As :func:`check`, of a file or of a folder with parts; each process reads its share.

    Args:
        path: Of what all processes are about to load.

    Raises:
        RuntimeError: On every process, if anything is damaged.
    """
    found: list[str | None] = gather_from_ranks(lambda: _first_damage(path, *_place()))
    for damage in found or [_first_damage(path, 0, 1)]:
        if damage:
            raise _refused(path, damage)


def _first_damage(path: Path, rank: int, world: int) -> str | None:
    """What is wrong with those archives in a file or folder that it is this process's to read."""
    if path.is_file():
        return _damage_of(path) if rank == 0 else None
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not (path / ".metadata").is_file():
        return None  # no checkpoint: whoever loads it will say so
    try:
        entries = FileSystemReader(path).read_metadata().storage_data.values()
    except Exception as error:  # it is a pickle
        return f".metadata cannot be read ({error})"
    for entry in sorted(entries, key=lambda e: (e.relative_path, e.offset))[rank::world]:
        try:
            with (path / entry.relative_path).open("rb") as file:
                file.seek(entry.offset)
                damage = _damage(BytesIO(file.read(entry.length)))
        except OSError as error:
            damage = f"it cannot be opened ({error})"
        if damage:
            return f"{entry.relative_path}: {damage}"
    meta = path / "meta.pt"
    damage = _damage(meta) if rank == 0 and meta.is_file() else None
    return damage and f"meta.pt: {damage}"


def _load_together(strategy: Any, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Check a local checkpoint, then load it as the class of the strategy does."""
    path = strategy.broadcast(path)
    if Path(path).exists():
        check_together(Path(path))
    loaded: dict[str, Any] = type(strategy).load_checkpoint(strategy, path, *args, **kwargs)
    return loaded


def _place() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _refused(path: Path, damage: str) -> RuntimeError:
    return RuntimeError(
        f"{path} is damaged: {damage}. Nothing of it was loaded. Resume from an earlier checkpoint."
    )


def _damage_of(path: Path) -> str | None:
    """What is wrong with a file, if it is an archive."""
    with path.open("rb") as file:
        begins_as_archive = b"PK\x03\x04".startswith(file.read(4))
    return _damage(path) if begins_as_archive or zipfile.is_zipfile(path) else None


def _damage(file: Path | BytesIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):
                return None
            folders = [entry.filename for entry in entries if entry.external_attr & _FOLDER]
            wrong = archive.testzip()
    except Exception as error:  # zipfile trips over bad bytes in many ways
        return f"it cannot be read to its end ({error})"
    if folders:
        return f"{folders[0]} is marked as a folder"
    return wrong and f"{wrong} does not fit its checksum"


class Checked(CheckpointIO):
    """Loads only intact files; saves as before.

    Args:
        inner: What loads and saves.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    @classmethod
    def add(cls, trainer: pl.Trainer) -> None:
        """Let a Trainer check what it loads."""
        strategy = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):  # it loads past its checkpoint_io
            vars(strategy).setdefault("load_checkpoint", partial(_load_together, strategy))
            return
        inner = trainer.strategy.checkpoint_io
        if not isinstance(inner, cls):
            with suppress(TypeError):  # strategies for TPUs take only their own
                trainer.strategy.checkpoint_io = cls(inner)

    @classmethod
    def remove(cls, trainer: pl.Trainer) -> None:
        """Give the Trainer back what it had."""
        vars(trainer.strategy).pop("load_checkpoint", None)
        if isinstance(checked := trainer.strategy.checkpoint_io, cls):
            trainer.strategy.checkpoint_io = checked.inner

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check a local file, then load it.

        Raises:
            RuntimeError: If it is damaged.
        """
        if Path(path).is_file():
            check(Path(path))
        try:
            return self.inner.load_checkpoint(path, *args, **kwargs)
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):
                raise
            raise _refused(path, "its directory is broken") from error  # zipfile reads less of it

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As without it."""
        self.inner.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As without it."""
        self.inner.remove_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """As without it."""
        self.inner.teardown()
