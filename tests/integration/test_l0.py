"""L0: what gates cost, how they close, and what is left of them in the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparsity import NM, Block, Columns, RigL, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.l0 import L0, chance_to_be_open, gate, noisy_gate
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.testing import Batches, Result, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def method(lam: float = 0.01, **options: Any) -> L0:
    """Gates that start so low that some shut within a few steps."""
    return L0(lam, **{"lr": 0.05, "droprate_init": 0.9, "examples": 64, **options})


# --------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 2.0])
@pytest.mark.parametrize("temperature", [0.33, 2 / 3])
def test_the_chance_is_how_often_gates_are_open(log_alpha: float, temperature: float) -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    drawn = noisy_gate(torch.full_like(u, log_alpha), u, temperature)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    expected = chance_to_be_open(torch.tensor(log_alpha), temperature).item()
    assert (drawn > 0).float().mean().item() == pytest.approx(expected, abs=0.005)


def test_gates_are_exactly_shut_or_open_at_their_limits() -> None:
    assert gate(torch.tensor([-4.6, 4.6])).tolist() == [0.0, 1.0]
    u = torch.tensor([1e-6, 1 - 1e-6])
    assert noisy_gate(torch.zeros(2), u).tolist() == [0.0, 1.0]


def layer_of(**options: Any) -> Layer:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    layer = Layer("w", weight, torch.ones_like(weight, dtype=torch.bool), **options)
    slots = {
        "log_alpha": torch.randn(layer.size, generator=generator, dtype=torch.float64),
        "u": torch.rand(layer.size, generator=generator, dtype=torch.float64),
    }
    return Layer(
        "w", weight, layer.mask, **{**options, "slots": {**slots, **options.get("slots", {})}}
    )


@pytest.mark.parametrize("structure", [Rows(), Columns(), Block(2, 3)])
def test_a_unit_pays_for_its_weights(structure: Any) -> None:
    layer = layer_of(structure=structure)
    chance = chance_to_be_open(layer.slots["log_alpha"])
    paid = L0(3.0, examples=60).penalty(layer)
    assert paid.item() == pytest.approx(3 / 60 * 24 / layer.size * chance.sum().item())


def test_barred_weights_are_free() -> None:
    barred = torch.zeros(4, 6, dtype=torch.bool)
    barred[:, :2] = True
    layer = layer_of(structure=Rows(), slots={"barred": barred})
    chance = chance_to_be_open(layer.slots["log_alpha"])
    assert L0(1.0, examples=1).penalty(layer).item() == pytest.approx(4 * chance.sum().item())
    squares = ((layer.weight**2) * ~barred).sum(1)
    paid = L0(0.0, weight_decay=0.2, examples=1).penalty(layer)
    assert paid.item() == pytest.approx((0.1 * squares * chance).sum().item())


def test_gradients_are_those_of_loss_and_penalty() -> None:
    layer = layer_of(structure=Columns())
    target = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    tried = L0(0.3, weight_decay=0.1, examples=2)

    def objective(weight: Tensor, log_alpha: Tensor) -> Tensor:
        moved = Layer(
            "w",
            weight,
            layer.mask,
            slots={**layer.slots, "log_alpha": log_alpha},
            structure=Columns(),
        )
        return ((tried.effective(moved) - target) ** 2).sum() + tried.penalty(moved)

    grad = 2 * (tried.effective(layer) - target)
    seen = Layer("w", layer.weight, layer.mask, grad=grad, slots=layer.slots, structure=Columns())
    found = tried.gradients(seen)
    for place, name in enumerate(("weight", "log_alpha")):
        leaves = [layer.weight, layer.slots["log_alpha"]]
        for i in range(leaves[place].numel()):
            sides = []
            for h in (1e-6, -1e-6):
                moved = [leaf.clone() for leaf in leaves]
                moved[place].view(-1)[i] += h
                sides.append(objective(*moved))
            slope = (sides[0] - sides[1]) / 2e-6
            assert found[name] is not None
            assert found[name].view(-1)[i].item() == pytest.approx(slope.item(), abs=1e-5)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------- trainings


def test_a_higher_price_leaves_fewer_weights() -> None:
    left = [fit([method(lam)]).live for lam in (0.0, 0.01, 0.02)]
    assert left[0] > left[1] > left[2]
    assert left[1] < NUMEL / 4


@pytest.mark.parametrize("structure", [Rows(), Columns()])
def test_units_live_or_die_whole(structure: Any) -> None:
    result = fit([method(1e-4, structure=structure, exclude="net.0")])
    assert 0 < result.live < NUMEL - 8 * 9
    for mask in result.masks.values():
        units = mask.flatten(2).all(2) if mask.ndim > 2 else mask
        whole = units.all(1) if isinstance(structure, Rows) else units.all(0)
        some = units.any(1) if isinstance(structure, Rows) else units.any(0)
        assert torch.equal(whole, some)


class Look(Callback):
    """Notes what the first linear layer computes with."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.log_alpha: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        self.drawn.append(pl_module.net[5].weight.detach().clone())
        kept = keeper.masks["net.5.weight"]
        self.log_alpha.append(kept.slots["log_alpha"].clone())
        pl_module.net[5].eval()
        self.validated.append(pl_module.net[5].weight.detach().clone())
        pl_module.net[5].train()
        assert torch.equal(self.validated[-1], kept.weight)
        gates = gate(kept.slots["log_alpha"]).view(16, 128)
        assert torch.equal(self.validated[-1], kept.parameter * gates)


