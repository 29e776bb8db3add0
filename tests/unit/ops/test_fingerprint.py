"""Fingerprints of masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparsity.ops import fingerprint as module
from lightning_sparsity.ops.fingerprint import fingerprint


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 39))
def test_one_flipped_entry_changes_it(entries: list[bool], place: int) -> None:
    mask = torch.tensor(entries, dtype=torch.bool)
    other = mask.clone()
    if place < len(mask):
        other[place] = ~other[place]
        assert fingerprint(mask) != fingerprint(other)
    assert fingerprint(mask) == fingerprint(mask.clone())


def test_all_masks_of_two_words_differ() -> None:
    found = set()
    for number in range(2**12):
        mask = torch.tensor([bool(number >> bit & 1) for bit in range(12)])
        found.add(fingerprint(mask))
    assert len(found) == 2**12


def test_moved_entries_and_lengths_count() -> None:
    mask = torch.zeros(64, dtype=torch.bool)
    mask[3] = True
    assert fingerprint(mask) != fingerprint(mask.roll(8))
    assert fingerprint(mask) != fingerprint(mask.roll(16))
    assert fingerprint(mask[:32]) != fingerprint(mask)
    assert fingerprint(torch.zeros(0, dtype=torch.bool)) == 0


def test_chunks_and_memory_formats_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(37, 53) < 0.3
    whole = fingerprint(mask)
    assert fingerprint(mask.t().contiguous().t()) == whole
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert fingerprint(mask) == whole


def test_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32; torch\.bool is needed"):
        fingerprint(torch.zeros(3))
