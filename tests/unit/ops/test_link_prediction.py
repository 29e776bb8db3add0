"""Scores from matrix products against sums over neighbours and paths, one by one."""

import itertools
import math

import pytest
import torch

from lightning_sparsity.ops.link_prediction import ch2_l3n, ch3_l3n, ch3_l3p


def a_mask(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def graph(mask):
    """Neighbours of ("r", i) and ("c", j)."""
    links = {("r", i): set() for i in range(len(mask))}
    links |= {("c", j): set() for j in range(mask.shape[1])}
    for i, j in mask.nonzero().tolist():
        links["r", i].add(("c", j))
        links["c", j].add(("r", i))
    return links


def by_nodes(mask, multiply):
    links = graph(mask)
    scores = torch.zeros(mask.shape, dtype=torch.float64)
    for i, j in (~mask).nonzero().tolist():
        for near, far in ((("r", i), ("c", j)), (("c", j), ("r", i))):
            for z in links[far]:
                shared = len(links[near] & links[z])
                if shared:
                    outside = max(len(links[z]) - shared - 1, 0)
                    scores[i, j] += (shared + 1 if multiply else 1) / (outside + 1)
    return scores


def by_paths(mask):
    links = graph(mask)
    scores = torch.zeros(mask.shape, dtype=torch.float64)
    for i, j in (~mask).nonzero().tolist():
        u, v = ("r", i), ("c", j)
        paths = [(a, b) for a, b in itertools.product(links[u], links[v]) if b in links[a]]
        community = {z for path in paths for z in path}
        e = {z: len(links[z] - community - {u, v}) for z in community}
        scores[i, j] = sum(1 / math.sqrt((1 + e[a]) * (1 + e[b])) for a, b in paths)
    return scores


MASKS = [
    a_mask(7, 9, 0.4, 0),
    a_mask(9, 5, 0.3, 1),
    a_mask(6, 6, 0.8, 2),
    a_mask(12, 20, 0.1, 3),
    torch.zeros(3, 4, dtype=torch.bool),
    torch.ones(3, 4, dtype=torch.bool),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ch3_l3n, lambda mask: by_nodes(mask, multiply=False)),
        (ch2_l3n, lambda mask: by_nodes(mask, multiply=True)),
        (ch3_l3p, by_paths),
    ],
)
def test_scores(ours, theirs, mask):
    scores = ours(mask)
    torch.testing.assert_close(scores, theirs(mask), rtol=0, atol=1e-9)
    assert not scores[mask].any()
    torch.testing.assert_close(ours(mask.T), scores.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("score", [ch3_l3n, ch2_l3n, ch3_l3p])
def test_what_is_refused(score):
    with pytest.raises(ValueError, match="out, in"):
        score(torch.ones(2, 2, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"torch\.bool"):
        score(torch.ones(2, 2))
