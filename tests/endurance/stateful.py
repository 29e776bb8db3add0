"""Live through random trainings, and check after every step all that is promised of it.

    python tests/endurance/stateful.py --sequences 1000 --seed 0 --output stateful.json

A sequence draws a small model (linear, convolutional, tied weights; one optimizer or two), one
method or several after another, densities, structure, windows, storage, optimizer, and batches
whose loss is missing, not finite, or reaches one layer only. It is trained to its end; then it is
resumed from checkpoints of any moment, with the same storage or the other, breaks off with an
exception and is fitted again, by the same Trainer or a new one, is copied, or goes on for longer.

After every batch: the units that live are as many as the budget says, in every layer and in
total, and units are whole; weights and optimizer state are zero off the masks, and weights are
finite; names are those of the dense model, and so are the shapes of what is saved. After loading,
masks are those that were saved. After every batch of a resumed training, weights, optimizer state,
masks, slots, counters and random states have the bits of the training that went on. After every
``fit``, whether it ended or broke off, nothing of the package is left in the model or its
optimizers.

``--only 17`` repeats one sequence.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import io
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from methods import (
    EMERGENT,
    END_DENSE,
    INITIAL,
    LINEAR_ONLY,
    METHODS,
    MOVE_BETWEEN_LAYERS,
    SINGLE_WEIGHTS,
)

from lightning_sparsity import NM, Block, Columns, MaskCallback, Rows, SparseCompute
from lightning_sparsity.core.apportion import shares
from lightning_sparsity.core.capture import Hook  # a copy's does nothing
from lightning_sparsity.core.intact import Checked
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.run import Run
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops.fingerprint import fingerprint
from lightning_sparsity.structures import Structure
from lightning_sparsity.testing import (
    Batch,
    Batches,
    ManualModel,
    TinyModel,
    assert_zero_off_masks,
    quiet_trainer,
    tiny_net,
)

EPOCHS = 3  # as many as LotteryTicket fills with what the table of methods gives it
Position = tuple[int, int]  # epoch and batch


def _linear() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def _tied() -> nn.Sequential:
    first, second = nn.Linear(36, 36), nn.Linear(36, 36)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Tanh(), nn.Linear(36, 4))


def _convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 4),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "tied": _tied,
    "convolution": tiny_net,
    "convolutions": _convolutions,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
}
STRUCTURES: list[Structure] = [Rows(), Columns(), Block(2, 4), NM(2, 4)]
# All but ESPN, whose joint training is longer than these trainings; kill.py has it.
ALL: dict[str, Callable[..., MaskCallback]] = {**METHODS, **EMERGENT}
# Updaters that can be told when to begin, when to end, and how often to act.
WINDOWED = [
    name
    for name, make in METHODS.items()
    if name not in INITIAL
    and {"update_interval", "update_start", "update_end"}
    <= inspect.signature(type(make()).__init__).parameters.keys()
]
# Its training has a length that is its own.
PHASED = ["LotteryTicket"]
# What lives is not a number of units that the density says, but a matter of their papers.
OWN_BUDGET = ["SNAPit", "SRigL", "LotteryTicket", *EMERGENT]
# Dense and sparse by turns.
BY_TURNS = ["IHT", "DSD"]
PLACES = ["forward", "loss", "backward", "before step", "batch end", "validation"]


# ------------------------------------------------------------------------------ what is lived


@dataclass(frozen=True)
class Stage:
    """One method of a training.

    Args:
        name: In the table of methods.
        options: Its arguments.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def callback(self) -> MaskCallback:
        """A new one."""
        return ALL[self.name](**self.options)


@dataclass(frozen=True)
class Leg:
    """One call of ``fit``.

    Args:
        kind: "fresh", "resume" from a checkpoint, "again" by the Trainer that broke off,
            "longer" by the Trainer that ended, "anew" with the same model.
        storage: "dense" or "csr".
        seed: Of ``seed_everything``.
        saves: Where to save; a batch of -1 is the end of the epoch.
        copies: Where to copy the model.
        interruption: Epoch, batch and place of an exception.
        pick: Which checkpoint to resume from, in [0, 1).
    """

    kind: str = "fresh"
    storage: str = "dense"
    seed: int = 3
    saves: tuple[Position, ...] = ()
    copies: tuple[Position, ...] = ()
    interruption: tuple[int, int, str] | None = None
    pick: float = 0.0


