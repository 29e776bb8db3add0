"""MaskCallback: what every mask method shares. A method file states the paper's choices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sparsity.callbacks.budget import Budgeter
from lightning_sparsity.core.capture import Statistic
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import (
    Budget,
    Curve,
    Distribution,
    Layers,
    Ramp,
    Rule,
    Schedule,
    call_of,
    errors_of,
    works_on_parts,
)
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Observe, Role, Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.run import Run
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.core.window import Interval, Window
from lightning_sparsity.distributions import fixes_total, per_layer
from lightning_sparsity.reports import allocation_table
from lightning_sparsity.rules import chain, drop, find, grow
from lightning_sparsity.scores import magnitude, needs_gradient, random
from lightning_sparsity.structures import NM, Structure, Unstructured

_adapt = chain(drop(magnitude), grow(random))


class SparsityCallback(Callback):
    """Base of all our callbacks: brings the keeper, and pickles without Trainer or model."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make sure that the Trainer has a keeper."""
        MaskKeeper.ensure(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the logging functions that Lightning hangs on callbacks."""
        return {k: v for k, v in self.__dict__.items() if k not in ("log", "log_dict")}


class MaskCallback(SparsityCallback):
    """A method that makes or changes masks, stated by its parts.

    Args:
        density: Live share of all sparse weights, in (0, 1]. May be left out when an
            earlier callback made the masks, or the distribution or structure fixes it.
        distribution: How ``density`` is split over layers, or densities by name pattern.
        default_distribution: The method's own, if no distribution is given.
        update_interval: Optimizer steps between updates, "epoch", or ``epochs(n)``.
        update_start: First step (int) or fraction of training (float).
        update_end: Last step (int) or fraction of training (float).
        include: Which parameters are sparse.
        exclude: Which of those are left dense.
        structure: What one unit is; None: single weights, or as an earlier callback has it.
        seed: Of random choices; None: that of ``seed_everything``, or torch's.
        role: "initial" acts once before the first step, "updater" in its window.
        initial: Makes the masks, if no earlier callback did.
        update: What one update does.
        ramp: ``ramp(initial density, density)`` is the schedule of the density over the
            window; None: the density stays.
        initial_density: Where the ramp starts when no earlier callback made masks.
        observe: Fills slots from the dense gradients before every step.
        statistics: "inputs" and "output_grads", where updates read ``layer.statistics``.
        single_weights: Whether the method makes sense for single weights only, so that any
            other structure is refused.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """

    entrywise = False  # whether begin and update, where written anew, leave all work to the rules

    def __init__(
        self,
        *,
        density: float | None,
        initial: Rule,
        default_distribution: Distribution,
        distribution: Mapping[str, float] | Distribution | None = None,
        update: Rule | None = None,
        update_interval: Interval = 100,
        update_start: int | float = 0,
        update_end: int | float = 1.0,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
        role: Role = "updater",
        ramp: Ramp | None = None,
        initial_density: float = 1.0,
        observe: Observe | None = None,
        statistics: Collection[Statistic] = (),
        single_weights: bool = False,
    ) -> None:
        self._check_types(structure, seed)
        self._check_parts(initial, update, default_distribution, observe, statistics, role)
        self._check_flag("single_weights", single_weights)
        self.single_weights = single_weights
        if structure is not None:
            self._check_units(structure, f"{self._name}(structure={structure!r})")
        if isinstance(structure, NM):
            density = self._check_pattern(density, structure)
            if distribution is not None:
                raise ValueError(
                    f"{self._name}(structure={structure!r}, distribution={call_of(distribution)}): "
                    "the pattern fixes what lives in every layer; leave distribution out."
                )
        if density is not None:
            self._check("density", density, low_open=True)
        self._check("initial_density", initial_density, low_open=True)
        if isinstance(distribution, Mapping):
            with errors_of(f"{self._name}: distribution"):
                distribution = per_layer(distribution)
        if distribution is not None and (
            not callable(distribution) or isinstance(distribution, type)
        ):
            raise TypeError(
                f"{self._name}(distribution={call_of(distribution)}): must be a distribution such "
                "as erk or epsilon(20), or densities by name pattern, {'net.*': 0.1}."
            )
        self.density = None if density is None else float(density)
        self.distribution = distribution
        self.default_distribution = default_distribution
        with errors_of(self._name):
            self.window = Window(update_interval, update_start, update_end)
        self.include = include
        self.exclude = exclude
        self.structure = structure
        self.seed = plain(seed)
        self.role: Role = role
        self.initial = initial
        self.rule = update
        self.ramp = ramp
        self.initial_density = float(initial_density)
        self.observe = observe
        if ramp is not None:
            self._check_ramp(ramp)
        self.statistics = frozenset(statistics)

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """Print the allocation, once, unless a monitor prints it."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        first = next(c for c in callbacks if isinstance(c, MaskCallback))
        monitored = any(getattr(c, "print_tables", False) for c in callbacks)
        if keeper.masks is not None and self is first and not monitored:
            rank_zero_info(allocation_table(keeper.masks, pl_module))

    def _warn_of_stop(self, masks: Masks, runs: Sequence[Run], when: str) -> None:
        """Say that training was stopped before the method came to its end.

        Args:
            masks: All masks.
            runs: The method at work.
            when: Where that was, such as "after 1 of 3 prunings".
        """
        mine = [masks[name] for run in runs for name in run.names]
        density = sum(kept.live for kept in mine) / sum(kept.numel for kept in mine)
        rank_zero_warn(
            f"{self._name}: training was stopped {when}; the density is {density:.4g}, not "
            f"{self.density or 'the final one'}. Let what stops it (EarlyStopping, max_time, "
            "max_steps) come later."
        )

    # ----------------------------------------------------------- what the engine asks

    @property
    def ramps(self) -> bool:
        """Whether the density changes in the window."""
        return self.ramp is not None

    def drop_fraction_at(self, progress: float) -> float | None:
        """Share of the live units that an update at ``progress`` drops, if the rule says."""
        fractions = [part.fraction_at(progress) for part in find(self.rule, drop)]
        return next((fraction for fraction in fractions if fraction is not None), None)

    @property
    def needs_gradient(self) -> bool:
        """Whether updates read dense gradients."""
        by_rule = self.rule is not None and needs_gradient(self.rule)
        return by_rule or (self.ramps and needs_gradient(self._budget.distribution))

    @property
    def on_parts(self) -> bool:
        """Whether sharded layers need not be gathered for updates: verbs that say so do all."""
        return self._leaves_work("update") and works_on_parts(self.rule)

    @property
    def begins_on_parts(self) -> bool:
        """The same at the start."""
        return self._leaves_work("begin") and works_on_parts(self.initial)

    def _leaves_work(self, name: str) -> bool:
        """Whether a method of this class, inherited or not, leaves all work to the rules."""
        return self.entrywise or getattr(type(self), name) is getattr(MaskCallback, name)

    def check(self, layers: Layers) -> None:
        """Raise if the asked density cannot be reached, long before it is due.

        Args:
            layers: Every layer of the method.

        Raises:
            ValueError: If the density is out of reach; says what is the largest sparsity. Or
                if the method makes sense for single weights only.
        """
        for layer in layers:
            self._check_units(layer.structure, f"{self._name}: {layer.name} is cut otherwise")
        self._budget.check(layers)

    def estimate(self, layers: Layers, share: Share, view: ModelView) -> Layers:
        """Look at the model and its data before beginning; this one need not.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.
            view: The model, with all its layers as the methods before left them.

        Returns:
            The layers with what :meth:`begin` needs, such as a score in a slot.
        """
        return layers

    @property
    def only_prunes(self) -> bool:
        """Whether no update ever brings a unit to life."""
        return isinstance(self.rule, drop) or self.role == "initial"

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make masks, or fit those that were found to what was asked.

        Found masks are kept; a density scales their layer budgets, a distribution
        replaces them. A method that ramps starts from what it finds.

        Args:
            layers: The layers of one optimizer.
            share: What part of the whole they are.

        Returns:
            The layers as they should be.

        Raises:
            ValueError: If nothing says what the density should be, or a pattern of the
                distribution matches no layer.
        """
        self._budget.check_found(layers, share)
        given = self.density is not None or self.distribution is not None
        if share.found and (self.ramps or not given):
            return layers
        if self.density is None and not share.found and not fixes_total(self._budget.distribution):
            raise ValueError(
                f"{self._name}(density=None): no earlier callback made masks, so a density is "
                f"needed; for 90% sparsity pass {self._name}(density=0.1)."
            )
        rule = _adapt if share.found and self.role == "updater" else self.initial
        return self._start(rule, layers, self._budget.first(layers, share))

    def _start(self, rule: Rule, layers: Layers, budget: Budget) -> Layers:
        """What a rule makes of the layers before the first step, checked: it may be the user's."""
        made = rule(layers, budget, 0.0)
        names = [layer.name for layer in layers]
        if not isinstance(made, Sequence) or [getattr(x, "name", None) for x in made] != names:
            raise TypeError(
                f"{self._name}: {call_of(rule)} gave {type(made).__name__} for {', '.join(names)}; "
                "a rule must give the layers that it was given, changed or not."
            )
        return made

    def update(self, layers: Layers, share: Share, progress: float) -> Layers:
        """Apply the method's rule, towards the density of the moment if it ramps.

        Args:
            layers: The layers of one optimizer, after its step.
            share: What part of the whole they are.
            progress: How much of the window has passed, in [0, 1].

        Returns:
            The layers as they should be.
        """
        assert self.rule is not None
        if self.ramp is None:
            return self.rule(layers, [layer.live for layer in layers], progress)
        return self.rule(layers, self._budget.on_the_way(layers, share, progress), progress)

    @property
    def _budget(self) -> Budgeter:
        return Budgeter(
            name=self._name,
            density=self.density,
            given=self.distribution,
            default=self.default_distribution,
            initial_density=self.initial_density,
            ramp=self.ramp,
            only_prunes=self.only_prunes,
        )

    # ----------------------------------------------------------------------- checks

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, name: str, value: object, *, low_open: bool = False) -> None:
        """Raise unless ``value`` is a number in [0, 1], or (0, 1]."""
        interval = "(0, 1]" if low_open else "[0, 1]"
        hint = "; for 90% sparsity pass density=0.1" if name == "density" else ""
        message = f"{self._name}({name}={value!r}): {name} must lie in {interval}{hint}."
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{self._name}({name}={value!r}): {name} must be a number{hint}.")
        if not (0 <= float(value) <= 1) or (low_open and value == 0):
            raise ValueError(message)

    def _check_fraction(self, name: str, value: object) -> None:
        """Raise unless ``value`` is a number in [0, 1] or a schedule of such numbers."""
        if callable(value) and not isinstance(value, type):
            self._check_schedule(name, value, 0, 1)
        else:
            self._check(name, value)

    def _check_schedule(
        self, name: str, value: Schedule | Curve, low: float, high: float = math.inf
    ) -> None:
        """Raise unless a function of progress gives finite numbers from ``low`` to ``high``."""
        where = f"{self._name}({name}={call_of(value)})"
        allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"at {low:g} or above"
        for progress in (0.0, 0.5, 1.0):
            try:
                number: object = value(progress)
            except TypeError as error:
                number = error
            if isinstance(number, bool) or not isinstance(number, Real):
                raise TypeError(
                    f"{where}: {name} must be a number, or a function of progress in [0, 1] that "
                    f"gives one, such as cosine(0.3); at progress {progress} it gives {number!r}."
                )
            if not (low <= float(number) <= high and math.isfinite(number)):
                raise ValueError(
                    f"{where}: is {number} at progress {progress}; {name} must lie {allowed}."
                )

    def _check_types(self, structure: Structure | None, seed: int | None) -> None:
        if structure is not None and not isinstance(structure, Structure):
            raise TypeError(
                f"{self._name}(structure={structure!r}): must be a structure such as Rows() or "
                "NM(2, 4)."
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"{self._name}(seed={seed!r}): must be an int or None.")

    def _check_parts(
        self,
        initial: Rule,
        update: Rule | None,
        default_distribution: Distribution,
        observe: Observe | None,
        statistics: Collection[Statistic],
        role: Role,
    ) -> None:
        """Raise unless the parts of a method of one's own are what they must be."""
        self._check_callable("initial", initial, "drop(random)", optional=False)
        self._check_callable("update", update, "chain(drop(magnitude), grow(random))")
        self._check_callable("default_distribution", default_distribution, "erk", optional=False)
        self._check_callable("observe", observe, "momentum(0.9).observe")
        listed = isinstance(statistics, Collection) and not isinstance(statistics, str)
        if not listed or not all(name in get_args(Statistic) for name in statistics):
            raise ValueError(
                f"{self._name}(statistics={statistics!r}): must be some of "
                f"{', '.join(map(repr, get_args(Statistic)))}, as in ('inputs',)."
            )
        if role not in get_args(Role):
            raise ValueError(
                f"{self._name}(role={role!r}): must be one of "
                f"{', '.join(map(repr, get_args(Role)))}."
            )

    def _check_units(self, structure: Structure, where: str) -> None:
        if self.single_weights and structure != Unstructured():
            raise ValueError(
                f"{where}: {self._name} works on single weights only; leave out structure= "
                f"(here {structure!r})."
            )

    def _check_number(
        self,
        name: str,
        value: object,
        low: float,
        high: float = math.inf,
        *,
        inside: bool = False,
    ) -> None:
        """Raise unless ``value`` is finite and from ``low`` to ``high``, or lies between them."""
        least, most = ("above", "below") if inside else ("at least", "at most")
        bounds = [f"{least} {low:g}"] * (low > -math.inf) + [f"{most} {high:g}"] * (high < math.inf)
        allowed = " and ".join(bounds) or "finite"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{self._name}({name}={value!r}): {name} must be a number, {allowed}.")
        number = float(value)
        fits = low < number < high if inside else low <= number <= high
        if not (fits and math.isfinite(number)):
            raise ValueError(f"{self._name}({name}={value!r}): {name} must be {allowed}.")

    def _check_count(self, name: str, value: object, least: int = 1) -> None:
        """Raise unless ``value`` is an integer of at least ``least``."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{self._name}({name}={value!r}): must be an int >= {least}.")
        if int(value) < least:
            raise ValueError(f"{self._name}({name}={value!r}): must be at least {least}.")

    def _check_flag(self, name: str, value: object) -> None:
        """Raise unless ``value`` is a bool."""
        if not isinstance(value, bool):
            raise TypeError(f"{self._name}({name}={value!r}): must be True or False.")

    def _check_callable(
        self, name: str, value: object, example: str, *, optional: bool = True
    ) -> None:
        """Raise unless ``value`` is a function, or None where it is ``optional``."""
        if value is None and optional:
            return
        if not callable(value) or isinstance(value, type):
            raise TypeError(
                f"{self._name}({name}={value!r}): must be a function, such as {example}."
            )

    def _check_ramp(self, ramp: Ramp) -> None:
        if self.only_prunes and self.density is not None and self.initial_density < self.density:
            raise ValueError(
                f"{self._name}(density={self.density}, initial_density={self.initial_density}): "
                "it only prunes; initial_density must be at least density."
            )
        if self.density is None and not fixes_total(self._budget.distribution):
            raise ValueError(
                f"{self._name}(density=None): the density to arrive at is needed; for 90% sparsity "
                f"pass {self._name}(density=0.1)."
            )
        self._check_arrives(ramp)

    def _check_arrives(self, ramp: Ramp) -> None:
        """Raise unless ``ramp`` makes schedules of densities from its start to its end."""
        try:
            arrives, halfway = (float(ramp(1.0, 0.5)(progress)) for progress in (1.0, 0.5))
        except (TypeError, ValueError):
            raise TypeError(
                f"{self._name}(ramp={call_of(ramp)}): must make a schedule from the initial and "
                "the final density: a class such as cubic, not cubic(1.0, 0.1)."
            ) from None
        if not 0 < halfway <= 1:
            raise ValueError(
                f"{self._name}(ramp={call_of(ramp)}): ramp(1.0, 0.5) is {halfway} halfway; a "
                "density lies in (0, 1]."
            )
        if not math.isclose(arrives, 0.5):
            raise ValueError(
                f"{self._name}(ramp={call_of(ramp)}): ramp(1.0, 0.5) ends at {arrives}, not at the "
                "final density 0.5; use a ramp between two densities, such as cubic."
            )

    def _check_pattern(self, density: float | None, structure: NM) -> float:
        if density not in (None, structure.density):
            raise ValueError(
                f"{self._name}(density={density!r}, structure={structure!r}): the pattern fixes "
                f"the density at {structure.density}; leave density out."
            )
        return structure.density
