"""DNW, DPF, SR-STE and Top-KAST: what they have in common, and each against a plain loop."""

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparsity import GMP, NM, DensityMonitor, RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.dnw import DNW
from lightning_sparsity.callbacks.learned.dpf import DPF
from lightning_sparsity.callbacks.learned.sr_ste import SRSTE
from lightning_sparsity.callbacks.learned.top_kast import TopKAST
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.structures import Layout, Unstructured
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def dnw(density=0.3, **options):
    return DNW(density, **options)


def dpf(density=0.3, **options):
    return DPF(density, **{"update_interval": 4, **options})


def sr_ste(density=0.3, **options):
    return SRSTE(density, **{"structure": Unstructured(), "exclude": (), **options})


def top_kast(density=0.3, **options):
    return TopKAST(density, **options)


METHODS = [dnw, dpf, sr_ste, top_kast]
each = pytest.mark.parametrize("make", METHODS)


# --------------------------------------------------------------- a plain loop for each


def largest(weight, count):
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


@dataclass
class Plain:
    """DNW, written down once more in plain torch; the others change a little of it."""

    density: float = 0.25
    every: int = 1
    to_the_end: bool = False

    def choose(self, weights, progress):
        return [largest(w, round(self.density * w.numel())) for w in weights]

    def gradient(self, place, weight, mask, grad):
        return grad

    def still(self, place):
        """What does not move in a step."""

    def train(self, model, optimizer, batches):
        weights = [p for p in model.parameters() if p.ndim > 1]
        masks = self.choose([w.detach() for w in weights], 0)
        for step, batch in enumerate(batches, start=1):
            latent = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w, mask in zip(weights, masks, strict=True):
                    w.mul_(mask)
            optimizer.zero_grad()
            model.loss(batch).backward()
            with torch.no_grad():
                for i, w in enumerate(weights):
                    w.copy_(latent[i])
                    w.grad = self.gradient(i, latent[i], masks[i], w.grad)
            optimizer.step()
            for i, w in enumerate(weights):
                if (still := self.still(i)) is not None:
                    w.data[still] = latent[i][still]
                    optimizer.state[w]["momentum_buffer"][still] = 0
            if step % self.every == 0 and (self.to_the_end or step < len(batches)):
                masks = self.choose([w.detach() for w in weights], step / len(batches))
        return [w.detach() * mask for w, mask in zip(weights, masks, strict=True)], masks


class PlainDPF(Plain):
    def choose(self, weights, progress):
        density = self.density + (1 - self.density) * (1 - progress) ** 3
        together = torch.cat([w.flatten() for w in weights])
        parts = largest(together, round(density * together.numel())).split(
            [w.numel() for w in weights]
        )
        return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


class PlainSRSTE(Plain):
    def gradient(self, place, weight, mask, grad):
        return grad + 0.05 * weight * ~mask


class PlainTopKAST(Plain):
    def choose(self, weights, progress):
        self.trained = [largest(w, round((self.density + 0.125) * w.numel())) for w in weights]
        return super().choose(weights, progress)

    def still(self, place):
        return ~self.trained[place]

    def gradient(self, place, weight, mask, grad):
        penalty = 0.05 * weight * (mask + ~mask / self.density)
        return (grad + penalty) * self.trained[place]