@dataclass(frozen=True)
class Life:
    """A sequence.

    Args:
        stages: Methods, in list order.
        net: Which of :data:`NETS`.
        optimizer: Which of :data:`OPTIMIZERS`.
        stepping: "automatic", "scaler" (a GradScaler), "by hand" or "raw" (two optimizers).
        batches: Per epoch.
        accumulate: Batches per step.
        validate: Batches between validations; 0: at the ends of epochs.
        faults: By position: "none" (no loss), "nan", or "partial" (of the last layer only).
        legs: What happens.
    """

    stages: tuple[Stage, ...]
    legs: tuple[Leg, ...] = (Leg(),)
    net: str = "linear"
    optimizer: str = "sgd"
    stepping: str = "automatic"
    batches: int = 4
    accumulate: int = 1
    validate: int = 0
    faults: dict[Position, str] = field(default_factory=dict)

    def has(self, fault: str) -> bool:
        """Whether a batch has this fault."""
        return fault in self.faults.values()

    def model(self) -> Pupil:
        """A new model."""
        if self.has("nan") and self.stepping != "scaler":
            return (GuardedByHand if self.stepping == "by hand" else Guarded)(self)
        return (ByHand if self.stepping in ("by hand", "raw") else Pupil)(self)

    def like(self) -> Pupil:
        """A model to compare with; no random number is drawn."""
        with torch.random.fork_rng(devices=[]):
            return self.model()

    def callbacks(self, storage: str) -> list[Callback]:
        """New callbacks."""
        made: list[Callback] = [stage.callback() for stage in self.stages]
        return made if storage == "dense" else [*made, SparseCompute("csr")]


def draw(chance: random.Random) -> Life:
    """A random sequence."""
    net = chance.choice(list(NETS))
    stepping = chance.choice(["automatic"] * 6 + ["scaler", "by hand", "by hand", "raw"])
    batches = chance.randint(3, 5)
    accumulate = chance.choice([1, 1, 2]) if stepping in ("automatic", "scaler") else 1
    stages = _stages(chance, net, EPOCHS * math.ceil(batches / accumulate))
    kinds = ["none", "partial", "nan"]
    learns = any(_learns(stage) for stage in stages)
    if stepping == "raw" or (learns and stepping != "scaler"):
        kinds.remove("nan")  # nobody throws it away, or only after what learns has seen it
    anywhere = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(batches)]
    ill = chance.sample(anywhere, chance.choice([0, 0, 1, 3]))
    return Life(
        stages=stages,
        legs=_legs(chance, stages, anywhere, accumulate, stepping),
        net=net,
        optimizer=chance.choice(list(OPTIMIZERS)),
        stepping=stepping,
        batches=batches,
        accumulate=accumulate,
        validate=chance.choice([0, 0, 2]),
        faults={position: chance.choice(kinds) for position in ill},
    )


def _learns(stage: Stage) -> bool:
    return hasattr(stage.callback(), "trained")


def _stages(chance: random.Random, net: str, steps: int) -> tuple[Stage, ...]:
    """An initial method or none, and a method or two after one another."""
    structure = chance.choice([None, None, None, *STRUCTURES])
    density = chance.choice([0.3, 0.5, 0.8] if structure else [0.1, 0.2, 0.3, 0.5, 0.8])
    common: dict[str, Any] = {} if structure is None else {"structure": structure}
    if net.startswith("convolution") and isinstance(structure, NM | Block):
        common["exclude"] = "net.0"  # it has one input channel
    allowed = [name for name in ALL if name not in LINEAR_ONLY or not net.startswith("conv")]
    if structure is not None:
        refused = {*SINGLE_WEIGHTS, *END_DENSE, *EMERGENT, "SNAPit"}
        allowed = [name for name in allowed if name not in refused]
    if density < 0.3:  # neurons are few
        allowed = [name for name in allowed if name != "SNAPit"]

    shape = chance.choice(["one", "one", "initial", "hand-over", "hand-over", "both"])

    def stage(name: str, share: float | None = density, **window: Any) -> Stage:
        options = {} if name in EMERGENT else {"density": share, **common}
        if isinstance(structure, NM):
            del options["density"]
            options = {"density": None, **options}
        if shape != "one":
            options.setdefault("exclude", ())  # all of the same layers
        return Stage(name, {**options, **window})

    windowed = [name for name in WINDOWED if name in allowed]
    stages = []
    if shape in ("initial", "both"):
        stages.append(stage(chance.choice([name for name in INITIAL if name in allowed])))
    if shape == "one":
        emergent = [name for name in EMERGENT if name in allowed]  # they come here alone
        name = chance.choice(emergent if emergent and chance.random() < 0.3 else allowed)
        if name in windowed and chance.random() < 0.5:
            return (stage(name, **_window(chance, chance.randint(0, 2), steps)),)
        return (stage(name),)

    def later(name: str) -> float | None:
        """The density of a method that finds masks."""
        if ALL[name]().ramps:
            return density
        return chance.choice([None, density, density if structure else density / 2])

    first = chance.choice(windowed)
    middle = chance.randint(3, steps - 1) if shape in ("hand-over", "both") else steps
    share = later(first) if stages else density
    stages.append(stage(first, share, **_window(chance, chance.randint(0, 2), middle)))
    if shape in ("hand-over", "both"):
        second = chance.choice(windowed)
        share = later(second)
        if share is not None and stages[-1].options["density"] is not None:
            share = min(share, stages[-1].options["density"])
        begin = min(middle + chance.choice([0, 0, 1]), steps - 1)
        stages.append(stage(second, share, **_window(chance, begin, steps)))
    return tuple(stages)


