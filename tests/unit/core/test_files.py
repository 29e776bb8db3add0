"""Files: whole or not at all."""

from pathlib import Path

import pytest
import torch

from lightning_sparsity.core.files import is_whole, save, whole


def test_a_file_takes_the_place_of_another_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with whole(path) as unfinished:
        unfinished.write_text("old")
    with whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_who_dies_on_the_way_leaves_what_there_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def die() -> None:
        with whole(path) as unfinished:
            unfinished.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        die()
    assert path.read_text() == "old"


def test_another_process_writes(tmp_path: Path) -> None:
    with whole(tmp_path / "file", here=False):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 30, 1000, 4000])
def test_a_file_cut_short_is_not_whole(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    assert not is_whole(path)
    save({"a": torch.zeros(1000)}, path)
    assert is_whole(path)
    assert torch.load(path, weights_only=True)["a"].shape == (1000,)
    path.write_bytes(path.read_bytes()[:-cut])
    assert not is_whole(path)
