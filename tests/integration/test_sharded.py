"""Tensors in parts on several processes: the choices, draws and numbers of whole ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_sparsity.ops.selection import (
    Best,
    NonFiniteScoreError,
    sample,
    top_k,
    top_k_counts,
)
from lightning_sparsity.ops.sharded import Sharded, Split

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

CASES = 60


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
def test_parts_are_chosen_as_the_whole(mesh: tuple[int, ...], tmp_path: Path) -> None:
    mp.spawn(work, (mesh, tmp_path), nprocs=math.prod(mesh))


def work(rank: int, shape: tuple[int, ...], folder: Path) -> None:
    """All checks, in one of the processes."""
    torch.set_num_threads(1)
    world = math.prod(shape)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", shape)
    pick, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(CASES):
        Case(mesh, pick, generator).check()
    check_what_is_refused(mesh)
    dist.destroy_process_group()


class Case:
    """A few tensors with ties, zeros of both signs and any cut, also with empty parts."""

    def __init__(self, mesh: Any, pick: random.Random, generator: torch.Generator) -> None:
        self.pick = pick
        dtype = pick.choice([torch.float32, torch.float64, torch.bfloat16])
        self.scores: list[Tensor] = []
        self.parts: list[Tensor] = []
        self.candidates: list[Tensor] = []
        self.candidate_parts: list[Tensor] = []
        for _ in range(pick.randint(1, 3)):
            shape = [pick.randint(1, 7) for _ in range(pick.randint(1, 4))]
            scores = torch.randn(shape, generator=generator)
            scores = (scores if pick.random() < 0.5 else (scores * 2).round() / 2).to(dtype)
            candidates = torch.rand(shape, generator=generator) < pick.choice([0.3, 0.9, 1.1])
            cut = any_cut(mesh, len(shape), pick)
            is_whole = pick.random() < 0.15
            self.scores.append(scores)
            self.candidates.append(candidates)
            self.parts.append(scores if is_whole else in_parts(scores, mesh, cut))
            is_whole |= pick.random() < 0.2
            self.candidate_parts.append(candidates if is_whole else in_parts(candidates, mesh, cut))

    def check(self) -> None:
        self.check_top(None, None)
        self.check_top(self.candidates, self.candidate_parts)
        self.check_best()
        for whole, part in zip(self.candidates, self.candidate_parts, strict=True):
            check_draws(whole, part, self.pick.randint(0, int(whole.sum())))
        for whole, part in zip(self.scores, self.parts, strict=True):
            if isinstance(part, Sharded):
                check_numbers(whole, part)

    def check_top(self, allowed: list[Tensor] | None, allowed_parts: list[Tensor] | None) -> None:
        total = sum(s.numel() if allowed is None else int(c.sum()) for s, c in self._pairs())
        k = self.pick.randint(0, total)
        masks = top_k(self.scores, k, allowed)
        found = top_k(self.parts, k, allowed_parts)
        for mask, mine, part in zip(masks, found, self.parts, strict=True):
            assert isinstance(mine, Sharded) == isinstance(part, Sharded)
            assert torch.equal(whole_of(mine), mask)
        assert top_k_counts(self.parts, k, allowed_parts) == [int(m.sum()) for m in masks]

    def check_best(self) -> None:
        k = self.pick.randint(0, sum(int(c.sum()) for c in self.candidates))
        best = Best(k)
        for part, allowed in zip(self.parts, self.candidate_parts, strict=True):
            best.add(part, allowed)
        expected = top_k(self.scores, k, self.candidates)
        for mask, mine in zip(expected, best.masks(self.scores), strict=True):
            assert torch.equal(mine, mask)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.scores, self.candidates, strict=True))


def check_draws(whole: Tensor, part: Tensor, k: int) -> None:
    for shape in (whole.shape, (-1,)):
        expected = sample(whole.reshape(shape), k, torch.Generator().manual_seed(k))
        found = sample(part.reshape(shape), k, torch.Generator().manual_seed(k))
        assert torch.equal(whole_of(found), expected)


def check_numbers(whole: Tensor, part: Sharded) -> None:
    """Entry by entry on parts, all else gathered; the same numbers."""
    nothing = torch.zeros((), dtype=whole.dtype)
    on_parts: list[Callable[[Tensor], Tensor]] = [
        lambda t: (t.abs() * whole).mul_(2),
        lambda t: torch.where(t > 0, whole, nothing),
        lambda t: t.double().lerp(whole.double(), 0.25),
        lambda t: ~(t == 0) & (t < 1),
        lambda t: (t * t).abs_(),
        lambda t: torch.zeros_like(t, dtype=torch.bool),
        lambda t: t.reshape(-1).reshape(whole.shape),
    ]
    for compute in on_parts:
        found = compute(part)
        assert isinstance(found, Sharded)
        assert found.part.shape == part.part.shape
        assert torch.equal(found.formed(), compute(whole))
    gathering: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.sort(dim=0).values,
        lambda t: t.sum(0),
        lambda t: t.flatten()[whole.flatten() > 0],
        lambda t: t.count_nonzero(),
        lambda t: (t > -9).all(),
        lambda t: (t > 99).any(),
        lambda t: t.isfinite().all(),
    ]
    for compute in gathering:
        found = compute(part)
        assert not isinstance(found, Sharded)
        assert torch.equal(whole_of(found), compute(whole))


def check_what_is_refused(mesh: Any) -> None:
    scores = torch.randn(4, 5)
    part = in_parts(scores, mesh, [Shard(0)] * mesh.ndim)
    for write in (
        lambda: part.mul_(2),
        lambda: (part * 2)[0].fill_(1),
        lambda: (part * 2).t().fill_(1),
        lambda: torch.zeros_like(part).index_fill_(0, torch.tensor([0]), 1),
    ):
        with pytest.raises(RuntimeError, match="never writes"):
            write()
    scores[2, 3] = math.nan
    with pytest.raises(NonFiniteScoreError, match="1 of 20 candidate scores"):
        top_k([in_parts(scores, mesh, [Shard(1)] * mesh.ndim)], 3)
    with pytest.raises(ValueError, match="k=21"):
        top_k([part], 21)


def any_cut(mesh: Any, dims: int, pick: random.Random) -> list[Any]:
    return [pick.choice([Replicate(), *map(Shard, range(dims))]) for _ in range(mesh.ndim)]


def in_parts(whole: Tensor, mesh: Any, cut: list[Any]) -> Sharded:
    spread = distribute_tensor(whole.clone(), mesh, cut)
    return Sharded(spread.to_local(), Split.of(spread))


def whole_of(tensor: Tensor) -> Tensor:
    formed = getattr(tensor, "formed", None)
    return tensor if formed is None else formed()
