"""Which weights are kept compressed, and what moves with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparsity.core import storage as storage_module
from lightning_sparsity.core.filters import Candidate, candidates, linear_and_conv, select
from lightning_sparsity.core.layer_time import Load, measure
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.storage import Choice, Storage
from lightning_sparsity.structures import Unstructured


class Policy:
    include: Any = ()
    exclude: Any = ()
    kernels: Any = "torch"

    def __init__(self, layout: Any = "csr", contiguous: bool = True) -> None:
        self.layout = layout
        self.contiguous = contiguous
        self.elementwise: tuple[type[torch.optim.Optimizer], ...] = ()
        self.announced = 0

    def announce(self, masks: Masks, storage: Storage) -> None:
        self.announced += 1


def weights_of(net: nn.Module) -> list[Candidate]:
    return list(select(candidates(net), linear_and_conv, ()))


class Setting:
    """A network with random masks, an optimizer that has stepped, and a storage."""

    def __init__(self, net: nn.Module, policy: Policy | None = None, steps: int = 1) -> None:
        torch.manual_seed(0)
        self.net = net
        self.policy = policy or Policy()
        self.kept = [SparseParameter(c, Unstructured()) for c in weights_of(net)]
        for kept in self.kept:
            kept.set_mask(torch.rand(kept.shape) < 0.5)
            kept.parameter.data.mul_(kept.mask)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(steps):
            self.step()
        self.masks = Masks(self.kept)
        self.masks.enforce(self.kept, self.optimizer)
        self.optimizer.zero_grad()
        self.storage = Storage(
            self.policy,
            self.masks,
            list(net.modules()),
            lambda: [self.optimizer],
            {kept.name for kept in self.kept},
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.net(torch.randn(4, 6)).square().sum().backward()
        self.optimizer.step()

    def moments(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [state[i][key] for i in state for key in ("exp_avg", "exp_avg_sq")]

    def state(self) -> list[Tensor]:
        return [t.clone() for t in [*self.net.state_dict().values(), *self.moments()]]


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3))


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_there_and_back_nothing_changes() -> None:
    setting = Setting(mlp())
    before = setting.state()
    parameters = list(setting.net.parameters())
    setting.storage.start({})
    assert all(kept.compressed is not None for kept in setting.kept)
    assert [kept.parameter.shape for kept in setting.kept] == [(k.live,) for k in setting.kept]
    for kept in setting.kept:
        assert setting.optimizer.state[kept.parameter]["exp_avg"].shape == (kept.live,)
        assert setting.optimizer.state[kept.parameter]["step"].shape == ()
    assert all(a is b for a, b in zip(setting.net.parameters(), parameters, strict=True))
    assert_equal(setting.state(), before)
    setting.storage.release()
    assert all(kept.compressed is None for kept in setting.kept)
    assert [kept.parameter.shape for kept in setting.kept] == [k.shape for k in setting.kept]
    assert_equal(setting.state(), before)
    assert [type(module) for module in setting.net] == [type(module) for module in mlp()]  # type: ignore[arg-type]


def test_gradients_that_are_there_come_along() -> None:
    setting = Setting(mlp())
    setting.net(torch.randn(4, 6)).square().sum().backward()
    grads = [kept.parameter.grad.clone() * kept.mask for kept in setting.kept]  # type: ignore[union-attr]
    setting.storage.start({})
    for kept, grad in zip(setting.kept, grads, strict=True):
        assert torch.equal(kept.parameter.grad, grad[kept.mask])  # type: ignore[arg-type]
    setting.storage.release()
    assert_equal([kept.parameter.grad for kept in setting.kept], grads)  # type: ignore[misc]


def test_some_are_released_by_name() -> None:
    setting = Setting(mlp())
    setting.storage.start({})
    setting.storage.release(["2.weight"])
    assert [kept.compressed is None for kept in setting.kept] == [False, True, False]
    setting.storage.settle()  # as soon as it may be again
    assert not any(kept.compressed is None for kept in setting.kept)


def test_optimizers_take_dense_state() -> None:
    setting = Setting(mlp())
    saved = copy.deepcopy(setting.optimizer.state_dict())
    setting.storage.start({})
    before = setting.state()
    setting.step()
    setting.optimizer.load_state_dict(saved)
    assert_equal(setting.moments(), before[-len(setting.moments()) :])
    for kept in setting.kept:
        assert setting.optimizer.state[kept.parameter]["exp_avg"].shape == (kept.live,)
    setting.step()


def test_an_optimizer_without_state_is_no_matter() -> None:
    setting = Setting(mlp(), steps=0)
    setting.storage.start({})
    setting.step()
    assert len(setting.moments()) == 12


def test_a_layer_without_live_weights_can_be_compressed() -> None:
    setting = Setting(mlp())
    dead = setting.kept[1]
    dead.set_mask(torch.zeros(dead.shape, dtype=torch.bool))
    setting.masks.enforce([dead], setting.optimizer)
    setting.storage.start({})
    assert dead.parameter.shape == (0,)
    setting.step()
    setting.storage.release()
    assert dead.parameter.shape == dead.shape
    assert not dead.parameter.any()


@pytest.mark.parametrize("live", [0.0, 0.2, 1.0])
def test_everything_follows_to_another_mask(live: float) -> None:
    setting, dense = Setting(mlp()), Setting(mlp())
    setting.storage.start({})
    for one in (setting, dense):
        torch.manual_seed(1)
        layers = []
        for kept in one.kept:
            layer = kept.layer()
            mask = torch.rand(kept.shape) < live
            layers.append(type(layer)(**{**vars(layer), "mask": mask}))
        one.masks.commit(layers, [one.optimizer])
    assert_equal(setting.state(), dense.state())
    for one in (setting, dense):
        torch.manual_seed(2)
        one.step()
        one.masks.enforce(one.kept, one.optimizer)
    for a, b in zip(setting.state(), dense.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# deciding ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "holds"),
    [
        (0.4, 0.4, True),
        (0.4, 0.21, True),
        (0.4, 0.2, False),
        (0.4, 0.79, True),
        (0.4, 0.8, False),
        (0.0, 0.0, True),
    ],
)
def test_a_choice_holds_until_the_density_halves_or_doubles(
    then: float, now: float, holds: bool
) -> None:
    assert Choice(True, then).holds_at(now) == holds


def measured(setting: Setting, monkeypatch: pytest.MonkeyPatch, *faster: str) -> list[str]:
    asked: list[str] = []

    def fake(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        asked.append(kept.name)
        return (2.0, 1.0) if kept.name in faster else (1.0, 2.0)

    monkeypatch.setattr(storage_module, "measure", fake)
    return asked


def test_auto_measures_what_has_been_given_something(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(mlp(), Policy("auto"))
    asked = measured(setting, monkeypatch, "0.weight")
    setting.storage.start({})
    setting.storage.settle()
    assert not asked, "nothing has been seen"
    setting.net[:2](torch.randn(4, 6))  # type: ignore[index]
    setting.storage.settle()
    assert asked == ["0.weight"]
    setting.net.eval()
    setting.net(torch.randn(4, 6))
    setting.net.train()
    with torch.no_grad():
        setting.net(torch.randn(4, 6))
    setting.storage.settle()
    assert asked == ["0.weight"], "validation is not training"
    setting.step()
    setting.storage.settle()
    setting.storage.settle()
    assert asked == ["0.weight", "2.weight", "3.weight"]
    assert [kept.compressed is not None for kept in setting.kept] == [True, False, False]
    assert setting.storage.state_dict() == {
        name: {
            "compressed": name == "0.weight",
            "density": setting.masks[name].density,
            "kernels": "torch",
            "dense_ms": 2.0 if name == "0.weight" else 1.0,
            "compressed_ms": 1.0 if name == "0.weight" else 2.0,
        }
        for name in asked
    }


def test_inputs_given_by_name_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(nn.Sequential(nn.Linear(6, 5)), Policy("auto"))
    asked = measured(setting, monkeypatch)
    setting.storage.start({})
    setting.net[0](input=torch.randn(4, 6))  # type: ignore[index, operator]
    setting.storage.settle()
    assert asked == ["0.weight"]


def test_saved_choices_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Setting(mlp(), Policy("auto"))
    measured(first, monkeypatch, "0.weight", "3.weight")
    first.storage.start({})
    first.step()
    first.storage.settle()
    again = Setting(mlp(), Policy("auto"))
    asked = measured(again, monkeypatch, "2.weight")
    again.storage.start({**first.storage.state_dict(), "gone.weight": vars(Choice(True, 0.5))})
    assert [kept.compressed is not None for kept in again.kept] == [True, False, True]
    assert again.policy.announced == 1
    again.step()
    again.storage.settle()
    assert not asked


def test_csr_needs_no_saved_choice() -> None:
    setting = Setting(mlp())
    choice = vars(Choice(False, 0.5, 1.0, 2.0))
    setting.storage.start({kept.name: choice for kept in setting.kept})
    assert all(kept.compressed is not None for kept in setting.kept)


def test_after_the_end_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(mlp(), Policy("auto"))
    setting.storage.start({})
    assert any(module._forward_pre_hooks for module in setting.net.modules())
    setting.storage.release()
    assert not any(module._forward_pre_hooks for module in setting.net.modules())


def test_all_processes_do_what_the_first_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(mlp(), Policy("auto"))
    measured(setting, monkeypatch, "0.weight")
    theirs = {kept.name: vars(Choice(True, 0.5, 4.0, 3.0)) for kept in setting.kept}
    setting.storage._broadcast = lambda decided: theirs
    setting.storage.start({})
    setting.step()
    setting.storage.settle()
    assert all(kept.compressed is not None for kept in setting.kept)
    assert setting.storage.choices["2.weight"].dense_ms == 4.0


# measuring --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: nn.Linear(6, 5), (4, 6)),
        (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
        (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
        (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2)), (2, 3, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 6)),
    ],
    ids=["linear", "no bias", "conv1d", "conv2d", "same"],
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_measuring_changes_nothing(
    net: Any, shape: tuple[int, ...], autocast: torch.dtype | None, needs_grad: bool
) -> None:
    torch.manual_seed(0)
    layer = net()
    model = nn.Sequential(layer)
    kept = SparseParameter(weights_of(model)[0], Unstructured())
    kept.set_mask(torch.rand(kept.shape) < 0.5)
    calls: list[int] = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    weight, random = kept.parameter.detach().clone(), torch.get_rng_state()
    times = measure(kept, Load(shape, torch.float32, needs_grad, autocast))
    assert min(times) > 0
    assert torch.equal(kept.parameter, weight)
    assert kept.parameter.grad is None
    assert kept.compressed is None
    assert not calls, "hooks of the user are not called"
    assert torch.equal(torch.get_rng_state(), random)


def test_a_compressed_weight_can_be_measured() -> None:
    setting = Setting(mlp())
    setting.storage.start({})
    before = setting.state()
    assert min(measure(setting.kept[0], Load((4, 6), torch.float32, True, None))) > 0
    assert setting.kept[0].compressed is not None
    assert_equal(setting.state(), before)


# chains -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "chained"),
    [
        (lambda: mlp(), [True, True, False]),
        (
            lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 4), nn.Linear(4, 3)),
            [False, True, False],
        ),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.GELU()), nn.Linear(5, 3)),
            [False, False],
        ),
    ],
    ids=["activation", "dropout", "nested"],
)
def test_outputs_stay_as_they_come_where_nobody_minds(net: Any, chained: list[bool]) -> None:
    setting = Setting(net())
    setting.storage.start({})
    assert [kept.compressed.is_chained for kept in setting.kept] == chained  # type: ignore[union-attr]
    out = setting.net(torch.randn(4, 6))
    assert out.is_contiguous()


def test_a_dense_linear_neighbour_takes_outputs_as_they_come() -> None:
    setting = Setting(mlp())
    setting.storage.start({})
    setting.storage.release(["2.weight"])
    setting.storage.reasons["2.weight"] = "as it was told"
    setting.storage._announce()
    compressed = setting.kept[0].compressed
    assert compressed is not None
    assert compressed.is_chained


def test_all_outputs_may_stay_as_they_come() -> None:
    setting = Setting(mlp(), Policy(contiguous=False))
    setting.storage.start({})
    assert all(kept.compressed.is_chained for kept in setting.kept)  # type: ignore[union-attr]


# averaging over processes -----------------------------------------------------------


def test_gradients_are_averaged_where_any_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(mlp())
    means: list[Tensor] = []

    def mean(tensor: Tensor) -> Tensor:
        means.append(tensor)
        return tensor / 2  # the other process has zeros

    monkeypatch.setattr(storage_module, "mean_over_ranks", mean)
    setting.storage.share(["0.weight", "3.weight", "none.weight"])
    setting.storage.start({})
    setting.kept[0].parameter.grad = torch.ones_like(setting.kept[0].parameter)
    setting.kept[1].parameter.grad = torch.ones_like(setting.kept[1].parameter)
    setting.storage.average(setting.optimizer)
    first, second, third = (kept.parameter.grad for kept in setting.kept)
    assert first is not None
    assert first.eq(0.5).all()
    assert second is not None
    assert second.eq(1).all(), "it was not shared"
    assert third is None, "no process has one"
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    means.clear()
    setting.storage.average(other)
    assert not means
