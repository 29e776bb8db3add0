import math

import pytest
import torch
from torch import Tensor

from lightning_sparsity.ops.masked import apply_gate, gate, mask_

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.complex128]
SPECIAL = [1.0, -2.5, 0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def gate_and_apply(tensor: Tensor, mask: Tensor) -> None:
    apply_gate([tensor], [gate(mask, like=tensor)])


def mask_one(tensor: Tensor, mask: Tensor) -> None:
    mask_([tensor], [mask])


both = pytest.mark.parametrize("function", [gate_and_apply, mask_one])


class TestGate:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_all_bits_where_live(self, dtype: torch.dtype) -> None:
        like = torch.zeros(2, 2, dtype=dtype)
        result = gate(torch.tensor([[True, False], [False, True]]), like)
        assert result.dtype == INTEGERS[like.element_size()]
        assert result.tolist() == [[-1, 0], [0, -1]]

    def test_takes_the_memory_format(self) -> None:
        like = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
        mask = torch.rand(2, 3, 4, 4) < 0.5
        result = gate(mask, like)
        assert result.stride() == like.stride()
        assert torch.equal(result == -1, mask)

    def test_refuses_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"tensor of shape \(3,\), mask of \(1,\)"):
            gate(torch.tensor([True]), torch.zeros(3))


@both
class TestMasking:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_positive_zero_off_the_mask_and_untouched_on_it(self, function, dtype) -> None:
        tensor = torch.tensor(SPECIAL * 2, dtype=dtype)
        mask = torch.arange(16) < 8
        before = bits(tensor).clone()
        function(tensor, mask)
        assert torch.equal(bits(tensor)[mask], before[mask])
        assert bits(tensor)[~mask].tolist() == [0] * 8

    @pytest.mark.parametrize("dtype", OTHERS)
    def test_other_dtypes(self, function, dtype) -> None:
        tensor = torch.ones(4, dtype=dtype)
        mask = torch.tensor([True, False, False, True])
        function(tensor, mask)
        assert torch.equal(tensor, mask.to(dtype))

    def test_any_memory_format(self, function) -> None:
        base = torch.randn(4, 6, 3, 3)
        for tensor in (
            base.clone(memory_format=torch.channels_last),
            base.clone().transpose(0, 1),
            base.clone()[:, ::2],
        ):
            mask = torch.rand(tensor.shape) < 0.5
            expected = torch.where(mask, tensor, 0)
            strides = tensor.stride()
            function(tensor, mask)
            assert torch.equal(tensor, expected)
            assert tensor.stride() == strides

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
    def test_no_or_zero_dimensions(self, function, shape) -> None:
        tensor = torch.full(shape, math.nan)
        function(tensor, torch.zeros(shape, dtype=torch.bool))
        assert torch.equal(tensor, torch.zeros(shape))

    def test_leaf_parameters(self, function) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        function(weight, torch.tensor([True, False, True]))
        assert weight.tolist() == [1, 0, 1]
        assert weight.is_leaf
        assert weight.requires_grad
        assert weight.grad_fn is None

    def test_a_stale_graph_is_noticed(self, function) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        loss = weight.square().sum()
        function(weight, torch.tensor([True, False, True]))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_refuses_another_shape(self, function) -> None:
        with pytest.raises(ValueError, match="shape"):
            function(torch.zeros(3), torch.tensor([True]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_a_gate_of_another_width(dtype: torch.dtype) -> None:
    mask = torch.tensor([True, False, True])
    state = torch.tensor([math.nan, math.nan, 2.0], dtype=dtype)
    apply_gate([state], [gate(mask, like=torch.zeros(3))])
    assert bool(state[0].isnan())
    assert state[1:].tolist() == [0, 2]


def test_several_tensors() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    masks = [torch.tensor([True, False]), torch.tensor([False, False, True])]
    apply_gate(tensors, [gate(m, like=t) for m, t in zip(masks, tensors, strict=True)])
    assert [t.tolist() for t in tensors] == [[1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="shorter"):
        apply_gate(tensors, [])
    with pytest.raises(ValueError, match="shorter"):
        mask_(tensors, masks[:1])
