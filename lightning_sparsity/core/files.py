"""Files: written whole or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def whole(path: Path, here: bool = True) -> Iterator[Path]:
    """Give a path to write to; what is there in the end takes the place of ``path``.

    A program that dies on the way leaves ``path`` as it was.

    Args:
        path: Of the finished file.
        here: Whether this process is the one of several that writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    yield unfinished
    if not here:
        return
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def save(value: Any, path: Path) -> None:
    """``torch.save``, whole or not at all."""
    with whole(path) as unfinished:
        torch.save(value, unfinished)


def is_whole(path: Path) -> bool:
    """Whether ``torch.save`` has written a file to its end: cut short, it has no directory."""
    return path.is_file() and zipfile.is_zipfile(path)
