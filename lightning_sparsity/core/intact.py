"""Intact: damaged checkpoints are refused before anything of them is loaded.

``torch.save`` writes a zip archive with a CRC-32 of every tensor and of all else, but
``torch.load`` does not look at them: a flipped bit in a weight or a mask goes unnoticed.
"""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import CheckpointIO

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
    with path.open("rb") as file:
        begins_as_archive = b"PK\x03\x04".startswith(file.read(4))
    if not (begins_as_archive or zipfile.is_zipfile(path)):
        return
    if damage := _damage(path):
        raise _refused(path, damage)


def _refused(path: Path, damage: str) -> RuntimeError:
    return RuntimeError(
        f"{path} is damaged: {damage}. Nothing of it was loaded. Resume from an earlier checkpoint."
    )


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
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
        inner = trainer.strategy.checkpoint_io
        if not isinstance(inner, cls):
            with suppress(TypeError):  # strategies for TPUs take only their own
                trainer.strategy.checkpoint_io = cls(inner)

    @classmethod
    def remove(cls, trainer: pl.Trainer) -> None:
        """Give the Trainer back what it had."""
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
