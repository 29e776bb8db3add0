"""Supermask: chances of weights that stay as they are."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_sparsity import RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.supermask import Supermask
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.starts import signed_constant
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SPARSE = ["net.0.weight", "net.5.weight", "net.7.weight"]


class Watch(Callback):
    """Before every batch: latent weights, scores, masks, and what the layers compute with."""

    def __init__(self) -> None:
        self.latent: list[dict[str, torch.Tensor]] = []
        self.score: list[dict[str, torch.Tensor]] = []
        self.computed: list[dict[str, torch.Tensor]] = []
        self.mask: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        masks = MaskKeeper.of(trainer).masks
        self.latent.append({k.name: k.parameter.detach().clone() for k in masks})
        self.score.append({k.name: k.slots["score"].clone() for k in masks if k.slots})
        self.computed.append({k.name: k.computed.clone() for k in masks})
        self.mask.append({k.name: k.mask.clone() for k in masks})


class Validated(TinyModel):
    """Remembers what validation computes with."""

    used: list[torch.Tensor]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.used.append(self.net[5].weight.detach().clone())

    def val_dataloader(self) -> Any:
        return Batches(1)


def start_weights() -> dict[str, torch.Tensor]:
    return fit([], max_epochs=0).model.state_dict()


# What the paper promises --------------------------------------------------------------


def test_sparse_weights_never_move():
    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    before, watch = start_weights(), Watch()
    result = fit([Supermask(), watch], lambda: TinyModel(optimizer=decaying))
    for latent in watch.latent:
        assert all(torch.equal(latent[name], before[name]) for name in SPARSE)
    for name in SPARSE:
        assert torch.equal(result.weights[name], before[name] * result.masks[name])
    assert not torch.equal(result.weights["net.5.bias"], before["net.5.bias"])
    assert 0.3 * NUMEL < result.live < 0.7 * NUMEL


@pytest.mark.parametrize("chance", [0.6, 0.9])
def test_every_step_computes_with_a_new_draw(chance):
    watch = Watch()
    fit([Supermask(initial_probability=chance, lr_scale=1e-9), watch])
    draws = torch.stack([at["net.5.weight"] != 0 for at in watch.computed]).float()
    assert draws.mean().item() == pytest.approx(chance, abs=0.01)  # of 49152 draws
    # independent from step to step: the variance of the sums of 24 draws says so
    assert draws.sum(0).var().item() == pytest.approx(24 * chance * (1 - chance), rel=0.15)
    for at, latent in zip(watch.computed, watch.latent, strict=True):
        drawn = at["net.5.weight"] != 0
        assert torch.equal(at["net.5.weight"], latent["net.5.weight"] * drawn)


def test_all_batches_of_a_step_have_one_draw():
    watch = Watch()
    fit([Supermask(), watch], accumulate_grad_batches=2)
    computed = [at["net.5.weight"] for at in watch.computed]
    for first, second in zip(computed[::2], computed[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(computed[0], computed[2])


@pytest.mark.parametrize("rescale", [False, True])
def test_gradient_of_a_score(rescale):
    generator = torch.Generator().manual_seed(0)
    weight, grad, score = (torch.randn(6, 5, generator=generator) for _ in range(3))
    drawn = torch.rand(6, 5, generator=generator) < 0.5
    dense = torch.ones(6, 5, dtype=torch.bool)
    layer = Layer("w", weight, dense, grad, slots={"score": score, "drawn": drawn})
    method = Supermask(rescale=rescale)
    scale = 30 / int(drawn.sum()) if rescale else 1
    torch.testing.assert_close(method.effective(layer), weight * drawn * scale)
    found = method.gradients(layer)
    chance = score.sigmoid()
    torch.testing.assert_close(found["score"], grad * weight * scale * chance * (1 - chance))
    assert found["weight"] is None
    live = 30 / int((score > 0).sum()) if rescale else 1
    torch.testing.assert_close(method.evaluated(layer), weight * (score > 0) * live)


def test_an_empty_draw_is_no_division_by_zero():
    slots = {"score": torch.full((2, 2), -9.0), "drawn": torch.zeros(2, 2, dtype=torch.bool)}
    layer = Layer("w", torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), slots=slots)
    method = Supermask(rescale=True)
    assert not method.effective(layer).any()
    assert not method.evaluated(layer).any()


def test_a_good_mask_is_found_though_nothing_else_is_trained():
    class Frozen(TinyModel):
        def __init__(self):
            super().__init__(
                nn.Sequential(nn.Flatten(), nn.Linear(36, 256), nn.ReLU(), nn.Linear(256, 4))
            )
            for parameter in self.parameters():
                parameter.requires_grad_(parameter.ndim > 1)

    def loss(**options):
        method = Supermask(rescale=True, weight_init=signed_constant("std"), **options)
        found = fit([method], Frozen, max_epochs=8)
        return sum(found.model.loss(batch).item() for batch in Batches())

    assert loss() < 0.7 * loss(lr_scale=1e-9, initial_probability=0.51)


def test_rescaled_weights_are_what_files_hold():
    before = start_weights()
    result = fit([Supermask(rescale=True)])
    for name in SPARSE:
        mask = result.masks[name]
        scale = mask.numel() / int(mask.sum())
        torch.testing.assert_close(result.weights[name], before[name] * mask * scale)


def test_start_values():
    before, watch = start_weights(), Watch()
    fit([Supermask(weight_init=signed_constant("std")), watch], max_epochs=1)
    for name in SPARSE:
        start = before[name].sign() * before[name].std(correction=0)
        torch.testing.assert_close(watch.latent[0][name], start)


def test_draws_follow_the_seed():
    def draws(seed):
        watch = Watch()
        fit([Supermask(seed=seed), watch], max_epochs=1)
        return watch.computed

    one, again, other = draws(1), draws(1), draws(2)
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a["net.5.weight"], b["net.5.weight"])
        assert not torch.equal(a["net.5.weight"], c["net.5.weight"])


# With others --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
def test_resume(step, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        method = Supermask(rescale=True, weight_init=signed_constant())
        return fit([method, saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_files_are_plain_and_hold_what_validation_sees(tmp_path):
    Validated.used = []
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit([Supermask(), watch, saver], Validated, enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    for name in SPARSE:
        likely = watch.score[16][name] > 0
        assert torch.equal(weights[name], watch.latent[16][name] * likely)
        assert not torch.equal(watch.computed[16][name], weights[name])  # a draw is another
    assert torch.equal(Validated.used[-2], weights["net.5.weight"])


def test_rigl_goes_on_where_it_ends():
    watch = Watch()
    methods = [Supermask(update_end=0.5), RigL(update_start=0.5, update_interval=4)]
    result = fit([*methods, watch], max_epochs=4)
    live = sum(result.history[15][1].values())
    assert {sum(counts.values()) for _, counts in result.history[15:]} == {live}
    for name in SPARSE:
        assert torch.equal(watch.latent[15][name], watch.latent[0][name])
        assert not watch.latent[17][name][~watch.mask[17][name]].any()  # in place from then on
        assert not torch.equal(watch.latent[17][name], watch.latent[16][name])
    assert result.changes > 15  # every step of the first half, and RigL's


def test_masks_of_others_are_never_left():
    result = fit([StaticSparse(0.4), Supermask(weight_init=signed_constant())])
    allowed = fit([StaticSparse(0.4)]).masks
    for name in SPARSE:
        assert not (result.masks[name] & ~allowed[name]).any()
    assert 0 < result.live < 0.3 * NUMEL


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"model": lambda: ManualModel()},
        {"model": lambda: ManualModel(raw=True)},
    ],
)
def test_however_it_is_trained(options):
    watch = Watch()
    model = options.pop("model", TinyModel)
    result = fit([Supermask(), watch], model, **options)
    assert result.changes > 5
    for name in SPARSE:
        assert torch.equal(watch.latent[-1][name], watch.latent[0][name])


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"rescale": 1}, TypeError, r"rescale=1\): must be True or False"),
        ({"initial_probability": 1}, ValueError, "initial_probability must be above 0 and below 1"),
        ({"initial_probability": "p"}, TypeError, "initial_probability must be a number"),
        ({"lr_scale": 0}, ValueError, r"lr_scale=0\): lr_scale must be above 0"),
        ({"momentum": 1}, ValueError, r"momentum=1.*below 1"),
        ({"weight_init": "signed"}, TypeError, "must be a function, such as signed_constant"),
        ({"update_start": -1}, ValueError, "update_start"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^Supermask.*{message}"):
        Supermask(**bad)


def test_single_weights_only():
    with pytest.raises(ValueError, match=r"^Supermask: net.*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), Supermask()])
