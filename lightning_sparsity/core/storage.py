"""Storage: which weights are kept compressed, decided by measuring, and their way in and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Protocol, runtime_checkable

from lightning_sparsity.core.capture import Hook
from lightning_sparsity.core.compressed import CompressedWeight, reason_to_stay_dense
from lightning_sparsity.core.filters import Selection
from lightning_sparsity.core.layer_time import Load, measure
from lightning_sparsity.core.masks import Masks, resize
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Kernels
from lightning_sparsity.ops.ranks import mean_over_ranks

Layout = Literal["auto", "csr"]
"""How weights are kept: whatever measures faster, or in compressed rows."""

_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)
"""Optimizers that treat every weight by itself, so that the shape of a parameter is nothing."""

IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for the names of parameters that it is to leave alone."""

_POINTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Softplus,
    nn.Softsign,
)
"""Modules that give each number a result by itself, in whatever order they lie, without chance."""


@runtime_checkable
class StoragePolicy(Protocol):
    """A callback that says how weights are kept.

    Attributes:
        layout: "auto" or "csr".
        include: Which weights may be compressed.
        exclude: Which of those stay dense.
        kernels: What multiplies by compressed weights; "auto": what measures faster.
        contiguous: Whether outputs of compressed layers are contiguous where it matters.
        elementwise: Further optimizers that treat every weight by itself.
    """

    layout: Layout
    include: Selection
    exclude: Selection
    kernels: Kernels | Literal["auto"]
    contiguous: bool
    elementwise: tuple[type[Optimizer], ...]

    def announce(self, masks: Masks, storage: Storage) -> None:
        """Show what was decided."""
        ...


@dataclass(frozen=True)
class Choice:
    """How one weight is kept, and why.

    Args:
        compressed: Whether in compressed rows.
        density: Live share of the weight as it was decided.
        dense_ms: Forward and backward pass of the layer with dense storage; None: not measured.
        compressed_ms: The same with compressed storage.
        kernels: What multiplies by the compressed weight.
    """

    compressed: bool
    density: float
    dense_ms: float | None = None
    compressed_ms: float | None = None
    kernels: Kernels = "torch"

    def holds_at(self, density: float) -> bool:
        """Whether the density is still within a factor of two."""
        if not self.density:
            return not density
        return self.density / 2 < density < self.density * 2


