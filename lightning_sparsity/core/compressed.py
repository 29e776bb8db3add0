"""Compressed weights: a layer whose parameter holds the values of its live weights alone.

The parameter keeps its name and its identity and becomes a vector; its gradient and the
optimizer's state have the same shape. The layer multiplies by the compressed matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparsity.core.stand_in import Forward, StandIn
from lightning_sparsity.ops.compressed import DTYPES, Kernels, Pattern, product
from lightning_sparsity.ops.live import Formed, Live


class CompressedWeight(StandIn):
    """A weight whose parameter is a vector of its live values, in row-major order.

    Args:
        parameter: The weight, dense; zero off the mask.
        mask: Its live positions, bool; it may change, with :meth:`follow`.
        kernels: What multiplies; see :mod:`~lightning_sparsity.ops.compressed`.

    Attributes:
        shape: Of the dense weight.
        view: The weight as rules read it, always the same object.
        is_chained: Whether the output of a linear layer may be left as it comes, a view that is
            not contiguous.
        pattern: Where the values are in the weight as a matrix of outputs by inputs.
        reads: How often somebody but the layer itself read the dense weight.
    """

    loads = True

    def __init__(self, parameter: nn.Parameter, mask: Tensor, kernels: Kernels = "torch") -> None:
        super().__init__(parameter)
        self.shape = tuple(parameter.shape)
        self._stride = parameter.stride()
        self.pattern = Pattern(as_matrix(mask))
        self.reads = 0
        self.kernels = kernels
        self.is_chained = False
        self.view = Live(
            parameter.detach, lambda: self.pattern.positions, self.shape, parameter.detach()
        )
        self._records: _Records | None = None

    # ---------------------------------------------------------------------- conversions

    def compress(self, dense: Tensor) -> Tensor:
        """The live values of a tensor of the weight's shape, ``(nnz,)``."""
        return self.pattern.gather(dense)

    def expand(self, values: Tensor) -> Tensor:
        """The tensor of the weight's shape and memory format with these live values, ``(nnz,)``."""
        dense = self.pattern.scatter(values).view(self.shape)
        if dense.stride() == self._stride:
            return dense
        return dense.new_empty_strided(self.shape, self._stride).copy_(dense)

    def mask(self) -> Tensor:
        """The live positions, bool, shape of the weight."""
        device = self.parameter.device
        flat = torch.zeros(
            self.pattern.shape[0] * self.pattern.shape[1], dtype=torch.bool, device=device
        )
        return flat.index_fill_(0, self.pattern.positions, True).view(self.shape)

    def follow(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Take the pattern of another mask.

        Returns:
            Carries values ``(old nnz,)`` over to the new pattern: those that live on stay what
            they are, those that came alive get zero.
        """
        before, flat = self.pattern.positions, self.mask().view(-1)
        self.pattern = Pattern(as_matrix(mask))
        stays = mask.reshape(-1).index_select(0, before).nonzero().view(-1)
        returns = flat.index_select(0, self.pattern.positions).nonzero().view(-1)
        nnz = self.pattern.nnz

        def carried(values: Tensor) -> Tensor:
            return values.new_zeros(nnz).index_copy_(0, returns, values.index_select(0, stays))

        return carried

    # ------------------------------------------------------------------ what rules read

    def record(self, wanted: bool) -> None:
        """Begin to record what forms the dense gradient; or forget it.

        What was recorded since the last call with False is kept by a call with True.
        """
        if wanted and self._records is None and self.parameter.requires_grad:
            self._records = _Records(self.parameter)
        elif not wanted and self._records is not None:
            self._records.close()
            self._records = None

    def dense_gradient(self, finish: Callable[[Tensor], Tensor]) -> Formed | None:
        """The gradient of what was recorded, formed when it is read; None if nothing was.

        Args:
            finish: Applied to what was formed, such as a mean over processes.
        """
        if self._records is None or self.parameter.grad is None:
            return None
        parts = self._records.arrived()

        def form() -> Tensor:
            with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
                if not parts:  # a gradient of zeros that nobody has cleared
                    return finish(like.new_zeros(self.shape))
                total = parts[0]()
                for part in parts[1:]:
                    total += part()
                return finish(total.view(self.shape))

        like = self.parameter.detach()
        return Formed(form, self.shape, like)

    def remove(self) -> None:
        """Give every module its own class back, and let go of what was recorded."""
        self.record(False)
        super().remove()

    # ------------------------------------------------------------------- what layers do

    def forward_of(self, plain: type[nn.Module]) -> Forward | None:
        """Products with the compressed matrix in place of the layer's own."""
        return _FORWARDS.get(plain.forward)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias`` for inputs ``(batch, columns)``; see :mod:`ops.compressed`.

        Under autocast it computes in the dtype of the weight, and the result gets the dtype that
        a dense layer would give it: that of the autocast, but for float64.
        """
        device = inputs.device.type
        casts = torch.is_autocast_enabled(device) and torch.float64 not in (
            inputs.dtype,
            self.parameter.dtype,
        )
        with torch.autocast(device, enabled=False):
            out = product(inputs, self._leaf(), self.pattern, bias, self._recorder(), self.kernels)
        return out.to(torch.get_autocast_dtype(device)) if casts else out

    def _leaf(self) -> Tensor:
        """The values as autograd should take them.

        As long as a graph of another pattern is alive, in a loss that somebody keeps, torch holds
        the parameter to the length that it had then. A stand-in gathers its gradient meanwhile.
        """
        parameter = self.parameter
        if not (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter
        if _length_for_autograd(parameter) == len(parameter):
            return parameter
        others = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
        if parameter._backward_hooks or others > (self._records is not None):
            raise RuntimeError(
                "A compressed weight has changed its length while something, such as a loss kept "
                "without .detach(), still holds the graph of an earlier batch, and there is a "
                "gradient hook on the weight, which would not be called. Detach what is kept."
            )
        leaf = parameter.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._hand_over)
        return leaf

    def _hand_over(self, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        mine = self.parameter.grad
        self.parameter.grad = grad if mine is None or grad is None else mine + grad
        if self._records is not None:
            self._records.arrive()

    def _recorder(self) -> Callable[[Tensor, Tensor], None] | None:
        return None if self._records is None else self._keep

    def _keep(self, across: Tensor, slopes: Tensor) -> None:
        if self._records is not None:
            given, came_back = across.detach(), slopes.detach()
            self._records.add(lambda: came_back @ given.t())

    def seen(self, training: bool) -> Tensor:
        """The dense weight, which cannot be written to; its gradient arrives at the values."""
        self.reads += 1
        dense: Tensor = _Dense.apply(self._leaf(), self)  # type: ignore[no-untyped-call]
        return dense.as_subclass(ReadOnly)

    def evaluated(self) -> Tensor:
        """The dense weight, detached."""
        return self.expand(self.parameter.detach())

    def version(self) -> object:
        """Differs when the values do, or lie elsewhere."""
        return self.parameter._version, self.parameter.data_ptr()

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Take the live values of a dense weight."""
        self.parameter.copy_(self.compress(weight))


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight as outputs by everything else."""
    return tensor.reshape(tensor.shape[0], -1)


def reason_to_stay_dense(module: nn.Module, parameter: nn.Parameter) -> str | None:
    """Why a layer's weight cannot be compressed; None if it can."""
    kind: Any = getattr(module, "_plain_class", type(module))
    if _FORWARDS.get(kind.forward) is None or module._parameters.get("weight") is not parameter:
        return f"{kind.__name__} has no product with a compressed weight"
    if parameter.dtype not in DTYPES:
        return f"torch has no products of compressed {_name(parameter.dtype)} weights"
    if not parameter.requires_grad:
        return "frozen"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        own = next(k for k in (nn.Conv1d, nn.Conv2d) if issubclass(kind, k))._conv_forward
        if kind._conv_forward is not own or "_conv_forward" in vars(module):
            return f"{kind.__name__} has a convolution of its own"
        if module.groups != 1:
            return "its groups have a matrix each"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}"
    return None


