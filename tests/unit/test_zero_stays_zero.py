"""The optimizers that the engine trusts between updates do keep zeros."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from lightning_sparsity.core.run import _ZERO_STAYS_ZERO, Owner

OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    torch.optim.SGD: [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    torch.optim.Adam: [{}, {"amsgrad": True}, {"fused": True}, {"decoupled_weight_decay": True}],
    torch.optim.AdamW: [{}, {"amsgrad": True}, {"fused": True}],
    torch.optim.NAdam: [{}, {"decoupled_weight_decay": True}],
    torch.optim.RAdam: [{}, {"decoupled_weight_decay": True}],
    torch.optim.RMSprop: [{}, {"centered": True}, {"momentum": 0.9}],
    torch.optim.Adadelta: [{}],
}


def test_every_trusted_optimizer_is_tried() -> None:
    assert set(OPTIONS) == set(_ZERO_STAYS_ZERO)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_zero_weights_with_zero_gradients_stay_zero(
    kind: type[Optimizer], maximize: bool, weight_decay: float
) -> None:
    for options, foreach in itertools.product(OPTIONS[kind], [False, True]):
        if options.get("fused") and foreach:
            continue
        torch.manual_seed(0)
        mask = torch.rand(8, 9) < 0.5
        weight = torch.nn.Parameter(torch.randn(8, 9) * mask)
        kwargs: dict[str, Any] = {"weight_decay": weight_decay, "maximize": maximize, **options}
        if not options.get("fused"):
            kwargs["foreach"] = foreach
        optimizer = kind([weight], lr=0.1, **kwargs)  # type: ignore[call-arg]
        assert Owner(optimizer, []).keeps_zeros()
        for _ in range(5):
            weight.grad = torch.randn(8, 9) * mask
            optimizer.step()
        assert not weight.detach()[~mask].any()
        assert weight.detach()[mask].all()
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert not value[~mask].any(), (kind, options)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.Rprop, torch.optim.Adagrad])
def test_others_are_masked_after_every_step(kind: type[Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    assert not Owner(kind([weight], lr=0.1), []).keeps_zeros()  # type: ignore[call-arg]


def test_a_pre_hook_of_somebody_else_ends_the_trust() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: None)
    assert not Owner(optimizer, []).keeps_zeros()
