"""OptG in a Trainer, and what users do to it; with it the engine of all learned masks."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sparsity import (
    GMP,
    SNIP,
    DensityMonitor,
    Magnitude,
    OptG,
    RigL,
    StaticSparse,
    uniform,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.testing import (
    Batch,
    Batches,
    ManualModel,
    Result,
    TinyModel,
    fit,
    quiet_trainer,
    sgd,
    tiny_net,
)

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
FLAT = 36 * 16 + 16 * 4
LIVE = round(0.3 * NUMEL)


def optg(density: float | None = 0.3, **kwargs: Any) -> OptG:
    return OptG(density, **{"alpha": 1.0, **kwargs})


def flat_net() -> nn.Module:
    """Without normalisation and dropout."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def flat(**kwargs: Any) -> TinyModel:
    return TinyModel(flat_net(), **kwargs)


def masks_of(trainer: pl.Trainer) -> Masks:
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is not None
    return keeper.masks


Page = dict[str, dict[str, Tensor]]


class Diary(Callback):
    """After every batch, by layer: the mask, the latent and the effective weight, ..."""

    def __init__(self) -> None:
        self.pages: list[Page] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.pages.append(self.page(trainer))

    @staticmethod
    def page(trainer: pl.Trainer) -> Page:
        found: Page = {}
        for kept in masks_of(trainer):
            found[kept.name] = {
                "mask": kept.mask.clone(),
                "latent": kept.parameter.detach().clone(),
                "weight": kept.weight.clone(),
                **{key: tensor.clone() for key, tensor in kept.slots.items()},
            }
            for optimizer in trainer.optimizers:
                for key, value in optimizer.state.get(kept.parameter, {}).items():
                    found[kept.name][key] = torch.as_tensor(value).clone()
        return found

    @property
    def live(self) -> list[int]:
        return [sum(int(layer["mask"].sum()) for layer in page.values()) for page in self.pages]

    def of(self, name: str, key: str) -> list[Tensor]:
        return [page[name][key] for page in self.pages if key in page[name]]

    def masks(self) -> list[Tensor]:
        return [torch.cat([x["mask"].flatten() for x in page.values()]) for page in self.pages]

    def assert_equal(self, other: Diary, start: int = 0) -> None:
        """To the last bit, from page ``start`` of the other one."""
        assert len(self.pages) == len(other.pages) - start
        for number, (mine, theirs) in enumerate(zip(self.pages, other.pages[start:], strict=True)):
            for name in theirs:
                assert mine[name].keys() == theirs[name].keys(), (number, name)
                for key, value in theirs[name].items():
                    assert torch.equal(mine[name][key], value), (number, name, key)

    def assert_close(self, other: Diary, **tolerance: Any) -> None:
        """The same masks; all else but for rounding."""
        assert len(self.pages) == len(other.pages)
        for mine, theirs in zip(self.pages, other.pages, strict=True):
            for name in theirs:
                for key, value in theirs[name].items():
                    torch.testing.assert_close(mine[name][key], value, **tolerance)


def write(callbacks: list[Any], *args: Any, **kwargs: Any) -> Diary:
    diary = Diary()
    fit([*callbacks, diary], *args, **kwargs)
    return diary


# What the paper says --------------------------------------------------------------