def _length_for_autograd(parameter: nn.Parameter) -> int:
    """The length that a gradient of the parameter must have for torch to take it."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    metadata = getattr(node, "_input_metadata", None)
    return metadata[0].shape[0] if metadata else len(parameter)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Records:
    """What forms the dense gradient of a weight: as much as has arrived at its ``.grad``.

    A backward pass that never gets there (``autograd.grad``), or whose gradient was cleared,
    does not count.

    Args:
        parameter: The values.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._arrived: list[Callable[[], Tensor]] = []
        self._pending: list[tuple[int, Callable[[], Tensor]]] = []
        self._version: int | None = None
        self._handle = parameter.register_post_accumulate_grad_hook(self.arrive)

    def add(self, part: Callable[[], Tensor]) -> None:
        """Record a part in a backward pass, which may or may not arrive."""
        self._forget_cleared()
        task = torch._C._current_graph_task_id()
        mine = [(of, other) for of, other in self._pending if of == task]
        self._pending = [*mine, (task, part)]

    def arrive(self, parameter: Tensor | None = None) -> None:
        """The gradient of the backward pass at work has come to the parameter."""
        task = torch._C._current_graph_task_id()
        grad = self._parameter.grad
        self._arrived += [part for of, part in self._pending if of == task]
        self._pending = []
        self._version = None if grad is None else grad._version

    def arrived(self) -> list[Callable[[], Tensor]]:
        """The parts of the gradient that there is."""
        self._forget_cleared()
        return list(self._arrived)

    def _forget_cleared(self) -> None:
        grad = self._parameter.grad
        if grad is None or (grad._version != self._version and not grad.any()):
            self._arrived = []

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()


