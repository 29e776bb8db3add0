"""Tensors that rules read in the place of compressed weights and of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparsity.ops.live import Formed, Live

DENSE = torch.tensor([[0.0, -2.0, 0.0], [3.0, 0.0, 0.25]])
POSITIONS = torch.tensor([1, 3, 5])


def live(dense: Tensor = DENSE) -> Live:
    values = dense.view(-1)[POSITIONS]
    return Live(lambda: values, lambda: POSITIONS, dense.shape, values)


def formed() -> tuple[Formed, list[int]]:
    made: list[int] = []

    def form() -> Tensor:
        made.append(1)
        return DENSE.clone()

    return Formed(form, DENSE.shape, DENSE), made


STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "sqrt of abs": lambda x: x.abs().sqrt(),
    "double": lambda x: x.double(),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "detach": lambda x: x.detach(),
}
BECOME_DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "plus": lambda x: x + 1,
    "from": lambda x: 1 - x,
    "times": lambda x: x * DENSE,
    "times the other": lambda x: DENSE * x,
    "times itself": lambda x: x * x,
    "compared": lambda x: x > 0,
    "masked": lambda x: x[DENSE != 0],
    "summed": lambda x: x.sum(0),
    "clone": lambda x: x.clone(),
    "where": lambda x: torch.where(x > 0, x, 7.0),
    "stacked": lambda x: torch.stack([x, x]),
    "joined": lambda x: torch.cat((x, DENSE)),
    "matrix product": lambda x: x @ DENSE.t(),
    "norm": lambda x: x.norm(),
    "like": lambda x: torch.zeros_like(x),
    "log": lambda x: x.abs().log(),
    "strided": lambda x: x.to(memory_format=torch.contiguous_format) + 0,
    "topk": lambda x: x.view(-1).topk(2).values,
    "list of tensors": lambda x: torch._foreach_add([x, x], 1)[0],
}


@pytest.mark.parametrize("function", STAY.values(), ids=list(STAY))
def test_functions_of_one_number_that_keep_zero_are_computed_on_the_values(
    function: Callable[[Tensor], Tensor],
) -> None:
    result = function(live())
    assert isinstance(result, Live)
    right = function(DENSE)
    assert result.dtype == right.dtype
    assert result.shape == right.shape
    assert torch.equal(result.formed(), right)
    assert torch.equal(result.values_there, right.view(-1)[POSITIONS])
    assert torch.equal(result.positions, POSITIONS)


@pytest.mark.parametrize("function", BECOME_DENSE.values(), ids=list(BECOME_DENSE))
@pytest.mark.parametrize("make", [live, lambda: formed()[0]], ids=["live", "formed"])
def test_all_others_see_the_dense_tensor(
    function: Callable[[Tensor], Tensor], make: Callable[[], Tensor]
) -> None:
    result = function(make())
    assert not isinstance(result, Formed)
    assert torch.equal(result, function(DENSE))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "entry": lambda x: x[1],
    "reshaped": lambda x: x.reshape(-1),
    "viewed": lambda x: x.view(3, 2),
    "transposed": lambda x: x.t(),
    "part": lambda x: x.chunk(2)[1],
    "column of the transposed": lambda x: x.t()[1],
}


@pytest.mark.parametrize("function", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("make", [live, lambda: formed()[0]], ids=["live", "formed"])
def test_a_view_is_read_and_never_written(
    function: Callable[[Tensor], Tensor], make: Callable[[], Tensor]
) -> None:
    view, right = function(make()), function(DENSE)
    assert view.shape == right.shape
    assert view.stride() == right.stride()
    assert torch.equal(view + 0, right)
    assert view.sum() == right.sum()
    for write in (lambda: view.mul_(2), lambda: view.fill_(1), lambda: torch.neg(right, out=view)):
        with pytest.raises(RuntimeError, match="never writes"):
            write()


def test_what_is_formed_is_not_kept() -> None:
    tensor, made = formed()
    assert tensor.shape == (2, 3)
    assert tensor.dtype == DENSE.dtype
    assert not made
    for times in (1, 2):
        assert torch.equal(tensor.abs(), DENSE.abs())
        assert len(made) == times


def test_values_are_those_of_now() -> None:
    values = torch.tensor([1.0, 2.0])
    tensor = Live(lambda: values, lambda: torch.tensor([0, 3]), (2, 2), values)
    magnitudes = tensor.abs()
    values.mul_(-3)
    assert tensor.formed().tolist() == [[-3, 0], [0, -6]]
    assert magnitudes.formed().tolist() == [[1, 0], [0, 2]]


def _assign(tensor: Tensor) -> None:
    tensor[DENSE != 0] = 1


@pytest.mark.parametrize(
    "write",
    [
        _assign,
        lambda x: x.mul_(2),
        lambda x: x.copy_(DENSE),
        lambda x: x.zero_(),
        lambda x: x.detach().add_(1),
        lambda x: torch.abs(DENSE, out=x),
        lambda x: torch._foreach_mul_([x], 2),
    ],
    ids=["[]", "mul_", "copy_", "zero_", "detach", "out", "foreach"],
)
@pytest.mark.parametrize("make", [live, lambda: formed()[0]], ids=["live", "formed"])
def test_they_cannot_be_written_to(
    write: Callable[[Any], object], make: Callable[[], Tensor]
) -> None:
    with pytest.raises(RuntimeError, match="a rule returns changed copies; it never writes"):
        write(make())


def test_dense_tensors_may_be_filled_from_them() -> None:
    target = torch.zeros(2, 3)
    target.copy_(live())
    assert torch.equal(target, DENSE)
    target.add_(live()).mul_(formed()[0])
    assert torch.equal(target, 2 * DENSE * DENSE)


def test_they_say_what_they_are() -> None:
    assert repr(live()) == "Live(shape=(2, 3), dtype=torch.float32)"
    assert repr(formed()[0]) == "Formed(shape=(2, 3), dtype=torch.float32)"


def test_they_hold_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    tensor = Live(parameter.detach, lambda: POSITIONS, (2, 3), parameter.detach())
    assert not tensor.requires_grad
    assert not (tensor.abs() * 2).requires_grad
