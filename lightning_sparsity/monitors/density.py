"""DensityMonitor: logs densities, churn, exploration and FLOPs; reports at start and end."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_sparsity import reports
from lightning_sparsity.callbacks.base import SparsityCallback
from lightning_sparsity.connectivity import CollapseError
from lightning_sparsity.core.keeper import MaskKeeper, nobody
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.storage import StoragePolicy
from lightning_sparsity.metrics import GradientFlow
from lightning_sparsity.monitors import tensorboard
from lightning_sparsity.monitors.requested import check_metrics
from lightning_sparsity.monitors.watch import Watch


class DensityMonitor(SparsityCallback):
    r"""Watches sparse training: logs it, draws it and reports on it. Changes nothing.

    It logs to every logger, on the steps on which Lightning logs and after the last one:

    - ``density/total``: live weights / weights;
    - ``churn/total``: weights that the last update dropped / weights live before it;
    - ``itop/total``: weights ever live / weights, the in-time over-parameterisation rate
      :math:`R_s` (Liu et al., 2021, arXiv:2102.02887);
    - ``drop_fraction/RigL``, by callback: share of the live weights that an update drops at
      present, 0 outside the callback's window;
    - of learned masks, by parameter, what the method says of them, such as ``score_mean/`` and
      ``score_std/``;
    - ``flops/inference``: :math:`F = \sum_l f_l d_l + f_o`, per sample;
    - ``flops/training``: per sample, in the mean of the training so far;
    - ``flops/inference_ratio``, ``flops/training_ratio``: the same, divided by those of the
      dense model;
    - ``collapse/total``: number of layers that have no live weight left or, with
      ``connectivity``, none on a path; ``collapse/net.0.weight`` is 1 for each of them, else 0;
    - with ``connectivity``, ``effective_density/total``: live weights on a path from input to
      output / weights; and by parameter ``dead_neurons/``: output units without a live
      weight, or that the next layer does not read;
    - whatever ``metrics`` asks for.

    The first three also by parameter, such as ``density/net.0.weight``. Here :math:`f_l` are
    the forward FLOPs of a layer, 2 per multiply-accumulate, :math:`d_l` its density and
    :math:`f_o` the FLOPs of everything else. A training step counts :math:`3F`, and
    :math:`\sum_l f_l (1 - d_l)` more for dense weight gradients on which an update is based.
    These are what hardware would need that skips every zero. They are counted while the first
    batch passes forward; in a compiled model that cannot be seen, and its FLOPs are reported
    as unknown and not logged. Passes that score weights before training are not counted.

    TensorBoard also gets a page of charts (custom scalars), histograms of the live weights,
    a picture of the densities over time, and the two reports. They are printed as well: the
    allocation before the first step, and in the end what became of it, with theoretical
    FLOPs beside measured time and bytes. The progress bar shows the density.

    Without a sparsity method in the Trainer it reports a dense model.

    Args:
        per_layer: Whether to log what there is of each parameter, beside totals.
        histograms: When TensorBoard gets histograms and the picture: batches between them,
            "epoch", or None for never.
        print_tables: Whether to print the reports.
        connectivity: Whether to follow paths through the linear and convolutional layers. The
            graph of the model is read off its modules: exact if each of them calls its layers
            one after the other, a guess inside modules with skip connections or parallel
            branches (see :mod:`lightning_sparsity.connectivity`).
        on_collapse: What follows when a layer has no live weight left or, with
            ``connectivity``, none on a path: "warn" once, or "error", which ends training.
            Of single dead neurons ``connectivity`` warns once per layer.
        metrics: Metrics of :mod:`lightning_sparsity.metrics` to log as well, by tag, such as
            ``{"compression/csr": CompressionRatio("csr")}``; also others that are updated
            with a model. They see the masks at the start and whenever they are logged:
            ``MaskSimilarity()`` compares with the start, ``MaskSimilarity(to="last")`` with the
            time before. ``GradientFlow`` sees gradients just before the optimizer's step on
            logging steps, before clipping and masking, and is also logged by parameter,
            ``tag/net.0.weight``; optimizers that are stepped past Lightning show none.
        accuracy: The name under which the model logs the accuracy, in [0, 1], on which
            ``ParameterEfficiency`` and its hardness-normalized form are based; the latest
            value counts, and until there is one they are not logged.

    Raises:
        ValueError: If ``histograms`` is not a positive number of batches, "epoch" or None, or
            ``on_collapse`` is neither "warn" nor "error"; or if one of ``accuracy`` and an
            efficiency in ``metrics`` is there without the other.
        TypeError: If another argument is of the wrong type.
        CollapseError: In training, if asked for by ``on_collapse``.

    Example::

        Trainer(callbacks=[RigL(density=0.1), DensityMonitor()])
    """

    def __init__(
        self,
        *,
        per_layer: bool = True,
        histograms: int | Literal["epoch"] | None = "epoch",
        print_tables: bool = True,
        connectivity: bool = False,
        on_collapse: Literal["warn", "error"] = "warn",
        metrics: Mapping[str, Metric] | None = None,
        accuracy: str | None = None,
    ) -> None:
        histograms = plain(histograms)
        whole = isinstance(histograms, int) and not isinstance(histograms, bool)
        if not (histograms in (None, "epoch") or (whole and int(histograms) > 0)):
            raise ValueError(
                f"DensityMonitor(histograms={histograms!r}): must be a positive number of batches, "
                '"epoch", or None for no histograms.'
            )
        for name, flag in (
            ("per_layer", per_layer),
            ("print_tables", print_tables),
            ("connectivity", connectivity),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"DensityMonitor({name}={flag!r}): must be True or False.")
        if on_collapse not in ("warn", "error"):
            raise ValueError(
                f'DensityMonitor(on_collapse={on_collapse!r}): must be "warn" or "error".'
            )
        check_metrics(metrics, accuracy)
        self.metrics = dict(metrics or {})
        self.accuracy = accuracy
        self.per_layer = per_layer
        self.histograms = histograms
        self.print_tables = print_tables
        self.connectivity = connectivity
        self.on_collapse = on_collapse
        self._restored: dict[str, Any] = {}
        self._model: Callable[[], pl.LightningModule | None] = nobody
        self._watch: Watch | None = None
        self._logged = True
        self._drawn = -1
        self._flops_told = False
        self._told_accuracy = False
        self._told_cut: set[str] = set()
        self._told_neurons: set[str] = set()

    # ------------------------------------------------------------------ start and end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bring the keeper; forget what belongs to another model."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._model() is not pl_module:
                self._restored = {}
            self._model = weakref.ref(pl_module)
            self._check_gradients(trainer)

    def _check_gradients(self, trainer: pl.Trainer) -> None:
        """Refuse gradients off the masks where there may be none."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for tag, metric in self.metrics.items():
            off = isinstance(metric, GradientFlow) and not metric.live
            if off and any(isinstance(callback, StoragePolicy) for callback in callbacks):
                raise MisconfigurationException(
                    f"DensityMonitor(metrics={{{tag!r}: GradientFlow(live=False)}}): weights that "
                    "SparseCompute keeps compressed have no gradient off the mask. Use live=True, "
                    "or leave one of the two out."
                )

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """The masks are made or restored, and no step was taken yet: report them.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            keeper: Owner of the masks.
        """
        step = _step(trainer)
        self._watch = watch = Watch(keeper, pl_module, step, self.connectivity, self.metrics)
        watch.load_state_dict(self._restored)
        self._restored = {}
        self._logged, self._drawn, self._flops_told = True, -1, False
        for writer in tensorboard.writers(trainer):
            writer.add_custom_scalars(tensorboard.layout())
        self._told_cut, self._told_neurons, self._told_accuracy = set(), set(), False
        table = reports.allocation_table(watch.masks, pl_module)
        wired = reports.connectivity_line(watch.wiring) if watch.wiring else ""
        self._report(trainer, "start", "\n".join(filter(None, (table, wired))))
        self._judge(watch)
        self._tell_flops(watch)  # known already, if training resumes

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is not logged yet, and report."""
        if self._watch is None or not self._watch.batches:
            return
        if not self._logged:
            self._log(trainer, _step(trainer) - 1)
        if self.histograms is not None:
            self._draw(trainer, _step(trainer) - 1)
        self._report(trainer, "end", self._watch.report())
        if self.accuracy is not None and self.accuracy not in trainer.callback_metrics:
            rank_zero_warn(
                f"DensityMonitor(accuracy={self.accuracy!r}): the model logged nothing so named."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model. The state stays, for another ``fit`` of the same one."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the model; what lies in parts is lost, as other processes may be elsewhere."""
        if self._watch is not None and any(p.is_sharded for p in self._watch.masks):
            self._watch.stop_counting()
            self._watch = None
        self._release()

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.stop_counting()
            self._restored = self._watch.state_dict()
            self._watch = None

    # ---------------------------------------------------------------------- each batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time; in the first batch, start to count FLOPs."""
        if self._watch is not None:
            self._watch.clock.start_batch()
            self._watch.start_counting()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """With automatic optimization, the forward pass is over."""
        if self._watch is not None and pl_module.automatic_optimization:
            self._watch.end_forward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """See masks that live for one of several steps in a batch only."""
        if self._watch is not None:
            self._watch.tracker.look()
            if trainer.loggers and _is_logging_step(trainer):
                self._watch.requested.see_gradients(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the masks; log on logging steps."""
        watch = self._watch
        if watch is None:
            return
        updated = watch.end_batch(_samples(batch), trainer.accumulate_grad_batches, _step(trainer))
        self._tell_flops(watch)
        if updated:
            self._judge(watch)
        if (updated or watch.batches == 1) and not trainer.barebones:
            _show(pl_module, watch.tracker.density)
        if _accumulates(trainer):
            return
        self._logged = _is_logging_step(trainer)
        if self._logged:
            self._log(trainer, _step(trainer))
        watch.requested.forget_gradients()
        if isinstance(self.histograms, int) and (_step(trainer) + 1) % self.histograms == 0:
            self._draw(trainer, _step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if that is due."""
        if self._watch is not None:
            self._watch.stop_counting()  # an epoch can be cut short before its batch ends
            self._watch.clock.pause()
            if self.histograms == "epoch":
                self._draw(trainer, _step(trainer) - 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not part of a batch's time."""
        if self._watch is not None:
            self._watch.clock.pause()

    def _judge(self, watch: Watch) -> None:
        """Warn or stop if nothing passes through a layer any more."""
        dead, cut = watch.dead_layers, watch.cut_layers
        told = [f"no live weight is left in {', '.join(dead)}"] if dead else []
        told += [f"none is on a path from input to output in {', '.join(cut)}"] if cut else []
        message = f"Layer collapse: {'; '.join(told)}."
        if told and self.on_collapse == "error":
            raise CollapseError(
                f"{message} Raise the density, or choose a distribution that leaves every layer "
                'some weights; DensityMonitor(on_collapse="warn") goes on.'
            )
        if set(cut) - self._told_cut:  # of dead layers the engine warns
            self._told_cut.update(cut)
            rank_zero_warn(message)
        dead_neurons = {k: v for k, v in watch.dead_neurons.items() if k not in self._told_neurons}
        if dead_neurons:
            self._told_neurons.update(dead_neurons)
            counts = ", ".join(f"{count} in {name}" for name, count in dead_neurons.items())
            rank_zero_warn(f"Dead neurons, which nothing enters or nothing reads: {counts}.")

    # ------------------------------------------------------------------------- output

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        assert self._watch is not None
        if not trainer.loggers:
            return
        # On all processes, which may each have parts of the masks.
        found = self._watch.metrics()
        asked = self._watch.requested.measure(self._accuracy(trainer), self.per_layer)
        if not trainer.is_global_zero:
            return
        if not self.per_layer:
            layers = set(self._watch.tracker.names)
            found = {k: v for k, v in found.items() if k.partition("/")[2] not in layers}
        for logger in trainer.loggers:
            logger.log_metrics({**found, **asked}, step)

    def _accuracy(self, trainer: pl.Trainer) -> float | None:
        """The latest accuracy, if there is one that can be."""
        logged = trainer.callback_metrics.get(self.accuracy) if self.accuracy else None
        if logged is None:
            return None
        if 0 <= float(logged) <= 1:
            return float(logged)
        if not self._told_accuracy:
            self._told_accuracy = True
            rank_zero_warn(
                f"DensityMonitor(accuracy={self.accuracy!r}): the model logged {float(logged):g}; "
                "efficiencies need an accuracy in [0, 1], and are not logged for others."
            )
        return None

    def _draw(self, trainer: pl.Trainer, step: int) -> None:
        assert self._watch is not None
        if step == self._drawn:
            return
        self._drawn = step
        writers = list(tensorboard.writers(trainer))
        for kept in self._watch.masks:
            if writers or kept.is_sharded:  # all processes gather, one writes
                name, values = f"live weights/{kept.name}", kept.values
                for writer in writers:
                    tensorboard.write_histogram(writer, name, values, step)
        for writer in writers:
            picture = self._watch.history.picture(step, self._watch.tracker.densities)
            if picture is not None:
                writer.add_image("density of each layer over time", picture, step)

    def _report(self, trainer: pl.Trainer, when: str, text: str) -> None:
        self._print(f"\n{text}\n")
        for writer in tensorboard.writers(trainer):
            tensorboard.write_text(writer, f"sparsity at the {when}", text, _step(trainer))

    def _tell_flops(self, watch: Watch) -> None:
        """Print FLOPs once, as soon as they are known."""
        if watch.cost.flops is not None and not self._flops_told:
            self._flops_told = True
            table = reports.flops_table(watch.masks, watch.cost.flops)
            line = reports.flops_line(watch.cost.flops, watch.tracker.densities)
            self._print(f"\n{table}{line}\n")

    def _print(self, text: str) -> None:
        if self.print_tables:
            rank_zero_info(text)

    # -------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only; masks at one bit per weight."""
        return self._restored if self._watch is None else self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only store: the state is applied when the masks are ready."""
        self._restored = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without the model."""
        state = {**super().__getstate__(), "_model": nobody, "_watch": None}
        return {**state, "_restored": self.state_dict()}


def _step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs the present batch; one more after its end."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _accumulates(trainer: pl.Trainer) -> bool:
    """Whether the optimizer step of this batch is still to come."""
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and trainer.fit_loop._should_accumulate()


def _is_logging_step(trainer: pl.Trainer) -> bool:
    always = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    return always or trainer._logger_connector.should_update_logs


def _samples(batch: Any) -> int:
    """Samples in a batch; 1 if that cannot be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return max(1, int(extract_batch_size(batch)))
        except Exception:
            return 1


def _show(pl_module: pl.LightningModule, density: float) -> None:
    """Put the density into the progress bar."""
    pl_module.log(
        "density", density, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
    )
