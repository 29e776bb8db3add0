"""ESPN against numbers from the authors' program: joint updates, and the mask they end in."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sparsity import ESPNFinetune
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.testing import TinyModel, fit

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "learned.json").read_text())["cases"]
}


class Recorder(Callback):
    """Weights, factors and their count above epsilon after every joint step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks["net.0.weight"]
        if "factor" in kept.slots:
            self.steps.append((kept.parameter.detach().clone(), kept.slots["factor"].clone()))


def test_joint_updates() -> None:
    case = CASES["espn_joint_update"]
    given, expected = case["inputs"], case["expected"]
    x, y = torch.tensor(given["x"]), torch.tensor(given["y"])

    def model() -> TinyModel:
        layer = nn.Linear(3, 2, bias=False)
        layer.weight = nn.Parameter(torch.tensor(given["w"]))
        return TinyModel(nn.Sequential(layer))

    recorder = Recorder()
    method = ESPNFinetune(
        given["keep_ratio"],
        alpha=given["alpha"],
        epsilon=given["eps"],
        joint_lr=given["lr"],
        tune_epochs=1,
        on_missed="warn",
    )
    data: Any = DataLoader([(x, y)], batch_size=None)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="factors are above epsilon"):
        fit([method, recorder], model, data=data, max_epochs=given["steps"] + 2)
    for (weight, factor), after in zip(recorder.steps, expected["steps"], strict=False):
        torch.testing.assert_close(weight, torch.tensor(after["w"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(factor, torch.tensor(after["c"]), atol=1e-5, rtol=0)
        assert int((factor > given["eps"]).sum()) == after["n_above_eps"]
    assert len(recorder.steps) == given["steps"]  # the next one is the last of the phase

    mask = torch.tensor(expected["keep_mask"], dtype=torch.bool)
    weight, factor = recorder.steps[-1]
    baked = _bake(method, weight, factor)
    assert torch.equal(baked.mask, mask)
    merged = torch.tensor(expected["w_after_merge"])
    torch.testing.assert_close(baked.weight[mask], merged[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["espn_mask_keeps_negative_c", "espn_mask_ties"])
def test_masks(name: str) -> None:
    case = CASES[name]
    factor = torch.tensor(case["inputs"]["c"])
    method = ESPNFinetune(case["inputs"]["keep_ratio"], on_missed="warn")
    baked = _bake(method, torch.ones_like(factor), factor)
    expected = torch.tensor(case["expected"]["mask"], dtype=torch.bool)
    # The program keeps every tie at its threshold; here the count is exact.
    assert baked.live == round(case["inputs"]["keep_ratio"] * factor.numel())
    assert not (baked.mask & ~expected).any()
    if name == "espn_mask_keeps_negative_c":
        assert torch.equal(baked.mask, expected)


def _bake(method: ESPNFinetune, weight: Tensor, factor: Tensor) -> Layer:
    mask = torch.ones_like(weight, dtype=torch.bool)
    layer = Layer("fc.weight", weight, mask, slots={"factor": factor})
    share = Share(("fc.weight",), (weight.numel(),), 0, found=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (baked,) = method.bake([layer], share)
    return baked
