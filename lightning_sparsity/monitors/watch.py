"""Watch: what a monitor knows about one ``fit``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_sparsity import connectivity, reports
from lightning_sparsity.connectivity import Wiring
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.run import Run
from lightning_sparsity.core.shards import whole
from lightning_sparsity.flops import FlopCounter, Flops, is_compiled
from lightning_sparsity.monitors.cost import BatchClock, TrainingCost
from lightning_sparsity.monitors.picture import DensityHistory
from lightning_sparsity.monitors.requested import Requested
from lightning_sparsity.monitors.tracker import MaskTracker
from lightning_sparsity.structures import Rows


class Watch:
    """Follows masks, FLOPs and time from the first step of a ``fit`` to its end.

    Args:
        keeper: Owner of the masks, made or restored.
        model: The model being fitted.
        step: The step of the loggers at which it begins.
        wires: Whether to follow which weights lie on a path from input to output.
        metrics: Metrics of masks or gradients, by the name under which they are logged.

    Attributes:
        masks: The masks.
        tracker: What happened to them.
        history: Their densities over time.
        cost: FLOPs of the model and the training.
        clock: Time per batch.
        requested: Metrics that the user asks for.
        batches: Batches of this ``fit`` so far.
    """

    def __init__(
        self,
        keeper: MaskKeeper,
        model: pl.LightningModule,
        step: int,
        wires: bool = False,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        assert keeper.masks is not None
        self.masks: Masks = keeper.masks
        self.tracker = MaskTracker(self.masks)
        self.history = DensityHistory(self.tracker.names)
        self.history.record(step, self.tracker.densities)
        self.cost = TrainingCost()
        self.clock = BatchClock()
        self.requested = Requested(metrics or {}, model)
        self.batches = 0
        self._keeper = keeper
        self._model = model
        self._wires = wires
        self._wiring: dict[str, Wiring] = {}
        self._wired_at = -1
        self._updates = _updates(keeper)
        self._counter: FlopCounter | None = None
        self._hooks: list[RemovableHandle] = []
        self._forward_ended = False

    # -------------------------------------------------------------------------- FLOPs

    def start_counting(self) -> None:
        """Count the FLOPs of the forward pass that follows, unless they are known."""
        if self.cost.flops is None and is_compiled(self._model):
            self.cost.flops = Flops(unknown="the model is compiled")
        if self.cost.flops is None:
            read = {k.name: k.computed if k.compressed is None else k.parameter for k in self.masks}
            self._counter = FlopCounter(read)
            for kept in self.masks:
                if kept.compressed is not None:
                    inputs = math.prod(kept.shape[1:])
                    hooks = self._counter.count_by_outputs(kept.name, kept.module, inputs)
                    self._hooks += hooks
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def end_forward(self) -> None:
        """Count no further."""
        self._forward_ended = True
        if self._counter is not None:
            self._counter.counting = False

    def stop_counting(self) -> FlopCounter | None:
        """Leave the counter; to be called where no user code is under way."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        return counter

    # ---------------------------------------------------------------------- each batch

    def end_batch(self, samples: int, accumulated: int, step: int) -> bool:
        """Take the batch into account.

        Args:
            samples: In the batch.
            accumulated: Batches per optimizer step.
            step: Of the loggers.

        Returns:
            Whether any mask was updated.
        """
        counter = self.stop_counting()
        if counter is not None and (self._forward_ended or not self._model.automatic_optimization):
            self.cost.flops = counter.per_sample(samples)
        updated = self._updated()
        dense = {name: 1 for run in self._keeper.runs if run.observes for name in run.names}
        dense |= {kept.name: 1 for kept in self.masks if kept.is_latent}
        for run in updated:
            if run.method.needs_gradient:
                dense.update({name: accumulated for name in run.names if name not in dense})
        self.cost.add(self.tracker.densities, dense)
        self.tracker.update({name for run in updated for name in run.names})
        if updated:
            self.history.record(step, self.tracker.densities)
        self.batches += 1
        return bool(updated)

    def _updated(self) -> list[Run]:
        """Runs that made an update since the last call."""
        before, self._updates = self._updates, _updates(self._keeper)
        # Runs are grouped anew when a parameter joins an optimizer.
        return [run for run in self._keeper.runs if run.updates > before.get(_identity(run), 0)]

    # ------------------------------------------------------------------------- output

    def metrics(self) -> dict[str, float]:
        """Everything that is logged, by name."""
        return {
            **self.tracker.metrics(),
            **self._collapse(),
            **self._connectivity(),
            **self._drop_fractions(),
            **self._figures(),
            **self.cost.metrics(self.tracker.densities),
        }

    @property
    def dead_layers(self) -> list[str]:
        """Layers that have no live weight."""
        return [kept.name for kept in self.masks if kept.numel and not kept.live]

    @property
    def cut_layers(self) -> list[str]:
        """Layers that have live weights and none on a path, as far as paths are followed."""
        return [name for name, layer in self.wiring.items() if layer.live and not layer.effective]

    @property
    def wiring(self) -> dict[str, Wiring]:
        """How the sparse parameters are wired, if asked for; outside chains all is effective."""
        if self._wires and self._wired_at != self.masks.changes:
            self._wired_at = self.masks.changes
            masks = {kept.name: whole(kept.mask) for kept in self.masks}
            found = connectivity.wiring(connectivity.layers_of(self._model, masks))
            apart = {k.name: Wiring(k.numel, k.live, k.live, 0, 0) for k in self.masks}
            self._wiring = {name: found.get(name, apart[name]) for name in masks}
        return self._wiring

    @property
    def dead_neurons(self) -> dict[str, str]:
        """How many neurons are dead, of layers that have others, and that did not ask for it."""
        return {
            name: f"{layer.dead_neurons} of {layer.neurons}"
            for name, layer in self.wiring.items()
            if layer.effective
            and layer.dead_neurons
            and not isinstance(self.masks[name].structure, Rows)
        }

    def _collapse(self) -> dict[str, float]:
        gone = {*self.dead_layers, *self.cut_layers}
        layers = {f"collapse/{name}": float(name in gone) for name in self.tracker.names}
        return {"collapse/total": float(len(gone)), **layers}

    def _connectivity(self) -> dict[str, float]:
        if not self._wires:
            return {}
        total = connectivity.effective_density(self.wiring)
        wired = {name: layer for name, layer in self.wiring.items() if layer.neurons}
        dead = {f"dead_neurons/{name}": layer.dead_neurons for name, layer in wired.items()}
        return {"effective_density/total": total, **dead}

    def _figures(self) -> dict[str, float]:
        """What methods say of the masks that they learn."""
        found: dict[str, float] = {}
        for run in self._keeper.runs:
            figures = getattr(run.method, "figures", None)
            if figures is None:
                continue
            for name in run.names:
                kept = self.masks[name]
                if kept.effective is not None:
                    said = figures(kept.layer())
                    found |= {f"{figure}/{name}": value for figure, value in said.items()}
        return found

    def _drop_fractions(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for run in self._keeper.runs:
            at = getattr(run.method, "drop_fraction_at", None)
            fraction = at(run.progress) if at is not None and run.steps is not None else None
            if fraction is not None and run.steps is not None:
                inside = run.steps.start <= run.owner.steps <= run.steps.end
                found.setdefault(f"drop_fraction/{run.key}", fraction if inside else 0.0)
        return found

    def report(self) -> str:
        """What became of the masks; theoretical FLOPs beside measured time and bytes."""
        flops = self.cost.flops or Flops(unknown="no batch was trained")
        parts = []
        if len(self.masks):
            parts.append(reports.final_table(self.masks, self.tracker.courses(), flops))
        if self.wiring:
            parts.append(reports.connectivity_line(self.wiring))
        parts.append(reports.flops_line(flops, self.tracker.densities))
        if not flops.unknown:
            parts.append(reports.training_flops_line(self.cost.spent, flops))
        if len(self.clock):
            stored_densely = all(kept.compressed is None for kept in self.masks)
            zeros = self.tracker.density < 1 and stored_densely
            parts.append(reports.time_line(self.clock.median, len(self.clock), zeros))
        if len(self.masks):
            parts.append(reports.memory_line(self.masks))
        return "\n".join(parts)

    # -------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only; masks at one bit per weight."""
        return {
            "version": 1,
            "masks": self.tracker.state_dict(),
            "history": self.history.state_dict(),
            "cost": self.cost.state_dict(),
            "requested": self.requested.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, if it is one of the same parameters; or begin."""
        goes_on = bool(state) and self.tracker.load_state_dict(state["masks"])
        if goes_on:
            self.history.load_state_dict(state["history"])
            self.cost.load_state_dict(state["cost"])
        self.requested.begin(state.get("requested", {}) if goes_on else {})


def _identity(run: Run) -> tuple[str, int]:
    return run.key, id(run.owner.optimizer)


def _updates(keeper: MaskKeeper) -> dict[tuple[str, int], int]:
    return {_identity(run): run.updates for run in keeper.runs}
