"""Dynamic sparse training by trainable thresholds (DST)."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import RigL, StaticSparse
from lightning_sparsity.callbacks.learned.dynamic_thresholds import DynamicThresholds
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.structures import Rows
from lightning_sparsity.testing import ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def quick(**options):
    """Prunes within 24 steps."""
    return DynamicThresholds(**{"alpha": 0.01, **options})


class Watch(Callback):
    """What the layers hold after every batch."""

    def __init__(self):
        self.threshold, self.effective, self.latent = [], [], []

    def on_train_batch_end(self, trainer, *args):
        kept = list(MaskKeeper.of(trainer).masks)
        self.threshold.append(
            [k.slots["threshold"].clone() for k in kept if "threshold" in k.slots]
        )
        self.effective.append({k.name: k.weight.clone() for k in kept})
        self.latent.append({k.name: k.parameter.detach().clone() for k in kept})


def test_weights_below_the_threshold_of_their_neuron_are_pruned():
    watch = Watch()
    result = fit([quick(), watch])
    assert [tuple(t.shape) for t in watch.threshold[-1]] == [(8,), (16,), (4,)]
    for place, (name, latent) in enumerate(watch.latent[-1].items()):
        threshold = watch.threshold[-1][place].view(-1, *[1] * (latent.ndim - 1))
        assert torch.equal(result.masks[name], latent.abs() > threshold)
        assert torch.equal(result.weights[name], latent * result.masks[name])
    counts = [sum(live.values()) for _, live in result.history]
    assert counts[0] > counts[-1] > 0
    assert counts[-1] < 0.9 * NUMEL
    assert len(set(counts)) > 10


def test_pruned_weights_still_learn_and_come_back():
    def plain(parameters):  # no momentum, no decay: what moves is moved by the loss
        return torch.optim.SGD(parameters, lr=0.1)

    watch = Watch()
    fit([quick(), watch], lambda: TinyModel(optimizer=plain))
    moved = back = 0
    for step in range(1, 24):
        for name, effective in watch.effective[step].items():
            dead = watch.effective[step - 1][name] == 0
            moved += int((watch.latent[step][name] != watch.latent[step - 1][name])[dead].sum())
            back += int((effective != 0)[dead].sum())
    assert moved > 0
    assert back > 0


def test_a_larger_alpha_is_sparser():
    live = [fit([quick(alpha=alpha)]).live for alpha in (1e-4, 0.01, 0.03)]
    assert live[0] > live[1] > live[2]


def test_a_layer_that_is_all_but_empty_gets_thresholds_of_zero_after_the_step():
    result = fit([quick(alpha=1.0, include="net.5"), watch := Watch()])
    thresholds = torch.stack([found[0] for found in watch.threshold])
    fallen = (thresholds[1:] == 0).all(1) & (thresholds[:-1] > 0).any(1)
    assert fallen.any()
    assert all(sum(live.values()) > 0.01 * 2048 for _, live in result.history)


@pytest.mark.parametrize(("live", "reset"), [(1, True), (2, False)])
def test_empty_means_one_percent(live, reset):
    weight = torch.zeros(10, 10)
    weight.view(-1)[:live] = 1.0
    threshold = torch.full((10,), 0.5)
    layer = Layer("w", weight, weight > 0, slots={"threshold": threshold})
    assert quick().settle(layer, 0.5) == {}
    assert bool((threshold == 0).all()) is reset


def test_weight_decay_follows_the_weights_unless_given():
    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    def model():
        return TinyModel(optimizer=decaying)

    followed = fit([quick()], model)
    followed.assert_equal(fit([quick(weight_decay=0.1)], model))
    assert followed.live > fit([quick(weight_decay=0)], model).live  # decay holds thresholds down


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
def test_resume(step, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([quick(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_files_hold_what_the_layers_compute_with(tmp_path):
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit([quick(), watch, saver], enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    for name, effective in watch.effective[19].items():
        assert torch.equal(weights[name], effective)
        assert (effective == 0).any()


def test_hands_over_to_rigl():
    result = fit([quick(update_end=0.5), RigL(update_start=0.5, update_interval=4)], max_epochs=6)
    counts = [live for _, live in result.history]
    assert counts[23] == counts[-1]
    assert 0 < sum(counts[-1].values()) < NUMEL
    assert result.history[23][0] != result.history[-1][0]


def test_stays_inside_the_masks_it_finds():
    result, begun = fit([StaticSparse(0.5), quick()]), fit([StaticSparse(0.5)])
    assert 0 < result.live < begun.live
    for name, mask in result.masks.items():
        assert not (mask & ~begun.masks[name]).any()


def test_one_threshold_per_layer():
    watch = Watch()
    result = fit([quick(granularity="layer"), watch])
    assert [tuple(t.shape) for t in watch.threshold[-1]] == [()] * 3
    assert 0 < result.live < NUMEL


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
)
def test_trainer_options(options):
    assert 0 < fit([quick()], **options).live < NUMEL


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization_with_two_optimizers(raw):
    assert 0 < fit([quick()], lambda: ManualModel(raw=raw)).live < NUMEL


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"alpha": -1e-6}, ValueError, r"alpha=-1e-06\): alpha must be at least 0"),
        ({"alpha": "1e-6"}, TypeError, "alpha must be a number"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
        ({"granularity": "matrix"}, ValueError, 'must be "layer", .* or "output"'),
        ({"granularity": ["layer"]}, ValueError, 'must be "layer", .* or "output"'),
        ({"momentum": 1}, ValueError, "momentum"),
        ({"update_start": -1}, ValueError, "update_start"),
        ({"seed": "3"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^DynamicThresholds.*{message}"):
        DynamicThresholds(**bad)


def test_masks_of_whole_units_are_refused():
    with pytest.raises(ValueError, match=r"^DynamicThresholds: net.0.weight .*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), quick()])
