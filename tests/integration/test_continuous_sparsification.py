"""Continuous sparsification: soft masks that harden into a ticket."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import RigL, StaticSparse
from lightning_sparsity.callbacks.learned.continuous_sparsification import ContinuousSparsification
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.structures import Rows
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit, quiet_trainer

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def quick(**options):
    """Prunes within 24 steps."""
    return ContinuousSparsification(**{"s_init": 2e-3, "lam": 5e-4, **options})


class Watch(Callback):
    """What the layers hold after every batch."""

    def __init__(self):
        self.score, self.temperature, self.ticket, self.latent, self.soft = [], [], [], [], []

    def on_train_batch_end(self, trainer, *args):
        kept = list(MaskKeeper.of(trainer).masks)
        if "score" in kept[0].slots:
            self.score.append([k.slots["score"].clone() for k in kept])
            self.temperature.append(float(kept[0].slots["temperature"]))
        self.ticket.append({k.name: k.weight.clone() for k in kept})
        self.soft.append({k.name: k.computed.clone() for k in kept})
        self.latent.append({k.name: k.parameter.detach().clone() for k in kept})


def test_soft_masks_in_training_and_the_ticket_at_the_end():
    watch = Watch()
    result = fit([quick(), watch])
    assert 0 < result.live < 0.9 * NUMEL
    scale = 1 / torch.tensor(2e-3).sigmoid()
    for place, (name, latent) in enumerate(watch.latent[-1].items()):
        score = watch.score[-1][place]
        soft = latent * (watch.temperature[-1] * score).sigmoid() * scale
        torch.testing.assert_close(watch.soft[-1][name], soft)
        assert int((watch.soft[-1][name] != 0).sum()) > int((score > 0).sum())
        assert torch.equal(result.masks[name], score > 0)
        torch.testing.assert_close(result.weights[name], latent * (score > 0) * scale)
        assert torch.equal(result.weights[name], watch.ticket[-1][name])


def test_weights_off_the_ticket_learn_while_their_masks_are_soft():
    def plain(parameters):  # no momentum, no decay: what moves is moved by the loss
        return torch.optim.SGD(parameters, lr=0.1)

    watch = Watch()
    fit([quick(s_init=-1e-3), watch], lambda: TinyModel(optimizer=plain))
    before, after = watch.latent[0]["net.5.weight"], watch.latent[1]["net.5.weight"]
    off = (watch.ticket[0]["net.5.weight"] == 0) & (watch.ticket[1]["net.5.weight"] == 0)
    assert (before != after)[off].any()


def test_the_temperature_rises_from_epoch_to_epoch():
    watch = Watch()
    fit([quick(final_temperature=100), watch])
    # after the last step of an epoch the slot has the temperature of the next
    assert watch.temperature == pytest.approx([1.0] * 7 + [10.0] * 8 + [100.0] * 9)


def test_the_temperature_rises_in_every_step_where_epochs_are_not_known():
    watch = Watch()
    fit([quick(final_temperature=100, update_end=20), watch])
    assert watch.temperature[:19] == pytest.approx([100 ** (step / 20) for step in range(1, 20)])
    watch = Watch()
    fit([quick(final_temperature=100), watch], max_epochs=-1, max_steps=10)
    assert watch.temperature == pytest.approx([100 ** (step / 10) for step in range(1, 11)])


def test_the_window_counts_epochs_of_its_own():
    method = quick(final_temperature=100, update_start=0.25, update_end=0.75)
    method.setup(quiet_trainer([method], max_epochs=6), TinyModel(), "fit")
    at = [method.temperature(step / 24) for step in (0, 7, 8, 15, 16, 23, 24)]
    assert at == pytest.approx([1, 1, 10, 10, 100, 100, 100])
    uneven = quick(final_temperature=100, update_end=0.5)
    uneven.setup(quiet_trainer([uneven], max_epochs=3), TinyModel(), "fit")
    assert [uneven.temperature(step / 12) for step in (0, 7, 8, 12)] == [1, 1, 100, 100]


def test_every_round_begins_cool_and_keeps_what_is_pruned():
    watch = Watch()
    fit([quick(rounds=2, final_temperature=100), watch], max_epochs=4)
    assert watch.temperature == pytest.approx([1.0] * 7 + [100.0] * 8 + [1.0] * 8 + [100.0] * 9)
    before, after = watch.score[14], watch.score[15]
    for old, new in zip(before, after, strict=True):
        # one step of training lies between the two, then the new round begins
        assert bool((new <= 2e-3).all())
        pruned = old < -0.02
        assert pruned.any()
        assert bool((new[pruned] < -1).all())


def test_scores_differ_from_those_of_one_round_only_from_the_second_on():
    one, two = Watch(), Watch()
    fit([quick(final_temperature=100), one], max_epochs=2)
    fit([quick(rounds=2, final_temperature=100), two], max_epochs=4)
    for mine, other in zip(one.score[:15], two.score[:15], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("sparser", [{"lam": 1e-3}, {"s_init": 2e-4}, {"lr_scale": 2.0}], ids=str)
def test_what_makes_it_sparser(sparser):
    assert fit([quick(**sparser)]).live < fit([quick()]).live


def test_masks_that_are_full_for_good_are_no_callback():
    with_callback, without = fit([ContinuousSparsification(s_init=100)]), fit([])
    assert all(mask.all() for mask in with_callback.masks.values())
    with_callback.masks = {}
    with_callback.assert_equal(without)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
@pytest.mark.parametrize("rounds", [1, 2])
def test_resume(step, rounds, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([quick(rounds=rounds), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_files_and_validation_have_the_ticket(tmp_path):
    class Validated(TinyModel):
        def validation_step(self, batch, batch_idx):
            seen.append({k: v.clone() for k, v in self.state_dict().items()})
            used.append(self.net[5].weight.detach().clone())

        def val_dataloader(self):
            return Batches(1)

    seen, used, watch = [], [], Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    result = fit(
        [quick(), watch, saver],
        Validated,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    for name, ticket in watch.ticket[15].items():
        assert torch.equal(weights[name], ticket)
        assert torch.equal(seen[1][name], ticket)
        assert (ticket == 0).any()
    assert torch.equal(used[1], watch.ticket[15]["net.5.weight"])
    assert torch.equal(used[2], result.weights["net.5.weight"])


def test_hands_over_to_rigl():
    result = fit([quick(update_end=0.5), RigL(update_start=0.5, update_interval=4)], max_epochs=6)
    counts = [live for _, live in result.history]
    assert counts[23] == counts[-1]
    assert 0 < sum(counts[-1].values()) < NUMEL
    assert result.history[23][0] != result.history[-1][0]


def test_trains_the_ticket_on_after_its_window():
    watch = Watch()
    result = fit([quick(update_end=0.5), watch], max_epochs=6)
    for name, mask in result.masks.items():
        assert torch.equal(watch.latent[23][name], watch.ticket[23][name])
        assert torch.equal(mask, watch.latent[23][name] != 0)
        assert not torch.equal(result.weights[name], watch.latent[23][name])


def test_scores_below_zero_are_no_alarm_while_soft_masks_live():
    result = fit([quick(s_init=-1e-3, lam=0.0)])  # no warning: it would be an error
    assert sum(result.history[0][1].values()) == 0 < result.live


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_an_empty_ticket_is_warned_of(end):
    message = "ContinuousSparsification: net.5.weight has no live weight left"
    with pytest.warns(UserWarning, match=message):
        fit([quick(s_init=-5.0, lam=0.0, include="net.5", update_end=end)])


def test_stays_inside_the_masks_it_finds():
    result, begun = fit([StaticSparse(0.5), quick()]), fit([StaticSparse(0.5)])
    assert 0 < result.live < begun.live
    for name, mask in result.masks.items():
        assert not (mask & ~begun.masks[name]).any()


def test_pickles():
    method = quick(rounds=2)
    method.setup(quiet_trainer([method], max_epochs=8), TinyModel(), "fit")
    copy = pickle.loads(pickle.dumps(method))
    assert [copy.temperature(n / 9) for n in range(10)] == [
        method.temperature(n / 9) for n in range(10)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"max_epochs": 1},
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
        ({"lam": -1e-8}, ValueError, r"lam=-1e-08\): lam must be at least 0"),
        ({"lam": None}, TypeError, "lam must be a number"),
        ({"s_init": float("inf")}, ValueError, "s_init must be finite"),
        ({"final_temperature": 0.5}, ValueError, "final_temperature must be at least 1"),
        ({"rounds": 0}, ValueError, r"rounds=0\): must be at least 1"),
        ({"rounds": 1.5}, TypeError, "must be an int >= 1"),
        ({"lr_scale": 0}, ValueError, "lr_scale must be above 0"),
        ({"momentum": 1.0}, ValueError, r"momentum=1.0\): must be below 1"),
        ({"update_end": 1.5}, ValueError, "update_end"),
        ({"seed": "3"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^ContinuousSparsification.*{message}"):
        ContinuousSparsification(**bad)


def test_masks_of_whole_units_are_refused():
    with pytest.raises(ValueError, match=r"^ContinuousSparsification: net.0.weight .*single"):
        fit([StaticSparse(0.5, structure=Rows()), quick()])