def by_hand(epochs: int, alpha: float, decay: float) -> list[Page]:
    """OptG(0.3) as a loop in plain torch; what is there after every batch."""
    pl.seed_everything(3, verbose=False)
    net = TinyModel().net.train()
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    scores = {name: torch.zeros_like(w) for name, w in weights.items()}
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    of_scores = torch.optim.SGD(scores.values(), lr=0.05, momentum=0.9)
    pages: list[Page] = []
    for epoch in range(epochs):
        is_last = epoch == epochs - 1
        risen = 1 / (1 + math.exp(-alpha * (epoch - epochs / 2)))
        if epoch:
            ranked = torch.cat([score.flatten() for score in scores.values()])
            keep = round(NUMEL * (1 - 0.7 * (1 if is_last else risen)))
            best = ranked.sort(descending=True, stable=True).indices[:keep]
            chosen = torch.zeros_like(ranked).index_fill(0, best, 1)
            parts = chosen.split([score.numel() for score in scores.values()])
            masks = {n: part.view_as(scores[n]) for n, part in zip(scores, parts, strict=True)}
        for x, y in Batches():
            used = {n: (w * masks[n]).detach().requires_grad_() for n, w in weights.items()}
            optimizer.zero_grad()
            out = torch.func.functional_call(net, used, (x,))
            nn.functional.cross_entropy(out, y).backward()
            for name, w in weights.items():
                grad = used[name].grad
                assert grad is not None
                scores[name].grad = grad * w.detach()
                w.grad = grad * masks[name]
            optimizer.step()
            of_scores.param_groups[0]["lr"] = 0.05 * risen
            of_scores.step()
            pages.append(
                {
                    f"net.{n}": {"latent": w.detach().clone(), "score": scores[n].clone()}
                    for n, w in weights.items()
                }
            )
            for name in weights:
                pages[-1][f"net.{name}"]["mask"] = masks[name].bool()
    return pages


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_is_a_short_loop_in_plain_torch(decay: float) -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=decay))

    diary = write([OptG(0.3, alpha=1.3)], model, max_epochs=6)
    loop = by_hand(6, 1.3, decay)
    for number in range(39):  # with step 40 the last epoch begins, on final masks
        for name in ("net.0.weight", "net.5.weight", "net.7.weight"):
            page, mine = diary.pages[number][name], loop[number][name]
            assert torch.equal(page["latent"], mine["latent"]), (number, name)
            torch.testing.assert_close(page["score"], mine["score"], rtol=1e-5, atol=1e-8)
            # ours is that of the next batch already
            assert torch.equal(page["mask"], loop[number + 1][name]["mask"]), (number, name)
    for name, layer in diary.pages[39].items():
        final = loop[40][name]["mask"]
        assert torch.equal(layer["mask"], final)
        assert torch.equal(layer["weight"], loop[39][name]["latent"] * final)


@pytest.mark.parametrize("alpha", [0.5, 2.0, "auto"])
def test_counts_are_those_of_equation_16(alpha: Any) -> None:
    diary = write([OptG(0.1, alpha=alpha)], max_epochs=6)
    steepness = 80 / 6 if alpha == "auto" else alpha
    for epoch in range(1, 6):
        sparsity = 0.9 / (1 + math.exp(-steepness * (epoch - 3))) if epoch < 5 else 0.9
        assert diary.live[8 * epoch - 1] == round((1 - sparsity) * NUMEL), epoch
    masks = diary.masks()
    moved = [i + 1 for i in range(1, 48) if not torch.equal(masks[i], masks[i - 1])]
    assert set(moved) <= {8, 16, 24, 32, 40}, "constant within an epoch"
    assert len(moved) >= 3
    assert diary.live[0] == NUMEL, "the first epoch is dense"


def test_pruned_weights_move_by_decay_and_momentum_alone() -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.01))

    diary = write([optg(update_end=40)], model, max_epochs=6)
    checked = 0
    for before, now in zip(diary.pages[:38], diary.pages[1:], strict=False):
        for name, layer in before.items():
            off = ~layer["mask"]
            momentum = 0.9 * layer["momentum_buffer"] + 0.01 * layer["latent"]
            expected = layer["latent"] - 0.05 * momentum
            torch.testing.assert_close(now[name]["latent"][off], expected[off])
            checked += int(off.sum())
    assert checked > 1000
    assert diary.pages[38]["net.5.weight"]["latent"].count_nonzero() == 2048


def test_weights_come_back_with_the_value_they_have() -> None:
    diary = write([optg()], max_epochs=6)
    revived = 0
    for before, now in zip(diary.pages[:38], diary.pages[1:], strict=False):
        for name, layer in now.items():
            back = layer["mask"] & ~before[name]["mask"]
            assert torch.equal(layer["weight"][back], layer["latent"][back])
            assert layer["weight"][back].all()
            revived += int(back.sum())
    assert revived > 5


def test_scores_of_pruned_weights_go_on_learning() -> None:
    diary = write([optg()], max_epochs=6)
    scores, masks = diary.of("net.5.weight", "score"), diary.of("net.5.weight", "mask")
    off = ~masks[32]
    assert off.sum() > 500
    assert (scores[36] != scores[32])[off].float().mean() > 0.9