def _window(chance: random.Random, start: int, steps: int) -> dict[str, Any]:
    return {
        "update_interval": chance.choice([1, 2, 3, "epoch"]),
        "update_start": start,
        "update_end": steps,
    }


def _legs(
    chance: random.Random,
    stages: Sequence[Stage],
    anywhere: Sequence[Position],
    accumulate: int,
    stepping: str,
) -> tuple[Leg, ...]:
    phased = any(stage.name in PHASED for stage in stages)
    # Accumulated gradients are in no file. For the last batch of an epoch see Within in kill.py.
    moments = [m for m in anywhere if (m[1] + 1) % accumulate == 0 and m[1] != anywhere[-1][1]]
    moments += [(epoch, -1) for epoch in range(EPOCHS - 1)]
    # Nobody announces a raw step; and a GradScaler that broke off there is no longer usable.
    places = [p for p in PLACES if p != "before step" or stepping not in ("raw", "scaler")]
    storage = chance.choice(["dense", "csr"])
    legs: list[Leg] = []
    for number in range(chance.randint(2, 4)):
        broke = bool(legs) and legs[-1].interruption is not None
        kinds = ["resume", "resume", "resume", "anew"]
        if not phased:
            kinds += ["again", "again", "again"] if broke else ["longer"]
        kind = chance.choice(kinds) if number else "fresh"
        if number and kind not in ("again", "longer") and chance.random() < 0.3:
            storage = {"dense": "csr", "csr": "dense"}[storage]
        breaks = kind in ("resume", "anew") and chance.random() < 0.5
        saves = kind in ("fresh", "resume", "anew")
        legs.append(
            Leg(
                kind=kind,
                storage=storage,
                seed=chance.randint(0, 9999),
                saves=tuple(sorted(chance.sample(moments, 3 if not number else 1))) * saves,
                copies=tuple(chance.sample(list(anywhere), chance.choice([0, 0, 1]))),
                interruption=(*chance.choice(anywhere), chance.choice(places)) if breaks else None,
                pick=chance.random(),
            )
        )
    return tuple(legs)


# ---------------------------------------------------------------------------------- the model


class Interrupted(Exception):
    """The exception of somebody else's code."""


