"""The table of arguments: for each, values that are allowed and values that are not."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_sparsity
from lightning_sparsity import distributions, schedules, scores, starts, structures
from lightning_sparsity.core import window
from lightning_sparsity.distributions import erk
from lightning_sparsity.metrics import CompressionRatio
from lightning_sparsity.rules import drop
from lightning_sparsity.schedules import constant, cosine, cubic, linear
from lightning_sparsity.scores import magnitude, random
from lightning_sparsity.starts import spread_inputs
from lightning_sparsity.structures import NM, Block, Rows

Error = type[Exception] | tuple[type[Exception], ...]
EITHER: Error = (TypeError, ValueError)


@dataclass(frozen=True)
class Kind:
    """What an argument may be.

    Args:
        good: Values that a callback takes.
        bad: Values that it refuses when it is made, and with which error.
    """

    good: tuple[Any, ...]
    bad: tuple[tuple[Any, Error], ...]

    def but(self, *bad: tuple[Any, Error]) -> Kind:
        """The same, where more is refused."""
        return Kind(self.good, self.bad + bad)

    def loosely(self) -> Kind:
        """The same, where it is left open which of the two errors is raised."""
        return Kind(self.good, tuple((value, EITHER) for value, _ in self.bad))

    def without(self, *good: Any) -> Kind:
        """The same, where less is taken."""
        return Kind(tuple(value for value in self.good if not _among(value, good)), self.bad)

    def or_(self, *good: Any) -> Kind:
        """The same, where these are taken too and not refused."""
        bad = tuple(pair for pair in self.bad if not _among(pair[0], good))
        return Kind(self.good + good, bad)


def _refused(error: Error, *values: Any) -> tuple[tuple[Any, Error], ...]:
    return tuple((value, error) for value in values)


def _among(value: Any, others: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and repr(value) == repr(other) for other in others)


def text_of(progress: float) -> str:
    """A schedule that gives a string."""
    return "0.3"


def nan_of(progress: float) -> float:
    """A schedule that gives no number."""
    return math.nan


def nothing_of() -> float:
    """A schedule that nobody can ask."""
    return 0.3


def number(
    low: float = -math.inf, high: float = math.inf, *, low_in: bool = True, high_in: bool = True
) -> Kind:
    """A finite number between two bounds, which are allowed or not."""
    values = [low] * (low_in and low > -math.inf) + [high] * (high_in and high < math.inf)
    start, end = max(low, -1e3), min(high, 1e3)
    inside = (start + 0.5 if end == 1e3 else (start + end) / 2) if start > -1e3 else end - 0.5
    values += [inside, np.float32(inside), np.float64(inside)]
    whole = math.floor(inside) + 1
    if low < whole < high:
        values += [whole, np.int64(whole)]
    out = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]
    if low > -math.inf:
        out += [low - 1, np.float32(low - 1), math.nextafter(low, -math.inf)]
        out += [] if low_in else [low]
    if high < math.inf:
        out += [high + 1, math.nextafter(high, math.inf)] + ([] if high_in else [high])
    wrong = (None, True, np.True_, "0.5", "", [], [0.5], (0.5,), {}, 0.5j, np.array([0.5, 0.5]))
    return Kind(tuple(values), _refused(TypeError, *wrong) + _refused(ValueError, *out))


def count(least: int = 1) -> Kind:
    """An integer."""
    wrong = (None, True, 1.5, 2.0, "2", "", [], [2], math.nan, math.inf, np.float32(2))
    out = (least - 1, -5, np.int64(least - 1))
    good = (least, least + 1, np.int64(least + 1), np.int32(least))
    return Kind(good, _refused(TypeError, *wrong) + _refused(ValueError, *out))


def choice(*values: str) -> Kind:
    """One of several words."""
    return Kind(
        values, _refused(EITHER, "other", "", values[0].upper(), None, True, 1, [], math.nan)
    )


def function(*good: Any) -> Kind:
    """A function; that of the class of one is a common mistake."""
    return Kind(good, _refused(TypeError, None, True, 3, 0.5, math.nan, "erk", "", [], {}, Rows))


def moment() -> Kind:
    """A step (int) or fraction of training (float)."""
    good = (0, 5, 0.5, np.int64(5), np.float32(0.5))
    wrong = (None, True, "end", "", [], (0, 1))
    out = (-1, -0.5, 1.5, math.nan, math.inf, -math.inf, np.float32("nan"), np.int64(-1))
    return Kind(good, _refused(EITHER, *wrong) + _refused(ValueError, *out))


def fraction_or_curve(bad: float, good: float = 0.5) -> Kind:
    """A number in [0, 1], or a schedule of such numbers."""
    wrong = (cosine, text_of, nothing_of)
    out = (constant(bad), linear(good, bad), nan_of)
    return Kind(
        (0, 1, 0.0, 1.0, good, np.float32(good), np.float64(good), cosine(good), constant(good)),
        tuple(pair for pair in number(0, 1).bad)
        + _refused(TypeError, *wrong)
        + _refused(ValueError, *out),
    )


def optional(kind: Kind) -> Kind:
    """The same, or None."""
    return Kind((None, *kind.good), tuple(pair for pair in kind.bad if pair[0] is not None))


FLAG = Kind((True, False), _refused(TypeError, None, 0, 1, 1.0, "True", "", [], math.nan))
SHARE = number(0, 1)
DENSITY = number(0, 1, low_in=False)
AT_LEAST_0 = number(0)
ABOVE_0 = number(0, low_in=False)
MOMENTUM = number(0, 1, high_in=False)
FUNCTION_OR_NONE = optional(function(lambda *given: None))
SCORE = function(magnitude)
RAMP = Kind(
    (cubic, linear),
    _refused(TypeError, None, True, 3, 0.5, math.nan, "cubic", "", [], cubic(1.0, 0.1))
    + _refused(ValueError, lambda start, end: constant(start), lambda start, end: linear(-1, end))
    + _refused(EITHER, lambda start, end: text_of, lambda start, end: 0.5),
)
RULE_OR_NONE = optional(function(drop(random)))
STRETCH = Kind(
    ((-0.1, 1.1), [-0.5, 1.5], (np.float32(-0.5), np.float32(1.5))),
    _refused(TypeError, None, True, 0.1, "ab", "", (), (-0.1,), (-0.1, 1.1, 2), (True, 1.1))
    + _refused(TypeError, ("-0.1", 1.1), {})
    + _refused(ValueError, (0.0, 1.1), (-0.1, 1.0), (math.nan, 1.1), (-0.1, math.inf), (1.1, -0.1)),
)
WARMUP = Kind(
    ((0.025, 0.1), [0.0, 0.0], (0.5, 1.0), (np.float32(0.25), np.float32(0.5))),
    _refused(TypeError, None, True, 0.1, "ab", "", (), (0.1,), (0, 0.1, 0.2), {})
    + _refused(EITHER, ("0.1", 0.2), (True, 1.0), (None, 0.5))
    + _refused(ValueError, (0.5, 0.1), (-0.1, 0.5), (0.5, 1.5), (math.nan, 0.5), (0.0, math.inf)),
)
PHASES = Kind(
    (((0.1, 0.5), (0.8, 1.0)), [(0, 1)], ((np.float32(0.25), np.float32(1.0)),)),
    _refused(TypeError, None, True, 0.5, "abc", [0.1, 1.0], [(0.1, 0.5, 1.0)], [(None, 1.0)])
    + _refused(TypeError, [("0.1", "1.0")], [(True, False)])
    + _refused(ValueError, (), "", [(0.5, 0.1)], [(0.1, 0.5)], [(-0.1, 1.0)], [(0.1, math.nan)])
    + _refused(ValueError, [(0.1, 0.5), (0.4, 1.0)], [(0.5, math.inf)]),
)
INTERVAL = Kind(
    (1, 4, "epoch", window.epochs(2), np.int64(4)),
    _refused(EITHER, None, True, 2.5, 1.0, "step", "", [], math.nan, math.inf, 0, -5, np.int64(0)),
)
DISTRIBUTION = Kind(
    (None, erk, {"net.*": 0.3}),
    _refused(TypeError, True, 3, 0.5, math.nan, "erk", "", [], Rows, distributions.epsilon)
    + _refused(TypeError, {3: 0.5})
    + _refused(EITHER, {"net.*": "0.5"}, {"net.*": True})
    + _refused(ValueError, {}, {"net.*": 0}, {"net.*": 1.5}, {"net.*": math.nan}),
)
STRUCTURE = Kind(
    (None, structures.Unstructured()), _refused(TypeError, True, 3, "rows", "", [], Rows, math.nan)
)
SEED = Kind(
    (None, 0, 5, np.int64(5)),
    _refused(TypeError, True, 1.5, "1", "", [], math.nan, math.inf, np.float32(1)),
)
DATA = Kind((None, []), _refused(TypeError, True, 3, 0.5, math.nan, "train", Rows))
# Whether they fit is seen when the model is: they are refused before the first step.
SELECTION = Kind((nn.Linear, "net.5", ["net.5", nn.Linear], lambda candidate: True), ())

# By argument, for all callbacks; or by callback and argument.
ARGUMENTS: dict[str, Kind] = {
    "density": optional(DENSITY),
    "distribution": DISTRIBUTION,
    "update_interval": INTERVAL,
    "update_start": moment(),
    "update_end": moment().without(0).but(*_refused(ValueError, 1, np.int64(1))).or_(1.0),
    "include": SELECTION,
    "exclude": SELECTION,
    "structure": STRUCTURE,
    "seed": SEED,
    "drop_fraction": fraction_or_curve(-0.5),
    "weight_init": RULE_OR_NONE,
    "growth": SCORE,
    "momentum": MOMENTUM,
    "lr_scale": ABOVE_0,
    "mode": choice("train", "eval"),
    "batches": count(),
    "data": DATA,
    "loss_fn": FUNCTION_OR_NONE,
    "forward_fn": FUNCTION_OR_NONE,
    "shuffle": FLAG,
    "reinitialize": FLAG,
    "initial_density": DENSITY,
    "granularity": choice("layer", "output"),
    # of one callback or two
    "ACDC|DPF|DSD|GMP|GSM|GraNet|IHT|LotteryTicket|MovementPruning|NeST|OptG.density": Kind(
        DENSITY.good, (*optional(DENSITY).bad, (None, ValueError))
    ),
    "ACDC.compressed": PHASES,
    "ACDC.dense_checkpoint": Kind(
        (None, "dense.pt", Path("dense.pt")), _refused(TypeError, True, 3, 0.5, [], math.nan)
    ),
    "AutoPrune.mu": AT_LEAST_0,
    "AutoPrune.initial_score": ABOVE_0,
    "AutoPrune.surrogate": choice("leaky_relu", "softplus"),
    "AutoPrune.grad": choice("sign", "weight"),
    "AutoPrune.alternate": FLAG,
    "CHT.removal": SCORE,
    "CHT.soft": FLAG,
    "CHT.chain_removal": FLAG,
    "CHT.topology": function(spread_inputs),
    "CHT.ramp": optional(RAMP),
    "CHT.structure": STRUCTURE.but((Rows(), ValueError), (NM(2, 4), ValueError)),
    "ContinuousSparsification.lam": AT_LEAST_0,
    "ContinuousSparsification.s_init": number(),
    "ContinuousSparsification.final_temperature": number(1),
    "ContinuousSparsification.rounds": count(),
    "DPF.ramp": RAMP,
    "DSD.lr_factor": ABOVE_0,
    "DSD.update_end": moment().without(0).but(*_refused(ValueError, 1, 1.0, np.float32(1))),
    "DSR.prune_target": Kind(
        (1, 10, 0.5, np.int64(10), np.float32(0.5)),
        _refused(TypeError, None, True, "0.1", "", [], 1j)
        + _refused(ValueError, 0, -1, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, np.float32("nan")),
    ),
    "DSR.threshold": ABOVE_0,
    "DeepR.l1": AT_LEAST_0,
    "DeepR.temperature": Kind(
        (None, 0, 0.5, np.float32(0.5), np.int64(1), cosine(0.5), linear(2.0)),
        optional(AT_LEAST_0).bad
        + _refused(TypeError, cosine, text_of, nothing_of)
        + _refused(ValueError, constant(-1), linear(1.0, -0.5), nan_of),
    ),
    "DeepR.share": optional(function(erk)),
    "DensityMonitor.per_layer": FLAG,
    "DensityMonitor.histograms": Kind(
        (None, "epoch", 1, 100, np.int64(5)),
        _refused(EITHER, True, 0, -5, 1.5, math.nan, math.inf, "step", "", [], np.int64(0)),
    ),
    "DensityMonitor.print_tables": FLAG,
    "DensityMonitor.connectivity": FLAG,
    "DensityMonitor.on_collapse": choice("warn", "error"),
    "DensityMonitor.metrics": Kind(
        (None, {}, {"csr": CompressionRatio()}),
        _refused(TypeError, True, 3, math.nan, "csr", [CompressionRatio()], {"csr": "csr"}),
    ),
    "DensityMonitor.accuracy": Kind(
        (None,), _refused(TypeError, True, 3, math.nan, []) + _refused(ValueError, "val_acc")
    ),
    "DynamicThresholds.alpha": AT_LEAST_0,
    "DynamicThresholds.weight_decay": optional(AT_LEAST_0),
    "ESPNFinetune|ESPNRewind.alpha": ABOVE_0,
    "ESPNFinetune|ESPNRewind.epsilon": SHARE,
    "ESPNFinetune|ESPNRewind.joint_lr": optional(ABOVE_0),
    "ESPNFinetune|ESPNRewind.on_missed": choice("raise", "warn"),
    "ESPNFinetune|ESPNRewind.tune_epochs": count(),
    "ESPNFinetune.tune_lr": optional(ABOVE_0),
    "ESPNFinetune.tune_lr_step": count(),
    "ESPNFinetune.tune_weight_decay": AT_LEAST_0,
    "ESPNFinetune.warmup_epochs": count(0),
    "ESPNRewind.rewind_to": count(0),
    "EdgePopup.weight_decay": AT_LEAST_0,
    "FORCE|IterSNIP.rounds": count(),
    "FORCE|IterSNIP.ramp": RAMP,
    "GMP.score": SCORE,
    "GMP.ramp": RAMP,
    "GSE.candidate_fraction": AT_LEAST_0,
    "GSM.weight_decay": optional(ABOVE_0),
    "GraNet.initial_density": optional(DENSITY),
    "GraNet.ramp": RAMP,
    "GraNet.prune_end": DENSITY,
    "GraSP.temperature": ABOVE_0,
    "GraSP.samples_per_class": optional(count()),
    "GraSP.target_fn": FUNCTION_OR_NONE,
    "GraSP.loss_fn": Kind((None,), FUNCTION_OR_NONE.bad),  # a function: see CONTRADICTIONS
    "IHT.sparse_intervals": count(),
    "IHT.dense_intervals": count(),
    "L0.lam": AT_LEAST_0,
    "L0.weight_decay": AT_LEAST_0,
    "L0.droprate_init": number(0, 1, low_in=False, high_in=False),
    "L0.temperature": ABOVE_0,
    "L0.stretch": STRETCH,
    "L0.lr": optional(AT_LEAST_0),
    "L0.examples": optional(count()),
    "L0.structure": STRUCTURE.but((NM(2, 4), ValueError)).or_(Rows()),
    "LotteryTicket.rounds": count(),
    "LotteryTicket.round_epochs": count(),
    "LotteryTicket.rewind_to": count(0).without(1, np.int64(1)).but((1, ValueError)),
    "LotteryTicket.treatment": choice("rewind", "learning_rate", "reinitialize", "fine_tune"),
    "MEST.mutation": fraction_or_curve(-0.5),
    "MEST.soft": FLAG,
    "MEST.gradient_weight": AT_LEAST_0,
    "Magnitude.at": moment().but(*_refused(ValueError, 1, np.int64(1))).or_(1.0),
    "MaskCallback|LearnedMask.default_distribution": function(erk),
    "MaskCallback|LearnedMask.initial": function(drop(random)),
    "MaskCallback|LearnedMask.update": RULE_OR_NONE,
    "MaskCallback|LearnedMask.role": choice("initial", "updater", "reparametrization"),
    "MaskCallback|LearnedMask.ramp": optional(RAMP),
    "MaskCallback|LearnedMask.observe": FUNCTION_OR_NONE,
    "MaskCallback|LearnedMask.statistics": Kind(
        ((), ("inputs",), ["inputs", "output_grads"], {"output_grads"}),
        _refused(EITHER, None, True, 3, math.nan, "inputs", "", ("outputs",), (3,)),
    ),
    "MaskCallback|LearnedMask.single_weights": FLAG,
    "MovementPruning|SoftMovementPruning.lr": Kind(
        (0.5, 1, np.float32(0.5), np.int64(1), cosine(0.5), linear(2.0)),
        ABOVE_0.bad
        + _refused(TypeError, cosine, text_of, nothing_of)
        + _refused(ValueError, constant(-1), linear(1.0, -0.5), nan_of),
    ),
    "MovementPruning|SoftMovementPruning.warmup": number(0, 0.8, high_in=False),
    "MovementPruning|SoftMovementPruning.cooldown": number(0, 0.9, high_in=False),
    "NeST.seed_density": optional(DENSITY),
    "NeST.peak_density": optional(number(0.3, 1)),
    "NeST.growth_end": number(0, 1, low_in=False, high_in=False),
    "NeST.new_weight_scale": AT_LEAST_0,
    "NeuralTangentTransfer.steps": count(),
    "NeuralTangentTransfer.lr": ABOVE_0,
    "NeuralTangentTransfer.kernel_weight": AT_LEAST_0,
    "NeuralTangentTransfer.penalty": AT_LEAST_0,
    "NeuralTangentTransfer.mask_interval": count(),
    "NeuralTangentTransfer.samples": count(2),
    "NeuralTangentTransfer.transfer_weights": FLAG,
    "OptG.alpha": ABOVE_0.or_("auto"),
    "OptG.update_end": moment().without(0).but(*_refused(ValueError, 1, np.int64(1))).or_(None),
    "Powerpropagation.alpha": number(1),
    "Powerpropagation.floor": SHARE,
    "ProsPr.inner_steps": count(0),
    "ProsPr.inner_lr": ABOVE_0,
    "ProsPr.inner_momentum": SHARE,
    "ProsPr.first_order": FLAG,
    "ProsPr.batches": optional(count()),
    "RedrWoodfisher|RedrWoodtaylor.block_size": count(),
    "RedrWoodfisher|RedrWoodtaylor.damping": optional(ABOVE_0),
    "RedrWoodfisher|RedrWoodtaylor.joint": FLAG,
    "SET.sign_split": FLAG,
    "SET.new_weight_std": AT_LEAST_0,
    "SNAPit|SNIPit.halvings": count(0),
    "SNFS.beta": MOMENTUM,
    "SNFS.redistribute": FLAG,
    "SRSTE.decay": AT_LEAST_0,
    "SRigL.gamma": ABOVE_0,
    "SRigL.ablate": FLAG,
    "STR.s_init": number(high=0, high_in=False),
    "STR.weight_decay": optional(ABOVE_0),
    "SoftMovementPruning.lam": AT_LEAST_0,
    "SoftMovementPruning.threshold": number(0, 1, low_in=False, high_in=False),
    "SoftMovementPruning.min_density": SHARE,
    "SparseCompute.layout": choice("auto", "csr"),
    "SparseCompute.kernels": choice("auto", "torch", "native"),
    "SparseCompute.contiguous": FLAG,
    "SparseCompute.elementwise": Kind(
        ((), (torch.optim.SGD,), [torch.optim.Adam]),
        _refused(EITHER, None, True, 3, "SGD", math.nan, (3,), ("SGD",), (nn.Linear,), [None]),
    ),
    "StaticSparse.score": SCORE,
    "StaticSparse.topology": RULE_OR_NONE,
    "Supermask.rescale": FLAG,
    "Supermask.initial_probability": number(0, 1, low_in=False, high_in=False),
    "SynFlow.rounds": count(),
    "SynFlow.zero_bias": FLAG,
    "SynFlow.double": FLAG,
    "TopKAST.exploration": SHARE,
    "TopKAST.decay": AT_LEAST_0,
    "TopKAST.penalty": choice("l2", "l1"),
    "VariationalDropout.threshold": number(-8, 8, low_in=False, high_in=False),
    "VariationalDropout.kl_weight": AT_LEAST_0,
    "VariationalDropout.warmup": WARMUP,
    "VariationalDropout.log_sigma2_init": number(),
    "VariationalDropout.lr": optional(AT_LEAST_0),
    "VariationalDropout.examples": optional(count()),
}

# Of schedules, distributions, structures and what else is passed to callbacks.
FRACTION_OF_WHOLE = number(0, 1, low_in=False)
PARTS: dict[str, Kind] = {
    "Block.rows": count(),
    "Block.columns": count(),
    "NM.n": count().without(2, np.int64(2)).but((5, ValueError)),
    "NM.m": count(),
    "approximate_isometry.steps": count(),
    "approximate_isometry.lr": ABOVE_0,
    "approximate_isometry.tolerance": AT_LEAST_0,
    "approximate_isometry.orthogonal": FLAG,
    "constant.value": number(),
    "cosine.start": number(),
    "cosine.end": number(),
    "cubic.start": number(),
    "cubic.end": number(),
    "cyclic.low": number(high=0.5),
    "cyclic.high": number(0.1),
    "cyclic.cycles": count(),
    "drawn_by.score": SCORE,
    "drawn_by.power": AT_LEAST_0,
    "early.schedule": function(cosine(0.5), text_of),
    "early.at": FRACTION_OF_WHOLE,
    "epochs.number": count(),
    "epsilon.value": ABOVE_0,
    "erk_power.power": AT_LEAST_0,
    "exponential.start": ABOVE_0,
    "exponential.end": ABOVE_0,
    "geometric.start": number(),
    "geometric.gamma": ABOVE_0,
    "geometric.updates": ABOVE_0,
    "global_by.score": SCORE,
    "global_by.min_per_layer": count(0),
    "in_proportion.measure": function(lambda layer: layer.size),
    "inverse_power.start": number(),
    "inverse_power.power": ABOVE_0,
    "keep_dense.distribution": function(erk),
    "keep_dense.layers": Kind(
        ("net.5", ["net.5", "net.7"], ("net.*",)),
        _refused(EITHER, None, True, 3, 0.5, math.nan, "", [], (), [3], [None], {}),
    ),
    "keep_dense.charge": FLAG,
    "linear.start": number(),
    "linear.end": number(),
    "momentum.beta": MOMENTUM,
    "nearby.length": ABOVE_0,
    "per_layer.densities": Kind(
        ({"net.*": 0.3}, [("net.5", 1.0), ("*", 0.1)], {"*": np.float32(0.5)}, {"*": 1}),
        _refused(EITHER, None, True, 3, 0.5, math.nan, "net.5", "", {}, [], ["net.5"], {3: 0.5})
        + _refused(EITHER, {"*": "0.5"}, {"*": True}, {"*": 0}, {"*": 1.5}, {"*": math.nan})
        + _refused(EITHER, {"*": math.inf}, {"*": None}, [("*", 0.5, 0.5)]),
    ),
    "sigmoid.start": number(),
    "sigmoid.end": number(),
    "sigmoid.steepness": ABOVE_0,
    "sigmoid.normalize": FLAG,
    "signed_constant.scale": choice("fan_in", "live_fan_in", "std"),
    "slot.name": Kind(("momentum",), _refused(EITHER, None, True, 3, "", [], math.nan)),
    "slot.signed": FLAG,
    "smart_ratio_with.linear": DENSITY,
    "smart_ratio_with.vgg": FLAG,
    "sparse_uniform.fan_in": choice("live", "dense"),
    "step.value": number(),
    "step.factors": Kind(
        ({0.5: 0.5}, [(0.5, 0.5), (0.75, 0)], {}, {np.float32(0.5): np.float32(0.5)}, {1: 0.5}),
        _refused(EITHER, None, True, 3, 0.5, math.nan, "abc", [0.5], {"0.5": 0.5}, {0.5: "0.5"})
        + _refused(EITHER, {0.5: True}, {True: 0.5}, {0.5: None}, {0.5: math.nan}, {0.0: 0.5})
        + _refused(EITHER, {1.5: 0.5}, {-0.5: 0.5}, {math.nan: 0.5}, {math.inf: 0.5})
        + _refused(EITHER, {0.5: math.inf}),
    ),
    "taylor.beta": MOMENTUM,
    "until.ramp": function(cubic),
    "until.at": FRACTION_OF_WHOLE,
}
# Made by callbacks that check for them what they are given.
INSIDE = {structures.Layout, schedules.alternating}
_MODULES = (schedules, distributions, structures, scores, starts, window)
_INTERNAL = {"Asked", "Window", "Ends", "Steps"}


def one_count(layers: Any, total: int) -> list[int]:
    """A distribution that forgets layers."""
    return [1]


def floats(layers: Any, total: int) -> list[float]:
    """A distribution that splits in fractions."""
    return [total / len(layers)] * len(layers)


def nothing(*given: Any) -> None:
    """A function that gives nothing."""


def first_layers(layers: Any, budget: Any, progress: float) -> Any:
    """A rule that forgets layers."""
    return layers[:1]


# By argument: what only the model shows not to fit.
MISFITS: dict[str, tuple[Any, ...]] = {
    "include": (
        *("net.9", "nothing.*", "*.bias", "", 3, None, True, 1.5, math.nan, [3], {}, (), []),
        *(nn.ReLU(), nn.Conv3d, lambda candidate: False),
    ),
    "exclude": (
        *("net.9", "nothing.*", "*", "", 3, None, True, 1.5, math.nan, [3]),
        *(nn.ReLU(), nn.Conv3d, lambda candidate: True),
    ),
    "structure": (Block(3, 3), NM(1, 7)),
    "distribution": (
        *({"net.0": 0.1}, {"net.99": 0.5, "*": 0.5}, {"*": 0.9}, distributions.epsilon(20)),
        *(one_count, floats, nothing, distributions.keep_dense(erk, "*", charge=True)),
    ),
    "weight_init": (nothing, first_layers),
    "topology": (nothing, first_layers),
    "data": ([], iter(())),
    "forward_fn": (nothing,),
    "target_fn": (nothing,),
}

# Arguments that are allowed one by one and not together, and what the message must name.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "ESPNRewind": ({"density": 0.3, "structure": NM(2, 4)},),
    "CHT": ({"density": 0.6, "ramp": cubic, "initial_density": 0.5, "structure": Rows()},),
    "DSD": ({"density": 0.3, "update_start": 0.6, "update_end": 0.3},),
    "GMP": (
        {"density": 0.3, "initial_density": 0.2},
        {"density": 0.3, "update_start": 0.5, "update_end": 0.1},
        {"density": 0.3, "update_start": 20, "update_end": 10},
    ),
    "GraNet": ({"density": 0.3, "structure": NM(2, 4)},),
    "GraSP": (
        {"loss_fn": nothing, "samples_per_class": 10},
        {"loss_fn": nothing, "forward_fn": nothing, "samples_per_class": None},
        {"loss_fn": nothing, "target_fn": nothing, "samples_per_class": None},
    ),
    "MEST": ({"soft": True, "density": None},),
    "MovementPruning": ({"density": 0.3, "warmup": 0.5, "cooldown": 0.5},),
    "NeST": (
        {"density": 0.5, "peak_density": 0.4},
        {"density": 0.1, "seed_density": 0.5, "peak_density": 0.4},
    ),
    "RigL": (
        {"density": 0.3, "structure": NM(2, 4)},
        {"distribution": erk, "structure": NM(2, 4)},
        {"update_start": 0.5, "update_end": 0.1},
        {"update_start": 20, "update_end": 10},
        {"update_start": np.int64(20), "update_end": np.int64(10)},
    ),
    "SET": ({"density": 0.3, "sign_split": True, "structure": Rows()},),
    "SRSTE": ({"density": 0.3},),  # its pattern is 2:4
    "SoftMovementPruning": ({"warmup": 0.5, "cooldown": 0.5},),
    "MaskCallback": (
        {
            **{"density": 0.3, "initial": drop(random), "default_distribution": erk},
            **{"structure": Rows(), "single_weights": True},
        },
    ),
    "NM": ({"n": 4, "m": 2},),
    "cyclic": ({"low": 0.5, "high": 0.1, "cycles": 1},),
}


def callbacks() -> dict[str, type[Callback]]:
    """The public callbacks, by name."""
    members = {name: getattr(lightning_sparsity, name) for name in lightning_sparsity.__all__}
    return {n: m for n, m in members.items() if inspect.isclass(m) and issubclass(m, Callback)}


def parts() -> dict[str, type[Any]]:
    """Schedules, distributions, structures, scores and starts that take arguments, by name."""
    return {name: member for module in _MODULES for name, member in _made_in(module)}


def _made_in(module: ModuleType) -> Iterator[tuple[str, type[Any]]]:
    for name, member in vars(module).items():
        own = inspect.isclass(member) and member.__module__ == module.__name__
        public = own and not name.startswith("_") and name not in _INTERNAL and member not in INSIDE
        if public and dataclasses.is_dataclass(member) and dataclasses.fields(member):
            yield name, member


def arguments(kind: Callable[..., Any]) -> list[str]:
    """Names of the arguments."""
    return list(inspect.signature(kind).parameters)


def entry(table: Mapping[str, Kind], name: str, argument: str) -> str:
    """The key of an argument: that of its own class, or else of all.

    Raises:
        KeyError: If the table has none.
    """
    for key in table:
        owners, _, of = key.rpartition(".")
        if of == argument and name in owners.split("|"):
            return key
    if argument in table:
        return argument
    raise KeyError(f"{name}({argument}=): add what it may be and what not, to arguments.py")


def needed(kind: Callable[..., Any], argument: str) -> dict[str, Any]:
    """What else to pass, so that only ``argument`` can be at fault.

    Args:
        kind: The class.
        argument: What is tried.
    """
    name, parameters = kind.__name__, inspect.signature(kind).parameters
    given: dict[str, Any] = {}
    for other, parameter in parameters.items():
        if parameter.default is parameter.empty and name in parts():
            given[other] = PARTS[entry(PARTS, name, other)].good[0]
    if name == "SRSTE":  # by itself it has a pattern, which fixes the density
        given["structure"] = structures.Unstructured()
    if name == "cyclic":
        given |= {"low": 0.1, "high": 0.5}
    if name == "NM":
        given |= {"n": 1, "m": 4} if argument != "m" else {"n": 1}
    if name in ("MaskCallback", "LearnedMask"):
        given |= {"initial": drop(random), "default_distribution": erk}
    if "density" in parameters and (name, argument) != ("SRSTE", "structure"):
        given["density"] = 0.3
    return {other: value for other, value in given.items() if other != argument}