def test_latent_weights_are_dense_until_the_last_epoch() -> None:
    diary = write([optg()], max_epochs=4)
    for number, page in enumerate(diary.pages):
        layer = page["net.5.weight"]
        if number < 23:
            assert layer["latent"].all()
        else:
            assert torch.equal(layer["latent"], layer["weight"])
            assert not layer["momentum_buffer"][~layer["mask"]].any()
        assert ("score" in layer) == (number < 23)


def test_density_one_is_no_callback() -> None:
    for callback in (OptG(1.0), OptG(1.0, update_end=1.0)):
        result, without = fit([callback]), fit([])
        result.masks = {}
        result.assert_equal(without)


# Arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf'^OptG\(alpha={alpha}\): .* above 0 or "auto"'):
        OptG(0.3, alpha=alpha)


@pytest.mark.parametrize("alpha", ["steep", None, True])
def test_alpha_of_a_wrong_type(alpha: Any) -> None:
    with pytest.raises(TypeError, match=rf"^OptG\(alpha={alpha!r}\): must be a number"):
        OptG(0.3, alpha=alpha)


@pytest.mark.parametrize(
    ("momentum", "error"), [(1, ValueError), (-0.1, ValueError), ("0.9", TypeError)]
)
def test_bad_momentum(momentum: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^OptG\(momentum="):
        OptG(0.3, momentum=momentum)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_few_epochs_arrive_with_the_paper_s_alpha(epochs: int) -> None:
    result = fit([OptG(0.3)], max_epochs=epochs)
    assert result.live == LIVE
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[-4] == LIVE, "and train on"


@pytest.mark.parametrize("known", [{"alpha": "auto"}, {"update_end": 8}])
def test_an_unknown_number_of_epochs_is_an_error(known: dict[str, Any]) -> None:
    message = r"^OptG\(alpha=.*: the number of epochs is not known.*max_epochs=.*update_end="
    with pytest.raises(MisconfigurationException, match=message):
        fit([OptG(0.3, **known)], max_epochs=-1, max_steps=12)


def test_without_epochs_both_are_enough() -> None:
    result = fit([OptG(0.3, alpha="auto", update_end=8)], max_epochs=-1, max_steps=12)
    assert result.live == LIVE


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0.9, r"^OptG\(update_start=0.9\): the masks are final from 0.6667 .*Begin earlier"),
        (16, r"^OptG: update_start=16 and update_end=0.66.* are both step 16 .*Begin earlier"),
        (20, r"^OptG: update_end=0.66.* is step 16 of 24 and comes before update_start=20"),
    ],
)
def test_a_start_that_leaves_nothing_to_learn_in(start: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit([optg(update_start=start)])


def test_a_late_start_does_not_disturb_a_dry_run() -> None:
    fit([optg(update_start=0.9)], fast_dev_run=True)


# Files ----------------------------------------------------------------------------


def saver(path: Path, **kwargs: Any) -> ModelCheckpoint:
    options = {"filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1, **kwargs}
    return ModelCheckpoint(path, **options)


def test_a_file_shows_plain_effective_weights(tmp_path: Path) -> None:
    diary = write([optg(), saver(tmp_path)], max_epochs=4, enable_checkpointing=True)
    for step in (4, 12, 20, 28):
        file = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert list(file["state_dict"]) == list(TinyModel().state_dict())
        TinyModel().load_state_dict(file["state_dict"], strict=True)
        TinyModel.load_from_checkpoint(tmp_path / f"step={step}.ckpt")
        for name, layer in diary.pages[step - 1].items():
            assert torch.equal(file["state_dict"][name], layer["weight"])
            assert torch.equal(file["state_dict"][name], layer["latent"] * layer["mask"])


def test_a_file_with_weights_only(tmp_path: Path) -> None:
    callbacks = [optg(), saver(tmp_path, save_weights_only=True)]
    diary = write(callbacks, max_epochs=4, enable_checkpointing=True)
    file = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    TinyModel().load_state_dict(file["state_dict"], strict=True)
    for name, layer in diary.pages[19].items():
        assert torch.equal(file["state_dict"][name], layer["weight"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resume_equals_not_stopping(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> tuple[Result, Diary]:
        diary = Diary()
        callbacks = [optg(), saver(tmp_path), diary]
        return fit(callbacks, max_epochs=4, enable_checkpointing=True, **kwargs), diary

    whole, pages = run()
    for step in (12, 16, 28):
        rest, diary = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
        diary.assert_equal(pages, start=step)
        rest.assert_equal(whole)


def test_a_state_of_another_density_is_refused(tmp_path: Path) -> None:
    fit([optg()]).trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(
        MisconfigurationException,
        match=r"nothing was restored(?s:.*)OptG\(density=0\.3\).*OptG\(density=0\.2\)",
    ):
        fit([optg(0.2)], ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=4)


def test_a_longer_training_keeps_what_was_learned(tmp_path: Path) -> None:
    first = fit([optg()])
    first.trainer.save_checkpoint(tmp_path / "end.ckpt")
    longer = fit([optg()], ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=6)
    assert all(torch.equal(longer.masks[key], mask) for key, mask in first.masks.items())
    assert longer.changes == 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_training_made_longer_on_its_way_arrives(tmp_path: Path) -> None:
    fit([optg(), saver(tmp_path)], max_epochs=4, enable_checkpointing=True)
    result = fit([optg()], ckpt_path=str(tmp_path / "step=12.ckpt"), max_epochs=6)
    live = [sum(counts.values()) for _, counts in result.history]
    assert live[36 - 12 :] == [round((1 - 0.7 / (1 + math.exp(-1))) * NUMEL)] * 3 + [LIVE] * 9


# Fits -----------------------------------------------------------------------------


class Before(Callback):
    """What is there when the first batch begins."""

    def __init__(self) -> None:
        self.page: Page = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.page = self.page or Diary.page(trainer)


@pytest.mark.filterwarnings("ignore:OptG. training ended at step 24")
def test_a_second_fit_goes_on() -> None:
    before, diary, model = Before(), Diary(), TinyModel()
    trainer = quiet_trainer([optg(update_end=40), diary])
    trainer.fit(model, Batches())
    trainer.callbacks.append(before)  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 6
    trainer.fit(model, Batches())
    for name, layer in before.page.items():
        for key in ("latent", "mask", "weight", "score"):
            assert torch.equal(layer[key], diary.pages[23][name][key]), (name, key)
    assert diary.live[39] == LIVE


@pytest.mark.filterwarnings("ignore:OptG. training ended at step 24")
def test_weights_written_between_two_fits_are_the_latent_ones() -> None:
    before, diary, model = Before(), Diary(), TinyModel()
    trainer = quiet_trainer([optg(update_end=40), diary])
    trainer.fit(model, Batches())
    with torch.no_grad():
        model.net[5].weight[0] = 0.25  # type: ignore[index]
    trainer.callbacks.append(before)  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 6
    trainer.fit(model, Batches())
    latent = before.page["net.5.weight"]["latent"]
    assert (latent[0] == 0.25).all()
    assert torch.equal(latent[1:], diary.pages[23]["net.5.weight"]["latent"][1:])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_off_leaves_plain_layers(error: type[BaseException], tmp_path: Path) -> None:
    class Failing(TinyModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 21:
                raise error("the user's own")
            return self.loss(batch)

    diary, model = Diary(), Failing()
    trainer = quiet_trainer([optg(), diary], max_epochs=6)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(model, Batches())
    parameters = dict(model.named_parameters())
    for name, layer in diary.pages[-1].items():
        assert torch.equal(parameters[name], layer["weight"])
        assert not parameters[name][~layer["mask"]].any()
        assert (~layer["mask"]).any()
    assert [type(module) for module in model.net] == [type(module) for module in tiny_net()]
    assert [list(vars(module)) for module in model.net] == [
        list(vars(module)) for module in tiny_net()
    ]
    trainer.save_checkpoint(tmp_path / "broken.ckpt")
    rest = Before()
    fit([optg(), rest], max_epochs=6, ckpt_path=str(tmp_path / "broken.ckpt"))
    for name, layer in rest.page.items():
        for key in ("latent", "mask", "weight", "score"):
            assert torch.equal(layer[key], diary.pages[-1][name][key])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_a_plain_model(copied: Callable[[nn.Module], Any]) -> None:
    class Tied(TinyModel):
        def __init__(self) -> None:
            first, second = nn.Linear(36, 36), nn.Linear(36, 36)
            second.weight = first.weight
            super().__init__(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second))

    class Copying(Callback):
        copies: list[Any]

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            taken = copied(module.net)
            page = Diary.page(trainer)["net.1.weight"]
            assert torch.equal(taken[1].weight, page["weight"])
            assert taken[1].weight is taken[3].weight
            assert len(list(taken.parameters())) == 3
            assert type(taken[1]) is nn.Linear
            assert "_effective_weights" not in vars(taken[1])
            x = Batches()._batches[0][0]
            assert torch.equal(taken(x), module.net(x))
            self.copies.append(taken)

    copying = Copying()
    copying.copies = []
    with_copies = fit([optg(), copying], Tied)
    with_copies.assert_equal(fit([optg()], Tied))
    first, second = (copying.copies[i][1].weight for i in (10, 14))
    assert not torch.equal(first, second), "a copy does not follow the training"


# Ways of stepping -----------------------------------------------------------------


def test_two_halves_accumulated_are_one_batch() -> None:
    class Halves(Batches):
        def __init__(self) -> None:
            super().__init__()
            self._batches = [
                half for x, y in self._batches for half in ((x[:4], y[:4]), (x[4:], y[4:]))
            ]

    whole = write([optg()], flat, max_epochs=4)
    halves = write([optg()], flat, max_epochs=4, data=Halves(), accumulate_grad_batches=2)
    halves.pages = halves.pages[1::2]
    halves.assert_close(whole)
    assert whole.live[-1] == round(0.3 * FLAT)


def test_bf16_mixed_keeps_scores_and_latent_weights_in_float32() -> None:
    diary = write([optg()], precision="bf16-mixed")
    for name in ("net.0.weight", "net.5.weight"):
        assert {x.dtype for x in diary.of(name, "latent")} == {torch.float32}
        assert {x.dtype for x in diary.of(name, "score")} == {torch.float32}
    assert diary.live[-1] == LIVE
    exact = write([optg()])
    score, other = (x.of("net.5.weight", "score")[0] for x in (diary, exact))
    assert not torch.equal(score, other), "the forward pass was in bfloat16"
    torch.testing.assert_close(score, other, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "double")])
def test_scores_of_other_weights_are_float32_too(precision: str, dtype: str) -> None:
    data = Batches()
    data._batches = [(x.to(getattr(torch, dtype)), y) for x, y in data._batches]
    diary = write([optg()], precision=precision, data=data)
    assert diary.of("net.5.weight", "latent")[0].dtype == getattr(torch, dtype)
    assert diary.of("net.5.weight", "score")[0].dtype == torch.float32
    assert diary.live[-1] == LIVE


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


class Overflowing(TinyModel):
    """One batch whose gradients overflow, so that a GradScaler skips the step."""

    bad = 11

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * float("inf") if self.trainer.fit_loop.total_batch_idx == self.bad else loss


def test_a_skipped_step_changes_nothing() -> None:
    diary = write([optg()], Overflowing, plugins=[scaler()])
    before, after = diary.pages[10:12]
    for name in before:
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    assert not torch.equal(*diary.of("net.5.weight", "score")[11:13])
    for layer in diary.pages[-1].values():
        assert torch.isfinite(layer["latent"]).all()


def test_masks_wait_for_a_skipped_step() -> None:
    class AtTheEnd(Overflowing):
        bad = 15

    diary = write([optg()], AtTheEnd, plugins=[scaler()])
    assert diary.live[14] == diary.live[15] > LIVE
    assert diary.live[16:] == [LIVE] * 8


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_fused_optimizers(name: str, scaled: bool) -> None:
    def run(fused: bool) -> Diary:
        def make(parameters: Any) -> Any:
            return getattr(torch.optim, name)(parameters, lr=0.01, fused=fused)

        return write(
            [optg()],
            lambda: Overflowing(flat_net(), make) if scaled else flat(optimizer=make),
            plugins=[scaler()] if scaled else [],
        )

    run(True).assert_close(run(False), rtol=1e-3, atol=1e-4)


def test_clipping_by_norm_sees_live_weights_alone() -> None:
    seen: list[bool] = []

    class Clipping(TinyModel):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            for kept in masks_of(self.trainer):
                assert kept.parameter.grad is not None
                assert not kept.parameter.grad[~kept.mask].any()
                seen.append(bool((~kept.mask).any()))
            self.clip_gradients(optimizer, *args, **kwargs)

    fit([optg()], Clipping, gradient_clip_val=0.1)
    assert any(seen)


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_does_not_touch_the_scores(by: str) -> None:
    clipped = write([optg()], gradient_clip_val=1e-3, gradient_clip_algorithm=by)
    free = write([optg()])
    for name in ("net.0.weight", "net.5.weight", "net.7.weight"):
        assert torch.equal(clipped.of(name, "score")[0], free.of(name, "score")[0])
        assert not torch.equal(clipped.of(name, "latent")[0], free.of(name, "latent")[0])


class OneManual(ManualModel):
    """One optimizer, stepped by hand, maybe with a closure."""

    def __init__(self, *, closure: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._closure = closure

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self._raw)

        def backward() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self._closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return self._make(self.parameters())


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization_is_automatic_optimization(raw: bool, closure: bool) -> None:
    manual = write([optg(update_end=20)], lambda: OneManual(raw=raw, closure=closure))
    manual.assert_equal(write([optg(update_end=20)]))


class TwoOptimizers(TinyModel):
    """One optimizer per layer; all step, or each after a backward pass of its own."""

    def __init__(self, raw: bool = False, in_turns: bool = False) -> None:
        super().__init__(flat_net())
        self.automatic_optimization = False
        self._raw, self._in_turns = raw, in_turns

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers(use_pl_optimizer=not self._raw)
        for optimizer in optimizers:
            if self._in_turns or optimizer is optimizers[0]:
                self.zero_grad()
                self.manual_backward(self.loss(batch))
            if self._in_turns:
                optimizer.step()
        for optimizer in optimizers if not self._in_turns else ():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[i].parameters()) for i in (1, 3)]  # type: ignore[index, union-attr]


@pytest.mark.parametrize("raw", [False, True])
def test_several_optimizers_make_the_step_of_one(raw: bool) -> None:
    options: dict[str, Any] = {"update_end": 20, "distribution": uniform}
    several = write([optg(**options)], lambda: TwoOptimizers(raw))
    several.assert_equal(write([optg(**options)], flat))


@pytest.mark.parametrize("raw", [False, True])
def test_optimizers_in_turns(raw: bool) -> None:
    diary = write([optg(update_end=20)], lambda: TwoOptimizers(raw, in_turns=True))
    assert diary.live[-1] == round(0.3 * FLAT)
    assert len(set(diary.live)) > 2


def test_a_graph_may_outlive_the_step_of_another_optimizer() -> None:
    class Apart(TwoOptimizers):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            flat = batch[0].flatten(1)
            losses = [self.net[1](flat).square().mean()]  # type: ignore[index]
            losses += [self.net[3](flat[:, :16]).square().mean()]  # type: ignore[index]
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):  # type: ignore[call-overload]
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    fit([optg(update_end=20)], Apart)


