"""Movement pruning, hard and soft: what moves away from zero stays."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_sparsity import NM, Block, Columns, RigL, Rows, StaticSparse, cosine, cubic, linear
from lightning_sparsity.callbacks.learned.movement import MovementPruning, SoftMovementPruning
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.ops.selection import top_k
from lightning_sparsity.testing import Batches, ManualModel, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SPARSE = ["net.0.weight", "net.5.weight", "net.7.weight"]


def soft(**options: Any) -> SoftMovementPruning:
    """Prunes within 24 steps."""
    return SoftMovementPruning(**{"lam": 10.0, "lr": 0.2, **options})


BOTH = {"hard": lambda **kw: MovementPruning(0.3, **kw), "soft": soft}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))


class Watch(Callback):
    """Latent weights, slots and masks before the first step and after every one."""

    def __init__(self) -> None:
        self.latent: list[dict[str, torch.Tensor]] = []
        self.slots: list[dict[str, dict[str, torch.Tensor]]] = []
        self.mask: list[dict[str, torch.Tensor]] = []

    def _look(self, trainer: Any) -> None:
        masks = MaskKeeper.of(trainer).masks
        self.latent.append({k.name: k.parameter.detach().clone() for k in masks})
        self.slots.append(
            {k.name: {s: t.detach().clone() for s, t in k.slots.items()} for k in masks}
        )
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


@pytest.mark.parametrize("slope", [[-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]], ids=str)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_what_moves_away_from_zero_stays_whatever_its_magnitude(kind, slope):
    weight = torch.tensor([[2.0, 0.5, -2.0, -0.5]])

    class Pulled(TinyModel):
        """A loss with one slope for ever: every weight moves one way."""

        def __init__(self):
            super().__init__(nn.Linear(4, 1, bias=False), lambda p: torch.optim.SGD(p, lr=1e-3))
            with torch.no_grad():
                self.net.weight.copy_(weight)

        def loss(self, batch):
            return (self.net.weight * torch.tensor([slope])).sum()

    methods = {
        "hard": MovementPruning(0.5, include="net.weight"),
        "soft": SoftMovementPruning(lam=0.0, threshold=0.5, include="net.weight"),
    }
    found = fit([methods[kind]], Pulled, max_epochs=1).masks["net.weight"]
    away = -torch.tensor([slope]) * weight > 0  # one large and one small
    assert torch.equal(found, away)
    assert int(found.sum()) == 2


def test_density_is_flat_then_falls_cubically_then_is_flat():
    result = fit([MovementPruning(0.2, warmup=0.25, cooldown=0.25)])
    densities = [sum(counts.values()) / NUMEL for _, counts in result.history]
    assert densities[:6] == [1.0] * 6
    ramp = cubic(1.0, 0.2)
    for step in range(6, 19):
        assert densities[step - 1] == pytest.approx(ramp((step - 6) / 12), abs=1 / NUMEL)
    assert densities[17:] == [round(0.2 * NUMEL) / NUMEL] * 7


def test_hard_is_plain_torch_with_scores():
    """The same training written down without callbacks, scores straight through."""
    watch = Watch()
    fit([MovementPruning(0.2, lr=0.01), watch], lambda: TinyModel(net(), optimizer=adamw))
    start = fit([], lambda: TinyModel(net()), max_epochs=0).model.state_dict()
    parameter = {k: v.clone().requires_grad_() for k, v in start.items()}
    score = {k: torch.zeros_like(v, requires_grad=True) for k, v in start.items() if v.ndim > 1}
    of_scores = torch.optim.AdamW(score.values(), lr=0.01, weight_decay=0.0)
    of_rest = adamw(parameter.values())
    mask = watch.mask[0]
    for step, (x, y) in enumerate([*Batches()] * 3):
        w1, w2 = (parameter[k] * (mask[k] + s - s.detach()) for k, s in score.items())
        hidden = nn.functional.linear(x.flatten(1), w1, parameter["net.1.bias"]).relu()
        out = nn.functional.linear(hidden, w2, parameter["net.3.bias"])
        loss = nn.functional.cross_entropy(out, y)
        for optimizer in (of_scores, of_rest):
            optimizer.zero_grad()
        loss.backward()
        of_scores.step()
        of_rest.step()
        mask = watch.mask[step + 1]
        for name, ours in watch.slots[step + 1].items() if step < 23 else ():
            torch.testing.assert_close(ours["score"], score[name].detach(), rtol=1e-3, atol=1e-5)
            latent = watch.latent[step + 1][name]
            torch.testing.assert_close(latent, parameter[name].detach(), rtol=1e-3, atol=1e-6)
            assert torch.equal(mask[name], top_k([ours["score"]], int(mask[name].sum()))[0])


def test_threshold_and_penalty_rise_together():
    watch = Watch()
    fit([soft(warmup=0.25, cooldown=0.25, threshold=0.2), watch])
    found = [float(slots["net.5.weight"]["threshold"]) for slots in watch.slots[:24]]
    ramp = cubic(0.0, 0.2)
    expected = [ramp((step - 6) / 12) for step in range(24)]
    assert found == pytest.approx(expected)
    assert found[6] == 0 < found[7]

    score = torch.tensor([0.5, -1.0, 2.0, 0.0])
    weight, grad = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.1, 0.2], [0.3, -0.4]])
    for threshold in (0.0, 0.1, 0.2):
        slots = {"score": score, "threshold": torch.tensor(threshold)}
        layer = Layer("w", weight, torch.ones(2, 2, dtype=torch.bool), grad, slots=slots)
        gradients = soft(threshold=0.2).gradients(layer)
        chance = score.sigmoid()
        slope = 10.0 * threshold / 0.2 * chance * (1 - chance) / 4
        torch.testing.assert_close(gradients["score"], (grad * weight).view(-1) + slope)
        torch.testing.assert_close(gradients["weight"], grad)  # all of them are above it


def test_weights_below_the_threshold_get_no_gradient_and_their_scores_do():
    slots = {"score": torch.tensor([-5.0, 1.0]), "threshold": torch.tensor(0.1)}
    weight, grad = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.5, 0.5]])
    layer = Layer("w", weight, torch.ones(1, 2, dtype=torch.bool), grad, slots=slots)
    gradients = soft(lam=0.0).gradients(layer)
    assert gradients["weight"].tolist() == [[0.0, 0.5]]
    assert gradients["score"].tolist() == [1.0, 1.0]


def test_more_penalty_is_sparser_but_never_empty():
    live = [fit([soft(lam=lam)]).live for lam in (0.0, 10.0, 1e4)]
    assert live[0] > live[1] > live[2]
    least = sum(int(0.05 * size) + 1 for size in (72, 2048, 64))
    assert fit([soft(lam=1e4, min_density=0.05)]).live == least
    assert live[2] == 1 + 11 + 1  # int(0.005 n) + 1 of every layer


def test_the_learning_rate_may_be_a_schedule():
    assert MovementPruning(0.5).learning_rate(3e-5, 0.7) == 1e-2
    assert MovementPruning(0.5, lr=linear(1e-2)).learning_rate(3e-5, 0.75) == 2.5e-3
    assert SoftMovementPruning(lr=cosine(0.4)).learning_rate(3e-5, 0.5) == pytest.approx(0.2)


def test_density_one_is_no_callback():
    with_callback, without = fit([MovementPruning(1.0)]), fit([])
    with_callback.masks = {}
    with_callback.assert_equal(without)
    # a threshold that no score falls below
    with_callback = fit([SoftMovementPruning(lam=0.0, threshold=1e-6)])
    assert all(mask.all() for mask in with_callback.masks.values())
    with_callback.masks = {}
    with_callback.assert_equal(without)


# With others --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
@pytest.mark.parametrize("kind", BOTH)
def test_resume(kind, step, tmp_path):
    def run(**kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([BOTH[kind](), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("kind", BOTH)
def test_files_are_plain_and_hold_what_validation_sees(kind, tmp_path):
    Validated.used = []
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit([BOTH[kind](), watch, saver], Validated, enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    bare = TinyModel()
    bare.load_state_dict(weights, strict=True)
    assert list(weights) == list(bare.state_dict())
    zeros = 0
    for name in SPARSE:
        assert torch.equal(weights[name], watch.latent[16][name] * watch.mask[16][name])
        zeros += int((weights[name] == 0).sum())
    assert zeros > 100
    assert torch.equal(Validated.used[-2], weights["net.5.weight"])


@pytest.mark.parametrize("kind", BOTH)
def test_rigl_goes_on_where_it_ends(kind):
    watch = Watch()
    methods = [BOTH[kind](update_end=0.5), RigL(update_start=0.5, update_interval=4), watch]
    result = fit(methods, max_epochs=4)
    live = sum(result.history[15][1].values())
    assert 0 < live < NUMEL
    assert {sum(counts.values()) for _, counts in result.history[15:]} == {live}
    if kind == "hard":
        assert live == round(0.3 * NUMEL)
    for name in SPARSE:
        assert not watch.latent[17][name][~watch.mask[17][name]].any()
        assert not watch.slots[17][name]


@pytest.mark.parametrize("kind", BOTH)
def test_masks_of_others_are_never_left(kind):
    result = fit([StaticSparse(0.4), BOTH[kind]()])
    allowed = fit([StaticSparse(0.4)]).masks
    for name in SPARSE:
        assert not (result.masks[name] & ~allowed[name]).any()
    assert 0 < result.live < 0.4 * NUMEL


@pytest.mark.parametrize("structure", [Rows(), Columns(), Block(2, 4)], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_whole_units(kind, structure):
    watch = Watch()
    fit([BOTH[kind](structure=structure, exclude="net.0"), watch])
    for name, mask in watch.mask[-2].items():
        kept = Layer("w", mask.float(), mask, structure=structure)
        assert torch.equal(structure.expand(kept.units, kept.shape, kept.layout), mask)
        score = watch.slots[-2][name]["score"]
        assert score.shape == (mask.shape if kind == "hard" else (kept.size,))
    assert sum(int(mask.sum()) for mask in watch.mask[-2].values()) < 0.9 * NUMEL


def test_a_pattern_is_for_the_hard_kind():
    result = fit([MovementPruning(structure=NM(1, 4), exclude="net.0")])
    assert all((mask.view(-1, 4).sum(1) == 1).all() for mask in result.masks.values())
    message = r"^SoftMovementPruning\(structure=NM\(n=2, m=4\)\): a threshold does not keep to a"
    with pytest.raises(ValueError, match=message):
        SoftMovementPruning(structure=NM(2, 4))
    with pytest.raises(ValueError, match=r"^SoftMovementPruning: net.5.weight.*MovementPruning"):
        fit([StaticSparse(structure=NM(1, 4), exclude="net.0"), soft(exclude="net.0")])


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
@pytest.mark.parametrize("kind", BOTH)
def test_however_it_is_trained(kind, options):
    options = dict(options)
    model = options.pop("model", TinyModel)
    result = fit([BOTH[kind]()], model, **options)
    assert result.changes > 1
    assert 0 < result.live < NUMEL
    if kind == "hard":
        assert result.live == round(0.3 * NUMEL)


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"lr": 0}, ValueError, r"lr=0\): lr must be above 0"),
        ({"lr": "1e-2"}, TypeError, "lr must be a number"),
        ({"lr": linear(-1.0)}, ValueError, r"lr=linear\(.*: is -1.0 at progress 0.0; lr must lie"),
        ({"lr": linear}, TypeError, "lr must be a number"),
        ({"warmup": -0.1}, ValueError, r"warmup=-0.1\): warmup must lie in \[0, 1\]"),
        ({"cooldown": "no"}, TypeError, "cooldown must be a number"),
        ({"warmup": 0.5, "cooldown": 0.5}, ValueError, "warmup=0.5, cooldown=0.5.*below 1"),
        ({"structure": 3}, TypeError, "structure"),
        ({"update_end": 2.0}, ValueError, "update_end"),
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_bad_arguments(kind, bad, error, message):
    with pytest.raises(error, match=rf"^(Soft)?MovementPruning.*{message}"):
        BOTH[kind](**bad)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"lam": -1}, ValueError, r"lam=-1\): lam must be at least 0"),
        ({"lam": math.inf}, ValueError, "lam must be at least 0"),
        ({"threshold": 0}, ValueError, "threshold must be above 0 and below 1"),
        ({"threshold": 1.0}, ValueError, "threshold must be above 0 and below 1"),
        ({"min_density": 2}, ValueError, r"min_density must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_of_the_soft_kind(bad, error, message):
    with pytest.raises(error, match=rf"^SoftMovementPruning.*{message}"):
        SoftMovementPruning(**bad)


@pytest.mark.parametrize("density", [0, 1.5, math.nan])
def test_bad_density(density):
    with pytest.raises(ValueError, match=r"^MovementPruning\(density=.*density must lie in"):
        MovementPruning(density)


def test_density_is_needed():
    with pytest.raises(ValueError, match=r"^MovementPruning\(density=None\).*density=0.1"):
        MovementPruning()
