"""DEEP R: the walk, the signs, what dies and what comes alive."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparsity import DeepR, StaticSparse, global_by, linear, uniform
from lightning_sparsity.callbacks.dynamic.deep_r import rewire
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.scores import random
from lightning_sparsity.testing import fit

ANYWHERE = global_by(random, min_per_layer=0)


def layer_of(weight: Any, sign: Any, *, name: str = "w", lr: float = 0.1, seed: int = 0) -> Layer:
    weight = torch.as_tensor(weight)
    return Layer(
        name,
        weight,
        weight != 0,
        slots={"sign": torch.as_tensor(sign, dtype=torch.int8)},
        generator=torch.Generator().manual_seed(seed),
        lr=lr,
    )


def big(live: int, size: int, value: float, **options: Any) -> Layer:
    weight = torch.zeros(size)
    weight[:live] = value
    return layer_of(weight, torch.ones(size), **options)


# one update by hand -----------------------------------------------------------------


def test_live_weights_drift_to_zero_and_keep_their_sign() -> None:
    layer = layer_of([0.5, -0.5, 0.0, 0.25], [1, -1, 1, 1])
    before = layer.weight.clone()
    (after,) = rewire(l1=0.2, temperature=0.0)([layer], [3], 0.0)
    assert torch.allclose(after.weight, torch.tensor([0.48, -0.48, 0.0, 0.23]))
    assert after.mask is layer.mask, "nothing died"
    assert torch.equal(layer.weight, before), "a rule writes nothing"


def test_flipped_weights_die_and_others_come_alive_with_their_fixed_sign() -> None:
    weight = torch.zeros(50)
    weight[:4] = torch.tensor([0.5, -0.3, 0.2, -0.1])
    sign = torch.tensor([1, 1, -1, -1] + [1, -1] * 23)
    layer = layer_of(weight, sign)
    (after,) = rewire(l1=0.0, temperature=0.0)([layer], [4], 0.0)
    assert after.live == 4
    assert after.mask[0]
    assert after.mask[3]
    new = after.mask & ~layer.mask
    assert int(new.sum()) == 2, "in 46 places this seed draws none of the two that died"
    assert torch.allclose(after.weight[new], 1e-12 * sign[new].float())
    assert (after.weight * sign)[after.mask].gt(0).all()
    assert torch.equal(after.slots["sign"], layer.slots["sign"])


def test_what_dies_and_is_drawn_again_starts_anew() -> None:
    layer = layer_of([0.5, -0.3], [1, 1])  # no other place is free
    (after,) = rewire(l1=0.0, temperature=0.0)([layer], [2], 0.0)
    assert after.live == 2
    assert after.weight.tolist() == pytest.approx([0.5, 1e-12])


@pytest.mark.parametrize(
    ("temperature", "progress", "deviation"),
    [
        (0.02, 0.0, math.sqrt(2 * 0.1 * 0.02)),
        (linear(0.02), 0.5, math.sqrt(2 * 0.1 * 0.01)),
        (None, 0.0, 0.1 * 0.03),
    ],
)
def test_noise_has_the_size_of_the_temperature(
    temperature: Any, progress: float, deviation: float
) -> None:
    layer = big(50_000, 60_000, 10.0)
    (after,) = rewire(l1=0.03, temperature=temperature)([layer], [layer.live], progress)
    moved = (after.weight - layer.weight)[layer.mask]
    assert float(moved.std()) == pytest.approx(deviation, rel=0.02)
    assert float(moved.mean()) == pytest.approx(-0.1 * 0.03, abs=4 * deviation / 50_000**0.5)
    assert not after.weight[~layer.mask].any()


def test_layers_without_signs_are_left_alone() -> None:
    dense = Layer("dense", torch.tensor([0.5, -0.5]), torch.ones(2, dtype=torch.bool), lr=0.1)
    sparse = layer_of([0.5, 0.0], [1, 1])
    out = rewire(l1=0.1)([dense, sparse], [2, 1], 0.0)
    assert out[0] is dense
    assert [layer.name for layer in out] == ["dense", "w"]


def test_noise_needs_a_learning_rate() -> None:
    with pytest.raises(ValueError, match=r"^w: .*learning rate"):
        rewire(l1=0.1)([layer_of([0.5, 0.0], [1, 1], lr=None)], [1], 0.0)  # type: ignore[arg-type]


# over all layers --------------------------------------------------------------------


def test_rewiring_over_all_layers_draws_uniformly_over_free_places() -> None:
    grown = {"small": 0, "large": 0}
    for seed in range(300):  # each loses one of two: with rounding, large would get both
        layers = [losing(101, "small", 2 * seed), losing(301, "large", 2 * seed + 1)]
        out = rewire(l1=0.0, temperature=0.0, share=ANYWHERE)(layers, [2, 2], 0.0)
        assert sum(layer.live for layer in out) == 4
        for layer in out:
            grown[layer.name] += layer.live - 1
    assert sum(grown.values()) == 600
    assert grown["small"] == pytest.approx(150, abs=45)  # four standard deviations


def losing(size: int, name: str, seed: int) -> Layer:
    """Two live weights, one of which has flipped."""
    weight = torch.zeros(size)
    weight[:2] = torch.tensor([-1.0, 1.0])
    return layer_of(weight, torch.ones(size), name=name, seed=seed)


def test_a_layer_never_loses_its_last_connection_to_others() -> None:
    layers = [big(3, 4, -1.0, name="small"), big(30, 4000, 1.0, name="large")]
    layers[0].weight[1] = -0.5
    out = rewire(l1=0.0, temperature=0.0, share=ANYWHERE)(layers, [3, 30], 0.0)
    assert sum(layer.live for layer in out) == 33
    assert out[0].mask[1], "the one nearest its sign stays"
    assert float(out[0].weight[1]) == pytest.approx(1e-12)


def test_counts_move_between_layers_in_training_and_the_sum_stays() -> None:
    result = fit([DeepR(0.3, distribution=uniform, share=ANYWHERE, temperature=1e-3)])
    counts = {tuple(live.values()) for _, live in result.history}
    assert len(counts) > 5
    assert {sum(count) for count in counts} == {655}


# in training ------------------------------------------------------------------------


class Signs(Callback):
    """Checks after every batch that each live weight has the sign of its place."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}
        self.checked = 0

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        assert keeper.masks is not None
        for kept in keeper.masks:
            if "sign" in kept.slots:
                sign = kept.slots["sign"]
                assert sign.dtype == torch.int8
                assert set(sign.unique().tolist()) == {-1, 1}
                assert torch.equal(kept.weight.sign()[kept.mask], sign[kept.mask].float())
                self.first[kept.name] = sign.clone()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        last = trainer.global_step == trainer.estimated_stepping_batches
        for name, sign in self.first.items():
            kept = keeper.masks[name]
            assert torch.equal(kept.slots["sign"], sign)
            if not last:  # nothing would train on an update after the last step
                assert (kept.weight * sign)[kept.mask].gt(0).all()
                self.checked += 1