class Storage:
    """Keeps weights compressed where the policy says, and everything else dense.

    Args:
        policy: The callback.
        masks: All sparse parameters.
        modules: Every module of the model.
        optimizers: The optimizers; a list that may change during training.
        chosen: Plain names of the weights that the policy is about.
        broadcast: Gives every process what the first one has.
        is_busy: Whether a method is at work on a weight that has to be dense for it.

    Attributes:
        choices: How each weight is kept that may be compressed, as far as it is decided.
        reasons: Why each of the others stays dense, by plain name.
    """

    def __init__(
        self,
        policy: StoragePolicy,
        masks: Masks,
        modules: Sequence[nn.Module],
        optimizers: Callable[[], Sequence[Optimizer]],
        chosen: Collection[str],
        broadcast: Callable[[Any], Any] = lambda decided: decided,
        is_busy: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.choices: dict[str, Choice] = {}
        self.reasons: dict[str, str] = {}
        self._policy = policy
        self._masks = masks
        self._modules = modules
        self._optimizers = optimizers
        self._broadcast = broadcast
        self._is_busy = is_busy
        self._shared: list[nn.Parameter] = []
        self._loads: dict[str, Load] = {}
        self._watching: dict[str, Any] = {}
        self._hooked: dict[Optimizer, list[Any]] = {}
        self._find(chosen)

    def _find(self, chosen: Collection[str]) -> None:
        """Say which weights may not be compressed."""
        for kept in self._masks:
            if len(kept.aliases) > 1:
                reason: str | None = f"tied: {', '.join(kept.aliases)}"
            else:
                reason = reason_to_stay_dense(kept.module, kept.parameter)
            if reason is None and kept.name not in chosen:
                reason = "left out by include= or exclude="
            if reason is not None:
                self.reasons[kept.name] = reason

    # ------------------------------------------------------------------- start and end

    def start(self, saved: Mapping[str, Any]) -> None:
        """Compress what is decided already, and look out for what is to be measured.

        Args:
            saved: From :meth:`state_dict`; empty in a new training.

        Raises:
            MisconfigurationException: If an optimizer needs the shape of a weight.
        """
        self._check_optimizers()
        self._follow_optimizers()
        if self._policy.layout == "auto":
            self.choices = {
                name: Choice(**choice)
                for name, choice in saved.items()
                if name in self._masks and name not in self.reasons
            }
            able = self._kernels()
            self.choices = {n: c for n, c in self.choices.items() if c.kernels in able}
            for kept in self._candidates():
                self._watch(kept)
        for name, choice in self.choices.items():
            if choice.compressed and not self._is_busy(name):
                self._compress(self._masks[name], choice.kernels)
        if self._policy.layout == "csr":
            self.settle()
        if self.choices or not self._candidates():
            self._announce()

    def share(self, names: Collection[str]) -> None:
        """Take over from DistributedDataParallel what it does for parameters.

        Args:
            names: Those that it was told to ignore. They are the first process's from now on.
        """
        named = dict(self._modules[0].named_parameters())
        self._shared = [named[name] for name in names if name in named]
        for parameter in self._shared:
            parameter.data = self._broadcast(parameter.data)

    @torch.no_grad()
    def average(self, optimizer: Optimizer) -> None:
        """Average the gradients of shared parameters that an optimizer is about to step."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [p for p in self._shared if id(p) in stepped]
        if not mine:
            return
        has = torch.tensor([float(p.grad is not None) for p in mine], device=mine[0].device)
        anywhere = mean_over_ranks(has)
        for parameter, share in zip(mine, anywhere.tolist(), strict=True):
            if share:
                grad = parameter.grad
                grad = torch.zeros_like(parameter) if grad is None else grad
                parameter.grad = mean_over_ranks(grad)

    def _candidates(self) -> list[SparseParameter]:
        return [kept for kept in self._masks if kept.name not in self.reasons]

    def _check_optimizers(self) -> None:
        names = {id(kept.parameter): kept.name for kept in self._candidates()}
        for optimizer in self._optimizers():
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            mine = [names[id(p)] for p in stepped if id(p) in names]
            if mine and type(optimizer) not in (*_ELEMENTWISE, *self._policy.elementwise):
                kind = type(optimizer).__name__
                raise MisconfigurationException(
                    f"SparseCompute: {kind} steps {mine[0]}, and it is not known to treat every "
                    "weight by itself, whatever the shape of the parameter; a compressed weight "
                    f"is a vector. If it does, pass SparseCompute(elementwise=({kind},)); if it "
                    "does not, leave its layers out with exclude= or use torch.optim.AdamW."
                )

    def release(self, names: Collection[str] | None = None) -> None:
        """Make weights dense again: those of these names, or all, and let go of everything."""
        for kept in self._masks:
            if kept.compressed is not None and (names is None or kept.name in names):
                self._expand(kept)
        if names is None:
            hooks = (handle for handles in self._hooked.values() for handle in handles)
            for handle in (*self._watching.values(), *hooks):
                handle.remove()
            self._watching, self._hooked = {}, {}

    # ------------------------------------------------------------------------ deciding

    def _watch(self, kept: SparseParameter) -> None:
        """See what the layer is given, once."""
        if kept.name not in self._loads:
            hook = Hook(partial(self._see, kept.name))
            handle = kept.module.register_forward_pre_hook(hook, with_kwargs=True)
            self._watching[kept.name] = handle

    def _see(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self._watching.pop(name).remove()
            given: Tensor = args[0] if args else kwargs["input"]
            device = given.device.type
            on = torch.is_autocast_enabled(device)
            self._loads[name] = Load(
                shape=tuple(given.shape),
                dtype=given.dtype,
                needs_grad=given.requires_grad,
                autocast=torch.get_autocast_dtype(device) if on else None,
            )

    def settle(self, names: Collection[str] | None = None) -> None:
        """Compress what may be, and decide anew where the density has changed.

        Args:
            names: The weights that were stepped; None: all.
        """
        self._follow_optimizers()
        due = [
            kept
            for kept in self._candidates()
            if (names is None or kept.name in names)
            and not self._is_busy(kept.name)
            and self._is_due(kept)
        ]
        if not due:
            return
        decided = {kept.name: asdict(self._decide(kept)) for kept in due}
        for name, choice in self._broadcast(decided).items():
            kept = self._masks[name]
            mine = self.choices[name] = Choice(**choice)
            if kept.compressed is not None and not mine.compressed:
                self._expand(kept)
            elif kept.compressed is not None:
                kept.compressed.kernels = mine.kernels
            elif mine.compressed:
                self._compress(kept, mine.kernels)
        self._announce()

    def _is_due(self, kept: SparseParameter) -> bool:
        choice = self.choices.get(kept.name)
        if self._policy.layout == "csr":
            return kept.compressed is None
        if kept.name not in self._loads:
            return False
        if choice is None or not choice.holds_at(kept.density):
            return True
        return choice.compressed != (kept.compressed is not None)  # it had to be dense for a while

    def _decide(self, kept: SparseParameter) -> Choice:
        able = self._kernels()
        if self._policy.layout == "csr":
            return Choice(True, kept.density, kernels=able[0])
        load = self._loads[kept.name]
        found = {kernels: measure(kept, load, kernels) for kernels in able}
        kernels = min(found, key=lambda kernels: found[kernels][1])
        dense, compressed = found[kernels]
        return Choice(compressed < dense, kept.density, dense, compressed, kernels)

    def _kernels(self) -> list[Kernels]:
        """What there is to choose from; the first is what is not measured."""
        if self._policy.kernels != "auto":
            return [self._policy.kernels]
        on_cpu = all(kept.parameter.device.type == "cpu" for kept in self._masks)
        measures = self._policy.layout == "auto" and on_cpu
        return ["torch", "native"] if measures and native.unavailable() is None else ["torch"]

    def finish(self) -> None:
        """Show the table once more if somebody but the layers has read compressed weights."""
        if any(kept.compressed is not None and kept.compressed.reads for kept in self._masks):
            self._policy.announce(self._masks, self)

    def _announce(self) -> None:
        self._chain()
        self._policy.announce(self._masks, self)

    def _chain(self) -> None:
        """Let outputs stay as they come where the next in line takes them so."""
        for kept in self._masks:
            if kept.compressed is not None:
                kept.compressed.is_chained = not self._policy.contiguous
        mine = {id(kept.module): kept.compressed for kept in self._masks if kept.compressed}
        for module in self._modules:
            if type(module) is nn.Sequential:
                for first, after in _neighbours(list(module)):
                    if id(first) in mine and (id(after) in mine or type(after) is nn.Linear):
                        mine[id(first)].is_chained |= not isinstance(first, nn.Conv1d | nn.Conv2d)

    # --------------------------------------------------------------------- in and out

    @torch.no_grad()
    def _compress(self, kept: SparseParameter, kernels: Kernels) -> None:
        compressed = CompressedWeight(kept.parameter, kept.mask, kernels)
        resize(kept, compressed.compress, self._optimizers())
        compressed.install(self._modules)
        kept.store(compressed)

    @torch.no_grad()
    def _expand(self, kept: SparseParameter) -> None:
        compressed = kept.compressed
        assert compressed is not None
        compressed.remove()
        resize(kept, compressed.expand, self._optimizers())
        kept.store(None)

    def _follow_optimizers(self) -> None:
        """Let the optimizers save and load dense state."""
        for optimizer in self._optimizers():
            if optimizer not in self._hooked:
                self._hooked[optimizer] = [
                    optimizer.register_state_dict_post_hook(self._expand_state),
                    optimizer.register_load_state_dict_pre_hook(self._compress_state),
                ]

    def _expand_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._changed(optimizer, state, _expanded)

    def _compress_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._changed(optimizer, state, _compressed)

    def _changed(
        self,
        optimizer: Optimizer,
        state: dict[str, Any],
        change: Callable[[CompressedWeight, Tensor], Tensor],
    ) -> dict[str, Any]:
        """A copy of an optimizer's ``state_dict`` in which tensors of compressed weights differ."""
        mine = {id(kept.parameter): kept.compressed for kept in self._masks if kept.compressed}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        places = [i for group in state["param_groups"] for i in group["params"]]
        entries = dict(state["state"])
        for place, parameter in zip(places, stepped, strict=True):
            if id(parameter) in mine and place in entries:
                entries[place] = {
                    key: change(mine[id(parameter)], value) if isinstance(value, Tensor) else value
                    for key, value in entries[place].items()
                }
        return {**state, "state": entries}

    def state_dict(self) -> dict[str, Any]:
        """What was measured, so that a resumed training computes with the same storage."""
        if self._policy.layout != "auto":
            return {}
        return {name: asdict(choice) for name, choice in self.choices.items()}


def _expanded(weight: CompressedWeight, tensor: Tensor) -> Tensor:
    return weight.expand(tensor) if tensor.shape == weight.parameter.shape else tensor


def _compressed(weight: CompressedWeight, tensor: Tensor) -> Tensor:
    if tensor.shape != weight.shape:
        return tensor
    return weight.compress(tensor.to(weight.pattern.columns.device))


def _neighbours(modules: list[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs that follow each other, with nothing but pointwise functions in between."""
    solid = [module for module in modules if type(module) not in _POINTWISE]
    return list(zip(solid, solid[1:], strict=False))