def no_noise():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def decaying(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (DNW(0.25), Plain()),
        (DNW(0.25, update_interval=5), Plain(every=5)),
        (DPF(0.25, update_interval=4), PlainDPF(every=4, to_the_end=True)),
        (SRSTE(0.25, structure=Unstructured(), exclude=(), decay=0.05), PlainSRSTE()),
        (TopKAST(0.25, exploration=0.125, decay=0.05), PlainTopKAST()),
        (TopKAST(0.25, exploration=0.125, decay=0.05, update_interval=6), PlainTopKAST(every=6)),
    ],
    ids=["DNW", "DNW-5", "DPF", "SRSTE", "TopKAST", "TopKAST-6"],
)
def test_training_is_that_of_a_plain_loop(method, plain):
    result = fit([method], lambda: TinyModel(no_noise(), decaying))
    pl.seed_everything(3, verbose=False)
    model = TinyModel(no_noise(), decaying)
    weights, masks = plain.train(model, decaying(model.parameters()), [*Batches()] * 3)
    assert result.changes > 2
    for name, weight, mask in zip(["net.1.weight", "net.3.weight"], weights, masks, strict=True):
        assert torch.equal(result.masks[name], mask)
        torch.testing.assert_close(result.weights[name], weight, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------- in every training


class Watch(Callback):
    """Masks and weights as every forward pass has them."""

    def __init__(self):
        self.masks: list[dict[str, Any]] = []
        self.latent: list[dict[str, Any]] = []
        self.computed: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kept = list(MaskKeeper.of(trainer).masks)
        self.masks.append({k.name: k.mask.clone() for k in kept})
        self.latent.append({k.name: k.parameter.detach().clone() for k in kept})
        self.computed.append({k.name: k.module.weight.detach().clone() for k in kept})


@each
def test_layers_compute_with_the_live_weights(make):
    watch = Watch()
    result = fit([make(), watch, DensityMonitor()])
    assert result.live == round(0.3 * NUMEL)
    back = 0
    for masks, latent, computed in zip(watch.masks, watch.latent, watch.computed, strict=True):
        for name, mask in masks.items():
            assert torch.equal(computed[name], latent[name] * mask)
            assert latent[name].count_nonzero() > 0.99 * mask.numel()  # they live on, latent
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        back += sum(int((after[name] & ~before[name]).sum()) for name in after)
    assert back > 10  # what was pruned comes back
    for name, mask in result.masks.items():
        assert torch.equal(mask, result.weights[name] != 0)


@pytest.mark.parametrize("make", [dnw, sr_ste, top_kast])
def test_every_forward_pass_has_the_largest_weights_of_the_moment(make):
    watch = Watch()
    fit([make(), watch])
    for masks, latent in zip(watch.masks, watch.latent, strict=True):
        for name, mask in masks.items():
            assert torch.equal(mask, largest(latent[name], int(mask.sum()))), name


@each
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_stopping_and_resuming_changes_no_bit(make, tmp_path):
    def run(**options):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([make(), saver], enable_checkpointing=True, **options)

    whole = run()
    for step in (8, 12):  # the end of an epoch, and within one
        rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
        rest.assert_equal(whole)
        assert rest.history == whole.history[step:]


@each
def test_the_file_holds_the_effective_weights(make, tmp_path):
    class Computed(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept = MaskKeeper.of(trainer).masks
            self.weights = {k.name: k.module.weight.detach().clone() for k in kept}

    computed = Computed()
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([make(), computed, saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    TinyModel().load_state_dict(file, strict=True)
    assert list(file) == list(TinyModel().state_dict())
    for name, mask in result.masks.items():
        assert torch.equal(file[name], computed.weights[name])
        assert torch.equal(file[name] != 0, mask)


@each
def test_density_one_is_no_callback(make):
    sparse, dense = fit([make(1.0)]), fit([])
    sparse.masks = {}
    sparse.assert_equal(dense)


@each
def test_after_the_window_the_mask_stays(make):
    watch = Watch()
    result = fit([make(update_end=0.5), watch])
    half = len(result.history) // 2
    assert len({digest for digest, _ in result.history[:half]}) > 1
    assert len({digest for digest, _ in result.history[half - 1 :]}) == 1
    assert result.live == round(0.3 * NUMEL)
    for masks, latent in zip(watch.masks[half:], watch.latent[half:], strict=True):
        assert not any(latent[name][~mask].any() for name, mask in masks.items())


@each
def test_hands_over_to_rigl(make):
    result = fit([make(update_end=0.5), RigL(update_start=0.5, update_interval=2, update_end=1.0)])
    half = len(result.history) // 2
    assert {sum(live.values()) for _, live in result.history[half:]} == {round(0.3 * NUMEL)}
    assert len({digest for digest, _ in result.history[:half]}) > 1
    assert len({digest for digest, _ in result.history[half:]}) > 3


@each
def test_begins_dense_where_the_window_does(make):
    watch = Watch()
    result = fit([make(update_start=0.5), watch])
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in watch.masks]
    assert set(counts[:12]) == {NUMEL}
    assert counts[-1] < NUMEL
    assert result.live == round(0.3 * NUMEL)
    dense = Watch()
    fit([StaticSparse(1.0), dense])
    for ours, theirs in zip(watch.latent[:13], dense.latent[:13], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@each
@pytest.mark.parametrize("first", [StaticSparse(0.5), GMP(0.5, update_interval=2, update_end=0.3)])
def test_found_masks_are_never_left(make, first):
    watch = Watch()
    start = 0 if isinstance(first, StaticSparse) else 0.5
    result = fit([copy.deepcopy(first), make(update_start=start), watch])
    found = watch.masks[0 if start == 0 else 11]
    widest = found if start else fit([StaticSparse(0.5)], max_epochs=1).masks
    assert result.live == round(0.3 * NUMEL)
    assert result.changes > 2
    for name, mask in result.masks.items():
        assert not (mask & ~widest[name]).any()


@each
def test_more_than_was_found_is_refused(make):
    with pytest.raises(MisconfigurationException, match="only prunes"):
        fit([StaticSparse(0.2), make(0.5)])


@each
def test_whole_rows(make):
    result = fit([make(0.5, structure=Rows())])
    rows = 0
    for mask in result.masks.values():
        assert torch.equal(mask.flatten(1).any(1), mask.flatten(1).all(1))
        rows += int(mask.flatten(1).any(1).sum())
    assert rows == (8 + 16 + 4) // 2


@each
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8)])
def test_patterns(make, pattern):
    result = fit([make(None, structure=pattern, exclude="net.0")])
    assert result.changes > 2
    for mask in result.masks.values():
        assert (pattern.group(mask, Layout()).sum(1) == pattern.n).all()


@each
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
)
def test_ways_to_train(make, options):
    data = None
    if options.get("precision") == "64-true":
        data = Doubles()
    result = fit([make()], data=data, **options)
    assert result.live == round(0.3 * NUMEL)
    assert result.changes > 2


