"""Sparse variational dropout: its noise, its divergence, and what drowns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.variational_dropout import (
    VariationalDropout,
    divergence,
    log_alpha,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.testing import Batches, Result, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def method(**options: Any) -> VariationalDropout:
    return VariationalDropout(**{"lr": 0.5, "examples": 64, "warmup": (0.0, 0.1), **options})


# ------------------------------------------------------------------------ the formulas


def test_the_divergence_is_that_of_the_distributions() -> None:
    """Its slope against a sum over draws: the paper fitted values, up to a constant."""
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def exact(alpha: float) -> float:  # E log|w| - H(w), for w = 1 + sqrt(alpha) noise
        return (1 + math.sqrt(alpha) * noise).abs().log().mean().item() - 0.5 * math.log(alpha)

    found = [divergence(torch.tensor(x)).item() for x in (-3.0, -1.0, 1.0, 3.0)]
    drawn = [exact(math.exp(x)) for x in (-3.0, -1.0, 1.0, 3.0)]
    for a, b in ((0, 1), (1, 2), (2, 3)):
        assert found[a] - found[b] == pytest.approx(drawn[a] - drawn[b], abs=0.02)


def test_the_divergence_falls_to_zero() -> None:
    values = divergence(torch.linspace(-8, 8, 100))
    assert (values.diff() < 0).all()
    assert 0 < values[-1] < 1e-3


def test_weights_of_zero_have_finite_gradients() -> None:
    weight = torch.tensor([0.0, -0.0, 1e-30, 0.3], requires_grad=True)
    log_sigma2 = torch.full((4,), -10.0, requires_grad=True)
    assert log_alpha(weight, log_sigma2).tolist()[:3] == [8.0, 8.0, 8.0]
    total = (
        divergence(log_alpha(weight, log_sigma2)).sum()
        + (log_alpha(weight, log_sigma2).exp() * weight**2).sum()
    )
    total.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert log_sigma2.grad is not None
    assert log_sigma2.grad.isfinite().all()


def layer_of(**slots: Tensor) -> Layer:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    mine = {
        "log_sigma2": 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64) - 1,
        "noise": torch.randn(5, 4, generator=generator, dtype=torch.float64),
        "kl_weight": torch.tensor(0.7),
    }
    return Layer("w", weight, torch.ones(5, 4, dtype=torch.bool), slots={**mine, **slots})


def test_gradients_are_those_of_loss_and_divergence() -> None:
    layer = layer_of()
    target = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    tried = VariationalDropout(examples=3)

    def objective(weight: Tensor, log_sigma2: Tensor) -> Tensor:
        moved = Layer("w", weight, layer.mask, slots={**layer.slots, "log_sigma2": log_sigma2})
        return ((tried.effective(moved) - target) ** 2).sum() + tried.penalty(moved)

    grad = 2 * (tried.effective(layer) - target)
    found = tried.gradients(Layer("w", layer.weight, layer.mask, grad=grad, slots=layer.slots))
    leaves = [layer.weight, layer.slots["log_sigma2"]]
    for place, name in enumerate(("weight", "log_sigma2")):
        ours = found[name]
        assert ours is not None
        for i in range(20):
            sides = []
            for h in (1e-6, -1e-6):
                moved = [leaf.clone() for leaf in leaves]
                moved[place].view(-1)[i] += h
                sides.append(objective(*moved))
            slope = (sides[0] - sides[1]).item() / 2e-6
            assert ours.view(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_the_noise_has_the_variance_that_is_trained() -> None:
    log_sigma2 = torch.tensor([-2.0, 0.0, 1.0])
    weight = torch.tensor([1.0, -2.0, 3.0])
    draws = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    slots = {"log_sigma2": log_sigma2, "noise": draws}
    layer = Layer("w", weight.expand(20_000, 3), torch.ones(20_000, 3).bool(), slots=slots)
    drawn = VariationalDropout().effective(layer)
    torch.testing.assert_close(drawn.var(0), log_sigma2.exp(), rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.mean(0), weight, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.0), (0.025, 0.0), (0.0625, 0.5), (0.1, 1.0), (0.8, 1.0), (1.0, 1.0)],
)
def test_the_divergence_warms_up(progress: float, expected: float) -> None:
    layer = Layer("w", torch.ones(2), torch.ones(2).bool(), generator=torch.Generator())
    now = VariationalDropout().settle(layer, progress)["kl_weight"]
    assert now.item() == pytest.approx(expected)
    at_once = VariationalDropout(warmup=(0.0, 0.0), kl_weight=2.0).settle(layer, progress)
    assert at_once["kl_weight"].item() == 2.0


# ---------------------------------------------------------------------------- trainings


class Look(Callback):
    """Notes what the first linear layer computes with."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.slots: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks["net.5.weight"]
        self.drawn.append(pl_module.net[5].weight.detach().clone())
        self.slots.append({name: tensor.clone() for name, tensor in kept.slots.items()})
        pl_module.net[5].eval()
        validated = pl_module.net[5].weight.detach()
        pl_module.net[5].train()
        latent = kept.parameter.detach()
        assert torch.equal(kept.mask, log_alpha(latent, kept.slots["log_sigma2"]) < 3)
        assert torch.equal(validated, latent * kept.mask)
        assert torch.equal(validated, kept.weight)


