"""The table of public mask methods that the contract tests run over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import lightning_sparsity
from lightning_sparsity import (
    ACDC,
    CHT,
    DNW,
    DPF,
    DSD,
    DSR,
    FORCE,
    GMP,
    GSE,
    GSM,
    IHT,
    L0,
    MEST,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    AutoPrune,
    ContinuousSparsification,
    DeepR,
    DynamicThresholds,
    EdgePopup,
    ESPNFinetune,
    ESPNRewind,
    GraNet,
    GraSP,
    IterSNIP,
    LearnedMask,
    LotteryTicket,
    Magnitude,
    MaskCallback,
    MovementPruning,
    NeST,
    NeuralTangentTransfer,
    OptG,
    ProsPr,
    RedrGradient,
    RedrGradientGlobal,
    RedrLoss,
    RedrRandom,
    RedrWoodfisher,
    RedrWoodtaylor,
    RigL,
    SNAPit,
    SNIPit,
    SoftMovementPruning,
    SparseCompute,
    SRigL,
    StaticSparse,
    Supermask,
    SynFlow,
    TopKAST,
    Unstructured,
    VariationalDropout,
)
from lightning_sparsity.core.apportion import shares
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.distributions import erk
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import Batch, Batches, TinyModel

Make = Callable[..., MaskCallback]


def loss_of(model: TinyModel, batch: Batch) -> Tensor:
    """The loss to score by: under manual optimization ``training_step`` returns none."""
    loss: Tensor = model.loss(batch)
    return loss


def scored(**options: Any) -> dict[str, Any]:
    """What methods need that look at data: the loader of these tests is no DataLoader."""
    return {"data": Batches(2), "loss_fn": loss_of, **options}


def output_of(model: TinyModel, batch: Batch) -> Tensor:
    """The logits: these models have no ``forward``."""
    return model.net(batch[0])


def by_output(**options: object) -> dict[str, object]:
    """As :func:`scored`, for methods that ask for the output."""
    return {"data": Batches(2), "forward_fn": output_of, **options}


# Arguments that make each method act several times in a run of 24 steps.
METHODS: dict[str, Make] = {
    "StaticSparse": lambda density=0.3, **kw: StaticSparse(density, **kw),
    "SNIP": lambda density=0.3, **kw: SNIP(density, **scored(**kw)),
    "IterSNIP": lambda density=0.3, **kw: IterSNIP(density, **scored(**{"rounds": 3, **kw})),
    "FORCE": lambda density=0.3, **kw: FORCE(density, **scored(**{"rounds": 3, **kw})),
    "SNIPit": lambda density=0.3, **kw: SNIPit(density, **scored(**kw)),
    "SNAPit": lambda density=0.3, **kw: SNAPit(density, **scored(**{"exclude": (), **kw})),
    "GraSP": lambda density=0.3, **kw: GraSP(density, **by_output(**kw)),
    "SynFlow": lambda density=0.3, **kw: SynFlow(density, **by_output(**{"rounds": 5, **kw})),
    "ProsPr": lambda density=0.3, **kw: ProsPr(density, **scored(**kw)),
    "NeuralTangentTransfer": lambda density=0.3, **kw: NeuralTangentTransfer(
        density, **by_output(**{"steps": 3, "mask_interval": 1, "samples": 4, **kw})
    ),
    "SET": lambda density=0.3, **kw: SET(density, **kw),
    "GSE": lambda density=0.3, **kw: GSE(density, **{"update_interval": 4, **kw}),
    "RigL": lambda density=0.3, **kw: RigL(density, **{"update_interval": 4, **kw}),
    "SRigL": lambda density=0.3, **kw: SRigL(
        density,
        **{"update_interval": 4, "gamma": 0.9, **kw},  # so that neurons die
    ),
    "CHT": lambda density=0.3, **kw: CHT(density, **kw),
    "GMP": lambda density=0.3, **kw: GMP(density, **{"update_interval": 4, **kw}),
    "RedrRandom": lambda density=0.3, **kw: RedrRandom(density, **kw),
    "RedrGradient": lambda density=0.3, **kw: RedrGradient(density, **kw),
    "RedrGradientGlobal": lambda density=0.3, **kw: RedrGradientGlobal(density, **kw),
    "RedrLoss": lambda density=0.3, **kw: RedrLoss(density, **kw),
    "RedrWoodfisher": lambda density=0.3, **kw: RedrWoodfisher(density, **kw),
    "RedrWoodtaylor": lambda density=0.3, **kw: RedrWoodtaylor(density, **kw),
    "DeepR": lambda density=0.3, **kw: DeepR(density, **{"temperature": 1e-3, **kw}),
    "MEST": lambda density=0.3, **kw: MEST(density, **{"update_interval": 4, **kw}),
    "ACDC": lambda density=0.3, **kw: ACDC(
        density, **{"update_interval": 2, "compressed": ((0.3, 0.6), (0.8, 1.0)), **kw}
    ),
    "NeST": lambda density=0.3, **kw: NeST(density, **{"update_interval": 4, **kw}),
    "DSR": lambda density=0.3, **kw: DSR(density, **{"update_interval": 4, **kw}),
    "SNFS": lambda density=0.3, **kw: SNFS(density, **kw),
    "GraNet": lambda density=0.3, **kw: GraNet(density, **{"update_interval": 4, **kw}),
    "DSD": lambda density=0.3, **kw: DSD(density, **kw),
    "IHT": lambda density=0.3, **kw: IHT(density, **{"update_interval": 4, **kw}),
    "LotteryTicket": lambda density=0.3, **kw: LotteryTicket(density, **{"rounds": 2, **kw}),
    "GSM": lambda density=0.3, **kw: GSM(density, **{"weight_decay": 0.01, **kw}),
    "Magnitude": lambda density=0.3, **kw: Magnitude(density, **{"at": 0.5, **kw}),
    "OptG": lambda density=0.3, **kw: OptG(density, **{"alpha": 1.0, "update_interval": 4, **kw}),
    "DNW": lambda density=0.3, **kw: DNW(density, **kw),
    "DPF": lambda density=0.3, **kw: DPF(density, **{"update_interval": 4, **kw}),
    "SRSTE": lambda density=0.3, **kw: SRSTE(
        density, **{"structure": Unstructured(), "exclude": (), **kw}
    ),
    "TopKAST": lambda density=0.3, **kw: TopKAST(density, **kw),
    "EdgePopup": lambda density=0.3, **kw: EdgePopup(
        density, **{"update_interval": 4, "update_end": 0.7, "lr_scale": 100.0, **kw}
    ),
    "MovementPruning": lambda density=0.3, **kw: MovementPruning(
        density, **{"update_interval": 4, "update_end": 0.7, **kw}
    ),
}
INITIAL = [name for name, make in METHODS.items() if make().role == "initial"]
UPDATERS = [name for name in METHODS if name not in INITIAL]
# Only the total of their live weights stays the same.
MOVE_BETWEEN_LAYERS = ["RedrGradientGlobal", "DSR", "SNFS", "RedrWoodfisher", "RedrWoodtaylor"]
SINGLE_WEIGHTS = [name for name, make in METHODS.items() if make().single_weights]
FULL_MATRIX = ["RigL", "SET", "GMP", "OptG"]
# Layers compute with effective weights until the window ends, and with their own from then on.
LEARNED = ["OptG", "DNW", "DPF", "SRSTE", "TopKAST", "EdgePopup", "MovementPruning"]
# They go on learning to the end of training, unless told otherwise.
LEARN_TO_THE_END = ["DNW", "DPF", "SRSTE", "TopKAST"]
# Their papers give weights off the mask a gradient.
DENSE_GRADIENTS = ["DNW", "DPF", "SRSTE", "TopKAST"]
LINEAR_ONLY = ["CHT"]
# The others' weights are their parameters, which may be kept compressed.
IN_PLACE = [name for name in METHODS if name not in LEARNED]
# Their papers end with a dense network.
END_DENSE = ["DSD"]

# Methods without a density: what prunes something in 24 steps.
EMERGENT: dict[str, Callable[..., LearnedMask]] = {
    "STR": lambda **kw: STR(**{"s_init": -5.0, "weight_decay": 0.1, **kw}),
    "ContinuousSparsification": lambda **kw: ContinuousSparsification(
        **{"lam": 1e-3, "lr_scale": 10.0, **kw}
    ),
    "DynamicThresholds": lambda **kw: DynamicThresholds(**{"alpha": 1e-2, **kw}),
    "L0": lambda **kw: L0(0.01, **{"lr": 0.05, "droprate_init": 0.9, "examples": 64, **kw}),
    "VariationalDropout": lambda **kw: VariationalDropout(
        **{"lr": 0.5, "examples": 64, "warmup": (0.0, 0.1), **kw}
    ),
    "Supermask": lambda **kw: Supermask(**kw),
    "SoftMovementPruning": lambda **kw: SoftMovementPruning(**{"lam": 10.0, "lr": 0.2, **kw}),
    "AutoPrune": lambda **kw: AutoPrune(**{"mu": 0.01, "initial_score": 0.01, **kw}),
}
# And those with phases of their own; one epoch of joint training and two after it.
APART: dict[str, Callable[..., LearnedMask]] = {
    **EMERGENT,
    "ESPNFinetune": lambda **kw: ESPNFinetune(
        **{"density": 0.3, "alpha": 1.2, "joint_lr": 0.1, "tune_epochs": 2, **kw}
    ),
    "ESPNRewind": lambda **kw: ESPNRewind(
        **{
            "density": 0.3,
            "alpha": 1.2,
            "joint_lr": 0.1,
            "rewind_to": 0,
            "tune_epochs": 2,
            **kw,
        }
    ),
}


def stored(names: Iterable[str], compressed: Collection[str] = IN_PLACE) -> list[Any]:
    """Names and storages as pytest parameters: all dense, and some of them compressed too.

    Args:
        names: Of methods.
        compressed: Those that run with compressed storage too.
    """
    names = list(names)
    dense = [pytest.param(name, "dense", id=name) for name in names]
    return dense + [
        pytest.param(name, "csr", id=f"{name}-csr") for name in names if name in compressed
    ]


def made(name: str, storage: str, *args: Any, **options: Any) -> list[Callback]:
    """A method as the table has it, and what keeps its weights compressed if that is asked for."""
    method = METHODS[name](*args, **options)
    return [method] if storage == "dense" else [method, SparseCompute("csr")]


def expected_live(
    name: str,
    density: float,
    masks: Mapping[str, Tensor],
    parts: Sequence[Sequence[str]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> int:
    """Live weights at the end: the density to the weight, but for DSD, SNAPit and SRigL.

    After DSD all are live: that its sparse phase has the density is a test of its own.
    SNAPit has the density of all neurons, each with all of its weights. SRigL has c weights
    at each of its a live neurons: at the start all neurons and the rounded mean of the
    layer's budget, later as many as a neurons can share evenly of that.

    Args:
        name: Of the method.
        density: What it was asked for.
        masks: What it made; those of SNAPit and SRigL are checked row by row.
        parts: The names of each optimizer's masks, if there are several.
        layouts: Of the masks that are not ``(out, in, ...)``.
    """
    numel = sum(mask.numel() for mask in masks.values())
    parts = parts or [list(masks)]
    if name in END_DENSE:
        return numel
    if name == "SNAPit":
        return _live_neurons(density, masks, parts, layouts or {})
    if name != "SRigL":
        return round(density * numel)
    live = 0
    sizes = [sum(masks[key].numel() for key in part) for part in parts]
    for part, total in zip(parts, shares(round(density * numel), sizes), strict=True):
        layers = [
            Layer(
                key,
                torch.empty(masks[key].shape),
                torch.ones_like(masks[key]),
                layout=(layouts or {}).get(key, Layout()),
            )
            for key in part
        ]
        for layer, budget in zip(layers, erk(layers, total), strict=True):
            fan_in = layer.layout.canonical(masks[layer.name]).sum((2, 3)).view(-1)
            start = len(fan_in) * max(1, round(budget / len(fan_in)))
            active = int(fan_in.count_nonzero())
            assert set(fan_in.tolist()) - {0} == {start // active}, layer.name
            live += start // active * active
    return live


def _live_neurons(
    density: float,
    masks: Mapping[str, Tensor],
    parts: Sequence[Sequence[str]],
    layouts: Mapping[str, Layout],
) -> int:
    """Weights of the live neurons, whose number in every part is checked."""
    neurons = {
        key: layouts.get(key, Layout()).canonical(mask).flatten(2).flatten(0, 1)
        for key, mask in masks.items()
    }
    assert all((rows.all(1) == rows.any(1)).all() for rows in neurons.values())
    sizes = [sum(len(neurons[key]) for key in part) for part in parts]
    for part, budget in zip(parts, shares(round(density * sum(sizes)), sizes), strict=True):
        assert sum(int(neurons[key].any(1).sum()) for key in part) == budget
    return sum(int(mask.sum()) for mask in masks.values())


def public_callbacks() -> set[str]:
    """Names of all public callbacks."""
    members = {name: getattr(lightning_sparsity, name) for name in lightning_sparsity.__all__}
    return {n for n, m in members.items() if inspect.isclass(m) and issubclass(m, Callback)}


def public_methods() -> set[str]:
    """Names of the public callbacks that make masks."""
    return {
        name
        for name in lightning_sparsity.__all__
        if inspect.isclass(member := getattr(lightning_sparsity, name))
        and issubclass(member, MaskCallback)
        and member not in (MaskCallback, LearnedMask)
    }
