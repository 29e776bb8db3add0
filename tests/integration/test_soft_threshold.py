"""STR: weights shrink by a threshold that weight decay sets free."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import GMP, RigL, StaticSparse
from lightning_sparsity.callbacks.learned.soft_threshold import STR
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.structures import Layout, Rows
from lightning_sparsity.testing import ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def decaying(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-3)


def model():
    return TinyModel(optimizer=decaying)


def quick(**options):
    """Prunes within 24 steps."""
    return STR(**{"s_init": -6.0, "weight_decay": 0.1, **options})


class Watch(Callback):
    """What the layers hold after every batch."""

    def __init__(self):
        self.s, self.effective, self.latent = [], [], []

    def on_train_batch_end(self, trainer, *args):
        kept = list(MaskKeeper.of(trainer).masks)
        self.s.append([k.slots["s"].clone() for k in kept if "s" in k.slots])
        self.effective.append({k.name: k.weight.clone() for k in kept})
        self.latent.append({k.name: k.parameter.detach().clone() for k in kept})


def test_weights_die_and_what_is_left_is_shrunk():
    watch = Watch()
    result = fit([quick(), watch], model)
    counts = [sum(live.values()) for _, live in result.history]
    assert counts[0] > 0.9 * NUMEL > 0.5 * NUMEL > counts[-1] > 0
    assert len(set(counts)) > 10  # it emerges, step by step
    for place, (name, latent) in enumerate(watch.latent[-1].items()):
        threshold = watch.s[-1][place].sigmoid()
        shrunk = latent.sign() * (latent.abs() - threshold).clamp(min=0)
        assert torch.equal(watch.effective[-1][name], shrunk)
        assert torch.equal(result.weights[name], shrunk)
        assert torch.equal(result.masks[name], latent.abs() > threshold)
        assert (latent[~result.masks[name]] != 0).any()
    assert len({float(s) for s in watch.s[-1]}) == 3  # every layer has learned its own


def test_far_below_zero_only_weight_decay_moves_s():
    watch = Watch()
    fit([STR(s_init=-500, momentum=0.8), watch], model)
    s = torch.tensor(-500.0)
    speed = torch.zeros(())
    for found in watch.s:
        speed = 0.8 * speed + 5e-3 * s
        s = s - 0.05 * speed
        torch.testing.assert_close(torch.stack(found), s.expand(3), rtol=1e-6, atol=0)


def test_weight_decay_follows_that_of_the_weight_group_by_group():
    def groups(parameters):
        parameters = list(parameters)
        return torch.optim.SGD(
            [{"params": parameters[:4], "weight_decay": 5e-3}, {"params": parameters[4:]}], lr=0.05
        )

    watch = Watch()
    fit([STR(s_init=-500), watch], lambda: TinyModel(optimizer=groups))
    conv, hidden, last = watch.s[-1]
    assert conv > -500
    assert hidden == last == -500
    given = Watch()
    fit([STR(s_init=-500, weight_decay=5e-3), given], lambda: TinyModel(optimizer=groups))
    assert given.s[-1] == [conv] * 3


def test_more_decay_is_sparser():
    live = [fit([quick(weight_decay=decay)], model).live for decay in (0.01, 0.05, 0.1)]
    assert live[0] > live[1] > live[2]


def test_a_threshold_of_zero_is_no_callback():
    with_callback, without = fit([STR()], model), fit([], model)
    assert all(mask.all() for mask in with_callback.masks.values())
    with_callback.masks = {}
    with_callback.assert_equal(without)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: torch.optim.Adam(p), None],
    ids=["sgd", "adam", "default"],
)
def test_no_weight_decay_is_an_error_that_says_why(optimizer):
    make = TinyModel if optimizer is None else lambda: TinyModel(optimizer=optimizer)
    message = (
        r"^STR\(weight_decay=None\): the optimizer has no weight decay for net.0.weight .*"
        r"stay at sigmoid\(-3200\) and prune nothing; give the optimizer weight_decay, or STR\("
    )
    with pytest.raises(ValueError, match=message):
        fit([STR()], make)
    with pytest.raises(ValueError, match=message):  # long before its window opens
        fit([STR(update_start=0.5)], make)
    assert fit([quick()], make).live < NUMEL


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
@pytest.mark.parametrize("granularity", ["layer", "output"])
def test_resume(step, granularity, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        method = quick(granularity=granularity)
        return fit([method, saver], model, enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_files_hold_the_shrunk_weights(tmp_path):
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit([quick(), watch, saver], model, enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    for name, effective in watch.effective[19].items():
        assert torch.equal(weights[name], effective)
        assert (effective == 0).any()


def test_hands_over_to_rigl():
    stopped, watch = quick(update_end=0.5), Watch()
    result = fit([stopped, RigL(update_start=0.5, update_interval=4), watch], model, max_epochs=6)
    counts = [live for _, live in result.history]
    assert counts[23] == counts[-1]  # each layer keeps what STR left it
    assert sum(counts[-1].values()) < NUMEL
    assert result.history[23][0] != result.history[-1][0]  # in other places
    for name in result.masks:  # at the end of the window the shrunk weights became the weights
        assert torch.equal(watch.latent[23][name], watch.effective[23][name])


def test_takes_over_from_an_earlier_method_and_stays_inside_its_masks():
    result = fit([StaticSparse(0.5), quick(weight_decay=1e-3)], model)
    assert 0.4 * NUMEL < result.live < round(0.5 * NUMEL)
    begun = fit([StaticSparse(0.5)], model)
    for name, mask in result.masks.items():
        assert not (mask & ~begun.masks[name]).any()
    result = fit([GMP(0.6, update_interval=2, update_end=0.5), quick(update_start=0.5)], model)
    assert 0 < result.live < 0.6 * NUMEL


def test_before_its_window_weights_are_dense():
    result = fit([quick(update_start=0.5)], model)
    counts = [sum(live.values()) for _, live in result.history]
    assert counts[:11] == [NUMEL] * 11
    assert counts[-1] < NUMEL


def test_one_threshold_per_neuron():
    watch = Watch()
    result = fit([quick(granularity="output"), watch], model)
    assert [tuple(s.shape) for s in watch.s[-1]] == [(8,), (16,), (4,)]
    assert len(set(watch.s[-1][1].tolist())) > 8
    live = result.masks["net.5.weight"].sum(1)
    assert len(set(live.tolist())) > 4


def test_thresholds_of_output_units_find_theirs_in_grouped_and_transposed_weights():
    weight = torch.ones(4, 3, 2)  # two groups of two inputs, three outputs each
    layout = Layout(groups=2, transposed=True)
    s = torch.tensor([0.0, 50.0, 0.0, 0.0, 0.0, 50.0])  # the second and the last output die
    layer = Layer("w", weight, weight > 0, layout=layout, slots={"s": s})
    live = quick(granularity="output").support(layer)
    assert not live[:2, 1].any()
    assert not live[2:, 2].any()
    assert int(live.sum()) == 4 * 3 * 2 - 8


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
    assert 0 < fit([quick()], model, **options).live < NUMEL


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization_with_two_optimizers(raw):
    result = fit([quick()], lambda: ManualModel(raw=raw, optimizer=decaying))
    assert 0 < result.live < NUMEL
    result = fit([STR(s_init=-8)], lambda: ManualModel(raw=raw, optimizer=decaying))
    assert result.live < NUMEL


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"s_init": 0}, ValueError, r"s_init=0\): s_init must be below 0"),
        ({"s_init": float("nan")}, ValueError, "s_init"),
        ({"s_init": "-5"}, TypeError, "s_init must be a number"),
        ({"weight_decay": 0}, ValueError, r"weight_decay=0\): weight_decay must be above 0"),
        ({"weight_decay": True}, TypeError, "weight_decay"),
        ({"granularity": "filter"}, ValueError, 'must be "layer", .* or "output"'),
        ({"momentum": 1}, ValueError, "momentum"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"update_end": 1}, ValueError, "update_end"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^STR.*{message}"):
        STR(**bad)


def test_masks_of_whole_units_are_refused():
    with pytest.raises(ValueError, match=r"^STR: net.0.weight .*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), quick()], model)
