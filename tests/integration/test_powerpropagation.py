"""Powerpropagation: layers compute with powers, under any callback that makes masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity import (
    ACDC,
    GMP,
    MEST,
    SET,
    SNFS,
    SNIP,
    DensityMonitor,
    GraNet,
    LotteryTicket,
    Magnitude,
    OptG,
    RigL,
    StaticSparse,
)
from lightning_sparsity.callbacks.learned.powerpropagation import Powerpropagation, power
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.testing import Batches, ManualModel, Result, fit
from lightning_sparsity.testing import TinyModel as Model

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
UNDER: dict[str, Callable[[], Callback]] = {
    "ACDC": lambda: ACDC(0.3, update_interval=2, compressed=((0.3, 0.6), (0.8, 1.0))),
    "GMP": lambda: GMP(0.3, update_interval=4),
    "GraNet": lambda: GraNet(0.3, update_interval=4),
    "LotteryTicket": lambda: LotteryTicket(0.3, rounds=2),
    "MEST": lambda: MEST(0.3, update_interval=4),
    "Magnitude": lambda: Magnitude(0.3, at=0.5),
    "RigL": lambda: RigL(0.3, update_interval=4),
    "SET": lambda: SET(0.3),
    "SNFS": lambda: SNFS(0.3),
    "SNIP": lambda: SNIP(0.3, data=Batches(2)),
    "StaticSparse": lambda: StaticSparse(0.3),
}


class Look(Callback):
    """Notes parameter, weight and mask of the first linear layer after every forward pass."""

    def __init__(self) -> None:
        self.parameter: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.mask: list[Tensor] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks["net.5.weight"]
        self.parameter.append(kept.parameter.detach().clone())
        self.weight.append(pl_module.net[5].weight.detach().clone())
        self.mask.append(kept.mask.clone())
        assert torch.equal(kept.weight, self.weight[-1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", UNDER)
def test_masks_are_kept_exactly(name: str, first: bool) -> None:
    look = Look()
    pair = [UNDER[name](), Powerpropagation(3.0)]
    result = fit([*(pair[::-1] if first else pair), look])
    assert result.live == round(0.3 * NUMEL)
    for phi, weight, mask in zip(look.parameter, look.weight, look.mask, strict=True):
        torch.testing.assert_close(weight, phi**3)
        assert not phi[~mask].any()
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()
    assert type(result.model.net[5]) is torch.nn.Linear  # type: ignore[index]


def test_the_start_is_the_same_network() -> None:
    powers, plain = Look(), Look()
    fit([UNDER["RigL"](), Powerpropagation(3.0), powers], max_steps=5)
    fit([UNDER["RigL"](), plain], max_steps=5)
    assert torch.equal(powers.mask[0], plain.mask[0])
    torch.testing.assert_close(powers.weight[0], plain.weight[0])
    assert not torch.allclose(powers.weight[1], plain.weight[1])


@pytest.mark.parametrize("name", ["RigL", "GMP", "SNIP"])
def test_an_exponent_of_one_changes_nothing(name: str) -> None:
    fit([UNDER[name](), Powerpropagation(1.0)]).assert_equal(fit([UNDER[name]()]))


def test_it_needs_no_masks() -> None:
    alone, without = fit([Powerpropagation(1.0)]), fit([])
    alone.masks = {}
    alone.assert_equal(without)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_gradient_is_that_of_the_power(floor: float) -> None:
    phi = torch.tensor([-1.5, 0.5, 2.0, 0.0, 1e-4], dtype=torch.float64)
    grad = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    layer = Layer("w", phi, torch.ones(5, dtype=torch.bool), grad=grad)
    found = Powerpropagation(3.0, floor=floor).gradients(layer)["weight"]
    leaf = phi.clone().requires_grad_()
    (expected,) = torch.autograd.grad(power(leaf, 3.0), leaf, grad)
    assert found is not None
    torch.testing.assert_close(found[:3], expected[:3])
    if floor:
        least = 0.1 * (phi**2).mean().sqrt()
        torch.testing.assert_close(found[3:], 3 * least**2 * grad[3:])
    else:
        torch.testing.assert_close(found[3:], expected[3:])
        assert found[3] == 0


def test_what_grows_at_zero_learns() -> None:
    def learned(floor: float) -> float:
        look = Look()
        fit([UNDER["RigL"](), Powerpropagation(2.0, floor=floor), look])
        steps = range(len(look.mask) - 2)
        step = next(t for t in steps if (look.mask[t + 1] & ~look.mask[t]).any())
        born = look.mask[step + 1] & ~look.mask[step]
        assert not look.parameter[step + 1][born].any()
        return look.parameter[step + 2][born].ne(0).float().mean().item()

    assert learned(0.1) > 0.9
    assert learned(0.0) == 0.0


class Gradients(Callback):
    """Notes which weights RigL should grow: the largest gradients of the computed weight."""

    def __init__(self) -> None:
        self.dense: list[Tensor] = []
        self.mask: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        kept = keeper.masks["net.5.weight"]
        self.dense.append(kept.parameter.grad.clone())  # type: ignore[union-attr]
        self.mask.append(kept.mask.clone())


def test_growth_follows_the_gradient_of_the_weight() -> None:
    seen = Gradients()  # its hook comes before the keeper's: the gradient is that of the weight
    fit([seen, UNDER["RigL"](), Powerpropagation(3.0)])
    step = next(t for t in range(23) if (seen.mask[t + 1] & ~seen.mask[t]).any())
    old, new, size = seen.mask[step], seen.mask[step + 1], seen.dense[step].abs()
    born = new & ~old
    free = ~old & ~born
    assert size[born].min() >= size[free].max()
    assert size[free].max() > 0


def test_the_largest_weights_hold_more_of_the_norm() -> None:
    def held(callbacks: list[Callback]) -> float:
        weights = fit(callbacks, max_epochs=8).weights["net.5.weight"].flatten() ** 2
        return (weights.topk(len(weights) // 10).values.sum() / weights.sum()).item()

    shares = [held([Powerpropagation(alpha)]) for alpha in (1.0, 2.0, 4.0)]
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12, 16])
@pytest.mark.parametrize("name", ["RigL", "GMP", "LotteryTicket"])
def test_resume(name: str, step: int, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit(
            [UNDER[name](), Powerpropagation(3.0), saver], enable_checkpointing=True, **kwargs
        )

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_files_hold_the_weights(tmp_path: Path) -> None:
    look = Look()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    result = fit([UNDER["RigL"](), Powerpropagation(3.0), look, saver], enable_checkpointing=True)
    file = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    Model().load_state_dict(file, strict=True)
    assert torch.equal(file["net.5.weight"], look.weight[12])
    last = torch.load(tmp_path / "step=24.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(result.model.state_dict()["net.5.weight"], last["net.5.weight"])


def test_tickets_go_back_to_the_parameters_of_the_start() -> None:
    look = Look()
    fit([UNDER["LotteryTicket"](), Powerpropagation(3.0), look])
    start = look.parameter[0]
    back = [torch.equal(phi, start * m) for phi, m in zip(look.parameter, look.mask, strict=True)]
    assert sum(back) == 3, "at the start of each of three trainings"


def test_updaters_in_a_queue() -> None:
    ramp = GMP(0.6, update_interval=2, update_end=0.5)
    after = RigL(update_start=0.5, update_interval=4)
    result = fit([ramp, after, Powerpropagation(2.0)], max_epochs=6)
    assert result.live == round(0.6 * NUMEL)
    assert len({digest for digest, _ in result.history[25:]}) > 1


@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}],
)
def test_trainers(options: dict[str, Any]) -> None:
    result = fit([UNDER["RigL"](), Powerpropagation(3.0), DensityMonitor()], **options)
    assert result.live == round(0.3 * NUMEL)


@pytest.mark.parametrize("raw", [True, False])
def test_manual_optimization(raw: bool) -> None:
    method = RigL(0.3, update_interval=2, update_end=6)
    look = Look()
    result = fit([method, Powerpropagation(2.0), look], lambda: ManualModel(raw=raw))
    assert result.live == round(0.3 * NUMEL)
    torch.testing.assert_close(look.weight[-1], look.parameter[-1] * look.parameter[-1].abs())


def test_averages() -> None:
    result = fit([UNDER["RigL"](), Powerpropagation(2.0), EMAWeightAveraging()], max_epochs=4)
    assert result.live == round(0.3 * NUMEL)
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()


def test_one_at_a_time() -> None:
    learned = OptG(0.3, alpha="auto")
    with pytest.raises(MisconfigurationException, match="^Powerpropagation and OptG both change"):
        fit([learned, Powerpropagation()])
    with pytest.raises(MisconfigurationException, match=r"and Powerpropagation\[1\] both change"):
        fit([Powerpropagation(), Powerpropagation()])
    fit([OptG(0.3, alpha="auto", include="net.5"), Powerpropagation(include="net.7")])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"alpha": 0.5}, ValueError, "alpha must be at least 1"),
        ({"alpha": float("inf")}, ValueError, "alpha must be at least 1"),
        ({"alpha": "2"}, TypeError, "alpha must be a number"),
        ({"floor": -0.1}, ValueError, r"floor must lie in \[0, 1\]"),
        ({"floor": None}, TypeError, "floor must be a number"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    (name,) = bad
    with pytest.raises(error, match=rf"^Powerpropagation\({name}=.*{message}"):
        Powerpropagation(**bad)
