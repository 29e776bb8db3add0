"""GSM: who is active, how passive weights fade, what is cut, and what it asks of the optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_sparsity import GSM, Magnitude, Rows, StaticSparse, uniform
from lightning_sparsity.testing import ManualModel, Result, TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
WEIGHTS = ["net.0.weight", "net.5.weight", "net.7.weight"]
decaying = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


class Watch(TinyModel):
    """Keeps weights before every step, and the gradients that the optimizer gets."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = decaying) -> None:
        super().__init__(net, optimizer)
        self.weights: list[dict[str, Tensor]] = []
        self.dense: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, Tensor]] = []

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        named = {n: p for n, p in self.named_parameters() if p.ndim > 1}
        grads = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        return {n: p.detach().clone() for n, p in named.items()}, grads

    def on_after_backward(self) -> None:
        self.dense.append(self._tensors()[1])

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        weights, grads = self._tensors()
        self.weights.append(weights)
        self.seen.append(grads)


def watched(callback: GSM, *before: Callback, **options: Any) -> tuple[Result, Watch]:
    model = options.pop("model", None) or Watch()
    return fit([*before, callback], lambda: model, **options), model


def active(model: Watch, step: int) -> dict[str, Tensor]:
    return {name: grad != 0 for name, grad in model.seen[step].items()}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


# who is active ----------------------------------------------------------------------


def test_the_most_salient_of_all_layers_keep_their_gradient_in_every_step() -> None:
    _, model = watched(GSM(0.1))
    chosen = []
    for step in range(24):
        now = active(model, step)
        assert count(now) == round(0.1 * NUMEL)
        scores = {n: (model.weights[step][n] * g).abs() for n, g in model.dense[step].items()}
        live = torch.cat([scores[n][now[n]] for n in WEIGHTS])
        rest = torch.cat([scores[n][~now[n]] for n in WEIGHTS])
        assert live.min() >= rest.max()
        for name, mask in now.items():
            assert torch.equal(model.seen[step][name], model.dense[step][name] * mask)
        chosen.append(torch.cat([now[n].flatten() for n in WEIGHTS]))
    assert all((a ^ b).any() for a, b in zip(chosen, chosen[1:], strict=False))
    ever = torch.stack(chosen).any(0)
    assert round(0.1 * NUMEL) < int(ever.sum()) < NUMEL


def test_a_distribution_splits_active_and_final_weights() -> None:
    result, model = watched(GSM(0.25, distribution=uniform))
    for step in (0, 10, 23):
        assert [int(m.sum()) for m in active(model, step).values()] == [18, 512, 16]
    assert [int(mask.sum()) for mask in result.masks.values()] == [18, 512, 16]


def test_densities_by_name() -> None:
    wanted = {"net.0": 0.5, "net.5": 0.125, "net.7": 0.25}
    result, model = watched(GSM(distribution=wanted))
    assert [int(m.sum()) for m in active(model, 7).values()] == [36, 256, 16]
    assert [int(mask.sum()) for mask in result.masks.values()] == [36, 256, 16]


def test_whole_units_are_active() -> None:
    result, model = watched(GSM(0.5, structure=Rows()))
    rows = [m.flatten(1) for m in active(model, 5).values()]
    assert sum(int(r.any(1).sum()) for r in rows) == 14  # of 8 + 16 + 4
    scores = [(model.weights[5][n] * model.dense[5][n]).abs().flatten(1).sum(1) for n in WEIGHTS]
    kept = torch.cat([s[r.any(1)] for s, r in zip(scores, rows, strict=True)])
    assert kept.min() >= torch.cat(scores).sort().values[-14]
    for mask in result.masks.values():
        assert torch.equal(mask.flatten(1).all(1), mask.flatten(1).any(1))


def test_its_own_weight_decay_is_part_of_the_gradient_and_of_no_other_parameter() -> None:
    _, model = watched(GSM(0.1, weight_decay=0.02), model=Watch(optimizer=_sgd_without_decay))
    bias: list[bool] = []
    for name in WEIGHTS:
        rest = model.seen[3][name] - 0.02 * model.weights[3][name]
        bias.append(bool((rest.abs() < 1e-9).float().mean() > 0.5))
    assert any(bias)
    total = sum(
        int(((model.seen[3][n] - 0.02 * model.weights[3][n]).abs() > 1e-8).sum()) for n in WEIGHTS
    )
    assert total <= round(0.1 * NUMEL)


# how the others fade ------------------------------------------------------------------


def _sgd_without_decay(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.05, momentum=0.9)


def test_a_passive_weight_fades_as_momentum_says() -> None:
    _, model = watched(GSM(0.1))
    chosen = [active(model, step)["net.5.weight"] for step in range(24)]
    never = ~torch.stack(chosen).any(0)
    assert never.sum() > 100
    start = model.weights[0]["net.5.weight"][never]
    w, z = start.clone(), torch.zeros_like(start)
    for step in range(24):
        torch.testing.assert_close(model.weights[step]["net.5.weight"][never], w)
        z = 0.9 * z + 0.01 * w
        w = w - 0.05 * z
    assert (w.abs() < start.abs()).all()