def test_a_graph_may_outlive_its_batch() -> None:
    class Gathering(OneManual):
        losses: list[Tensor]

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self.losses = [*(self.losses if batch_idx % 4 else []), self.loss(batch)]
            if batch_idx % 4 == 3:
                optimizer.zero_grad()
                self.manual_backward(torch.stack(self.losses).sum())
                optimizer.step()

    fit([optg(update_end=5, update_interval=2)], lambda: Gathering(net=flat_net()))


def test_checkpointed_activations() -> None:
    class Recomputing(TinyModel):
        def loss(self, batch: Batch) -> Tensor:
            out = checkpoint(self.net, batch[0].requires_grad_(), use_reentrant=False)
            return nn.functional.cross_entropy(out, batch[1])

    again = write([optg()], lambda: Recomputing(flat_net()))
    again.assert_equal(write([optg()], flat))


# Compiled -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_mask_updates_do_not_recompile(backend: str) -> None:
    def compiled() -> TinyModel:
        model = flat()
        model.net = torch.compile(model.net, backend=backend, fullgraph=True)  # type: ignore[assignment]
        return model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    diary = write([optg(update_end=1.0)], compiled, max_epochs=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(set(diary.live)) > 3
    diary.assert_close(write([optg(update_end=1.0)], flat, max_epochs=4))


# Others who write weights ---------------------------------------------------------


class Validated(TinyModel):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches()

    def val_dataloader(self) -> Batches:
        return Batches(count=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 3, "accumulate_grad_batches": 2}],
    ids=["at the end of an epoch", "between accumulated batches"],
)
def test_an_average_in_validation_leaves_no_trace(options: dict[str, Any]) -> None:
    average = EMAWeightAveraging(decay=0.5)
    averaged = write([optg(), average], Validated, data=Data(), **options)
    averaged.assert_equal(write([optg()], Validated, data=Data(), **options))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_averages_resume_to_the_last_bit(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> tuple[Result, list[dict[str, Tensor]]]:
        average = EMAWeightAveraging(decay=0.9)
        states: list[dict[str, Tensor]] = []

        class Average(Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                assert average._average_model is not None
                states.append(copy.deepcopy(average._average_model.module.state_dict()))

        callbacks = [optg(), average, saver(tmp_path), Average()]
        options = {"max_epochs": 4, "enable_checkpointing": True, **kwargs}
        return fit(callbacks, Validated, data=Data(), **options), states

    whole, states = run()
    for step in (12, 20):
        rest, later = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
        for mine, theirs in zip(later, states[step:], strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        rest.assert_equal(whole)
    file = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    fraction = file["state_dict"]["net.5.weight"].count_nonzero() / 2048
    assert 0.2 < fraction < 0.7, "files of averages are sparse"


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("net", [flat_net, tiny_net])
def test_stochastic_weight_averaging(net: Callable[[], nn.Module]) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    # of a net with normalisation it takes one more epoch, without steps, for the statistics
    result = fit([optg(update_end=24), swa], lambda: TinyModel(net()), max_epochs=4)
    assert result.live == round(0.3 * sum(mask.numel() for mask in result.masks.values()))
    for name, mask in result.masks.items():
        assert not result.weights[name][~mask].any()
        after = dict(result.model.named_parameters())[name]
        assert torch.equal(after, result.weights[name])


def test_weights_clamped_past_autograd_are_seen() -> None:
    class Clamping(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            for parameter in self.parameters():
                self.clamp(parameter)

        def clamp(self, parameter: Tensor) -> None:
            parameter.data.clamp_(-0.05, 0.05)

    class Traced(Clamping):
        @torch.no_grad()
        def clamp(self, parameter: Tensor) -> None:
            parameter.clamp_(-0.05, 0.05)

    write([optg()], Clamping).assert_equal(write([optg()], Traced))


class WithRate(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class FindsAtEpoch(LearningRateFinder):
    """Searches in mid-training, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("kind", [LearningRateFinder, FindsAtEpoch])
def test_a_search_for_a_learning_rate_leaves_no_trace(
    kind: type[LearningRateFinder], tmp_path: Path
) -> None:
    finder = kind(num_training_steps=4, update_attr=False)
    finder._early_exit = False
    options: dict[str, Any] = {"max_epochs": 4, "default_root_dir": tmp_path}
    found = write([optg(), finder], lambda: WithRate(), **options)
    plain = write([optg()], lambda: WithRate(), **options)
    assert finder.optimal_lr is not None
    losses = finder.optimal_lr.results["loss"]
    assert len(set(losses)) == len(losses), "what the search tried was seen"
    if kind is FindsAtEpoch:
        found.assert_equal(plain)
    assert found.live == plain.live


# With others ----------------------------------------------------------------------

TOGETHER: dict[str, Callable[[], list[Any]]] = {
    "SNIP": lambda: [SNIP(0.6, data=Batches(2), loss_fn=lambda m, batch: m.loss(batch)), optg()],
    "StaticSparse": lambda: [StaticSparse(0.6), optg()],
    "Magnitude": lambda: [Magnitude(0.6), optg(update_start=0.5, update_end=40)],
    "GMP": lambda: [GMP(0.6, update_interval=2, update_end=0.5), optg(update_start=0.5)],
    "RigL": lambda: [optg(update_end=0.5), RigL(update_start=0.5, update_interval=4)],
    "RigL beside": lambda: [
        optg(include="net.5"),
        RigL(0.3, include=["net.0", "net.7"], update_interval=4),
    ],
}


class Learning(Callback):
    """How many layers compute with effective weights, after every batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.counts.append(sum(kept.effective is not None for kept in masks_of(trainer)))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("SNIP", [3] * 39 + [0] * 9),
        ("StaticSparse", [3] * 39 + [0] * 9),
        ("Magnitude", [0] * 23 + [3] * 16 + [0] * 9),
        ("GMP", [0] * 23 + [3] * 16 + [0] * 9),
        ("RigL", [3] * 23 + [0] * 25),
        ("RigL beside", [1] * 39 + [0] * 9),
    ],
)
def test_together_with(name: str, counts: list[int]) -> None:
    learning = Learning()
    diary = write([*TOGETHER[name](), learning], max_epochs=6)
    assert learning.counts == counts
    assert diary.live[-1] == LIVE
    masks = diary.masks()
    if counts[0] == 3 and name != "RigL":
        assert not any((mask & ~masks[0]).any() for mask in masks), "found masks are never left"
    if name in ("Magnitude", "GMP"):
        assert not any((mask & ~masks[23]).any() for mask in masks[24:])
        assert diary.live[23] == round(0.6 * NUMEL)
    if name == "RigL":
        assert len({mask.numpy().tobytes() for mask in masks[24:]}) > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", TOGETHER)
def test_resume_around_hand_overs(name: str, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> tuple[Result, Diary]:
        diary = Diary()
        callbacks = [*TOGETHER[name](), saver(tmp_path), diary]
        return fit(callbacks, max_epochs=6, enable_checkpointing=True, **kwargs), diary

    whole, pages = run()
    for step in (20, 24, 28, 40):
        rest, diary = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
        diary.assert_equal(pages, start=step)
        rest.assert_equal(whole)


def test_the_monitor_shows_effective_density(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")
    diary = Diary()
    fit(
        [optg(), DensityMonitor(), diary],
        Validated,
        data=Data(),
        max_epochs=4,
        logger=board,
        log_every_n_steps=1,
    )
    events = EventAccumulator(str(tmp_path / "run"), {"scalars": 0}).Reload()
    shown = {e.step: e.value for e in events.Scalars("density/total")}
    assert len(shown) == 32
    for step, value in shown.items():
        assert value == pytest.approx(diary.live[step] / NUMEL)


# Two processes --------------------------------------------------------------------

SCRIPT = """
import hashlib, json, sys
import torch
from lightning.pytorch.callbacks import Callback
from lightning_sparsity import OptG
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Batches, fit, quiet_trainer

torch.set_num_threads(1)
both = sys.argv[1] == "2"


class Halves(Batches):
    def __init__(self):
        super().__init__()
        if sys.argv[2] == "halves" and both:
            rank = torch.distributed.get_rank()
            self._batches = [(x[4 * rank :][:4], y[4 * rank :][:4]) for x, y in self._batches]


class Ranks(Callback):
    seen = []

    def on_train_batch_end(self, trainer, *args):
        masks = MaskKeeper.of(trainer).masks
        digest = hashlib.blake2b(masks.digest().encode())
        for kept in masks:
            for tensor in (kept.parameter, kept.weight, *kept.slots.values()):
                digest.update(tensor.detach().numpy().tobytes())
        mine = digest.hexdigest()
        if both:
            all_of_them = [None, None]
            torch.distributed.all_gather_object(all_of_them, mine)
            assert all_of_them[0] == all_of_them[1], trainer.global_step
        self.seen.append((masks.digest(), mine, masks.live))


ranks = Ranks()
from lightning_sparsity.testing import TinyModel
from torch import nn


class Model(TinyModel):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))
        )

    def train_dataloader(self):
        return Halves()


import lightning.pytorch as pl

pl.seed_everything(3, verbose=False)
options = {"strategy": "ddp", "devices": 2} if both else {}
trainer = quiet_trainer(
    [OptG(0.3, alpha=1.0), ranks], max_epochs=4, use_distributed_sampler=False, **options
)
trainer.fit(Model())
if trainer.is_global_zero:
    print("RESULT", json.dumps(ranks.seen), flush=True)
if both:
    torch.distributed.destroy_process_group()
"""


def in_processes(count: int, data: str, path: Path) -> list[tuple[str, str, int]]:
    script = path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(count), data],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return [tuple(row) for row in json.loads(line.removeprefix("RESULT"))]  # type: ignore[misc]


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_learn_the_masks_of_one(tmp_path: Path) -> None:
    alone = in_processes(1, "whole", tmp_path)
    same = in_processes(2, "whole", tmp_path)
    assert same == alone, "on the same data the gradients are those of one"
    halves = in_processes(2, "halves", tmp_path)
    assert [row[2] for row in halves] == [row[2] for row in alone]
    assert halves[-1][2] == round(0.3 * FLAT)
    assert [row[0] for row in halves] == [row[0] for row in alone], "the same masks"
