import pytest
import torch

from lightning_sparsity.ops.condensed import condense


def test_tables_hold_what_lives():
    weight = torch.arange(24.0).view(3, 2, 2, 2)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, [1, 6]] = mask[2, [0, 7]] = True
    neurons, indices, values = condense(weight, mask.view(weight.shape))
    assert neurons.tolist() == [0, 2]
    assert indices.tolist() == [[1, 6], [0, 7]]
    assert values.tolist() == [[1, 6], [16, 23]]


def test_a_zero_that_lives_counts():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert condense(torch.zeros(2, 3), mask).values.shape == (2, 3)


def test_nothing_lives():
    neurons, indices, values = condense(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert (len(neurons), indices.shape, values.shape) == (0, (0, 0), (0, 0))


def test_gradients_reach_the_weight():
    weight = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    condense(weight, mask).values.sum().backward()
    assert torch.equal(weight.grad, mask.float())


def test_what_is_refused():
    mask = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match="1 to 2 inputs"):
        condense(torch.ones(2, 2), mask)
    with pytest.raises(ValueError, match="shape"):
        condense(torch.ones(2, 3), mask)
    with pytest.raises(TypeError, match=r"torch\.bool"):
        condense(torch.ones(2, 2), mask.float())