def test_noise_is_drawn_once_per_step_and_not_in_validation() -> None:
    look = Look()
    fit([method(), look], accumulate_grad_batches=2, max_epochs=2)
    assert len(look.drawn) == 16
    for place in range(0, 16, 2):
        assert torch.equal(look.drawn[place], look.drawn[place + 1])
        noise = look.slots[place]["noise"]
        assert noise.std().item() == pytest.approx(1, abs=0.1)
        assert place == 0 or not torch.equal(noise, look.slots[place - 1]["noise"])


def test_nothing_pushes_variances_up_before_the_divergence_counts() -> None:
    def risen(**options: Any) -> float:
        look = Look()
        fit([method(**options), look], max_epochs=2)
        return (look.slots[-1]["log_sigma2"].mean() - look.slots[0]["log_sigma2"].mean()).item()

    assert risen() > 5
    assert risen(warmup=(1.0, 1.0)) < 2


def test_a_heavier_divergence_leaves_fewer_weights() -> None:
    left = [fit([method(kl_weight=k, examples=10_000)]).live for k in (0.0, 1.0, 1000.0)]
    assert left[0] > left[1] > left[2]


def test_inputs_that_are_always_zero_drown() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    x[:, :, 3:] = 0
    y = (x[:, 0, 0, 0] > 0).long() + 2 * (x[:, 0, 0, 1] > 0).long()

    def model() -> TinyModel:
        return TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))

    data = DataLoader(TensorDataset(x, y), batch_size=8)
    result = fit([VariationalDropout(lr=0.3)], model, data=data, max_epochs=8)
    live = result.masks["net.1.weight"]
    assert live[:, :2].all(), "these decide"
    assert not live[:, 18:].any(), "these are never on"


def test_seeds() -> None:
    assert fit([method()]).history == fit([method()]).history
    assert fit([method(seed=1)]).history != fit([method(seed=2)]).history


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
def test_resume(step: int, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([method(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]
    assert whole.changes > 20, "the masks move, before and after"


def test_the_file_is_what_is_left(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([method(), saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    bare = TinyModel()
    bare.load_state_dict(file["state_dict"], strict=True)
    assert list(file["state_dict"]) == list(TinyModel().state_dict())
    left = result.model.state_dict()
    for name, mask in result.masks.items():
        assert torch.equal(left[name], file["state_dict"][name])
        assert torch.equal(left[name] != 0, mask)
    assert 0 < result.live < NUMEL


def test_rigl_goes_on_from_what_is_left() -> None:
    result = fit([method(update_end=0.5), RigL(update_start=0.5, update_interval=4)], max_epochs=6)
    counts = [sum(live.values()) for _, live in result.history]
    assert counts[22] < NUMEL
    assert len(set(counts[23:])) == 1
    assert len({digest for digest, _ in result.history[24:]}) == 3, "updates at 28, 32 of 36"


def test_noise_begins_later() -> None:
    result = fit([method(update_start=0.5)], max_epochs=6)
    counts = [sum(live.values()) for _, live in result.history]
    assert set(counts[:23]) == {NUMEL}
    assert counts[-1] < NUMEL


@pytest.mark.parametrize("end", [1.0, 0.5])
def test_what_an_earlier_mask_bars_never_lives(end: float) -> None:
    result = fit([StaticSparse(0.5), method(update_end=end)], max_epochs=4)
    before = fit([StaticSparse(0.5)], max_steps=1)
    assert 0 < result.live < NUMEL / 2
    for name, mask in result.masks.items():
        assert not (mask & ~before.masks[name]).any()


@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}],
)
def test_trainers(options: dict[str, Any]) -> None:
    result = fit([method()], **options)
    assert 0 < result.live < NUMEL


# ---------------------------------------------------------------------------- arguments


def test_examples_are_counted() -> None:
    x, y = torch.randn(48, 1, 6, 6), torch.randint(4, (48,))
    counted = VariationalDropout()
    fit([counted], data=DataLoader(TensorDataset(x, y), batch_size=8), max_steps=1)
    given = VariationalDropout(examples=48)
    assert counted.penalty(layer_of()).item() == given.penalty(layer_of()).item()
    with pytest.raises(MisconfigurationException, match=r"^VariationalDropout\(examples=None\)"):
        fit([VariationalDropout()], data=Batches())


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"threshold": 8}, ValueError, "threshold must be above -8 and below 8"),
        ({"threshold": None}, TypeError, "threshold must be a number"),
        ({"kl_weight": -1}, ValueError, "kl_weight must be at least 0"),
        ({"warmup": (0.2, 0.1)}, ValueError, "two fractions of the window in order"),
        ({"warmup": (5, 20)}, ValueError, "two fractions of the window in order"),
        ({"warmup": 0.1}, TypeError, "two fractions of the window in order"),
        ({"log_sigma2_init": math.inf}, ValueError, "log_sigma2_init must be finite"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"examples": 0}, ValueError, "must be at least 1"),
        ({"seed": "1"}, TypeError, "must be an int"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    (name,) = bad
    with pytest.raises(error, match=rf"^VariationalDropout\({name}=.*{message}"):
        VariationalDropout(**bad)


def test_units_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^VariationalDropout\(structure=Rows.*single weights"):
        VariationalDropout(structure=Rows())
    with pytest.raises(ValueError, match=r"^VariationalDropout: net.*single weights only"):
        fit([StaticSparse(0.5, structure=Rows()), method()])
