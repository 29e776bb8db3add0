"""ModelView: the model and its data for scores that need a pass, without a trace in training."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sparsity.core.filters import plain_name
from lightning_sparsity.core.fresh_loader import beside, fresh_loader
from lightning_sparsity.core.isolation import isolated
from lightning_sparsity.core.layer import Layer, Layers
from lightning_sparsity.core.lazy_weights import gathered_again, make_lazy
from lightning_sparsity.core.shards import is_sharded, local, whole
from lightning_sparsity.ops.ranks import gather_from_ranks, mean_over_ranks, sum_over_ranks
from lightning_sparsity.ops.sharded import Sharded

LossFunction = Callable[[pl.LightningModule, Any], Tensor]
"""Gets the LightningModule and a batch, and returns the loss, a scalar."""

ForwardFunction = Callable[[pl.LightningModule, Any], Tensor]
"""Gets the LightningModule and a batch, and returns the output of the network."""

_T = TypeVar("_T")
_PATIENCE = 3.0  # seconds until there is a progress bar


class ModelView:
    """The model as a method may use it before the first step.

    Args:
        trainer: The Trainer.
        module: The LightningModule, not wrapped.
        layers: Layers that stand for weights of the module.
        seed: Of the run, the same on every rank.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        layers: Iterable[Layer] = (),
        *,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self._trainer = trainer
        self._module = module
        self._layers = tuple(layers)

    def of(self, layers: Iterable[Layer]) -> ModelView:
        """The model with these layers in it."""
        return ModelView(self._trainer, self._module, layers, seed=self.seed)

    @contextmanager
    def open(
        self,
        layers: Layers,
        *,
        mode: Literal["train", "eval"] = "train",
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        on_parts: bool = True,
    ) -> Iterator[Pass]:
        """Work on copies of all parameters and buffers; nothing that happens inside stays.

        What is put back or never touched: parameters, gradients, buffers, the training mode of
        every module, tensors, lists, dicts and numbers that modules and the data module have as
        attributes (the states of metrics, say), and the random numbers of torch, NumPy and
        Python (see :func:`~lightning_sparsity.core.isolation.isolated`). Logging is silent,
        autocasting off, ``dtype`` the default, and a compiled module runs eagerly.

        Args:
            layers: Put their weights, times their masks, into the copy, those of all others
                as the methods before left them.
            mode: "train" or "eval", for all modules.
            dtype: Of the copies and of what is floating point in batches.
            seed: Of random numbers drawn inside; None: that of the run.
            on_parts: Whether copies of sharded weights are sharded too, and whole weights there
                only while a layer computes with them. :meth:`Pass.gradients` and
                :meth:`Pass.hessian_times` work so; without it everything does, and there must be
                room for a copy of the model.

        Yields:
            The copy of the model.
        """
        seed = self.seed if seed is None else seed
        trained = {plain_name(n) for n, p in self._module.named_parameters() if p.requires_grad}
        device = next((p.device.type for p in self._module.parameters()), "cpu")
        data = [self._trainer.train_dataloader, self._trainer.datamodule]  # type: ignore[attr-defined]
        with ExitStack() as stack:
            stack.enter_context(isolated(self._module, data, dtype=dtype, seed=seed))
            stack.enter_context(_silent(self._trainer, self._module))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device, enabled=False))
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            for module in self._module.modules():
                module.training = mode == "train"
            opened = Pass(self._trainer, self._module, dtype, seed, trained, on_parts)
            if opened.is_parted:
                stack.enter_context(gathered_again())
            opened.put(self._layers)
            opened.put(layers)
            yield opened


