r"""FLOPs: what a model computes per sample, layer by layer, counted once while it trains.

A multiply-accumulate counts 2, by the formulas of ``torch.utils.flop_counter``; additions
of biases, normalisation and activations count 0. With :math:`f_l` the forward FLOPs of the
layer of a sparse weight, :math:`d_l` its density and :math:`f_o` all the rest,

- inference: :math:`\sum_l f_l d_l + f_o`;
- a training step: three times that, for the outputs, the gradient of the inputs and the
  gradient of the weights, and :math:`\sum_{l \in G} f_l (1 - d_l)` more for the layers
  :math:`G` whose weight gradient was needed off the mask too. That is the count of Evci et
  al. (2020).

These are operations that hardware would need that skips every zero. What scoring weights before
training costs (SNIP, GraSP, SynFlow and the like) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop
from torch.utils.hooks import RemovableHandle

_aten = torch.ops.aten


def _linear_flop(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _lookup_flop(*args: Any, **kwargs: Any) -> int:
    return 0


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.linear: _linear_flop,  # on some devices it is not split up
    _aten.embedding: _lookup_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
}


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per sample.

    Args:
        layers: By name of the sparse parameter; those never seen at work are absent.
        other: Of all operations that read no sparse parameter.
        unknown: Why nothing is known of the others, or of all; empty if all is known.

    Example:
        >>> flops = Flops({"fc.weight": 1000.0}, other=200.0)
        >>> flops.dense, flops.inference({"fc.weight": 0.1})
        (1200.0, 300.0)
    """

    layers: Mapping[str, float] = field(default_factory=dict)
    other: float = 0.0
    unknown: str = ""

    @property
    def dense(self) -> float:
        """Of the whole model with every weight live."""
        return sum(self.layers.values()) + self.other

    def inference(self, densities: Mapping[str, float]) -> float:
        """Of the whole model at these densities."""
        return sum(f * densities[name] for name, f in self.layers.items()) + self.other

    def off_mask(self, densities: Mapping[str, float], names: Iterable[str]) -> float:
        """Of the weight gradients of some layers where their weights are not live."""
        return sum(self.layers[name] * (1 - densities[name]) for name in names)


class FlopCounter(TorchDispatchMode):
    """Counts forward FLOPs by the sparse parameter that an operation reads.

    Views of a parameter and what is computed from it element by element (casts of autocast,
    products with a mask) count as the parameter. The backward pass is not counted. Regions
    compiled by ``torch.compile`` are left alone and not seen. An operation that cannot be
    counted never disturbs the training.

    Args:
        parameters: The sparse parameters by name.

    Attributes:
        counting: Set it to False to let everything pass uncounted.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counting = True
        self._names = tuple(parameters)
        self._layers: dict[str, int] = {}
        self._other = 0
        self._failure = ""
        self._inside = 0
        self._sources: dict[StorageWeakRef, str | None] = {}
        for name, parameter in parameters.items():
            place = StorageWeakRef(parameter.untyped_storage())
            self._sources[place] = None if place in self._sources else name

    def count_by_outputs(self, name: str, layer: nn.Module, weights: int) -> list[RemovableHandle]:
        """Count a layer by the size of its outputs, as nobody sees what its kernels do.

        Args:
            name: Of its sparse parameter.
            layer: Linear or a convolution, not transposed.
            weights: From all of its inputs to one of its outputs, live or not.

        Returns:
            The hooks, to be removed when counting is over.
        """

        def enter(*args: Any) -> None:
            self._inside += 1

        def leave(module: nn.Module, args: Any, out: Tensor) -> None:
            self._inside -= 1
            if self.counting and not _in_backward():
                self._layers[name] = self._layers.get(name, 0) + 2 * out.numel() * weights

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled while this mode is on."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.counting and not self._inside and not _in_backward():
            try:
                self._count(getattr(func, "overloadpacket", func), args, kwargs, out)
            except Exception as error:
                self._failure = f"{func} could not be counted ({error})"
        return out

    def _count(self, operation: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs = list(_tensors((args, kwargs)))
        read = [(tensor, name) for tensor in inputs if (name := self._source(tensor))]
        if operation in _FORMULAS:
            flops = _FORMULAS[operation](*args, **kwargs, out_val=out)
            names = {name for _, name in read}
            if len(names) == 1:
                name = names.pop()
                self._layers[name] = self._layers.get(name, 0) + flops
            else:
                self._other += flops
        elif read:
            self._follow(read, out)

    def _follow(self, read: list[tuple[Tensor, str]], out: Any) -> None:
        """What has as many elements as the weight it was computed from stands for it."""
        for result in _tensors(out):
            for tensor, name in read:
                if result.numel() == tensor.numel():
                    self._sources.setdefault(StorageWeakRef(result.untyped_storage()), name)

    def _source(self, tensor: Tensor) -> str | None:
        if tensor.layout != torch.strided:
            return None
        return self._sources.get(StorageWeakRef(tensor.untyped_storage()))

    @property
    def found(self) -> bool:
        """Whether anything was counted."""
        return bool(self._layers or self._other)

    def per_sample(self, samples: int) -> Flops:
        """What was counted, divided by the number of samples."""
        layers = {
            name: self._layers[name] / samples for name in self._names if name in self._layers
        }
        unseen = [name for name in self._names if name not in layers]
        unknown = self._failure
        if not unknown and unseen:
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            unknown = f"no countable operation read {unseen[0]}{more} in the first batch"
        elif not unknown and not self.found:
            unknown = "no countable operation was seen in the first batch"
        return Flops(layers, self._other / samples, unknown)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the module or to one inside it."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None
        for inner in module.modules()
    )


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