class Pupil(TinyModel):
    """A model with the faults of a sequence."""

    def __init__(self, life: Life) -> None:
        super().__init__(net=NETS[life.net](), optimizer=OPTIMIZERS[life.optimizer])
        self.life = life
        self.interruption: tuple[int, int, str] | None = None
        self.left: list[int] | None = None

    def interrupt(self, place: str, batch: int) -> None:
        """Raise if this is the moment."""
        if self.interruption is None or self.interruption[2] != place:
            return
        now = (self.trainer.current_epoch, batch)
        if now == self.interruption[:2] or (place == "validation" and now >= self.interruption[:2]):
            self.interruption = None
            masks = _masks(self.trainer)
            self.left = [fingerprint(kept.mask) for kept in masks]
            raise Interrupted(place)

    def faulty_loss(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of a training step, with the faults of its position."""
        self.interrupt("forward", batch_idx)
        fault = self.life.faults.get((self.trainer.current_epoch, batch_idx))
        if fault == "none":
            return None
        if fault == "partial":
            with torch.no_grad():
                hidden = self.net[:-1](batch[0])  # type: ignore[index]
            loss = nn.functional.cross_entropy(self.net[-1](hidden), batch[1])  # type: ignore[index]
        else:
            loss = self.loss(batch)
        self.interrupt("loss", batch_idx)
        return loss * math.inf if fault == "nan" else loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.faulty_loss(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.interrupt("backward", self.trainer.fit_loop.batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.trainer.sanity_checking:
            return
        self.interrupt("validation", self.trainer.fit_loop.batch_idx)
        assert_zero_off_masks(_masks(self.trainer), self.trainer.optimizers)
        if self.life.stepping != "scaler":
            bare = self.life.like().eval()
            bare.load_state_dict(self.state_dict())
            found, expected = self.net(batch[0]), bare.net(batch[0])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class ByHand(Pupil, ManualModel):
    """The same with an optimizer for each half, stepped by hand."""

    def __init__(self, life: Life) -> None:
        super().__init__(life)
        self.automatic_optimization = False
        self._raw = life.stepping == "raw"

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.faulty_loss(batch, batch_idx)
        if loss is None:
            return
        self.manual_backward(loss)
        for optimizer in self.optimizers(use_pl_optimizer=not self._raw):  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


class Guarded(Pupil):
    """A model that throws away gradients that are not finite."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                parameter.grad.zero_()


class GuardedByHand(ByHand, Guarded):
    """The same, stepped by hand."""


def _masks(trainer: pl.Trainer) -> Masks:
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None, "the keeper is gone"
    assert keeper.masks is not None, "no masks in training"
    return keeper.masks


# --------------------------------------------------------------------------------- the budget


@dataclass
class Budgets:
    """How many units live, as far as methods promise it.

    Args:
        life: The sequence.
        density: Of every run, by its place: what its ramp has come to.
        updates: Of every run, by its place.
        live: Units of every run that lived before, by its place.
    """

    life: Life
    density: dict[int, float] = field(default_factory=dict)
    updates: dict[int, int] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)

    def copy(self) -> Budgets:
        """As they are now."""
        own = {name: dict(vars(self)[name]) for name in ("density", "updates", "live")}
        return Budgets(self.life, **own)

    def check(self, keeper: MaskKeeper) -> None:
        """Raise ``AssertionError`` unless as many live as should."""
        assert keeper.masks is not None
        last: dict[str, int] = {}
        for place, run in enumerate(keeper.runs):
            self._follow(place, run)
            if run.share is not None:
                last |= dict.fromkeys(run.names, place)
        for kept in keeper.masks:
            whole = kept.structure.live(kept.mask, kept.layout)
            units = kept.structure.expand(whole, kept.shape, kept.layout)
            assert torch.equal(units, kept.mask), f"{kept.name}: part of a unit"
            assert kept.name in last or kept.is_dense, f"{kept.name}: nobody has masked it"
        for place in sorted(set(last.values())):
            run = keeper.runs[place]
            if all(last[name] == place for name in run.names):
                self._check(place, keeper.runs, [keeper.masks[name] for name in run.names])

    def _follow(self, place: int, run: Run) -> None:
        """Note where the ramp of a run is, if it has made an update."""
        if run.share is None or not run.method.ramps or run.updates == self.updates.get(place, 0):
            return
        self.updates[place] = run.updates
        began = run.method.initial_density  # type: ignore[attr-defined]
        if run.share.found:
            began = sum(run.share.start.values()) / sum(run.size.values())
        ramp = run.method.ramp(began, run.method.density)  # type: ignore[attr-defined]
        self.density[place] = ramp(run.progress)

    def _check(self, place: int, runs: Sequence[Run], layers: Sequence[SparseParameter]) -> None:
        run = runs[place]
        name, method, share = type(run.method).__name__, run.method, run.share
        assert share is not None
        live = {kept.name: _units(kept) for kept in layers}
        before, self.live[place] = self.live.get(place), sum(live.values())
        if name in OWN_BUDGET:
            return
        if method.ramps:
            left_out = method.needs_gradient or method.observe is not None
            if not (left_out and self.life.has("partial")):
                self._check_ramp(place, run, live, layers, before)
            return
        if name in MOVE_BETWEEN_LAYERS:
            assert sum(live.values()) == sum(share.start.values()), f"{run.key}: {live}"
        else:
            assert live == dict(share.start), f"{run.key}: {live}, began with {share.start}"
        if isinstance(layers[0].structure, NM):
            assert method.density is None or _fits_pattern(method.density, layers), f"{run.key}"
            return
        if method.density is not None:
            wanted = _part(run, method.density)
            assert sum(live.values()) == wanted, f"{run.key}: {live}, not {wanted}"
        elif share.found:
            self._check_found(place, runs, live)
        self._check_uniform(run, layers)

    def _check_found(self, place: int, runs: Sequence[Run], live: dict[str, int]) -> None:
        """What the method before was asked for."""
        run = runs[place]
        earlier = [r for r in runs[:place] if set(r.names) & set(run.names) and r.key != run.key]
        asked = [r for r in earlier if r.method.density is not None]
        plain = not any(type(r.method).__name__ in (*OWN_BUDGET, *BY_TURNS) for r in earlier)
        if asked and plain and not self.life.has("partial"):
            wanted = _part(run, asked[-1].method.density or 1.0)
            assert sum(live.values()) == wanted, f"{run.key}: found {live}, not {wanted}"

    def _check_uniform(self, run: Run, layers: Sequence[SparseParameter]) -> None:
        """Every layer has the density, where a method begins with that."""
        method, share = run.method, run.share
        assert share is not None
        is_uniform = getattr(method, "default_distribution", None) is uniform
        if is_uniform and not share.found and method.density is not None:
            for kept in layers:
                exact = method.density * kept.size
                begun = share.start[kept.name]
                assert abs(begun - exact) < 1.5, f"{run.key}: {kept.name} began with {begun}"

    def _check_ramp(
        self,
        place: int,
        run: Run,
        live: dict[str, int],
        layers: Sequence[SparseParameter],
        before: int | None,
    ) -> None:
        """What the ramp says of the latest update."""
        assert run.share is not None
        assert run.method.density is not None
        name, total = type(run.method).__name__, sum(live.values())
        density = self.density.get(place)
        if name in BY_TURNS:
            allowed = {_part(run, run.method.density), sum(run.size.values())}
            allowed |= {sum(run.share.start.values())}
            assert isinstance(layers[0].structure, NM) or total in allowed, f"{run.key}: {live}"
        elif density is None:
            assert live == dict(run.share.start), f"{run.key}: {live} before any update"
        elif isinstance(layers[0].structure, NM):
            assert _fits_pattern(density, layers), f"{run.key}: {live} at {density}"
        else:
            wanted = _part(run, density)
            latent = getattr(run.method, "latent", False)  # what it dropped may come back
            begun = sum(run.share.start.values())  # after SRigL somewhat less than the density
            if run.method.only_prunes:
                wanted = min(wanted, begun if latent or before is None else before)
            assert total == wanted, f"{run.key}: {live}, not {wanted} at {density}"


