"""Compressed weights on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import METHODS

from lightning_sparsity import NM, RigL, SparseCompute, StaticSparse
from lightning_sparsity.ops.compressed import Pattern, product
from lightning_sparsity.testing import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_products_and_gradients_are_those_of_the_dense_matrix(
    dtype: torch.dtype, density: float
) -> None:
    torch.manual_seed(0)
    mask = torch.rand(33, 70, device="cuda") < density
    pattern = Pattern(mask)
    dense = torch.randn(33, 70, device="cuda", dtype=dtype).mul_(mask).requires_grad_()
    values = pattern.gather(dense.detach()).requires_grad_()
    inputs = torch.randn(12, 70, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(33, device="cuda", dtype=dtype, requires_grad=True)
    slopes = torch.randn(12, 33, device="cuda", dtype=dtype)
    ours = product(inputs, values, pattern, bias)
    found = torch.autograd.grad(ours, (inputs, values, bias), slopes)
    theirs = inputs @ dense.t() + bias
    wanted = torch.autograd.grad(theirs, (inputs, dense, bias), slopes)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1][mask])
    torch.testing.assert_close(found[2], wanted[2])


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["StaticSparse", "SET", "RigL", "GMP", "SNFS"])
def test_trains_compressed(name: str, precision: Any) -> None:
    result = fit([METHODS[name](), SparseCompute("csr")], accelerator="gpu", precision=precision)
    assert result.live == round(0.3 * 2184)
    assert all(weight.isfinite().all() for weight in result.weights.values())


def test_masks_are_those_of_dense_storage() -> None:
    options: dict[str, Any] = {"accelerator": "gpu", "precision": "64-true"}
    dense = fit([METHODS["RigL"]()], **options)
    compressed = fit([METHODS["RigL"](), SparseCompute("csr")], **options)
    assert dense.history == compressed.history
    for name, weight in dense.weights.items():
        torch.testing.assert_close(compressed.weights[name], weight, rtol=0, atol=1e-9)


def test_auto_measures_on_the_device() -> None:
    policy = SparseCompute()
    found: dict[str, Any] = {}
    policy.announce = lambda masks, storage: found.update(storage.choices)  # type: ignore[method-assign]
    fit([StaticSparse(0.3), policy], accelerator="gpu")
    assert found
    assert all(choice.dense_ms > 0 and choice.compressed_ms > 0 for choice in found.values())


def test_patterns_train_compressed() -> None:
    pattern = RigL(structure=NM(2, 4), exclude="net.0.weight", update_interval=4)
    result = fit([pattern, SparseCompute("csr")], accelerator="gpu")
    assert result.live == (16 * 128 + 4 * 16) // 2
