"""Selection against a plain stable sort, on data made to tie."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparsity.ops import pool
from lightning_sparsity.ops.packing import pack, unpack
from lightning_sparsity.ops.selection import Best, sample, top_k, top_k_counts, top_n_per_group

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0]),
    st.floats(-6e4, 6e4, allow_nan=False, width=16),
)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], int]:
    """Score tensors, their candidates, and how many to choose."""
    scores, candidates = [], []
    for length in draw(st.lists(st.integers(0, 12), min_size=1, max_size=4)):
        values = draw(st.lists(numbers, min_size=length, max_size=length))
        allowed = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        scores.append(torch.tensor(values, dtype=draw(st.sampled_from(DTYPES))))
        candidates.append(torch.tensor(allowed, dtype=torch.bool))
    total = int(sum(c.sum() for c in candidates))
    return scores, candidates, draw(st.integers(0, total))


def best(scores: Tensor, k: int, candidates: Tensor) -> Tensor:
    """The first ``k`` candidates of a stable descending sort."""
    order = scores.double().sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(candidates)
    chosen[order[candidates[order]][:k]] = True
    return chosen


@given(pools())
def test_top_k_is_a_stable_sort(pool: tuple[list[Tensor], list[Tensor], int]) -> None:
    scores, candidates, k = pool
    masks = top_k(scores, k, candidates)
    assert torch.equal(torch.cat(masks), best(torch.cat(scores), k, torch.cat(candidates)))
    assert top_k_counts(scores, k, candidates) == [int(mask.sum()) for mask in masks]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    distinct=st.sampled_from([1, 2, 5, 100, 10**6]),
    density=st.floats(0.1, 1.0),
    share=st.floats(0.0, 1.0),
    pieces=st.integers(1, 5),
)
def test_brackets_find_what_sorting_finds(
    seed: int, distinct: int, density: float, share: float, pieces: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(distinct, (6000,), generator=generator).float()
    candidates = torch.rand(6000, generator=generator) < density
    k = int(share * candidates.sum())
    few, chunk = pool._FEW, pool._CHUNK
    pool._FEW, pool._CHUNK = 8, {"cpu": 700}
    try:
        masks = top_k(scores.tensor_split(pieces), k, candidates.tensor_split(pieces))
    finally:
        pool._FEW, pool._CHUNK = few, chunk
    assert torch.equal(torch.cat(masks), best(scores, k, candidates))


@given(pools(), st.integers(1, 20))
def test_each_row_is_a_stable_sort(
    pool: tuple[list[Tensor], list[Tensor], int], width: int
) -> None:
    scores, candidates = torch.cat(pool[0]), torch.cat(pool[1])
    rows = len(scores) // width
    scores, candidates = (x[: rows * width].view(rows, width) for x in (scores, candidates))
    counts = torch.arange(rows) % (candidates.sum(1) + 1)
    mask = top_n_per_group(scores, counts, candidates)
    for row, count, allowed, chosen in zip(scores, counts, candidates, mask, strict=True):
        assert torch.equal(chosen, best(row, int(count), allowed))


@given(st.lists(st.booleans(), max_size=200), st.floats(0.0, 1.0), st.integers(0, 2**32), st.data())
def test_sample_draws_distinct_candidates(
    allowed: list[bool], share: float, seed: int, data: st.DataObject
) -> None:
    candidates = torch.tensor(allowed, dtype=torch.bool)
    k = round(share * int(candidates.sum()))
    mask = sample(candidates, k, torch.Generator().manual_seed(seed))
    assert int(mask.sum()) == k
    assert not bool((mask & ~candidates).any())
    # The ranks drawn do not depend on where the candidates lie.
    dense = torch.ones(int(candidates.sum()), dtype=torch.bool)
    again = sample(dense, k, torch.Generator().manual_seed(seed))
    assert torch.equal(mask[candidates], again)


@given(st.lists(st.booleans(), max_size=100))
def test_packing_is_lossless(entries: list[bool]) -> None:
    mask = torch.tensor(entries, dtype=torch.bool)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


@given(st.data())
def test_best_of_a_stream_is_the_top_k_of_all(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 4, (n,), generator=generator).float() for n in shapes]
    allowed = [torch.rand(n, generator=generator) < 0.7 for n in shapes]
    there = sum(int(mask.sum()) for mask in allowed)
    k = data.draw(st.integers(0, there))
    best = Best(k)
    for score, mask in zip(scores, allowed, strict=True):
        best.add(score, mask)
    for mine, whole in zip(best.masks(scores), top_k(scores, k, allowed), strict=True):
        assert torch.equal(mine, whole)