class _Dense(torch.autograd.Function):
    """The dense weight of compressed values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: CompressedWeight) -> Tensor:
        ctx.weight, ctx.pattern = weight, weight.pattern
        return weight.expand(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight: CompressedWeight = ctx.weight
        if weight.pattern is not ctx.pattern:
            raise RuntimeError(
                "A compressed weight was read before its last update of masks, and the graph of "
                "that reading goes backward after it. Go backward before the optimizer steps."
            )
        if weight._records is not None:
            dense = grad.detach()
            weight._records.add(dense.clone)
        return weight.compress(grad), None


class ReadOnly(Tensor):
    """A tensor that refuses to be written to, as nobody would see what is written."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute as with any tensor."""
        name = getattr(function, "__name__", "")
        given = [*args, *(kwargs or {}).values()]
        mine = [t for one in given for t in (one if isinstance(one, list | tuple) else [one])]
        first = args[0] if args else None
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        out = (kwargs or {}).get("out")
        if (writes and any(isinstance(t, cls) for t in mine)) or isinstance(out, cls):
            raise RuntimeError(
                f"{name}: this weight is kept compressed, and the dense tensor is a copy that is "
                "made for whoever reads it; what is written to it is lost. Write before training, "
                "or leave the layer out with SparseCompute(exclude=...)."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if not isinstance(first, cls):
            return result
        if isinstance(result, list | tuple) and type(result) in (list, tuple):
            return type(result)(_guarded(part, first) for part in result)
        return _guarded(result, first)


_WRITES = {"__setitem__", "__set__", "register_hook", "register_post_accumulate_grad_hook"}
"""What changes a tensor, or what would come to it, and does not end with an underscore."""


def _guarded(result: Any, first: ReadOnly) -> Any:
    """A result that refuses to be written to, if it shares memory with the weight."""
    if isinstance(result, Tensor) and _shares(result, first):
        return result.as_subclass(ReadOnly)
    return result


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one memory."""
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a layout without a storage
        return False


# ------------------------------------------------------------------------ forward passes


def _weight_of(layer: nn.Module) -> CompressedWeight | None:
    """The compressed weight of a layer; None while a functional call gives it another one."""
    found: CompressedWeight = vars(layer)["_stand_ins"]["weight"]
    return found if layer._parameters["weight"] is found.parameter else None


def _linear(layer: nn.Module, input: Tensor) -> Tensor:
    weight = _weight_of(layer)
    if weight is None:
        return nn.Linear.forward(layer, input)  # type: ignore[arg-type]
    rows = input.reshape(-1, input.shape[-1])
    out = weight.product(rows, layer._parameters["bias"])
    out = out if weight.is_chained else out.contiguous()
    return out.view(*input.shape[:-1], out.shape[-1])


def _convolution(layer: nn.Module, input: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    weight = _weight_of(layer)
    if weight is None:
        result: Tensor = layer._conv_forward(input, layer.weight, layer.bias)
        return result
    single = input.ndim == len(layer.kernel_size) + 1
    batch = input[None] if single else input
    columns, size = _unfold(layer, batch)  # (batch, columns, places)
    rows = columns.transpose(0, 1).reshape(columns.shape[1], -1).t()  # (batch * places, columns)
    out = weight.product(rows, layer._parameters["bias"])
    out = out.t().view(out.shape[1], len(batch), *size).transpose(0, 1)
    return out[0] if single else out.contiguous()


def _unfold(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What each output sees, ``(batch, columns, places)``, and the shape of the places."""
    padding = _padding(layer)
    if any(padding):
        inputs = F.pad(inputs, padding)
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    size = tuple(
        (length - span - 1) // step + 1
        for length, span, step in zip(inputs.shape[2:], spans, layer.stride, strict=True)
    )
    if not any(spans):  # 1x1
        for dim, step in enumerate(layer.stride, start=2):
            inputs = _every(step, inputs, dim)
        return inputs.flatten(2), size
    if isinstance(layer, nn.Conv1d):
        inputs = inputs.unsqueeze(2)
        kernel, dilation, stride = [
            (1, *x) for x in (layer.kernel_size, layer.dilation, layer.stride)
        ]
    else:
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    return F.unfold(inputs, kernel, dilation, 0, stride), size


def _every(step: int, tensor: Tensor, dim: int) -> Tensor:
    """Every so many entries of a dimension, from the first."""
    place: list[slice] = [slice(None)] * tensor.ndim
    place[dim] = slice(None, None, step)
    return tensor[tuple(place)]


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Zeros around the input, last dimension first, as ``F.pad`` takes them."""
    if layer.padding == "valid":
        return []
    if layer.padding == "same":  # an odd zero goes to the end
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]
    assert isinstance(layer.padding, tuple)
    return [n for side in reversed(layer.padding) for n in (side, side)]


_FORWARDS: dict[Any, Forward] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
}