def _units(kept: SparseParameter) -> int:
    return int(kept.structure.live(kept.mask, kept.layout).count_nonzero())


def _part(run: Run, density: float) -> int:
    """The units of a run that a density of its method gives."""
    assert run.share is not None
    sizes = run.share.sizes
    total = max(len(sizes), round(density * sum(sizes)))
    return shares(total, sizes)[run.share.index]


def _fits_pattern(density: float, layers: Sequence[SparseParameter]) -> bool:
    """Whether in every group of an ``NM`` pattern as many live as a density gives."""
    for kept in layers:
        assert isinstance(kept.structure, NM)
        wanted = max(1, math.ceil(round(density * kept.structure.m, 9)))
        if not (kept.structure.group(kept.mask, kept.layout).sum(1) == wanted).all():
            return False
    return True


# -------------------------------------------------------------------------------- the witness


@dataclass
class Line:
    """What was seen of a training, which all that resume it must see again.

    Args:
        seen: Hashes, by position.
        order: Positions, as they came; None as long as it has not been seen to its end.
    """

    seen: dict[Position, dict[str, str]] = field(default_factory=dict)
    order: list[Position] | None = None


@dataclass
class Save:
    """A checkpoint.

    Args:
        path: Of the file.
        line: Of the training that wrote it.
        position: The latest batch before it.
        storage: Of the training that wrote it.
        hashes: Of its masks.
        budgets: Of the training.
        epochs: Of the training.
    """

    path: Path
    line: Line
    position: Position
    storage: str
    hashes: list[int]
    budgets: Budgets
    epochs: int


