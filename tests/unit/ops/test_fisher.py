"""Fisher blocks against the recurrence, dense systems of equations and a real loss."""

import pytest
import torch

from lightning_sparsity.ops.fisher import (
    add_outer,
    inverse_blocks,
    newton_step,
    obs_saliency,
    survivors_update,
    to_blocks,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_recurrence(gradients, damping):
    """The inverse as WoodFisher builds it up, one gradient after the other."""
    inverse = torch.eye(gradients.shape[1], dtype=torch.float64) / damping
    for g in gradients:
        v = inverse @ g
        inverse = inverse - torch.outer(v, v) / (len(gradients) + g @ v)
    return inverse


def sums_of(gradients):
    """Sums over ``(N, blocks, size)``."""
    sums = torch.zeros(*gradients.shape[1:], gradients.shape[2], dtype=gradients.dtype)
    for rows in gradients:
        sums = add_outer(sums, rows)
    return sums


def constrained_minimum(fisher, gradient, weight, removed):
    """The least g.d + d.F.d / 2 with d = -w where removed, and its d, from its KKT system."""
    rows = torch.eye(len(weight), dtype=torch.float64)[removed]
    corner = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    system = torch.cat([torch.cat([fisher, rows.T], 1), torch.cat([rows, corner], 1)])
    change = torch.linalg.solve(system, torch.cat([-gradient, -weight[removed]]))[: len(weight)]
    return gradient @ change + change @ fisher @ change / 2, change


def test_blocks_are_consecutive_and_the_last_is_filled_up():
    assert to_blocks(torch.arange(1, 8), 3).tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert to_blocks(torch.arange(6), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert to_blocks(torch.tensor([True]), 2).tolist() == [[True, False]]
    assert to_blocks(torch.zeros(0), 4).shape == (0, 4)


def test_sums_are_new_tensors():
    sums, rows = torch.zeros(2, 3, 3), torch.arange(6.0).view(2, 3)
    new = add_outer(add_outer(sums, rows), rows)
    assert not sums.any()
    assert torch.equal(new, 2 * torch.einsum("bi,bj->bij", rows, rows))


@pytest.mark.parametrize("damping", [1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_inverse_is_that_of_the_recurrence(count, damping):
    gradients = normal(count, 2, 6)
    inverse = inverse_blocks(sums_of(gradients), count, damping)
    expected = torch.stack([by_recurrence(gradients[:, block], damping) for block in (0, 1)])
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=1e-9)
    fisher = torch.einsum("nbi,nbj->bij", gradients, gradients) / count
    fisher += damping * torch.eye(6)
    torch.testing.assert_close(inverse, torch.linalg.inv(fisher), rtol=1e-6, atol=1e-9)


def test_without_gradients_the_curvature_is_the_damping():
    inverse = inverse_blocks(torch.zeros(3, 4, 4), 0, 0.25)
    assert torch.equal(inverse, 4 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_sums_that_rounding_makes_indefinite_still_have_an_inverse():
    rows = (1e4 * normal(30, 1, 8)[:, :, :1] * normal(1, 1, 8)).float()
    sums = torch.cat([sums_of(rows), torch.eye(8)[None]])
    damped = sums.double() / 30 + 1e-5 * torch.eye(8)
    assert int((torch.linalg.cholesky_ex(damped)[1] > 0).sum()) == 1, "the case is too easy"
    inverse = inverse_blocks(sums, 30, 1e-5)
    values = torch.linalg.eigvalsh(inverse)
    assert bool((values > 0).all())
    assert float(values[0].max()) == pytest.approx(1e5, rel=1e-3)  # nowhere less than the damping
    torch.testing.assert_close(inverse[1], torch.eye(8).double() / (1 / 30 + 1e-5))


@pytest.mark.parametrize("first_order", [False, True])
def test_saliency_and_update_are_the_best_there_is(first_order):
    gradients, weight = normal(12, 1, 7), normal(1, 7, seed=1)
    gradient = first_order * normal(1, 7, seed=2)
    inverse = inverse_blocks(sums_of(gradients), 12, 0.1)
    fisher = torch.linalg.inv(inverse[0])
    moved = newton_step(weight, inverse, gradient)
    gain = gradient[0] @ inverse[0] @ gradient[0] / 2
    assert (gain > 0.1) == first_order
    loss = obs_saliency(moved, inverse) - gain
    for q in range(7):
        removed = torch.arange(7) == q
        least, best = constrained_minimum(fisher, gradient[0], weight[0], removed)
        assert float(loss[0, q]) == pytest.approx(float(least), rel=1e-9, abs=1e-12)
        for joint in (False, True):
            new = moved + survivors_update(moved, removed[None], inverse, joint)
            torch.testing.assert_close((new - weight)[0], best)


@pytest.mark.parametrize("first_order", [False, True])
def test_joint_update_is_the_best_for_many_and_the_sum_adds_up_single_ones(first_order):
    weight, removed = normal(2, 7, seed=1), normal(2, 7, seed=3) > 0.3
    inverse = inverse_blocks(sums_of(normal(12, 2, 7)), 12, 0.1)
    gradient = first_order * normal(2, 7, seed=2)
    moved = newton_step(weight, inverse, gradient)
    joint = moved + survivors_update(moved, removed, inverse, joint=True) - weight
    summed = moved + survivors_update(moved, removed, inverse) - weight
    more = 0.0
    for b in (0, 1):
        assert 1 < int(removed[b].sum()) < 6
        g, u, fisher = gradient[b], inverse[b] @ gradient[b], torch.linalg.inv(inverse[b])
        least, best = constrained_minimum(fisher, g, weight[b], removed[b])
        torch.testing.assert_close(joint[b], best)
        single = sum(
            (u - weight[b])[q] / inverse[b, q, q] * inverse[b, q]
            for q in removed[b].nonzero().view(-1)
        )
        torch.testing.assert_close(summed[b][~removed[b]], (single - u)[~removed[b]])
        more += float(g @ summed[b] + summed[b] @ fisher @ summed[b] / 2 - least)
    assert more > 1e-4
    for change in (joint, summed):
        assert not (weight + change)[removed].any(), "not exactly zero"


@pytest.mark.parametrize("joint", [False, True])
def test_blocks_that_lose_nothing_do_not_change(joint):
    weight = normal(2, 5)
    removed = torch.zeros(2, 5, dtype=torch.bool)
    removed[1, 2] = True
    inverse = inverse_blocks(sums_of(normal(9, 2, 5)), 9, 0.1)
    change = survivors_update(weight, removed, inverse, joint)
    assert not change[0].any()
    assert bool(change[1].all())


def test_filling_up_a_block_changes_nothing_for_its_weights():
    gradients, weight = normal(9, 5), normal(5, seed=1)
    removed = torch.tensor([True, False, False, True, False])
    results = []
    for size in (5, 8):
        sums = sums_of(torch.stack([to_blocks(g, size) for g in gradients]))
        inverse = inverse_blocks(sums, 9, 0.1)
        rows = newton_step(to_blocks(weight, size), inverse, to_blocks(gradients.mean(0), size))
        gone = to_blocks(removed, size)
        updates = [survivors_update(rows, gone, inverse, joint) for joint in (False, True)]
        results.append([rows, obs_saliency(rows, inverse), *updates])
    for alone, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled[:, :5], alone)
        assert not filled[:, 5:].any()


class LeastSquares:
    """The squared error of a linear model at its optimum; inputs of all scales, related."""

    def __init__(self, seed):
        mix = torch.eye(24) + normal(24, 24, seed=seed) / 24**0.5
        self.inputs = normal(2000, 24, seed=seed + 1) @ mix * torch.logspace(-1, 0.5, 24)
        self.targets = self.inputs @ normal(24, seed=seed + 2) + normal(2000, seed=seed + 3)
        self.weight = torch.linalg.lstsq(self.inputs, self.targets[:, None]).solution.view(1, 24)
        errors = self.inputs @ self.weight[0] - self.targets
        gradients = (errors[:, None] * self.inputs)[:, None]
        self.inverse = inverse_blocks(sums_of(gradients), 2000, 1e-6)
        self.optimum = self.loss(self.weight)

    def loss(self, weight):
        return float((self.inputs @ weight[0] - self.targets).square().mean() / 2)

    def induced(self, removed, joint):
        """How much a removal costs with the update of the survivors."""
        change = survivors_update(self.weight, removed, self.inverse, joint=joint)
        return self.loss(self.weight + change) - self.optimum

    @staticmethod
    def smallest(scores, count):
        removed = torch.zeros_like(scores, dtype=torch.bool)
        removed[0, scores[0].argsort()[:count]] = True
        return removed


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
def test_removal_costs_less_than_by_magnitude_on_least_squares(seed):
    problem = LeastSquares(seed)
    predicted = obs_saliency(problem.weight, problem.inverse)
    for q in (0, 12, 23):  # the prediction is right: at the optimum the Fisher is the curvature
        removed = torch.arange(24)[None] == q
        cost = problem.induced(removed, joint=False)
        assert cost == pytest.approx(float(predicted[removed]), rel=0.25)
    for count in (1, 6, 12):
        small = problem.smallest(problem.weight.abs(), count)
        by_magnitude = problem.loss(problem.weight * ~small) - problem.optimum
        best = problem.smallest(predicted, count)
        assert problem.induced(best, joint=True) < 0.5 * by_magnitude
        assert problem.induced(small, joint=True) < by_magnitude, "the update does not pay"
        assert problem.induced(best, joint=True) <= problem.induced(best, joint=False) * 1.01
