"""What holds for methods that learn masks and have no density, or phases of their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from methods import APART, EMERGENT
from torch import Tensor, nn

from lightning_sparsity import RigL
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Result, TinyModel, fit

STEPPING: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", APART)
def test_something_is_pruned_and_the_probe_sees_zeros(name: str) -> None:
    result = fit([APART[name]()])
    assert len(result.history) == 24
    assert 0 < result.live < sum(mask.numel() for mask in result.masks.values())
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()


@pytest.mark.parametrize("name", APART)
def test_after_fit_everything_is_plain(name: str) -> None:
    result = fit([APART[name]()])
    for module in result.model.modules():
        assert "_plain_class" not in vars(type(module)), "a layer of ours is left"
    assert list(result.model.state_dict()) == list(TinyModel().state_dict())
    for key, mask in result.masks.items():
        parameter = result.model.get_parameter(key)
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, result.weights[key])
        assert not parameter[~mask].any()
        assert parameter.requires_grad


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", APART)
def test_resume_equals_not_stopping(name: str, tmp_path: Path) -> None:
    def run(**options: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([APART[name](), saver], enable_checkpointing=True, **options)

    whole = run()
    for step in (8, 12, 16):
        rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
        rest.assert_equal(whole)
        assert rest.history == whole.history[step:]


@pytest.mark.parametrize("name", APART)
def test_files_are_plain_and_hold_what_validation_computes_with(name: str, tmp_path: Path) -> None:
    class Look(Callback):
        seen: dict[str, Tensor]
        masks: dict[str, Tensor]

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
        ) -> None:
            if trainer.global_step == 12:
                keeper = MaskKeeper.of(trainer)
                assert keeper is not None
                assert keeper.masks is not None
                pl_module.eval()
                self.seen = {p.name: p.module.weight.detach().clone() for p in keeper.masks}  # type: ignore[operator, union-attr]
                pl_module.train()
                self.masks = {p.name: p.mask.clone() for p in keeper.masks}

    look = Look()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    fit([APART[name](), look, saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(TinyModel().state_dict())
    TinyModel().load_state_dict(state, strict=True)
    for key, mask in look.masks.items():
        assert torch.equal(state[key], look.seen[key])
        assert not state[key][~mask].any()


@pytest.mark.parametrize("way", STEPPING)
@pytest.mark.parametrize("name", APART)
def test_every_way_of_stepping(name: str, way: str) -> None:
    result = fit([APART[name]()], **STEPPING[way])
    for key, value in result.weights.items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize("name", APART)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    fit([APART[name]()]).assert_equal(fit([APART[name]()]))


@pytest.mark.parametrize("name", APART)
def test_copies_in_mid_training_are_plain(name: str) -> None:
    class Copy(Callback):
        copied = 0

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
        ) -> None:
            if trainer.global_step == 5:
                net = pl_module.net
                assert isinstance(net, nn.Module)
                pl_module.eval()
                x = torch.randn(3, 1, 6, 6)
                for plain in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
                    assert torch.equal(plain(x), net(x))
                    assert {type(m) for m in plain} <= {type(m) for m in TinyModel().net}
                    self.copied += 1
                pl_module.train()

    look = Copy()
    fit([APART[name](), look])
    assert look.copied == 2


@pytest.mark.parametrize("name", EMERGENT)
def test_rigl_takes_over_what_was_learned(name: str) -> None:
    rigl = RigL(update_start=0.5, update_end=1.0, update_interval=3)
    result = fit([EMERGENT[name](update_end=0.5), rigl])
    live = [sum(counts.values()) for _, counts in result.history]
    assert len(set(live[12:])) == 1, "RigL keeps the number of live weights"
    assert live[-1] == result.live
    assert len({digest for digest, _ in result.history[12:]}) > 1, "RigL moved no weight"


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"include": "net.9"}, ValueError, r"include='net.9' names no parameter"),
        ({"exclude": "*"}, ValueError, "leaves no parameter"),
        ({"include": 3}, TypeError, "must be a parameter name"),
    ],
)
def test_what_does_not_fit_the_model(
    name: str, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fit([APART[name](**bad)])
    assert str(caught.value).startswith(name)
