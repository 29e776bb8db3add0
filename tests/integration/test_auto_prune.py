"""AutoPrune: scores with the sign of the weight in their gradient, trained in turns."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.auto_prune import AutoPrune
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SPARSE = ["net.0.weight", "net.5.weight", "net.7.weight"]


def quick(**options: Any) -> AutoPrune:
    """Prunes within 24 steps."""
    return AutoPrune(**{"mu": 0.01, "initial_score": 0.01, **options})


class Watch(Callback):
    """Latent weights, scores and masks before the first step and after every one."""

    def __init__(self) -> None:
        self.latent: list[dict[str, torch.Tensor]] = []
        self.score: list[dict[str, torch.Tensor]] = []
        self.mask: list[dict[str, torch.Tensor]] = []

    def _look(self, trainer: Any) -> None:
        masks = MaskKeeper.of(trainer).masks
        self.latent.append({k.name: k.parameter.detach().clone() for k in masks})
        self.score.append({k.name: k.slots["score"].clone() for k in masks if k.slots})
        self.mask.append({k.name: k.mask.clone() for k in masks})

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if not self.latent:
            self._look(trainer)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._look(trainer)


class Validated(TinyModel):
    """Remembers what validation computes with."""

    used: list[torch.Tensor]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.used.append(self.net[5].weight.detach().clone())

    def val_dataloader(self) -> Any:
        return Batches(1)


# What the paper promises --------------------------------------------------------------


@pytest.mark.parametrize("grad", ["sign", "weight"])
@pytest.mark.parametrize("surrogate", ["leaky_relu", "softplus"])
def test_gradients(grad, surrogate):
    generator = torch.Generator().manual_seed(0)
    weight, slope, score = (torch.randn(6, 5, generator=generator) for _ in range(3))
    dense = torch.ones(6, 5, dtype=torch.bool)
    layer = Layer("w", weight, dense, slope, slots={"score": score})
    method = AutoPrune(mu=0.3, grad=grad, surrogate=surrogate, alternate=False)
    live = score > 0
    assert torch.equal(method.support(layer), live)
    torch.testing.assert_close(method.effective(layer), weight * live)
    step = torch.where(live, 1.0, 0.01) if surrogate == "leaky_relu" else score.sigmoid()
    heard = weight.sign() if grad == "sign" else weight
    found = method.gradients(layer)
    torch.testing.assert_close(found["weight"], slope * live)
    torch.testing.assert_close(found["score"], (slope * heard + 0.3) * step)


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_and_scores_take_turns(steps):
    """One step each, weights first, however many batches a step has."""
    watch = Watch()
    fit([quick(), watch], accumulate_grad_batches=steps)
    at = range(0, 25, steps)
    for step, (before, after) in enumerate(zip(at[:-1], at[1:], strict=True)):
        moved = [
            any(not torch.equal(seen[before][name], seen[after][name]) for name in SPARSE)
            for seen in (watch.latent, watch.score)
        ]
        assert moved == [step % 2 == 0, step % 2 == 1] or after == 24  # baked at the end
    assert step == 24 // steps - 1


def test_without_turns_both_move_in_every_step():
    watch = Watch()
    fit([quick(alternate=False), watch])
    for seen in (watch.latent, watch.score):
        pairs = zip(seen[:23], seen[1:24], strict=True)
        assert all(not torch.equal(a["net.5.weight"], b["net.5.weight"]) for a, b in pairs)


def test_a_larger_penalty_is_sparser():
    live = [fit([quick(mu=mu)]).live for mu in (1e-5, 3e-3, 0.01)]
    assert live[0] > live[1] > live[2]


def test_what_was_pruned_keeps_its_value_and_can_come_back():
    class Turning(TinyModel):
        """A loss that half of the weights raise in the first epoch, and lower afterwards."""

        def __init__(self):
            super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=1e-5))
            self.sign = self.net[5].weight.detach().sign()
            self.sign[8:] = 0

        def loss(self, batch):
            direction = 1 if self.current_epoch == 0 else -1
            return direction * (self.net[5].weight * self.sign).sum()

    watch = Watch()
    options = {"mu": 0.0, "initial_score": 0.005, "surrogate": "softplus", "lr_scale": 200.0}
    fit([AutoPrune(**options, include="net.5.weight"), watch], Turning)
    live = [int(mask["net.5.weight"].sum()) for mask in watch.mask]
    assert (live[0], live[8]) == (2048, 1024)
    assert int((watch.latent[8]["net.5.weight"] != 0).sum()) == 2048
    assert live[-1] > 2000


# With others --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 15])
def test_resume(step, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return fit([quick(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_files_are_plain_and_hold_what_validation_sees(tmp_path):
    Validated.used = []
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit([quick(), watch, saver], Validated, enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    zeros = 0
    for name in SPARSE:
        assert torch.equal(weights[name], watch.latent[16][name] * (watch.score[16][name] > 0))
        zeros += int((weights[name] == 0).sum())
    assert zeros > 100
    assert torch.equal(Validated.used[-2], weights["net.5.weight"])


def test_rigl_goes_on_where_it_ends():
    watch = Watch()
    methods = [quick(update_end=0.5), RigL(update_start=0.5, update_interval=4), watch]
    result = fit(methods, max_epochs=4)
    live = sum(result.history[15][1].values())
    assert 0 < live < NUMEL
    assert {sum(counts.values()) for _, counts in result.history[15:]} == {live}
    for name in SPARSE:
        assert not watch.latent[17][name][~watch.mask[17][name]].any()


def test_masks_of_others_are_never_left():
    result = fit([StaticSparse(0.4), quick()])
    allowed = fit([StaticSparse(0.4)]).masks
    for name in SPARSE:
        assert not (result.masks[name] & ~allowed[name]).any()
    assert 0 < result.live < 0.4 * NUMEL


def test_scores_that_stay_positive_are_no_callback():
    with_callback = fit([AutoPrune(initial_score=100.0, alternate=False)])
    assert all(mask.all() for mask in with_callback.masks.values())
    with_callback.masks = {}
    with_callback.assert_equal(fit([]))


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
    options = dict(options)
    model = options.pop("model", TinyModel)
    result = fit([quick()], model, **options)
    assert result.changes > 2
    assert 0 < result.live < NUMEL


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"mu": -1}, ValueError, r"mu=-1\): mu must be at least 0"),
        ({"mu": "1"}, TypeError, "mu must be a number"),
        ({"initial_score": 0}, ValueError, r"initial_score=0\): initial_score must be above 0"),
        ({"surrogate": "relu"}, ValueError, 'surrogate=.relu.*must be "leaky_relu" or "softplus"'),
        ({"surrogate": ["relu"]}, ValueError, 'must be "leaky_relu" or "softplus"'),
        ({"grad": None}, ValueError, r'grad=None\): must be "sign" or "weight"'),
        ({"alternate": 1}, TypeError, r"alternate=1\): must be True or False"),
        ({"lr_scale": -1}, ValueError, "lr_scale must be above 0"),
        ({"momentum": 1}, ValueError, "below 1"),
        ({"include": 3}, TypeError, "must be a parameter name"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^AutoPrune.*{message}"):
        fit([AutoPrune(**bad)])


def test_single_weights_only():
    with pytest.raises(ValueError, match=r"^AutoPrune: net.*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), AutoPrune()])
