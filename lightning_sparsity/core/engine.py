"""Engine: sparse training step by step, apart from Lightning's hooks.

It groups the sparse parameters by optimizer, begins the methods, masks gradients before a
step, runs the due rules after it, and commits what they return.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparsity.core import oddities, state
from lightning_sparsity.core.capture import Capture
from lightning_sparsity.core.layer import Layer, Layers, density_of, works_on_parts
from lightning_sparsity.core.learner import LearnedMethod, Learner
from lightning_sparsity.core.masks import Masks, hashes, optimizer_state
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.plan import (
    Assignment,
    check_effective,
    check_order,
    check_windows,
)
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.core.run import Owner, Run, by_optimizer, carry_over, census
from lightning_sparsity.core.shards import is_sharded, sharded
from lightning_sparsity.core.storage import Storage
from lightning_sparsity.core.view import ModelView
from lightning_sparsity.ops.live import Formed
from lightning_sparsity.ops.masked import mask_
from lightning_sparsity.ops.ranks import gather_from_ranks, mean_over_ranks
from lightning_sparsity.ops.selection import NonFiniteScoreError
from lightning_sparsity.ops.sharded import Sharded


class Engine:
    """The sparse training of one model.

    Args:
        assignments: The methods and their parameters, initial ones first.
        parameters: Every sparse parameter once.
        optimizers: The optimizers; a list that may change during training.
        hook: Registered on every optimizer, to be called after its steps.
        trusted: Whether masked gradients stay masked until the optimizer reads them.
        warn: Says something to the user, once.
        modules: Every module of the model, for methods that change what layers compute with.
        loss_scale: Gives the factor of a GradScaler that is still in the gradients when an
            optimizer is about to step.
        is_manual: Whether the user steps the optimizers, so that :meth:`before_step` may not
            be called.
        averages: Gives the running averages of the model's weights, by plain name.
        record_scale: Gives the factor of a GradScaler in the gradients of activations.

    Attributes:
        masks: The masks.
        storage: What keeps weights compressed, if anything does.
        has_begun: Whether methods have begun, or gone on from a saved state.
        owners: The parameters, by optimizer.
        runs: Every method at work, once per optimizer.
        seed: Of random choices.
        total: Optimizer steps in the whole training; infinite if unknown.
        epochs: Epochs in the whole training; infinite if unknown.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        parameters: Sequence[SparseParameter],
        optimizers: Callable[[], Sequence[Optimizer]],
        hook: Callable[..., None],
        trusted: bool,
        warn: Callable[[str, str], None],
        modules: Sequence[nn.Module] = (),
        loss_scale: Callable[[Optimizer], float] = lambda optimizer: 1.0,
        is_manual: bool = False,
        averages: Callable[[], Sequence[Mapping[str, Tensor]]] = tuple,
        record_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.masks = Masks(parameters)
        self.has_begun = False
        self.owners: list[Owner] = []
        self.runs: list[Run] = []
        self.seed = 0
        self.total = float("inf")
        self.epochs = float("inf")
        self._assignments = assignments
        self._optimizers = optimizers
        self._hook = hook
        self._handles: list[Any] = []
        self._census: list[tuple[int, int]] = []
        self._trusted = trusted
        self._warn = warn
        self._loss_scale = loss_scale
        self._averages = averages
        self._record_scale = record_scale
        self._learners = {
            a.key: Learner(a.method, modules, partial(self._draw, a.key, a.method.seed))
            for a in assignments
            if isinstance(a.method, LearnedMethod)
        }
        check_effective([a for a in assignments if a.key in self._learners])
        self.storage: Storage | None = None
        self._watches_steps = is_manual and bool(self._learners)
        self._epoch = 0
        self._ending: int | None = None
        self._nearing: int | None = None
        self._in_batch = False
        self.follow_optimizers()

    # ------------------------------------------------------------------------ grouping

    def follow_optimizers(self) -> None:
        """Group the parameters by optimizer, anew when one joins or optimizers change."""
        now = census(self._optimizers())
        if now == self._census:
            return
        owners, runs = self.owners, self.runs
        self._let_go()
        self._census = now
        self.owners = by_optimizer(list(self.masks), self._optimizers())
        for place, owner in enumerate(self.owners):
            twins = [o for o in owners if o.optimizer is owner.optimizer] or owners[place:]
            owner.steps = twins[0].steps if twins else 0
        self.runs = [
            Run(a.key, a.method, owner, size)
            for a in self._assignments
            for owner in self.owners
            if (size := {p.name: p.size for p in owner.parameters if p.name in a.names})
        ]
        if runs:
            carry_over(runs, self.runs)
        self._handles = [
            owner.optimizer.register_step_post_hook(self._hook)
            for owner in self.owners
            if owner.optimizer is not None
        ]
        for owner in self.owners:
            if owner.optimizer is not None:  # a state from before the last update, say
                handle = owner.optimizer.register_load_state_dict_post_hook(self._after_load)
                self._handles.append(handle)
        for owner in self.owners if self._watches_steps else ():
            if owner.optimizer is not None:
                handle = owner.optimizer.register_step_pre_hook(self._before_raw_step)
                self._handles.append(handle)

    def _after_load(self, optimizer: Optimizer) -> None:
        """Somebody has put a state into an optimizer: it is to be zero off the masks."""
        owner = self._owner(optimizer)
        if owner is not None and self.has_begun:
            self.masks.enforce(owner.stepping, optimizer)

    def release(self) -> None:
        """Hand everything back: hooks of optimizers and layers, and the layers' weights."""
        self._let_go()
        if self.storage is not None:
            self.storage.release()
        for learner in self._learners.values():
            learner.hand_back(list(learner.active))

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        for owner in self.owners:
            owner.forget()
        self._handles = []

    def _draw(self, key: str, seed: int | None, name: str, step: int) -> torch.Generator:
        """Random numbers of a method for one parameter in one step."""
        return generator(self.seed if seed is None else seed, f"{key} steps", name, step)

    def _owner(self, optimizer: Optimizer) -> Owner | None:
        return next((o for o in self.owners if o.optimizer is optimizer), None)

    # ----------------------------------------------------------------------- beginning

    def open_windows(self, total: float, epochs: float, strict: bool) -> None:
        """Turn the windows of all methods into steps.

        Args:
            total: Optimizer steps in the whole training; not above 0 if unknown.
            epochs: Epochs in the whole training; not above 0 if unknown.
            strict: Whether a window that ends before it starts is an error.

        Raises:
            MisconfigurationException: If a window needs a ``total`` that is unknown, ends
                before it starts, or overlaps with another on the same parameter.
        """
        self.total = float(total) if total > 0 else float("inf")
        self.epochs = float(epochs) if epochs > 0 else float("inf")
        windows = []
        for a in self._assignments:
            if a.method.rule is None:
                continue
            asked = a.method.window
            try:
                steps = asked.resolve(self.total, arrives=a.method.ramps)
            except ValueError as error:
                raise MisconfigurationException(f"{a.key}: {error}") from None
            if strict and steps.start > steps.end:
                raise MisconfigurationException(
                    f"{a.key}: update_end={asked.end!r} is step {steps.end} of {self.total:g} and "
                    f"comes before update_start={asked.start!r}, step {steps.start}. Give both as "
                    "steps or both as fractions."
                )
            if strict and a.key in self._learners and steps.start == steps.end:
                raise MisconfigurationException(
                    f"{a.key}: update_start={asked.start!r} and update_end={asked.end!r} are both "
                    f"step {steps.end} of {self.total:g}, which leaves no step to learn in. Begin "
                    "earlier or end later."
                )
            windows.append((a.key, steps, frozenset(a.names)))
            for run in self.runs:
                run.steps = steps if run.key == a.key else run.steps
        check_windows(windows)

    def begin(self, seed: int, steps: int, strict: bool, view: ModelView | None = None) -> None:
        """Begin every initial method, then the first updater on each parameter.

        Nothing is written before all of them have succeeded.

        Args:
            seed: Of random choices.
            steps: Optimizer steps that the training has behind it.
            strict: Whether a ramp that this training never reaches is an error.
            view: The model, for methods that look at it; None: they cannot.
        """
        self.seed = seed
        for owner in self.owners:
            owner.steps = steps
        if strict:
            self._refuse_ramps_that_never_move()
        layers = {layer.name: layer for run in self.runs for layer in self._layers(run)}
        for a in self._assignments:
            a.method.check([layers[name] for name in a.names])
        made: dict[str, tuple[str, float]] = {}  # who acted last, and the density it leaves
        taken: set[str] = set()
        shares: list[tuple[Run, Share]] = []
        for a in self._assignments:
            names = set(a.names)
            check_order(a, made)
            if a.method.role != "updater" or not names & taken:
                found = bool(names & made.keys())
                mine = [run for run in self.runs if run.key == a.key and not self._is_early(run)]
                shares += [(run, self._begin(run, layers, found, view)) for run in mine]
            taken |= names if a.method.role == "updater" else set()
            before = [made[name][1] for name in a.names if name in made]
            left = a.method.density or (
                min(before) if before else density_of([layers[name] for name in a.names])
            )
            if a.method.role != "reparametrization":
                made |= dict.fromkeys(a.names, (a.key, left))
        latent = self._to_be_latent([run for run, _ in shares])
        self._agree("at the start", list(layers.values()))
        self.masks.commit(list(layers.values()), self._optimizers(), latent)
        for run, share in shares:
            run.share = share
            self._warn_of_dead_layers(run)
        self._start_learning()
        self.has_begun = True

    def _is_early(self, run: Run) -> bool:
        """Whether layers still compute with their parameters, before a method learns masks."""
        learns = run.key in self._learners and run.steps is not None
        return learns and run.owner.steps < run.steps.start  # type: ignore[union-attr]

    def _to_be_latent(self, runs: Sequence[Run]) -> set[str]:
        """The parameters of those of the runs that learn masks."""
        learning = [run for run in runs if run.key in self._learners]
        masking = [run for run in learning if run.method.role == "updater"]
        return {name for run in masking for name in run.names}

    def _start_learning(self) -> None:
        """Let every method that learns masks work on the parameters that it has now."""
        for run in self.runs:
            learner = self._learners.get(run.key)
            if learner is not None and run.share is not None and not run.is_over:
                names = [name for name in run.names if name not in learner.active]
                learner.begin(self._named(names), run.owner.steps, run.progress)

    def is_learned(self, name: str) -> bool:
        """Whether a method that learns masks is at work on a parameter."""
        return any(name in learner.active for learner in self._learners.values())

    def _named(self, names: Sequence[str]) -> list[SparseParameter]:
        return [self.masks[name] for name in names]

    def _refuse_ramps_that_never_move(self) -> None:
        for run in self.runs:
            if run.method.ramps and run.steps is not None and run.idle(self.total, self.epochs):
                raise MisconfigurationException(
                    f"{run.key}: its density of {run.method.density or 'the distribution'} would "
                    f"never be reached: the window is steps {run.steps.start} to {run.steps.end}, "
                    f"and training is from step {run.owner.steps} to {self.total:g}."
                )

    def _begin(
        self, run: Run, layers: dict[str, Layer], found: bool, view: ModelView | None = None
    ) -> Share:
        """Let a method take over; ``layers`` are replaced by what it makes of them."""
        sizes, index = run.among(self.runs)
        names = next(a.names for a in self._assignments if a.key == run.key)
        share = Share(names, sizes, index, found)
        mine = [
            dataclasses.replace(layers[fresh.name], generator=fresh.generator)
            for fresh in self._layers(run)
        ]
        mine = mine if run.method.begins_on_parts else [layer.gathered() for layer in mine]
        if view is not None:
            try:
                mine = list(run.method.estimate(mine, share, view.of(layers.values())))
            except MisconfigurationException as error:
                raise MisconfigurationException(f"{run.key}: {error}") from None
        begun = run.method.begin(mine, share)
        layers |= {layer.name: layer for layer in begun}
        return dataclasses.replace(share, start={layer.name: layer.live for layer in begun})

    def _layers(self, run: Run) -> Layers:
        seed = self.seed if run.method.seed is None else run.method.seed
        rates, decays = run.owner.learning_rates(), run.owner.weight_decays()
        return [
            self.masks[name].layer(
                grad=run.owner.kept.get(name),
                generator=generator(seed, run.key, name, run.updates),
                statistics=run.owner.capture.of(name) if run.owner.capture else None,
                lr=rates.get(id(self.masks[name].parameter)),
                weight_decay=decays.get(id(self.masks[name].parameter)),
            )
            for name in run.names
        ]

    def enforce(self) -> None:
        """Set weights and optimizer state to zero off the masks."""
        for owner in self.owners:
            self.masks.enforce(owner.stepping, owner.optimizer)
        self._outdate(self.masks)

    def enforce_weights(self) -> None:
        """Set weights to zero off the masks, whoever wrote them."""
        self.masks.enforce(self.masks)
        self._outdate(self.masks)
        self._renew()

    def _outdate(self, parameters: Iterable[SparseParameter]) -> None:
        """What layers compute with is to be made anew from their latent weights."""
        names = [kept.name for kept in parameters]
        for learner in self._learners.values():
            learner.outdate(names)

    def _renew(self) -> None:
        for learner in self._learners.values():
            learner.renew()

    # ---------------------------------------------------------------------- each batch

    def start_batch(self, epoch: int, is_last: bool, nears_last: bool) -> None:
        """Optimizer steps count as training from here.

        Args:
            epoch: The current epoch.
            is_last: Whether this is its last batch.
            nears_last: Whether this batch is accumulated for the last step of the epoch.
        """
        self._in_batch, self._epoch = True, epoch
        self._ending = epoch if is_last else None
        self._nearing = epoch if nears_last else None
        self.follow_optimizers()
        for owner in self.owners:
            self._undo_foreign_writes(owner)
        self._renew()
        self._capture()

    def _capture(self) -> None:
        """Record activations if an update that reads them follows the next step.

        Those of a compressed weight are recorded where its dense gradient is read.
        """
        for run in self.runs:
            due = run.due(self._nearing, self.total, ahead=1)
            if run.observes or (run.method.needs_gradient and due):
                for kept in self._named(run.names):
                    if kept.compressed is not None:
                        kept.compressed.record(True)
            if run.method.statistics and due and not run.owner.capture:
                mates = [r for r in self.runs if r.owner is run.owner]
                wanted = {statistic for mate in mates for statistic in mate.method.statistics}
                run.owner.capture = Capture(run.owner.parameters, wanted)

    def end_batch(self) -> None:
        """Count the steps that were skipped; those outside a batch are not training."""
        for owner in self.owners:
            if owner.masked:
                self._skip(owner)
        self._in_batch = False

    def end_epoch(self, epoch: int) -> None:
        """An epoch whose last batch made no real step owes its update to the next step."""
        for run in self.runs:
            if run.steps is not None and run.steps.counts(epoch):
                inside = max(run.steps.start, 1) <= run.owner.steps < run.steps.end
                run.pending |= inside and run.last_epoch != epoch

    def _is_due(self, run: Run, ahead: int = 0) -> bool:
        return run.due(self._ending, self.total, ahead)

    def _undo_foreign_writes(self, owner: Owner) -> None:
        if owner.touched():
            self.masks.enforce(owner.stepping)
            self._outdate(owner.stepping)
            owner.remember()

    # ----------------------------------------------------------------------- each step

    def before_step(self, optimizer: Optimizer) -> None:
        """Read what the methods need from the dense gradients, then mask them."""
        self.follow_optimizers()
        owner = self._owner(optimizer)
        if owner is not None:
            self._undo_foreign_writes(owner)
            self._keep_gradients(owner, copy=True)
            owner.moving = owner.has_gradients
            scale, decays = self._loss_scale(optimizer), owner.weight_decays()
            for learner in self._learners.values():
                learner.before_step(owner.parameters, scale, decays)
            self.masks.enforce_gradients(owner.stepping)
            owner.masked = True

    def _before_raw_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Gradients of learned masks are needed, also where nobody announces the step.

        Where a closure makes them, they are there when it has run: it gets a longer one.
        """
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._announce(optimizer)
            return None

        def announced() -> Any:
            result = closure()
            self._announce(optimizer)
            return result

        return args[:1], {**kwargs, "closure": announced}

    def _announce(self, optimizer: Optimizer) -> None:
        owner = self._owner(optimizer)
        if owner is not None and self._in_batch and not owner.masked:
            self.before_step(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """Mask what the step wrote, then run the updates that are due."""
        owner = self._owner(optimizer)
        if owner is not None and not self._in_batch:  # a search for a learning rate, say
            self._outdate(owner.stepping)
        if owner is None or not self._in_batch or not owner.stepped():
            return
        if not owner.masked:  # a raw optimizer: its gradients are still dense
            self._keep_gradients(owner, copy=False)
        if not (owner.masked and self._trusted and owner.keeps_zeros()):
            self.masks.enforce(owner.stepping, optimizer)
        active = [run for run in self.runs if run.owner is owner and not run.is_over]
        owner.steps += 1
        self._learn(owner, active)
        for name, (_, slots) in owner.observed.items():
            self.masks[name].slots.update(slots)
        for run in self.runs:
            if run.owner is owner and self._is_due(run) and not self._waits_for_start(run):
                if self._waits_for_another(run):
                    run.pending = True
                else:
                    self._update(run)
            if run in active:
                self._forget_slots(run)
        self._take_over(owner)
        self._outdate(owner.stepping)
        if self._watches_steps:  # the next forward pass may come in the same batch
            self._renew()
        owner.forget()
        owner.remember()
        if any(kept.effective is not None for kept in owner.stepping):
            owner.doubt()
        if self.storage is not None:
            self.storage.settle([kept.name for kept in owner.parameters])
        self._capture()

    def _learn(self, owner: Owner, active: Sequence[Run]) -> None:
        """Let the methods that learn masks make the step that the optimizer has made."""
        for run in active:
            learner = self._learners.get(run.key)
            if learner is not None and owner.optimizer is not None:
                rates = owner.learning_rates()
                mine = self._named(run.names)
                for kept, still in learner.after_step(mine, rates, owner.steps, run.progress):
                    state = optimizer_state(kept, owner.optimizer)
                    mask_(state, [~still] * len(state))

    def _waits_for_start(self, run: Run) -> bool:
        """Whether a method that learns masks has not begun: it begins after all updates."""
        return run.key in self._learners and run.share is None

    def _waits_for_another(self, run: Run) -> bool:
        """Whether a method has yet to begin, and one before it owes its last update."""
        before = self.runs[: self.runs.index(run)]
        return run.share is None and any(
            earlier.pending and set(earlier.names) & set(run.names) for earlier in before
        )

    def _take_over(self, owner: Owner) -> None:
        """Begin the methods that learn masks, and whose time has come."""
        waiting = [
            run
            for run in self.runs
            if run.owner is owner
            and self._waits_for_start(run)
            and not run.is_over
            and not self._is_early(run)
            and not self._waits_for_another(run)
        ]
        for run in waiting:
            if self.storage is not None:  # what learns its mask lives off it
                self.storage.release(run.names)
            layers = {layer.name: layer for layer in self._layers(run)}
            found = any(
                earlier.share is not None
                and earlier.method.role != "reparametrization"
                and set(earlier.names) & set(run.names)
                for earlier in self.runs[: self.runs.index(run)]
            )
            share = self._begin(run, layers, found)
            latent = self._to_be_latent([run])
            self.masks.commit(list(layers.values()), self._optimizers(), latent)
            run.share = share
            if self._ending is not None:  # this epoch owes no update
                run.last_epoch = self._ending
        if waiting:
            self._start_learning()

    def _bake(self, run: Run) -> None:
        """Leave what a method has learned in the parameters, zero off stored masks."""
        learner = self._learners.get(run.key)
        if learner is None or run.share is None:
            return
        baked = learner.method.bake(self._layers(run), run.share)
        for averages in self._averages():
            learner.bake_averages({n: averages[n] for n in run.names if n in averages})
        learner.hand_back(run.names)
        self.masks.commit(baked, self._optimizers())
        self.masks.enforce(self._named(run.names), run.owner.optimizer)
        run.released = True  # a longer training goes on with what was learned
        self._warn_of_dead_layers(run)

    def _keep_gradients(self, owner: Owner, copy: bool) -> None:
        """Show dense gradients to the methods that observe, keep them for due updates."""
        runs = [run for run in self.runs if run.owner is owner]
        for run in runs:
            if run.observes:
                owner.kept = self._dense(owner.parameters)
                for layer in self._layers(run):
                    if layer.grad is not None and run.method.observe is not None:
                        if not works_on_parts(run.method.observe):
                            layer = layer.gathered()
                        if isinstance(layer.grad, Formed) and not isinstance(layer.grad, Sharded):
                            # once, however often it is read
                            layer = dataclasses.replace(layer, grad=layer.grad.formed())
                        found = dict(run.method.observe(layer))
                        owner.observed[layer.name] = (run.key, found)
        wanted = {
            name
            for run in runs
            if run.method.needs_gradient and self._is_due(run, ahead=1)
            for name in run.names
        }
        owner.kept = self._dense([p for p in owner.parameters if p.name in wanted], copy)

    def _dense(
        self, parameters: Iterable[SparseParameter], copy: bool = False
    ) -> dict[str, Tensor]:
        """The dense gradients of those weights that have one, by name.

        Args:
            parameters: The weights.
            copy: Whether the gradients are about to be masked in place.
        """
        found: dict[str, Tensor | None] = {}
        for kept in parameters:
            grad = kept.parameter.grad
            if kept.compressed is not None:
                found[kept.name] = kept.compressed.dense_gradient(self._averaged)
            elif grad is not None:
                grad = grad.detach().clone() if copy else grad.detach()
                found[kept.name] = sharded(grad) if is_sharded(grad) else grad
        return {name: grad for name, grad in found.items() if grad is not None}

    def _averaged(self, grad: Tensor) -> Tensor:
        """A gradient formed from activations, as it would have come to the weight."""
        return mean_over_ranks(grad.div_(self._record_scale()))

    def _skip(self, owner: Owner) -> None:
        """A step that a GradScaler or an empty loss took away: time passes, updates wait."""
        active = [run for run in self.runs if run.owner is owner and not run.is_over]
        for run in active:
            run.pending |= self._is_due(run, ahead=1)
        owner.steps += 1
        owner.forget()
        for learner in self._learners.values():
            learner.skip(owner.parameters)
        for run in active:
            self._forget_slots(run)

    def _forget_slots(self, run: Run) -> None:
        """Let go of a method's slots once its window is behind it, unless training ends there."""
        ended = run.steps is not None and run.steps.end < self.total
        if run.is_over and (ended or run.released):
            self._bake(run)
            for name in run.names:
                gatherer, fresh = run.owner.observed.get(name, (run.key, {}))
                # the next method may have begun to gather in this step
                self.masks[name].slots = {} if gatherer == run.key else dict(fresh)

    def update(self, method: object) -> None:
        """Run an update that a method asks for, between two batches.

        Raises:
            NonFiniteScoreError: If a score is not finite.
        """
        runs = [run for run in self.runs if run.method is method]
        for run in runs:
            self._apply(run)
        if self.storage is not None:
            self.storage.settle([name for run in runs for name in run.names])

    def _update(self, run: Run) -> None:
        """Run an update, or let it wait."""
        try:
            self._apply(run)
        except NonFiniteScoreError as error:
            run.pending = True
            waits = "The update waits for the next step with finite scores."
            self._warn(f"{run.key} waits", f"{error} {waits}")

    def _apply(self, run: Run) -> None:
        run.updates += 1
        layers = {layer.name: layer for layer in self._layers(run)}
        if not run.method.on_parts:
            layers = {name: layer.gathered() for name, layer in layers.items()}
        try:
            share = run.share or self._begin(run, layers, found=True)
            ready = self._with_gradient(run, list(layers.values()))
            if ready:
                changed = run.method.update(ready, share, run.progress)
                layers |= {layer.name: layer for layer in changed}
        except NonFiniteScoreError as error:
            run.updates -= 1
            why = str(error).removeprefix(f"{run.key}: ")
            raise NonFiniteScoreError(f"{run.key}: {why}") from None
        self._agree(
            f"after the update of {run.key} at step {run.owner.steps}", list(layers.values())
        )
        self.masks.commit(list(layers.values()), self._optimizers())
        run.share = share
        run.pending = False
        run.last_epoch = self._epoch
        learner = self._learners.get(run.key)
        run.released = learner is not None and learner.method.is_done(self._layers(run), share)
        self._warn_of_dead_layers(run)

    def _agree(self, when: str, layers: Layers) -> None:
        """Raise unless every process has made the same masks, before they are committed.

        Raises:
            RuntimeError: Naming the parameter and the processes.
        """
        found = gather_from_ranks(lambda: hashes(layers))
        for rank, others in enumerate(found):
            for layer, theirs, first in zip(layers, others, found[0], strict=True):
                if theirs != first:
                    raise RuntimeError(
                        f"{layer.name}: {when} the mask of rank {rank} is not that of rank 0. "
                        "Masks follow from weights, gradients and seeds, so one of these differs "
                        "between the processes: look for code that runs on one rank only and "
                        "changes weights or gradients, and for a seed= of its own on each rank."
                    )

    def _with_gradient(self, run: Run, layers: Layers) -> Layers:
        """The layers that have what an update of them reads."""
        ready = [
            layer
            for layer in layers
            if (layer.grad is not None or not run.method.needs_gradient)
            and (layer.slots or run.method.observe is None)
        ]
        for layer in layers:
            if layer not in ready:
                self._warn(
                    f"{run.key} {layer.name}",
                    f"{run.key}: {layer.name} got no gradient in an update step and is left as "
                    "it is.",
                )
        return ready

    # ---------------------------------------------------------------------- what is odd

    def warn_of_dead_layers(self) -> None:
        """Say which layers the end of training leaves without a live weight."""
        for run in self.runs:
            self._say(oddities.dead_layers(run, self.masks, ()))

    def _warn_of_dead_layers(self, run: Run) -> None:
        """Say which layers of a method have no live weight left, in training too."""
        learner = self._learners.get(run.key)
        apart = learner is not None and learner.method.evaluates_apart
        hidden = learner.active if learner is not None and apart else ()
        self._say(oddities.dead_layers(run, self.masks, hidden))

    def warn_of_idle_methods(self) -> None:
        """Say which methods will make no update, or a single one where many are meant."""
        for run in self.runs:
            self._say(oddities.idle_method(run, self.total, self.epochs))

    def warn_of_unfinished_ramps(self) -> None:
        """Say which densities did not arrive."""
        for run in [run for run in self.runs if run.unfinished]:
            layers = self._layers(run)
            live, size = sum(n.live for n in layers), sum(n.size for n in layers)
            self._say(oddities.unfinished_ramp(run, live, size))

    def _say(self, found: Iterable[oddities.Oddity]) -> None:
        for about, message in found:
            self._warn(about, message)

    # --------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        saved = state.save(self.masks, self._assignments, self.owners, self.runs, self.seed)
        learners = {key: learner.state_dict() for key, learner in self._learners.items()}
        storage = {} if self.storage is None else self.storage.state_dict()
        return {**saved, "learners": learners, "storage": storage}

    def compare(self, saved: dict[str, Any]) -> None:
        """Raise if a saved state is of another training.

        Raises:
            MisconfigurationException: Naming everything that differs.
        """
        if found := state.differences(saved, self.masks, self._assignments, self.owners, self.runs):
            raise MisconfigurationException(
                "The checkpoint was made by another sparse training. Of its masks nothing was "
                "restored (Lightning has loaded its weights into the model):\n  "
                + "\n  ".join(found)
                + "\nUse the callbacks and the model it was made with, or begin a new training "
                "from its weights, with load_from_checkpoint."
            )

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state, after comparing."""
        self.compare(saved)
        self.seed = saved["seed"]
        state.restore(saved, self.masks, self.owners, self.runs)
        parameters = {kept.name: kept for kept in self.masks}
        for key, learner in self._learners.items():
            learner.restore(saved["learners"][key], parameters)
        self.has_begun = True

    def latent_among(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latent ones of the weights of a model's ``state_dict``, by plain name."""
        return {
            name: weights[kept.aliases[0]].detach().to("cpu", copy=True)
            for learner in self._learners.values()
            for name, kept in learner.active.items()
            if kept.aliases[0] in weights
        }

    def mask_weights(self, weights: dict[str, Tensor], averaged: bool) -> None:
        """Replace weights by name by what files should get.

        Args:
            weights: A model's ``state_dict``, changed in place.
            averaged: Whether it holds averages of the latent weights.
        """
        if averaged:
            for learner in self._learners.values():
                for name, kept in learner.active.items():
                    for alias in kept.aliases:
                        if alias in weights:
                            weights[alias] = learner.evaluated(name, weights[alias])
        state.mask_weights(self.state_dict(), weights)