def test_what_is_cut_has_faded() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))

    class Last(Callback):
        """The weights just before the last step."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    cut = {}
    for callback in (GSM(0.2), Magnitude(0.2, at=1.0)):
        last = Last()
        model = TinyModel(net(), partial(SGD, lr=0.1, momentum=0.91, weight_decay=0.05))
        result = fit([callback, last], lambda model=model: model, max_epochs=25)
        lost = [last.weights[n][~mask].square().sum() for n, mask in result.masks.items()]
        whole = [last.weights[n].square().sum() for n in result.masks]
        cut[type(callback)] = float(sum(lost) / sum(whole))
    assert cut[GSM] < 0.1 * cut[Magnitude]
    assert cut[GSM] < 0.02


# the window ---------------------------------------------------------------------------


def test_the_window() -> None:
    result, model = watched(GSM(0.3, update_start=8, update_end=16))
    kept = round(0.3 * NUMEL)
    for step in [*range(8), *range(16, 24)]:  # before and after it the gradient is the dense one
        for name, grad in model.dense[step].items():
            mask = model.weights[step][name] != 0 if step >= 16 else True
            assert torch.equal(model.seen[step][name], grad * mask)
    assert {count(active(model, step)) for step in range(8, 16)} == {kept}
    live = [sum(counts.values()) for _, counts in result.history]
    assert live == [NUMEL] * 15 + [kept] * 9
    final = torch.cat([(model.weights[16][n] != 0).flatten() for n in WEIGHTS])
    assert int(final.sum()) == kept
    for name, mask in result.masks.items():
        assert torch.equal(model.weights[16][name] != 0, mask), "the largest stayed"


def test_masks_that_were_found_are_never_left() -> None:
    result, model = watched(GSM(0.2), StaticSparse(0.5, distribution=uniform))
    begun = {name: model.weights[0][name] != 0 for name in WEIGHTS}
    assert count(begun) == round(0.5 * NUMEL)
    for step in range(24):
        now = active(model, step)
        assert count(now) == round(0.2 * NUMEL)
        assert not any((now[name] & ~begun[name]).any() for name in WEIGHTS)
    assert result.live == round(0.2 * NUMEL)
    assert not any((result.masks[name] & ~begun[name]).any() for name in WEIGHTS)


def test_raw_optimizers_step_alike() -> None:
    def run(**options: Any) -> Result:
        return fit([GSM(0.3, update_end=6)], lambda: ManualModel(optimizer=decaying, **options))

    run(raw=True).assert_equal(run())


def test_layers_keep_their_class_and_files_their_size(tmp_path: Any) -> None:
    kinds: list[type] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            kinds.extend(type(module) for module in pl_module.net)
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    watched(GSM(0.3), Look())
    assert set(kinds) == {type(module) for module in TinyModel().net}  # type: ignore[arg-type]
    file = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    saved = next(v for k, v in file["callbacks"].items() if k.startswith("MaskKeeper"))
    assert saved["learners"]["GSM"]["latent"] == dict.fromkeys(WEIGHTS)


# what it asks of the optimizer ----------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0])
def test_without_weight_decay_it_refuses(decay: float) -> None:
    make = partial(SGD, lr=0.05, momentum=0.9, weight_decay=decay)
    message = r"^GSM\(weight_decay=None\): .*net.0.weight.*pass GSM\(weight_decay=5e-4\)"
    with pytest.raises(ValueError, match=message):
        fit([GSM(0.1)], lambda: TinyModel(optimizer=make))
    fit([GSM(0.1, weight_decay=1e-3)], lambda: TinyModel(optimizer=make))
    fit([GSM(1.0)], lambda: TinyModel(optimizer=make))  # no weight has to fade


def test_a_group_without_weight_decay_is_named() -> None:
    def make(parameters: Any) -> SGD:
        first, *rest = parameters
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": [first]}]
        return SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)

    with pytest.raises(ValueError, match=r"no weight decay for net\.5\.weight"):
        fit([GSM(0.1)], lambda: TinyModel(optimizer=make))
    fit([GSM(0.1, include="net.0")], lambda: TinyModel(optimizer=make))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(AdamW, lr=0.01, weight_decay=0.01), "AdamW"),
        (partial(SGD, lr=0.05, weight_decay=0.01), "SGD without momentum"),
    ],
    ids=["adamw", "sgd"],
)
def test_other_optimizers_are_warned_of(make: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"^GSM: weights are stepped by {name}\. .*momentum=0.98"):
        result = fit([GSM(0.1)], lambda: TinyModel(optimizer=make))
    assert result.live == round(0.1 * NUMEL)
    fit([GSM(1.0)], lambda: TinyModel(optimizer=make))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"weight_decay": 0}, ValueError, "must be above 0, such as 5e-4, or None"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay must be at least 0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be"),
        ({"weight_decay": "1e-4"}, TypeError, "weight_decay must be a number"),
        ({"weight_decay": True}, TypeError, "weight_decay must be a number"),
        ({"density": None}, ValueError, r"pass GSM\(density=0.1\)"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GSM\({next(iter(bad))}=.*{message}"):
        GSM(**{"density": 0.3, **bad})
