import math

import pytest
import torch
from torch import Tensor

from lightning_sparsity.ops import pool, selection
from lightning_sparsity.ops.selection import (
    NonFiniteScoreError,
    sample,
    top_k,
    top_k_counts,
    top_n_per_group,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def reference(scores: list[Tensor], k: int, candidates: list[Tensor] | None = None) -> list[Tensor]:
    """The first ``k`` candidates of one stable descending sort."""
    flat = torch.cat([s.double().reshape(-1) for s in scores])
    allowed = torch.ones_like(flat, dtype=torch.bool)
    if candidates is not None:
        allowed = torch.cat([c.reshape(-1) for c in candidates])
    order = flat.sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(allowed)
    chosen[order[allowed[order]][:k]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def check(scores: list[Tensor], k: int, candidates: list[Tensor] | None = None) -> None:
    masks = top_k(scores, k, candidates)
    for mask, expected in zip(masks, reference(scores, k, candidates), strict=True):
        assert torch.equal(mask, expected)
    assert top_k_counts(scores, k, candidates) == [int(mask.sum()) for mask in masks]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coin(*shape: int, p: float = 0.5, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a few thousand scores go through chunks and brackets."""
    monkeypatch.setattr(pool, "_CHUNK", {"cpu": 1000})
    monkeypatch.setattr(pool, "_FEW", 16)


class TestTopK:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [0, 1, 7, 29, 30])
    def test_agrees_with_sorting(self, dtype: torch.dtype, k: int) -> None:
        check([normal(3, 4).to(dtype), normal(18, seed=2).to(dtype)], k)

    @pytest.mark.parametrize("k", range(7))
    def test_ties_go_to_the_earliest_tensor_and_lowest_index(self, k: int) -> None:
        scores = [torch.ones(2), torch.ones(1, 3), torch.ones(1)]
        chosen = torch.cat([mask.reshape(-1) for mask in top_k(scores, k)])
        assert chosen.tolist() == [True] * k + [False] * (6 - k)

    def test_negative_zero_equals_zero(self) -> None:
        (mask,) = top_k([torch.tensor([-0.0, 0.0, -0.0, 0.0])], 3)
        assert mask.tolist() == [True, True, True, False]

    def test_neighbouring_floats_differ(self) -> None:
        one = torch.ones(4)
        one[2] = torch.nextafter(one[2], torch.tensor(2.0))
        assert top_k([one], 1)[0].tolist() == [False, False, True, False]

    def test_subnormal_and_largest_scores(self) -> None:
        tiny, largest = 1e-45, torch.finfo(torch.float32).max
        scores = torch.tensor([0.0, tiny, largest, -largest, largest])
        for k in range(6):
            check([scores], k)

    def test_mixed_dtypes_are_compared_exactly(self) -> None:
        above = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
        masks = top_k([torch.ones(1, dtype=torch.bfloat16), torch.ones(1), above], 1)
        assert [int(mask) for mask in masks] == [0, 0, 1]

    def test_empty_and_zero_dimensional_tensors(self) -> None:
        scores = [torch.empty(0, 3), torch.tensor(2.0), torch.empty(0), torch.tensor([1.0, 3.0])]
        for k in range(4):
            check(scores, k)
        assert top_k([], 0) == []
        assert top_k([], 0, []) == []
        assert top_k_counts([], 0) == []

    def test_only_candidates_are_chosen(self) -> None:
        scores, candidates = [normal(5, 5), normal(9)], [coin(5, 5), coin(9)]
        for k in range(int(sum(c.sum() for c in candidates)) + 1):
            check(scores, k, candidates)

    def test_non_contiguous_scores_and_candidates(self) -> None:
        weight = normal(4, 6, 3, 3).round()
        for scores in (
            weight.to(memory_format=torch.channels_last),
            weight.transpose(0, 1),
            weight[:, ::2],
            weight[0, 0, 0].expand(5, 3),
        ):
            candidates = coin(*scores.shape[::-1]).permute(*reversed(range(scores.ndim)))
            check([scores], scores.numel() // 3)
            check([scores], int(candidates.sum()) // 2, [candidates])

    def test_masks_are_new_contiguous_tensors(self) -> None:
        candidates = torch.ones(3, 2, dtype=torch.bool).T
        (mask,) = top_k([normal(2, 3)], 6, [candidates])
        mask.zero_()
        assert mask.is_contiguous()
        assert bool(candidates.all())

    def test_scores_may_require_grad(self) -> None:
        (mask,) = top_k([torch.nn.Parameter(normal(8))], 3)
        assert not mask.requires_grad

    def test_the_global_generator_is_left_alone(self, small_limits: None) -> None:
        before = torch.get_rng_state()
        check([normal(5000)], 500)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("k", [-1, 4])
    def test_refuses_a_count_out_of_range(self, k: int) -> None:
        candidates = torch.tensor([True, True, True, False])
        with pytest.raises(ValueError, match=f"k={k}: it must lie between 0 and .* 3"):
            top_k([normal(4)], k, [candidates])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("k", [0, 2, 5])
    def test_refuses_candidates_that_are_not_finite(self, bad: float, k: int) -> None:
        scores = [normal(3), torch.tensor([0.0, bad])]
        for function in (top_k, top_k_counts):
            with pytest.raises(NonFiniteScoreError, match=r"scores\[1\]: 1 of 2") as caught:
                function(scores, k)
            assert caught.value.index == 1

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_ignores_scores_that_are_not_candidates(self, bad: float) -> None:
        scores = torch.tensor([bad, 1.0, bad, 2.0, 3.0])
        candidates = scores.isfinite()
        assert top_k([scores], 2, [candidates])[0].tolist() == [False, False, False, True, True]
        assert top_k_counts([scores], 2, [candidates]) == [2]

    def test_refuses_what_does_not_match(self) -> None:
        scores = normal(4)
        with pytest.raises(ValueError, match="1 scores but 2 candidates"):
            top_k([scores], 1, [scores > 0, scores > 0])
        with pytest.raises(ValueError, match=r"candidates\[0\] has shape \(3,\)"):
            top_k([scores], 1, [torch.ones(3, dtype=torch.bool)])
        with pytest.raises(TypeError, match=r"candidates\[0\] is torch.float32"):
            top_k([scores], 1, [scores])
        with pytest.raises(TypeError, match=r"scores\[0\] is torch.int64"):
            top_k([torch.arange(3)], 1)


@pytest.mark.usefixtures("small_limits")
class TestTopKOfMany:
    """The same, through chunks and brackets."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [1, 500, 2500, 4999])
    def test_agrees_with_sorting(self, dtype: torch.dtype, k: int) -> None:
        check([normal(70, 50).to(dtype), torch.empty(0), normal(1500, seed=3).to(dtype)], k)

    @pytest.mark.parametrize(
        "scores",
        [
            torch.ones(5000),
            torch.arange(5000.0),
            -torch.arange(5000.0),
            normal(5000).relu(),
            normal(5000).sign(),
            torch.arange(5000.0) % 5,
            normal(5000).pow(21).clamp(-1e30, 1e30),
            torch.cat([torch.ones(4990), normal(10)]),
        ],
        ids=["equal", "ascending", "descending", "half", "signs", "periodic", "heavy", "outliers"],
    )
    @pytest.mark.parametrize("k", [1, 1000, 2497, 4993])
    def test_hard_distributions(self, scores: Tensor, k: int) -> None:
        check([scores], k)
        check(list(scores.split([1, 2000, 2999])), k)

    @pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
    def test_only_candidates_are_chosen(self, p: float) -> None:
        scores, candidates = [normal(50, 60), normal(2000).round()], [coin(50, 60, p=p), coin(2000)]
        scores[0][~candidates[0]] = math.nan
        filled = [scores[0].nan_to_num(), scores[1]]
        total = int(sum(c.sum() for c in candidates))
        for k in (1, total // 3, total - 1):
            expected = reference(filled, k, candidates)
            assert all(map(torch.equal, top_k(scores, k, candidates), expected))

    @pytest.mark.parametrize("seed", range(5))
    def test_misleading_samples_cost_time_only(
        self, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rounds = 0

        def poor_bracket(inside: Tensor, share: float) -> tuple[float, float]:
            nonlocal rounds
            rounds += 1
            low, high = inside[torch.tensor([rounds * 31 % len(inside), rounds % len(inside)])]
            return min(float(low), float(high)), max(float(low), float(high))

        monkeypatch.setattr(pool, "_bracket", poor_bracket)
        check([normal(20_000, seed=seed).mul(9).round(), normal(20_000)], 8000)
        assert rounds > 2

    def test_an_unlucky_sample_ends_in_gathering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool.Pool, "sample_between", lambda *_: torch.empty(0))
        check([normal(5000)], 700)


class TestTopNPerGroup:
    @pytest.mark.parametrize("m", [1, 4, 16, 17, 40])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_agrees_with_sorting_each_row(self, m: int, dtype: torch.dtype) -> None:
        scores, candidates = normal(60, m).mul(2).round().to(dtype), coin(60, m)
        n = (candidates.sum(1) * torch.rand(60)).long()
        mask = top_n_per_group(scores, n, candidates)
        for row, count, allowed, chosen in zip(scores, n, candidates, mask, strict=True):
            assert torch.equal(chosen, reference([row], int(count), [allowed])[0])

    @pytest.mark.parametrize("n", [0, 2, 4])
    def test_the_same_count_in_every_row(self, n: int) -> None:
        scores = normal(50, 4)
        mask = top_n_per_group(scores, n)
        assert torch.equal(mask, top_n_per_group(scores, torch.full((50,), n)))
        assert mask.sum(1).tolist() == [n] * 50

    def test_chunks_of_rows(self, small_limits: None) -> None:
        scores = normal(4, 3000).T
        assert not scores.is_contiguous()
        n = torch.arange(3000) % 5
        mask = top_n_per_group(scores, n)
        assert mask.is_contiguous()
        assert torch.equal(mask.sum(1), n)
        assert torch.equal(mask[::100], top_n_per_group(scores[::100], n[::100]))

    def test_pairs_and_sorting_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores, candidates = normal(200, 8).round(), coin(200, 8)
        n = candidates.sum(1) // 2
        by_pairs = top_n_per_group(scores, n, candidates)
        monkeypatch.setattr(selection, "_PAIRWISE", 0)
        assert torch.equal(top_n_per_group(scores, n, candidates), by_pairs)

    def test_rows_without_entries(self) -> None:
        assert top_n_per_group(torch.empty(0, 4), 2).shape == (0, 4)
        assert top_n_per_group(torch.empty(3, 0), 0).shape == (3, 0)

    def test_ignores_scores_that_are_not_candidates(self) -> None:
        scores = torch.tensor([[math.nan, 1.0, 2.0], [math.inf, -3.0, -2.0]])
        mask = top_n_per_group(scores, 1, scores.isfinite())
        assert mask.tolist() == [[False, False, True]] * 2

    def test_errors(self) -> None:
        scores = normal(2, 4)
        few = torch.tensor([[True] * 4, [True, False, False, False]])
        for n in (-1, 2, torch.tensor([1, 2])):
            with pytest.raises(ValueError, match="number of candidates in every row"):
                top_n_per_group(scores, n, few)
        with pytest.raises(ValueError, match="number of candidates in every row"):
            top_n_per_group(scores, 5)
        with pytest.raises(ValueError, match=r"integers of shape \(2,\)"):
            top_n_per_group(scores, torch.tensor([1, 1, 1]))
        with pytest.raises(ValueError, match=r"integers of shape \(2,\)"):
            top_n_per_group(scores, torch.tensor(1.5))
        with pytest.raises(ValueError, match="groups, m"):
            top_n_per_group(scores[0], 1)
        with pytest.raises(NonFiniteScoreError):
            top_n_per_group(scores * math.nan, 1)


def draw(candidates: Tensor, k: int, seed: int = 0) -> Tensor:
    return sample(candidates, k, torch.Generator().manual_seed(seed))


class TestSample:
    @pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 0.95, 1.0])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 0.5, 0.9, 1.0])
    def test_draws_exactly_k_candidates(self, p: float, share: float) -> None:
        candidates = coin(40, 50, p=p)
        k = int(share * candidates.sum())
        mask = draw(candidates, k)
        assert mask.shape == candidates.shape
        assert int(mask.sum()) == k
        assert not bool((mask & ~candidates).any())

    def test_leaves_the_candidates_alone(self) -> None:
        candidates = torch.ones(10, dtype=torch.bool)
        draw(candidates, 8)
        assert bool(candidates.all())

    @pytest.mark.parametrize(
        ("numel", "live", "k"), [(12, 12, 3), (12, 9, 7), (40, 10, 5), (300, 200, 4)]
    )
    def test_is_uniform(self, numel: int, live: int, k: int) -> None:
        candidates = torch.zeros(numel, dtype=torch.bool)
        candidates[torch.randperm(numel, generator=torch.Generator().manual_seed(5))[:live]] = True
        generator = torch.Generator().manual_seed(7)
        draws = 3000
        hits = torch.zeros(numel)
        for _ in range(draws):
            hits += sample(candidates, k, generator)
        expected = draws * k / live
        # Chi-squared over the candidates, scaled for drawing without replacement.
        statistic = (hits[candidates] - expected).square().sum() / (expected * (1 - k / live))
        statistic *= (live - 1) / live
        assert abs(float(statistic) - (live - 1)) < 4 * math.sqrt(2 * (live - 1))

    def test_every_set_is_equally_likely(self) -> None:
        generator = torch.Generator().manual_seed(3)
        candidates = torch.tensor([True, True, False, True, True])
        seen: dict[tuple[bool, ...], int] = {}
        for _ in range(3000):
            key = tuple(sample(candidates, 2, generator).tolist())
            seen[key] = seen.get(key, 0) + 1
        assert len(seen) == 6
        assert all(400 < count < 600 for count in seen.values())

    @pytest.mark.parametrize("k", [3, 20, 100])
    def test_does_not_depend_on_memory_format(self, k: int) -> None:
        candidates = coin(4, 6, 5, 5)
        expected = draw(candidates, k)
        assert torch.equal(draw(candidates.to(memory_format=torch.channels_last), k), expected)
        assert torch.equal(draw(candidates.reshape(-1), k), expected.reshape(-1))

    def test_depends_on_ranks_not_on_positions(self) -> None:
        # The same ranks come out whether True or False entries are listed.
        rare = torch.zeros(1000, dtype=torch.bool)
        rare[::5] = True
        common = torch.ones(210, dtype=torch.bool)
        common[::21] = False
        for k in (3, 60, 150):
            assert torch.equal(draw(rare, k)[rare], draw(common, k)[common])

    def test_ranks_do_not_depend_on_how_duplicates_are_found(self) -> None:
        # 100 of 3200 are sorted, 101 are ticked off; the draws begin alike.
        for k in (100, 101):
            generator = torch.Generator().manual_seed(0)
            ranks: set[int] = set()
            while len(ranks) < k:
                ranks |= set(selection._integers(k - len(ranks), 3200, generator).tolist())
            generator.manual_seed(0)
            assert selection._distinct(k, 3200, generator).tolist() == sorted(ranks)

    def test_same_generator_same_draw(self) -> None:
        candidates = coin(500)
        assert torch.equal(draw(candidates, 30), draw(candidates, 30))
        assert not torch.equal(draw(candidates, 30), draw(candidates, 30, seed=1))

    def test_the_draw_is_fixed(self) -> None:
        # Masks of a seed must not change from release to release.
        chosen = draw(torch.ones(20, dtype=torch.bool), 4).nonzero().view(-1)
        assert chosen.tolist() == [9, 14, 18, 19]

    @pytest.mark.parametrize("k", [-1, 3])
    def test_refuses_a_count_out_of_range(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"k={k}: it must lie between 0 and .* 2"):
            draw(torch.tensor([True, False, True]), k)

    def test_refuses_candidates_that_are_not_bool(self) -> None:
        with pytest.raises(TypeError, match="torch.bool is needed"):
            draw(torch.ones(3), 1)
