import pytest
import torch

from lightning_sparsity.ops.packing import pack, unpack


@pytest.mark.parametrize("numel", [*range(18), 1000])
def test_round_trip(numel: int) -> None:
    mask = torch.rand(numel) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-numel // 8),)
    assert torch.equal(unpack(packed, (numel,)), mask)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (3, 5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    result = unpack(pack(mask), shape)
    assert result.dtype == torch.bool
    assert torch.equal(result, mask)


def test_row_major_order_lowest_bit_first() -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    assert pack(mask).tolist() == [0b10, 0b10]
    assert pack(mask.T.contiguous().T).tolist() == [0b10, 0b10]


def test_full_and_empty_masks() -> None:
    assert pack(torch.ones(11, dtype=torch.bool)).tolist() == [255, 7]
    assert pack(torch.zeros(11, dtype=torch.bool)).tolist() == [0, 0]


def test_memory_format_is_not_remembered() -> None:
    mask = (torch.rand(2, 3, 4, 4) < 0.5).to(memory_format=torch.channels_last)
    result = unpack(pack(mask), mask.shape)
    assert result.is_contiguous()
    assert torch.equal(result, mask)


def test_bool_storage_holds_zeros_and_ones_only() -> None:
    result = unpack(torch.tensor([0b10100110], dtype=torch.uint8), (8,))
    assert result.view(torch.uint8).tolist() == [0, 1, 1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("packed", [torch.zeros(1), torch.zeros(3), torch.zeros(2, 1)])
def test_refuses_a_length_that_does_not_fit(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\): 15 entries take 2 bytes"):
        unpack(packed.byte(), (3, 5))


def test_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match="torch.bool is needed"):
        pack(torch.ones(8))
    with pytest.raises(TypeError, match="torch.uint8 is needed"):
        unpack(torch.ones(1), (8,))
