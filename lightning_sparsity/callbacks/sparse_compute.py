"""SparseCompute: training that computes with the live weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_sparsity.callbacks.base import SparsityCallback
from lightning_sparsity.core.compressed import reason_to_stay_dense
from lightning_sparsity.core.filters import (
    Candidate,
    Selection,
    candidates,
    linear_and_conv,
    select,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import errors_of
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.method import Method
from lightning_sparsity.core.storage import IGNORED_BY_DDP, Layout, Storage
from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Kernels
from lightning_sparsity.reports import storage_table


class SparseCompute(SparsityCallback):
    """Keeps sparse weights compressed, so that training is faster and smaller than dense.

    It stands beside the callback that makes the masks. A weight that it compresses becomes a
    vector of its live values: its gradient and its optimizer state have one number per live
    weight, and the layer multiplies by compressed rows (CSR). Masks and training are the same
    as with dense storage, up to the order in which numbers are added. Where a method reads the
    dense gradient, it is formed for one layer at a time, on update steps only, from the layer's
    inputs and output gradients.

    A checkpoint shows none of this: it holds dense weights and dense optimizer state under the
    usual names, and may be resumed with other storage. What ``layout="auto"`` has decided is in
    it, so that a resumed training computes as the one before.

    Linear layers, and one- and two-dimensional convolutions without groups, in float32 or
    float64, can be compressed; the table says what stays dense and why. Under autocast they
    compute in the dtype of their weights, and their results get the dtype of the autocast.
    Weights that learn their masks are compressed when these are final. Somebody else who reads
    ``layer.weight`` gets the dense weight, differentiable, made anew every time; the table shows
    how often. Writing to it raises an error.

    Args:
        layout: "auto" measures each layer with the inputs that it got in the first step, dense
            and compressed, and keeps the faster; again when its density has halved or doubled.
            "csr" compresses every layer that can be.
        include: Which weights may be compressed: names, patterns, module types, callables.
        exclude: Which of those stay dense.
        kernels: What multiplies by compressed weights: "torch", torch's own sparse products, or
            "native", kernels that come with this package as C source and are compiled for the
            processor at hand when they are first used: about twice as fast, for CPUs only, and
            they need a C compiler. "auto": both are measured where the layout is, if there is a
            compiler; without measuring, torch's.
        contiguous: Whether the outputs of compressed linear layers are copied to be contiguous,
            as those of dense ones are; inside an ``nn.Sequential`` they are not where only
            activation functions stand before the next linear or compressed layer. False is
            faster for models that call the layers themselves, and then ``.view`` of such an
            output fails where ``.reshape`` works.
        elementwise: Further optimizer classes that treat every weight by itself, whatever the
            shape of the parameter, as those of ``torch.optim`` from SGD to AdamW do.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``layout`` or ``kernels`` is none of those named.

    Example::

        Trainer(callbacks=[RigL(density=0.05), SparseCompute()])
    """

    def __init__(
        self,
        layout: Layout = "auto",
        *,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        kernels: Kernels | Literal["auto"] = "auto",
        contiguous: bool = True,
        elementwise: Sequence[type[Optimizer]] = (),
    ) -> None:
        if layout not in get_args(Layout):
            raise ValueError(
                f"SparseCompute(layout={layout!r}): must be 'auto', which measures, or 'csr'."
            )
        if kernels not in ("auto", *get_args(Kernels)):
            raise ValueError(
                f"SparseCompute(kernels={kernels!r}): must be 'auto', 'torch', or 'native' to use "
                "no others than the kernels of this package."
            )
        if not isinstance(contiguous, bool):
            raise TypeError(f"SparseCompute(contiguous={contiguous!r}): must be True or False.")
        kinds = tuple(elementwise) if isinstance(elementwise, Sequence) else (elementwise,)
        if not all(isinstance(kind, type) and issubclass(kind, Optimizer) for kind in kinds):
            raise TypeError(
                f"SparseCompute(elementwise={elementwise!r}): must be optimizer classes, such as "
                "(Lion,)."
            )
        self.layout: Layout = layout
        self.include = include
        self.exclude = exclude
        self.kernels = kernels
        self.contiguous = contiguous
        self.elementwise = kinds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what compressed weights cannot be combined with.

        Raises:
            MisconfigurationException: Naming what it is, and the way out.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._refuse(trainer, pl_module)
            if isinstance(trainer.strategy, DDPStrategy):
                mine = [a for c in self._pool(pl_module) for a in c.aliases]
                setattr(pl_module, IGNORED_BY_DDP, [*getattr(pl_module, IGNORED_BY_DDP, ()), *mine])

    def on_masks_ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, keeper: MaskKeeper
    ) -> None:
        """Say which weights stay dense for now, as no table is printed before one is decided."""
        able = {c.name for c in self._pool(pl_module)}
        learning = [p.name for p in keeper.masks or () if p.effective and p.name in able]
        if learning:
            rank_zero_info(
                f"SparseCompute: {', '.join(learning)}: dense while masks are learned, compressed "
                "once these are final."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let DistributedDataParallel have its parameters again."""
        if mine := getattr(pl_module, IGNORED_BY_DDP, None):
            aliases = {a for c in self._pool(pl_module) for a in c.aliases}
            setattr(pl_module, IGNORED_BY_DDP, [name for name in mine if name not in aliases])

    def _pool(self, model: pl.LightningModule) -> list[Candidate]:
        """The weights that may be compressed, if they are sparse."""
        with errors_of("SparseCompute"):
            chosen = select(candidates(model), self.include, self.exclude)
        return [
            c
            for c in chosen
            if len(c.aliases) == 1 and reason_to_stay_dense(c.module, c.parameter) is None
        ]

    def _refuse(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, SparseCompute) for c in callbacks) > 1:
            raise MisconfigurationException("SparseCompute is given twice; leave one out.")
        if not any(isinstance(c, Method) for c in callbacks):
            raise MisconfigurationException(
                "SparseCompute compresses what another callback makes sparse, and there is none; "
                "add one, such as StaticSparse() for zeros that the weights have already."
            )
        device = trainer.strategy.root_device.type
        if self.kernels == "native" and device != "cpu":
            raise MisconfigurationException(
                f"SparseCompute(kernels='native'): the kernels are for CPUs, and this training is "
                f"on {device}. Leave kernels= out to compute with torch's sparse products."
            )
        if self.kernels == "native" and (reason := native.unavailable()) is not None:
            raise MisconfigurationException(
                f"SparseCompute(kernels='native'): {reason} Leave kernels= out to compute with "
                "torch's sparse products."
            )
        for callback in callbacks:
            if hasattr(callback, "_average_model"):
                raise MisconfigurationException(
                    f"SparseCompute and {type(callback).__name__}: averages are taken of weights "
                    "of one shape, and compressed weights change theirs. Leave one of them out."
                )
        compiled = getattr(model, "_compiler_ctx", None) is not None or any(
            "_orig_mod" in name or getattr(module, "_compiled_call_impl", None) is not None
            for name, module in model.named_modules()
        )
        if compiled:
            raise MisconfigurationException(
                "SparseCompute and torch.compile: compiled code cannot follow weights that change "
                "their length. Train uncompiled, or leave SparseCompute out."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "SparseCompute compresses whole weights, and ModelParallelStrategy splits them "
                'over processes. Use Trainer(strategy="ddp"), or leave SparseCompute out.'
            )
        if isinstance(trainer.strategy, DDPStrategy):
            if is_overridden("configure_model", model):
                raise MisconfigurationException(
                    "SparseCompute under DDP cannot see the layers that configure_model makes; "
                    "make them in __init__, or leave SparseCompute out."
                )
            if not model.automatic_optimization:
                raise MisconfigurationException(
                    "SparseCompute under DDP averages gradients when Lightning steps an optimizer, "
                    "which manual optimization may pass by. Use automatic optimization, or leave "
                    "SparseCompute out."
                )

    def announce(self, masks: Masks, storage: Storage) -> None:
        """Print how every weight is kept, what was measured, and what stays dense."""
        rank_zero_info(storage_table(masks, storage))