def test_signs_are_fixed_and_weights_follow_them() -> None:
    signs = Signs()
    result = fit([DeepR(0.3, temperature=1e-3), signs])
    # ER leaves the convolution and the last layer dense at this density: nothing to rewire
    assert set(signs.first) == {n for n, m in result.masks.items() if not m.all()} != set()
    assert signs.checked == 23 * len(signs.first)


def test_masks_of_an_earlier_callback_are_taken_over() -> None:
    signs = Signs()
    result = fit([StaticSparse(0.2, seed=1), DeepR(temperature=1e-3), signs])
    assert result.live == round(0.2 * 2184)
    assert result.changes > 10
    assert signs.checked > 0


def test_without_drift_and_noise_only_gradients_flip_signs() -> None:
    quiet = fit([DeepR(0.3, l1=0.0, temperature=0.0)])
    noisy = fit([DeepR(0.3, l1=0.0, temperature=1e-2)])
    start = fit([DeepR(0.3)], max_epochs=1, limit_train_batches=1).masks["net.5.weight"]

    def moved(result: Any) -> int:
        return int((result.masks["net.5.weight"] & ~start).sum())

    assert 0 < moved(quiet) < moved(noisy)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"l1": -1e-5}, ValueError, "l1=-1e-05.*at least 0"),
        ({"l1": math.nan}, ValueError, "l1=nan.*at least 0"),
        ({"l1": "small"}, TypeError, "l1='small'.*number"),
        ({"temperature": -1}, ValueError, "temperature=-1.*at least 0"),
        ({"temperature": True}, TypeError, "temperature=True"),
        ({"share": 0.5}, TypeError, "share=0.5.*global_by"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^DeepR\({message}"):
        DeepR(0.3, **bad)


def test_signs_are_drawn_from_the_layers_own_generator() -> None:
    def signs(seed: int) -> torch.Tensor:
        weight = torch.zeros(10, 10)
        layer = Layer(
            "w",
            weight,
            torch.rand(10, 10, generator=torch.Generator().manual_seed(5)) < 0.5,
            generator=torch.Generator().manual_seed(seed),
        )
        share = Share(("w",), (100,), 0, found=True)
        return DeepR().begin([layer], share)[0].slots["sign"]

    assert torch.equal(signs(1), signs(1))
    assert not torch.equal(signs(1), signs(2))
    assert abs(int(signs(1).sum())) < 40, "live weights at zero get random signs too"