class Witness(Checkpoint):
    """Checks everything after every batch, saves, and copies; the last of all callbacks.

    Args:
        play: Whose events it takes part in.
    """

    def __init__(self, play: Play) -> None:
        self._play = play
        self.life = play.life
        right = play.life.like()
        self._keys = {key: value.shape for key, value in right.state_dict().items()}
        self._names = [name for name, _ in right.named_parameters()]
        self._begun: set[int] = set()

    def arm(self, leg: Leg, line: Line, budgets: Budgets, expected: list[int] | None) -> None:
        """Get ready for another ``fit``.

        Args:
            leg: The call.
            line: What is to be seen again, and what was not seen yet.
            budgets: As they are at the start.
            expected: Hashes of the masks at the start, where they are known.
        """
        self.leg, self.line, self.budgets, self._expected = leg, line, budgets, expected
        self.visited: list[Position] = []
        self.final: dict[str, Tensor] = {}

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        masks = _masks(trainer)
        hashes = [fingerprint(kept.mask) for kept in masks]
        if self._expected is not None:
            assert hashes == self._expected, "masks are not those that were left"
        assert_zero_off_masks(masks, trainer.optimizers)
        if self.leg.kind == "resume":
            self._begun = _begun(keeper)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        assert isinstance(pl_module, Pupil)
        pl_module.interrupt("before step", trainer.fit_loop.batch_idx)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: Pupil, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        keeper, masks = MaskKeeper.of(trainer), _masks(trainer)
        assert keeper is not None
        position = (trainer.current_epoch, batch_idx)
        assert_zero_off_masks(masks, trainer.optimizers)
        self.budgets.check(keeper)
        self._check_names(pl_module, masks)
        self._compare(position, _hashes(trainer, pl_module, keeper))
        self._count(keeper)
        self.visited.append(position)
        self.final = {kept.name: kept.mask.clone() for kept in masks}
        if position in self.leg.copies:
            self._copy(pl_module)
        if position in self.leg.saves:
            self._save(trainer, position)
        pl_module.interrupt("batch end", batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch, -1) in self.leg.saves and self.visited:
            self._save(trainer, self.visited[-1])

    def _count(self, keeper: MaskKeeper) -> None:
        counts = self._play.counts
        counts["batches"] += 1
        begun, over = _begun(keeper), set()
        for place in begun - self._begun:
            mine = keeper.runs[place]
            earlier = [keeper.runs[p] for p in begun if p < place]
            if any(set(mine.names) & set(run.names) for run in earlier):
                over.add(mine.key)
        counts["hand-overs"] += len(over)
        self._begun = begun

    def _check_names(self, model: Pupil, masks: Masks) -> None:
        state = model.state_dict()
        assert {k: v.shape for k, v in state.items()} == self._keys, "state_dict"
        assert list(state) == list(self._keys), "order of the state_dict"
        assert [name for name, _ in model.named_parameters()] == self._names, "names"
        for key, value in state.items():
            assert value.isfinite().all(), f"{key} is not finite"
        for kept in masks:
            for alias in kept.aliases:
                assert not state[alias][~kept.mask].any(), f"{alias} in the state_dict"

    def _compare(self, position: Position, found: dict[str, str]) -> None:
        known = self.line.seen.setdefault(position, found)
        differing = [part for part in found if found[part] != known[part]]
        assert not differing, f"{', '.join(differing)} at {position} of a resumed training"

    def _copy(self, model: Pupil) -> None:
        twin = copy.deepcopy(model)
        assert_plain(twin, self.life)
        state = model.state_dict()
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), f"{key} in a copy"
        self._play.counts["copies"] += 1

    def _save(self, trainer: pl.Trainer, position: Position) -> None:
        path = self._play.folder / f"{len(self._play.saves)}.ckpt"
        trainer.save_checkpoint(path)
        masks = _masks(trainer)
        self._check_file(path, masks)
        self._play.counts["saves"] += 1
        self._play.saves.append(
            Save(
                path,
                self.line,
                position,
                self.leg.storage,
                [fingerprint(kept.mask) for kept in masks],
                self.budgets.copy(),
                trainer.max_epochs or 0,
            )
        )

    def _check_file(self, path: Path, masks: Masks) -> None:
        """A file is plain, dense, and zero off the masks."""
        file = torch.load(path, weights_only=True)
        state = file["state_dict"]
        assert {k: v.shape for k, v in state.items()} == self._keys, "state_dict in a file"
        bare = self.life.like()
        bare.load_state_dict(state, strict=True)
        made = bare.configure_optimizers()
        optimizers = made if isinstance(made, list) else [made]
        parameters = dict(bare.named_parameters())
        for optimizer, saved in zip(optimizers, file["optimizer_states"], strict=True):
            optimizer.load_state_dict(saved)
        for kept in masks:
            for alias in kept.aliases:
                assert not state[alias][~kept.mask].any(), f"{alias} in a file"
            for optimizer in optimizers:
                for value in optimizer.state.get(parameters[kept.name], {}).values():
                    if isinstance(value, Tensor) and value.ndim:
                        assert tuple(value.shape) == kept.shape, f"state of {kept.name} in a file"
                        assert kept.is_latent or not value[~kept.mask].any(), (
                            f"state of {kept.name} off the mask in a file"
                        )


def _begun(keeper: MaskKeeper) -> set[int]:
    """Places of the runs that have begun."""
    return {place for place, run in enumerate(keeper.runs) if run.share is not None}


def _hashes(trainer: pl.Trainer, model: nn.Module, keeper: MaskKeeper) -> dict[str, str]:
    """Hashes of all that a training is, by part."""
    state = keeper.state_dict()
    parts = {
        "weights": model.state_dict(),
        "optimizer state": [o.state_dict() for o in trainer.optimizers],
        "masks": [kept.mask for kept in _masks(trainer)],
        "random states": state["rng"],
        "counters": {k: state[k] for k in ("steps", "runs", "seed", "methods")},
        "slots": {name: saved["slots"] for name, saved in state["parameters"].items()},
        "what is learned": state["learners"],
    }
    return {name: _hash(part) for name, part in parts.items()}


def _hash(thing: Any) -> str:
    total = hashlib.blake2b(digest_size=8)
    _feed(thing, total.update)
    return total.hexdigest()


