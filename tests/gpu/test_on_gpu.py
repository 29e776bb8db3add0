"""The core contracts on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from methods import METHODS, expected_live
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import DensityMonitor
from lightning_sparsity.ops.masked import apply_gate, gate
from lightning_sparsity.ops.selection import sample, top_k
from lightning_sparsity.testing import Batch, Batches, Result, TinyModel, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# One way of looking each: gradients, rounds, second derivatives, float64, steps of training.
SCORING = ["SNIP", "FORCE", "GraSP", "SynFlow", "ProsPr"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_budget_is_exact_and_nothing_lives_off_the_mask(name: str, precision: Any) -> None:
    result = fit([METHODS[name](), DensityMonitor()], accelerator="gpu", precision=precision)
    masks = {key: mask.cpu() for key, mask in result.masks.items()}
    assert result.live == expected_live(name, 0.3, masks)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", SCORING)
def test_a_scoring_pass_leaves_no_trace(name: str, precision: Any) -> None:
    def run(*callbacks: Callback) -> Result:
        options: dict[str, Any] = {"accelerator": "gpu", "deterministic": True}
        return fit(callbacks, data=shuffled(), precision=precision, **options)

    plain, looked = run(), run(METHODS[name](1.0, data=None))
    assert all(mask.all() for mask in looked.masks.values())
    looked.masks = {}
    looked.assert_equal(plain)


def shuffled() -> DataLoader[Batch]:
    """Pictures in an order that the global random numbers decide."""
    data = Batches()
    pictures, labels = (torch.cat(part) for part in zip(*data, strict=True))
    return DataLoader(TensorDataset(pictures, labels), batch_size=8, shuffle=True)


@pytest.mark.parametrize("name", ["StaticSparse", "RigL", "SET"])
def test_random_masks_are_those_of_the_cpu(name: str) -> None:
    on_gpu = fit([METHODS[name]()], accelerator="gpu", max_steps=1)
    on_cpu = fit([METHODS[name]()], max_steps=1)
    assert on_gpu.history == on_cpu.history


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_not_stopping(name: str, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options: dict[str, Any] = {"accelerator": "gpu", "deterministic": True, **kwargs}
        return fit([METHODS[name](), saver], enable_checkpointing=True, **options)

    whole = run()
    run(ckpt_path=str(tmp_path / "step=12.ckpt"), seed=77).assert_equal(whole)


def test_fused_adamw() -> None:
    def fused() -> TinyModel:
        return TinyModel(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))

    result = fit([METHODS["RigL"]()], fused, accelerator="gpu", precision="16-mixed")
    assert result.live == round(0.3 * 2184)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_selection_and_gates_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3_000_000, generator=generator).to(dtype).abs()
    (here,), (there,) = top_k([scores], 300_000), top_k([scores.cuda()], 300_000)
    assert torch.equal(here, there.cpu())
    apply_gate([scores], [gate(here, scores)])
    on_gpu = scores.cuda()
    apply_gate([on_gpu], [gate(there, on_gpu)])
    assert torch.equal(scores, on_gpu.cpu())
    drawn = [sample(mask, 1000, torch.Generator().manual_seed(1)).cpu() for mask in (here, there)]
    assert torch.equal(*drawn)
