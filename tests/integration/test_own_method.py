"""A method of one's own: slots, observation, statistics, rules, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparsity import MaskCallback, erk
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.rules import chain, drop, grow
from lightning_sparsity.scores import magnitude, momentum, random
from lightning_sparsity.testing import TinyModel, fit


class GrowByMomentum(MaskCallback):
    """Drop by magnitude, grow where the averaged gradient is largest."""

    def __init__(self, density: float = 0.3) -> None:
        super().__init__(
            density=density,
            default_distribution=erk,
            initial=drop(random),
            update=chain(drop(magnitude, fraction=0.3), grow(momentum(0.9))),
            observe=momentum(0.9).observe,
            update_interval=4,
            update_end=0.75,
        )


@dataclass
class Seen:
    """Growth by the activations; remembers their shapes."""

    shapes: list[Any]
    needs_gradient = False

    def __call__(self, layer: Layer) -> Tensor:
        inputs, grads = layer.statistics["inputs"], layer.statistics["output_grads"]
        self.shapes.append((layer.name, [tuple(x.shape) for x in (*inputs, *grads)]))
        if layer.weight.ndim == 2:
            dense = sum(g.T @ x for x, g in zip(inputs, grads, strict=True))
            assert isinstance(dense, Tensor)
            return dense.abs()
        return layer.weight.abs()


class GrowByActivations(MaskCallback):
    """The dense gradient, formed from the layer's inputs and output gradients."""

    def __init__(self, shapes: list[Any]) -> None:
        super().__init__(
            density=0.3,
            default_distribution=erk,
            initial=drop(random),
            update=chain(drop(magnitude, fraction=0.3), grow(Seen(shapes))),
            statistics={"inputs", "output_grads"},
            update_interval=4,
            update_end=0.75,
        )


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_slots_follow_observation_and_resume(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        return fit([GrowByMomentum(), saver], enable_checkpointing=True, **kwargs)

    whole = run()
    assert whole.changes == 4
    file = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    slots = file["callbacks"]["MaskKeeper"]["parameters"]["net.5.weight"]["slots"]
    assert slots["momentum"].shape == (16, 128)
    assert (slots["momentum"] != 0).float().mean() > 0.5, "dense gradients, not masked ones"
    run(ckpt_path=str(tmp_path / "step=6.ckpt"), seed=9).assert_equal(whole)


def test_a_missing_slot_says_who_fills_it() -> None:
    layer = Layer("w", torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(KeyError, match=r"slot\(name='momentum'.*w has no slot.*observe="):
        momentum(0.9)(layer)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_statistics_are_those_of_the_due_step(accumulate: int) -> None:
    shapes: list[Any] = []
    result = fit([GrowByActivations(shapes)], accumulate_grad_batches=accumulate)
    assert result.changes == (4 if accumulate == 1 else 1)
    for name, seen in shapes:
        micro = len(seen) // 2
        assert micro == (1 if accumulate == 1 else 3)
        ends = {"net.5.weight": (128, 16), "net.7.weight": (16, 4)}
        if name in ends:
            assert seen == [(8, ends[name][0])] * micro + [(8, ends[name][1])] * micro
    assert not result.model.net[5]._forward_hooks  # type: ignore[index, union-attr]


def test_growth_by_activations_is_growth_by_gradient() -> None:
    by_gradient: dict[str, Tensor] = {}

    @dataclass
    class Compare(Seen):
        needs_gradient = True

        def __call__(self, layer: Layer) -> Tensor:
            score = super().__call__(layer)
            if layer.weight.ndim == 2:
                assert layer.grad is not None
                torch.testing.assert_close(score, layer.grad.abs())
                by_gradient[layer.name] = score
            return score

    method = GrowByActivations([])
    method.rule = chain(drop(magnitude, fraction=0.3), grow(Compare([])))
    fit([method])
    assert set(by_gradient) == {"net.5.weight", "net.7.weight"}


def test_statistics_of_compiled_layers_are_refused() -> None:
    def compiled() -> TinyModel:
        model = TinyModel()
        model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
        return model

    with pytest.raises(MisconfigurationException, match="GrowByActivations reads .*compiled"):
        fit([GrowByActivations([])], compiled)


def test_any_function_is_a_rule_a_score_and_a_distribution() -> None:
    def first_come(layer: Layer) -> Tensor:
        return -torch.arange(layer.weight.numel(), dtype=torch.float32).reshape(layer.shape) + 1e4

    def half_each(layers: Any, total: int) -> list[int]:
        return [layer.size // 2 for layer in layers]

    def turn(layers: Any, budget: Any, progress: float) -> Any:
        return [layer.with_units(layer.units.flip(0)) for layer in layers]

    class Mine(MaskCallback):
        def __init__(self) -> None:
            super().__init__(
                density=0.5,
                default_distribution=half_each,
                initial=drop(first_come),
                update=turn,
                update_interval=10,
            )

    result = fit([Mine()])
    assert result.changes == 2
    for mask in result.masks.values():
        flat = mask.flatten()
        assert flat[: len(flat) // 2].all()
        assert not flat[len(flat) // 2 :].any()


def test_observe_may_be_any_function() -> None:
    steps: list[str] = []

    def observe(layer: Layer) -> Mapping[str, Tensor]:
        assert layer.grad is not None
        steps.append(layer.name)
        return {"count": layer.slots.get("count", torch.zeros(())) + 1}

    method = GrowByMomentum()
    method.observe = observe
    method.rule = drop(magnitude, fraction=0.0)
    fit([method])
    assert len(steps) == 18 * 3, "until the window ends"