class Doubles(Batches):
    def __iter__(self):
        return ((x.double(), y) for x, y in super().__iter__())


@each
@pytest.mark.parametrize("raw", [False, True])
def test_two_optimizers_by_hand(make, raw):
    result = fit([make(update_end=20)], lambda: ManualModel(raw=raw))
    assert result.live == round(0.3 * NUMEL)
    assert result.changes > 2


@pytest.mark.parametrize(
    "method",
    [TopKAST(0.3, decay=0.5), SRSTE(0.3, decay=0.5, structure=Unstructured(), exclude=())],
    ids=["TopKAST", "SRSTE"],
)
def test_what_is_added_to_gradients_is_scaled_as_they_are(method):
    def run(fused):
        def make(parameters):  # a fused optimizer takes the scale out of the gradients itself
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=fused)

        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        return fit([method], lambda: TinyModel(optimizer=make), plugins=[precision])

    fused, plain = run(True), run(False)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(fused.weights[name], weight, rtol=1e-3, atol=1e-5)


@each
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"density": 1.5}, ValueError, r"\(density=1.5\): density must lie in \(0, 1\]; for 90%"),
        ({"density": "0.1"}, TypeError, r"\(density='0.1'\): density must be a number"),
        ({"update_interval": 0}, ValueError, "update_interval=0 must be a positive number"),
        ({"update_end": 1}, ValueError, "update_end=1 would be the first optimizer step; write"),
        ({"structure": "rows"}, TypeError, r"\(structure='rows'\): must be a structure such as"),
        ({"distribution": 3}, TypeError, r"\(distribution=3\): must be a distribution such as"),
        ({"seed": 1.5}, TypeError, r"\(seed=1.5\): must be an int or None"),
    ],
)
def test_bad_arguments(make, bad, error, message):
    with pytest.raises(error, match=rf"^{type(make()).__name__}.*{message}"):
        make(**bad)


@each
def test_a_density_is_needed(make):
    with pytest.raises(ValueError, match=r"density=None\).*density=0.1"):
        fit([make(None)])
