"""EdgePopup: the best subnetwork of weights that stay as they are."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_sparsity import NM, Columns, RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.edge_popup import EdgePopup
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.starts import signed_constant
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SPARSE = ["net.0.weight", "net.5.weight", "net.7.weight"]


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


def start_weights(seed: int = 3) -> dict[str, torch.Tensor]:
    return fit([], max_epochs=0, seed=seed).model.state_dict()


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))


# What the paper promises --------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    ],
    ids=["sgd", "adamw"],
)
def test_sparse_weights_never_move(optimizer):
    before, watch = start_weights(), Watch()
    result = fit([EdgePopup(0.3), watch], lambda: TinyModel(optimizer=optimizer))
    for latent in watch.latent:
        assert all(torch.equal(latent[name], before[name]) for name in SPARSE)
    for name in SPARSE:
        assert torch.equal(result.weights[name], before[name] * result.masks[name])
    assert not torch.equal(result.weights["net.5.bias"], before["net.5.bias"])


def test_live_are_the_largest_scores_of_every_layer_after_every_step():
    watch = Watch()
    result = fit([EdgePopup(0.3), watch])
    for score, mask in zip(watch.score[:-1], watch.mask[:-1], strict=True):
        for name in SPARSE:
            live = int(mask[name].sum())
            assert abs(live - 0.3 * mask[name].numel()) < 1.5
            assert torch.equal(mask[name], top_k([score[name].abs()], live)[0])
    assert result.changes > 10
    # nothing would compute with a choice after the last step
    for name in SPARSE:
        assert torch.equal(watch.mask[-1][name], watch.mask[-2][name])


def test_a_training_is_that_of_plain_torch_with_scores():
    """The same training written down without callbacks, scores straight through."""
    watch = Watch()
    fit([EdgePopup(0.4, lr_scale=2.0, weight_decay=0.01), watch], lambda: TinyModel(net()))
    score = {k: v.clone().requires_grad_() for k, v in watch.score[0].items()}
    weight, mask = watch.latent[0], watch.mask[0]
    torch.manual_seed(0)
    start = fit([], lambda: TinyModel(net()), max_epochs=0).model.state_dict()
    bias = [start[f"net.{i}.bias"].clone().requires_grad_() for i in (1, 3)]
    of_scores = torch.optim.SGD(score.values(), lr=0.1, momentum=0.9, weight_decay=0.01)
    of_biases = torch.optim.SGD(bias, lr=0.05, momentum=0.9)
    for step, (x, y) in enumerate([*Batches()] * 3):
        scored = {k: mask[k] + s.abs() - s.abs().detach() for k, s in score.items()}
        w1, w2 = (weight[k] * scored[k] for k in weight)
        hidden = nn.functional.linear(x.flatten(1), w1, bias[0]).relu()
        loss = nn.functional.cross_entropy(nn.functional.linear(hidden, w2, bias[1]), y)
        for optimizer in (of_scores, of_biases):
            optimizer.zero_grad()
        loss.backward()
        of_scores.step()
        of_biases.step()
        for name, ours in watch.score[step + 1].items():
            torch.testing.assert_close(ours, score[name].detach(), rtol=1e-4, atol=1e-6)
        mask = watch.mask[step + 1]


def test_a_good_subnetwork_is_found_though_nothing_else_is_trained():
    class Frozen(TinyModel):
        def __init__(self):
            super().__init__(
                nn.Sequential(nn.Flatten(), nn.Linear(36, 256), nn.ReLU(), nn.Linear(256, 4))
            )
            for parameter in self.parameters():
                parameter.requires_grad_(parameter.ndim > 1)

    found = fit([EdgePopup(0.5, weight_init=signed_constant())], Frozen, max_epochs=5)
    loss = [found.model.loss(batch).item() for batch in Batches()]
    untrained = fit(
        [EdgePopup(0.5, weight_init=signed_constant(), lr_scale=1e-9)], Frozen, max_epochs=1
    )
    before = [untrained.model.loss(batch).item() for batch in Batches()]
    assert sum(loss) < 0.5 * sum(before)


# Start values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("fan_in", (2 / 128) ** 0.5), ("live_fan_in", (2 / (0.25 * 128)) ** 0.5)],
)
def test_signed_constant(scale, expected):
    before, watch = start_weights(), Watch()
    fit([EdgePopup(0.25, weight_init=signed_constant(scale)), watch], max_epochs=1)
    latent = watch.latent[0]["net.5.weight"]
    assert torch.equal(latent.sign(), before["net.5.weight"].sign())
    torch.testing.assert_close(latent.abs(), torch.full_like(latent, expected))


def test_signed_constant_of_the_layers_own_spread():
    weight = torch.tensor([[3.0, -1.0], [1.0, -3.0]])
    layer = Layer("w", weight, torch.ones(2, 2, dtype=torch.bool))
    (start,) = signed_constant("std")([layer], [4], 0.0)
    torch.testing.assert_close(start.weight, weight.sign() * 5**0.5)
    with pytest.raises(ValueError, match=r'^signed_constant\(scale=.mean.\): scale must be "fan'):
        signed_constant("mean")


def test_scores_start_uniformly_by_fan_in_and_follow_the_seed():
    def scores(**kwargs):
        watch = Watch()
        fit([EdgePopup(0.3, **kwargs), watch], max_epochs=1)
        return watch.score[0]

    found, again, other = scores(seed=1), scores(seed=1), scores(seed=2)
    for name, inputs in zip(SPARSE, (9, 128, 16), strict=True):
        bound = inputs**-0.5
        assert found[name].abs().max() <= bound
        assert found[name].abs().mean() == pytest.approx(bound / 2, rel=0.25)
        assert torch.equal(again[name], found[name])
        assert not torch.equal(other[name], found[name])


# With others --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
def test_resume(step, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        method = EdgePopup(0.3, weight_init=signed_constant("live_fan_in"))
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
    fit([EdgePopup(0.3), watch, saver], Validated, enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    for name in SPARSE:
        assert torch.equal(weights[name], watch.latent[16][name] * watch.mask[16][name])
    assert torch.equal(Validated.used[-2], weights["net.5.weight"])


def test_rigl_goes_on_where_it_ends():
    watch = Watch()
    methods = [EdgePopup(0.3, update_end=0.5), RigL(update_start=0.5, update_interval=4)]
    result = fit([*methods, watch], max_epochs=4)
    live = round(0.3 * NUMEL)
    assert {sum(mask.sum().item() for mask in masks.values()) for masks in watch.mask} == {live}
    assert result.live == live
    for name in SPARSE:  # in place and trained from then on
        assert torch.equal(watch.latent[15][name], watch.latent[0][name])
        assert not watch.latent[17][name][~watch.mask[17][name]].any()
        assert not torch.equal(watch.latent[17][name], watch.latent[16][name])


def test_weights_are_trained_before_it_begins():
    watch = Watch()
    result = fit([EdgePopup(0.3, update_start=8), watch])
    assert not torch.equal(watch.latent[7]["net.5.weight"], watch.latent[0]["net.5.weight"])
    assert all(
        torch.equal(at["net.5.weight"], watch.latent[8]["net.5.weight"]) for at in watch.latent[8:]
    )
    assert result.live == round(0.3 * NUMEL)


@pytest.mark.parametrize("density", [None, 0.2])
def test_masks_of_others_are_never_left(density):
    result = fit([StaticSparse(0.4), EdgePopup(density)])
    allowed = fit([StaticSparse(0.4)]).masks
    for name in SPARSE:
        assert not (result.masks[name] & ~allowed[name]).any()
    assert result.live == round((density or 0.4) * NUMEL)
    assert (result.changes > 0) == (density is not None)  # nothing to choose otherwise


@pytest.mark.parametrize("structure", [Rows(), Columns()], ids=str)
def test_whole_units(structure):
    result = fit([EdgePopup(0.5, structure=structure, exclude="net.0")])
    assert result.changes > 0
    for mask in result.masks.values():
        lines = mask.all(1) | ~mask.any(1) if structure == Rows() else mask.all(0) | ~mask.any(0)
        assert lines.all()


def test_pattern():
    result = fit([EdgePopup(None, structure=NM(1, 4), exclude="net.0")])
    assert result.changes > 0
    assert all((mask.view(-1, 4).sum(1) == 1).all() for mask in result.masks.values())


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"model": lambda: ManualModel()},
        {"model": lambda: ManualModel(raw=True)},
    ],
)
def test_however_it_is_trained(options):
    watch = Watch()
    model = options.pop("model", TinyModel)
    result = fit([EdgePopup(0.3), watch], model, **options)
    assert result.live == round(0.3 * NUMEL)
    assert result.changes > 3
    for name in SPARSE:
        assert torch.equal(watch.latent[-1][name], watch.latent[0][name])


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density=0\): density must lie in \(0, 1\]"),
        ({"density": "0.5"}, TypeError, "density must be a number"),
        ({"lr_scale": 0}, ValueError, r"lr_scale=0\): lr_scale must be above 0"),
        ({"lr_scale": "1"}, TypeError, "lr_scale must be a number"),
        ({"momentum": 1}, ValueError, r"momentum=1.*below 1"),
        ({"momentum": -0.1}, ValueError, r"momentum=-0.1\): momentum must be at least 0"),
        ({"weight_decay": -1}, ValueError, r"weight_decay=-1\): weight_decay must be at least 0"),
        ({"weight_init": 3}, TypeError, r"weight_init=3\): must be a function, such as signed_c"),
        ({"structure": "rows"}, TypeError, "structure"),
        ({"update_interval": 0}, ValueError, "update_interval"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^EdgePopup.*{message}"):
        EdgePopup(**bad)


def test_density_is_needed():
    with pytest.raises(ValueError, match=r"^EdgePopup\(density=None\).*density=0.1"):
        fit([EdgePopup(None)])