def test_gates_are_drawn_once_per_step_and_not_in_validation() -> None:
    look = Look()
    fit([method(droprate_init=0.5), look], accumulate_grad_batches=2, max_epochs=2)
    assert len(look.drawn) == 16
    for place in range(0, 16, 2):
        assert torch.equal(look.drawn[place], look.drawn[place + 1])
        assert not torch.equal(look.drawn[place], look.validated[place])
        assert place == 0 or not torch.equal(look.drawn[place], look.drawn[place - 1])
    assert (look.drawn[0] == 0).float().mean() == pytest.approx(0.17, abs=0.03)  # 1 - 0.832


@pytest.mark.filterwarnings("ignore:L0. net.5.weight has no live weight left")
def test_log_alpha_keeps_its_limits() -> None:
    look = Look()
    fit([method(5.0, lr=2.0, include="net.5"), look])
    lowest = min(tensor.min().item() for tensor in look.log_alpha)
    assert lowest == pytest.approx(-4.60517, abs=1e-4)


def test_the_start_is_around_the_drop_rate() -> None:
    look = Look()
    fit([method(droprate_init=0.2), look], max_steps=1)
    start = look.log_alpha[0]
    assert start.mean().item() == pytest.approx(1.38629, abs=1e-3)
    assert start.std().item() == pytest.approx(0.01, rel=0.1)


def test_inputs_that_are_always_zero_are_let_go() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    x[:, :, 3:] = 0
    y = (x[:, 0, 0, 0] > 0).long() + 2 * (x[:, 0, 0, 1] > 0).long()

    def model() -> TinyModel:
        return TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))

    data = DataLoader(TensorDataset(x, y), batch_size=8)
    result = fit([L0(1.0, lr=0.05, structure=Columns())], model, data=data, max_epochs=6)
    live = result.masks["net.1.weight"][0]
    assert live[:2].all(), "these decide"
    assert not live[18:].any(), "these are never on"


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
    assert whole.changes > 4, "the masks move, before and after"


class Validate(Callback):
    """Keeps the weights as validation reads them at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.eval()
        layers = {f"net.{i}.weight": pl_module.net[i] for i in (0, 5, 7)}
        self.seen = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        pl_module.train()


def test_the_file_is_what_validation_computes_with(tmp_path: Path) -> None:
    look = Validate()
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([method(), look, saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    bare = TinyModel()
    bare.load_state_dict(file["state_dict"], strict=True)
    assert list(file["state_dict"]) == list(TinyModel().state_dict())
    left = result.model.state_dict()
    for name, mask in result.masks.items():
        assert torch.equal(file["state_dict"][name], look.seen[name])
        assert torch.equal(left[name], look.seen[name]), "the gates are in the weights"
        assert not file["state_dict"][name][~mask].any()
    assert 0 < result.live < NUMEL


def test_rigl_goes_on_from_what_is_left() -> None:
    gates = method(update_end=0.5)
    result = fit([gates, RigL(update_start=0.5, update_interval=4)], max_epochs=6)
    counts = [sum(live.values()) for _, live in result.history]
    assert counts[22] < NUMEL
    assert len(set(counts[23:])) == 1
    assert len({digest for digest, _ in result.history[24:]}) == 3, "updates at 28, 32 of 36"


def test_gates_begin_later() -> None:
    result = fit([method(update_start=0.5)], max_epochs=6)
    counts = [sum(live.values()) for _, live in result.history]
    assert set(counts[:24]) == {NUMEL}
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
    counted = L0(0.1)
    fit([counted], data=DataLoader(TensorDataset(x, y), batch_size=8), max_steps=1)
    layer = layer_of()
    assert counted.penalty(layer).item() == L0(0.1, examples=48).penalty(layer).item()
    message = r"^L0\(examples=None\): .*pass the number of examples, L0\(examples=60000\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit([L0(0.1)], data=Batches())


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"lam": -0.1}, ValueError, "lam must be at least 0"),
        ({"lam": float("nan")}, ValueError, "lam must be at least 0"),
        ({"lam": "0.1"}, TypeError, "lam must be a number"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
        ({"droprate_init": 0}, ValueError, "droprate_init must be above 0 and below 1"),
        ({"droprate_init": 1.0}, ValueError, "droprate_init must be above 0 and below 1"),
        ({"temperature": 0}, ValueError, "temperature must be above 0"),
        ({"stretch": (0.0, 1.1)}, ValueError, "must begin below 0 and end above 1"),
        ({"stretch": (-0.1, 1.0)}, ValueError, "must begin below 0 and end above 1"),
        ({"stretch": 1.1}, TypeError, "must be two numbers"),
        ({"lr": -1e-3}, ValueError, "lr must be at least 0"),
        ({"lr": True}, TypeError, "lr must be a number"),
        ({"examples": 0}, ValueError, "must be at least 1"),
        ({"structure": NM(2, 4)}, ValueError, "keep no pattern; use Rows"),
        ({"seed": 1.5}, TypeError, "must be an int"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    (name,) = bad
    with pytest.raises(error, match=rf"^L0\({name}=.*{message}"):
        L0(**bad)


def test_a_pattern_that_was_found_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^L0: net.5.weight .*keep no pattern"):
        fit([StaticSparse(structure=NM(1, 4), exclude="net.0"), method(exclude="net.0")])