class Pass:
    """A copy of the model, open for scoring.

    Attributes:
        module: The LightningModule, with copies in the place of its parameters.
        weights: The copy of every parameter, by plain name.
        masks: Of the weights that are sparse, by plain name.
        trained: Names of the parameters that training changes; the others are frozen.
        is_parted: Whether processes have parts of the copies and compute each batch together.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        dtype: torch.dtype,
        seed: int,
        trained: Collection[str],
        on_parts: bool = True,
    ) -> None:
        self.module = module
        self.weights: dict[str, Tensor] = {
            plain_name(name): p for name, p in module.named_parameters()
        }
        self.masks: dict[str, Tensor] = {}
        self.trained = frozenset(trained)
        self._trainer = trainer
        self._dtype = dtype
        self._seed = seed
        names = {id(p): name for name, p in self.weights.items()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self.weights}
        for inner in module.modules():
            for key, p in inner._parameters.items():
                if p is not None:  # a tied one has several places
                    self._places[names[id(p)]].append((inner, key))
        self.is_parted = any(map(is_sharded, self.weights.values()))
        if self.is_parted:
            self._spread_out(on_parts)

    def _spread_out(self, on_parts: bool) -> None:
        """Put parts, or whole tensors, in the place of copies that are cut over processes."""
        made = make_lazy(list(self.module.modules()))
        for name, copied in self.weights.items():
            if is_sharded(copied):
                self.weights[name] = made[id(copied)]
        if not on_parts:
            self.is_parted = False
            for module in self.module.modules():
                vars(module)["_parameters"] = dict(vars(module)["_parameters"])
            for name, parts in self.weights.items():
                if isinstance(parts, Sharded):
                    self.weights[name] = nn.Parameter(parts.formed(), parts.part.requires_grad)
            self.use(self.weights)

    @torch.no_grad()
    def put(self, layers: Layers) -> None:
        """Give the copy the weights of ``layers``, zero off their masks."""
        for layer in layers:
            copied, weight = self.weights[layer.name], layer.weight * layer.mask
            if isinstance(copied, Sharded):
                part = weight.part if isinstance(weight, Sharded) else copied.cut.part_of(weight)
                copied.part.copy_(part)
                self.masks[layer.name] = layer.mask
            else:
                copied.copy_(whole(weight))
                self.masks[layer.name] = whole(layer.mask)

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute with these tensors in the place of parameters; they may have a graph.

        Args:
            tensors: By plain name; ``weights`` brings the copies back.
        """
        for name, tensor in tensors.items():
            for module, key in self._places[name]:
                vars(module)["_parameters"][key] = tensor

    def batches(self, count: int, data: Iterable[Any] | None = None) -> list[Any]:
        """The first batches of a fresh iterator, moved to the device.

        Args:
            count: How many; fewer if there are no more.
            data: Where they come from; None: what the Trainer trains on, in an order of its
                own, each rank its own part.

        Raises:
            MisconfigurationException: If the Trainer's loader cannot be iterated without
                disturbing training.
            ValueError: If there is no batch.
        """
        first = islice(self.stream(data), count)
        found = list(self.progress(first, "data for scoring", count))
        if not found:
            raise ValueError("the data for scoring is empty: there is no batch.")
        return found

    def stream(self, data: Iterable[Any] | None = None) -> Iterator[Any]:
        """As :meth:`batches`, one at a time, for as long as there are any.

        Args:
            data: Where they come from; None: what the Trainer trains on.

        Raises:
            MisconfigurationException: If the Trainer's loader cannot be iterated without
                disturbing training.
        """
        source = fresh_loader(self._trainer, self._seed) if data is None else beside(data)
        return map(self._moved, iter(source))

    def progress(self, items: Iterable[_T], what: str, count: int | None = None) -> Iterable[_T]:
        """The items, with a progress bar if they take long and the Trainer shows any.

        Args:
            items: What is gone through.
            what: A word on it.
            count: How many there are; None: as many as ``len`` says.
        """
        bar = self._trainer.progress_bar_callback
        shown = (
            self._trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True)
        )
        options = {"total": count, "leave": False, "delay": _PATIENCE, "file": sys.stdout}
        return Tqdm(items, desc=what, **options) if shown else items

    def output(self, batch: Any, forward_fn: ForwardFunction | None = None) -> Tensor:
        """What the network makes of one batch, such as logits.

        Args:
            batch: From :meth:`batches`.
            forward_fn: How it is computed; None: the model is called with the first part of
                the batch.

        Raises:
            MisconfigurationException: If there is no ``forward_fn`` and the model has no
                ``forward`` or the batch no first part, or the output is no tensor.
        """
        if forward_fn is not None:
            made = forward_fn(self.module, batch)
        elif type(self.module).forward is pl.LightningModule.forward:
            raise MisconfigurationException(
                f"{type(self.module).__name__} has no forward method; give forward_fn=, a function "
                "of the module and a batch that returns the output of the network."
            )
        elif isinstance(batch, Tensor | tuple | list):
            made = self.module(batch if isinstance(batch, Tensor) else batch[0])
        else:
            raise MisconfigurationException(
                f"the batch is a {type(batch).__name__}, and nothing says what of it the model "
                "wants; give forward_fn=, a function of the module and a batch."
            )
        if not isinstance(made, Tensor):
            raise MisconfigurationException(
                f"the output of the model is a {type(made).__name__}; give forward_fn=, a function "
                "of the module and a batch that returns a tensor."
            )
        return made

    def loss(self, batch: Any, loss_fn: LossFunction | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            batch: From :meth:`batches`.
            loss_fn: How it is computed; None: the model's ``training_step``.

        Raises:
            MisconfigurationException: If there is no ``loss_fn`` and the model's
                ``training_step`` cannot be asked, or returns no loss.
        """
        if loss_fn is not None:
            return loss_fn(self.module, batch)
        step = self.module.training_step
        wanted = list(inspect.signature(step).parameters)
        if not self.module.automatic_optimization or wanted[:1] == ["dataloader_iter"]:
            raise MisconfigurationException(
                "the training_step of this model steps its optimizers, or fetches its own data, "
                "and cannot be asked for a loss alone; give loss_fn=, a function of the module and "
                "a batch."
            )
        found = step(batch, 0) if len(wanted) > 1 else step(batch)
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"training_step returned {type(loss).__name__}, not a loss; give loss_fn=, a "
                "function of the module and a batch."
            )
        return loss

    def gradients(
        self,
        names: Sequence[str],
        batches: Sequence[Any],
        loss_fn: LossFunction | None = None,
    ) -> dict[str, Tensor]:
        """Mean gradient of the loss over batches and ranks, dense, by parameter name.

        That of a sharded weight is sharded too.
        """
        self._check_count(batches)
        total = {name: torch.zeros_like(local(self.weights[name])) for name in names}
        for batch in self.progress(batches, "scoring"):
            found = torch.autograd.grad(
                self._part_of_loss(batch, loss_fn), self._leaves(names), allow_unused=True
            )
            for name, grad in zip(names, found, strict=True):
                if grad is not None:
                    total[name] += grad.detach() / len(batches)
        return {name: self._over_ranks(name, grad) for name, grad in total.items()}

    def _leaves(self, names: Iterable[str]) -> list[Tensor]:
        return [local(self.weights[name]) for name in names]

    def _part_of_loss(self, batch: Any, loss_fn: LossFunction | None) -> Tensor:
        """The loss of a batch; where weights are parts, what it adds to the mean over ranks."""
        loss = self.loss(batch, loss_fn)
        return loss / self._trainer.world_size if self.is_parted else loss

    def _over_ranks(self, name: str, found: Tensor) -> Tensor:
        """What all ranks have found together, from what :meth:`_part_of_loss` gave on each."""
        copied = self.weights[name]
        if isinstance(copied, Sharded):  # summed on its way to the parts
            return copied.of(found)
        return sum_over_ranks(found) if self.is_parted else mean_over_ranks(found)

    def _check_count(self, batches: Sequence[Any]) -> None:
        """Raise unless all ranks have as many batches, where they work together on each."""
        counts = [count for found in gather_from_ranks(lambda: [len(batches)]) for count in found]
        if self.is_parted and len(set(counts)) > 1:
            raise MisconfigurationException(
                f"there are {', '.join(map(str, counts))} batches for scoring on the processes, "
                "which need as many each: every batch is computed by all of them together."
            )

    def hessian_times(
        self,
        vectors: Mapping[str, Tensor],
        batches: Sequence[Any],
        loss_fn: LossFunction | None = None,
    ) -> dict[str, Tensor]:
        """The Hessian of the mean loss over batches and ranks, times a vector.

        Args:
            vectors: The parts of the vector, by parameter name; what is not named is held
                fixed.
            batches: From :meth:`batches`; one graph at a time is in memory.
            loss_fn: As for :meth:`loss`.
        """
        self._check_count(batches)
        weights = self._leaves(vectors)
        along_here = [local(vector) for vector in vectors.values()]
        total = {name: torch.zeros_like(local(vector)) for name, vector in vectors.items()}
        for batch in self.progress(batches, "scoring"):
            with sdpa_kernel(SDPBackend.MATH):  # the fused attentions cannot be derived twice
                grads = torch.autograd.grad(
                    self._part_of_loss(batch, loss_fn),
                    weights,
                    create_graph=True,
                    allow_unused=True,
                )
            pairs = zip(grads, along_here, strict=True)
            along = torch.stack([(grad * v).sum() for grad, v in pairs if grad is not None]).sum()
            if not along.requires_grad:  # the loss is linear in the weights
                continue
            products = torch.autograd.grad(along, weights, allow_unused=True)
            for name, product in zip(vectors, products, strict=True):
                if product is not None:
                    total[name] += product / len(batches)
        return {name: self._over_ranks(name, product) for name, product in total.items()}

    def sensitivities(
        self,
        names: Sequence[str],
        batches: Sequence[Any],
        loss_fn: LossFunction | None = None,
    ) -> dict[str, Tensor]:
        r"""How the loss changes with a factor on each entry, :math:`w \, \partial L / \partial w`.

        By parameter name, signed; the gradient is that of :meth:`gradients`.
        """
        grads = self.gradients(names, batches, loss_fn)
        return {name: self.weights[name].detach() * grad for name, grad in grads.items()}

    def _moved(self, batch: Any) -> Any:
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        return apply_to_collection(batch, Tensor, cast)


@contextmanager
def _silent(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Nothing that the model logs arrives anywhere. Its attributes are put back by others."""
    vars(module).update(log=_log_nothing, log_dict=_log_nothing)
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for the logging of a model that is only being scored."""