def _feed(thing: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(thing, Tensor):
        update(f"{thing.dtype} {tuple(thing.shape)}".encode())
        update(thing.detach().contiguous().cpu().numpy().tobytes())
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            update(str(key).encode())
            _feed(thing[key], update)
    elif isinstance(thing, list | tuple) and not all(isinstance(x, int) for x in thing):
        for part in thing:
            _feed(part, update)
    else:
        update(repr(tuple(thing) if isinstance(thing, list) else thing).encode())


def assert_plain(model: nn.Module, life: Life, trainer: pl.Trainer | None = None) -> None:
    """Raise ``AssertionError`` unless nothing of the package is left."""
    right = life.like()
    for (name, module), like in zip(model.named_modules(), right.modules(), strict=True):
        assert type(module) is type(like), f"{name} is a {type(module)}"
        assert "_stand_ins" not in vars(module), f"{name} has stand-ins"
        for key, hooks in vars(like).items():
            if key.endswith("_hooks"):
                held = getattr(module, key)
                left = [hook for hook in held.values() if not isinstance(hook, Hook)]
                assert bool(left) == bool(hooks), f"{name} has {key}: {left}"
    shapes = {name: parameter.shape for name, parameter in right.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes, "parameters"
    for (name, parameter), like in zip(model.named_parameters(), right.parameters(), strict=True):
        assert type(parameter) is nn.Parameter, name
        assert parameter.requires_grad == like.requires_grad, f"requires_grad of {name}"
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, f"{name}.grad"
        assert not parameter._backward_hooks, f"hooks of {name}"
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None), f"hooks of {name}"
    if trainer is None:
        return
    for optimizer in trainer.optimizers:
        for key, hooks in vars(optimizer).items():
            assert not key.endswith("_hooks") or not hooks, f"{key} of an optimizer"
        for parameter, state in optimizer.state.items():
            for value in state.values():
                dense = not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
                assert dense, f"optimizer state of shape {value.shape}"
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is None, "masks outside fit"
    assert not isinstance(trainer.strategy.checkpoint_io, Checked), "checkpoint_io"


# ------------------------------------------------------------------------------------ a life


class Refused(Exception):
    """A training that the package refuses before its first step."""


class Play:
    """A sequence on its way.

    Args:
        life: The sequence.
        folder: For its checkpoints.
    """

    def __init__(self, life: Life, folder: Path) -> None:
        self.life = life
        self.folder = folder
        self.saves: list[Save] = []
        self.counts: Counter[str] = Counter()
        self._model: Pupil | None = None
        self._trainer: pl.Trainer | None = None
        self._witness = Witness(self)
        self._broke: bool | None = None
        self.refused: Counter[str] = Counter()

    def run(self) -> None:
        """Live through it.

        Raises:
            AssertionError: If a promise is broken.
            Refused: If the package refuses the first training.
        """
        for leg in self.life.legs:
            if leg.kind in ("again", "longer") and self._broke is not (leg.kind == "again"):
                continue
            try:
                self._fit(leg)
            except Refused as error:
                if leg.kind == "fresh":
                    raise
                self.refused[str(error)] += 1
                self._broke = None

    def _fit(self, leg: Leg) -> None:
        path = None
        expected, epochs = None, EPOCHS
        line, budgets = Line(), Budgets(self.life)
        kind = "anew" if leg.kind == "resume" and not self.saves else leg.kind
        after: Position | None = None
        if kind in ("fresh", "resume"):
            pl.seed_everything(leg.seed, verbose=False)
            self._model = self.life.model()
        if kind == "anew" and leg.pick < 0.5:
            self._model = copy.deepcopy(self._model)
        model = self._model
        assert model is not None
        model.train()  # an exception in validation leaves it evaluating
        if kind == "resume":
            save = self.saves[int(leg.pick * len(self.saves))]
            path, expected, budgets, epochs = save.path, save.hashes, save.budgets, save.epochs
            budgets, after = budgets.copy(), save.position
            line = save.line if save.storage == leg.storage else Line()
            self.counts["resumes"] += 1
            self.counts["with other storage"] += save.storage != leg.storage
        if kind in ("again", "longer"):
            trainer, budgets = self._trainer, self._witness.budgets
            assert trainer is not None
            expected = model.left if kind == "again" else None
            if kind == "longer":
                trainer.fit_loop.max_epochs = (trainer.max_epochs or 0) + 1
        else:
            self._witness = Witness(self)
            trainer = self._make_trainer(leg, epochs)
        self._witness.arm(leg, line, budgets, expected)
        self._trainer, model.interruption = trainer, leg.interruption
        self.counts["trainings"] += 1
        self.counts[kind] += 1
        self._broke = self._train(trainer, model, path, may_refuse=kind in ("fresh", "anew"))
        self.counts["exceptions"] += self._broke
        self._check_end(trainer, model, line, after)

    def _make_trainer(self, leg: Leg, epochs: int) -> pl.Trainer:
        life = self.life
        options: dict[str, Any] = {}
        if life.stepping == "scaler":
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        if life.validate:
            options["val_check_interval"] = life.validate
        return quiet_trainer(
            [*life.callbacks(leg.storage), self._witness],
            max_epochs=epochs,
            enable_checkpointing=True,
            default_root_dir=self.folder,
            accumulate_grad_batches=life.accumulate,
            **options,
        )

    def _train(
        self, trainer: pl.Trainer, model: Pupil, path: Path | None, may_refuse: bool
    ) -> bool:
        """Whether it broke off."""
        data = Batches(self.life.batches, size=4)
        try:
            trainer.fit(model, data, Batches(1, size=4), ckpt_path=path)
        except Interrupted:
            return True
        except (ValueError, MisconfigurationException) as error:
            if self._witness.visited or not may_refuse:
                raise
            raise Refused(f"{type(error).__name__}: {error}") from error
        return False

    def _check_end(
        self, trainer: pl.Trainer, model: Pupil, line: Line, after: Position | None
    ) -> None:
        """Nothing is left, zeros are in place, and no batch was left out or repeated."""
        assert_plain(model, self.life, trainer)
        state = model.state_dict()
        for name, mask in self._witness.final.items():
            assert not state[name][~mask].any(), f"{name} after fit"
        if self._broke:
            return
        visited = self._witness.visited
        if line.order is None:
            line.order = visited if after is None else [p for p in line.seen if p <= after]
            line.order += visited if after is not None else []
        elif after is not None:
            rest = line.order[line.order.index(after) + 1 :]
            assert visited == rest, f"batches {visited} after {after}, not {rest}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and without what Lightning says."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def live(life: Life) -> Play:
    """Live through a sequence.

    Returns:
        What happened.

    Raises:
        AssertionError: If a promise is broken.
        Refused: If the package refuses the training before its first step.
    """
    folder = Path(tempfile.mkdtemp(prefix="stateful-"))
    play = Play(life, folder)
    try:
        with quiet():
            play.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return play


# ----------------------------------------------------------------------------- the command line

COUNTED = (
    "trainings",
    "batches",
    "resumes",
    "with other storage",
    "hand-overs",
    "saves",
    "copies",
    "exceptions",
    "again",
    "longer",
    "anew",
)


def run(numbers: Sequence[int], seed: int) -> dict[str, Any]:
    """Live through the sequences of these numbers; all counts, plain."""
    begin = time.perf_counter()
    total: Counter[str] = Counter()
    methods: dict[str, Counter[str]] = {name: Counter() for name in ALL}
    refused: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []
    for number in numbers:
        life = draw(random.Random(f"{seed} {number}"))
        counts: Counter[str] = Counter()
        try:
            play = live(life)
            counts = play.counts + Counter(sequences=1)
            refused += play.refused
        except Refused as error:
            refused[str(error)] += 1
        except Exception as error:
            said = io.StringIO()
            traceback.print_exc(file=said)
            failed.append(
                {
                    "sequence": number,
                    "error": f"{type(error).__name__}: {error}",
                    "life": repr(life),
                    "traceback": said.getvalue(),
                }
            )
            print(f"sequence {number}: {failed[-1]['error'][:300]}", flush=True)
        total += counts
        for name in {stage.name for stage in life.stages}:
            methods[name] += counts
        if (number + 1) % 100 == 0:
            print(f"{number + 1:5} sequences, {len(failed)} failed", flush=True)
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "sequences": total["sequences"],
        **{key: total[key] for key in COUNTED},
        "refused": dict(refused),
        "failed": failed,
        "by_method": {
            name: {key: counts[key] for key in ("sequences", *COUNTED)}
            for name, counts in methods.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """The counts, line by line."""
    columns = ("sequences", "trainings", "batches", "resumes", "hand-overs", "exceptions")
    rows = {**found["by_method"], "all": found}
    lines = [f"{'':28}" + "".join(f"{column:>12}" for column in columns)]
    for name, counts in rows.items():
        lines.append(f"{name:28}" + "".join(f"{counts[column]:>12}" for column in columns))
    said = ", ".join(f"{found[key]} {key}" for key in COUNTED)
    refused = sum(found["refused"].values())
    lines.append(f"{said}; {refused} refused, {len(found['failed'])} failed; {found['seconds']} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of sequences to repeat")
    parser.add_argument("--output", type=Path, help="JSON file of the counts")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = run(asked.only or range(asked.sequences), asked.seed)
    print(table(found))
    for failure in found["failed"]:
        told = failure.pop("traceback")
        if asked.only:
            print(failure["life"], told, sep="\n", file=sys.stderr)
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
