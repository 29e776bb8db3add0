"""NeuralTangentTransfer: a sparse start that would train as the dense one, found without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sparsity.callbacks.scored import ScoredStart, with_found
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layer, Layers, Rule, Verb
from lightning_sparsity.core.method import Share
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import ForwardFunction, ModelView, Pass
from lightning_sparsity.distributions import uniform
from lightning_sparsity.ops.ranks import mean_over_ranks
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import magnitude
from lightning_sparsity.structures import Structure

_CHOSEN = "score"  # the slot that the rules of the start read: 1 where a weight is to live


class NeuralTangentTransfer(ScoredStart):
    r"""Neural tangent transfer (Liu and Zenke, 2020, arXiv:2006.08228). Experimental.

    A sparse student imitates the dense network as it was initialised, the teacher: its outputs
    :math:`f` and its tangent kernel :math:`\Theta(x, x') = \nabla_\theta f(x) \, \nabla_\theta
    f(x')^\top`, which says how it would move in training. Without labels,

    .. math::
        \overline{\| f_S - f_T \|^2} + \gamma^2 \, \overline{\| \Theta_S - \Theta_T \|^2}
        + \frac{\lambda}{d} \| m \odot w \|^2

    is minimised by Adam, with means over the entries, the kernel between the two halves of the
    samples of a step, and :math:`d` the density. Every ``mask_interval`` steps each layer
    keeps the student's weights of largest magnitude; in the last interval the mask stays. The
    student starts as the teacher, and training starts from the student: its masks, its weights
    and the biases of the same layers. (What the controls put where the student has no weights
    are the teacher's.) All other parameters are part of the kernel and stay as they are, and so
    do frozen ones, which are masked by magnitude.

    Constants are those of the authors' demonstration on MNIST, but for fewer steps (theirs are
    20 epochs). Their kernel of the student counts pruned weights too; here it is that of
    the sparse network, which trains no others.

    It is for small networks: the gradient of every output is computed for every sample, which
    takes the memory of two to three times ``samples * outputs * parameters`` numbers, and the
    work is quadratic in ``samples * outputs``. Modules are in eval mode, and outputs may not
    depend on other samples: batch normalisation needs running statistics. What
    ``torch.func.vmap`` cannot do, such as a forward pass that branches on values, is refused.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: every layer alike. ``global_by(magnitude)`` ranks all layers together.
        steps: Of the student's training, at least 1.
        lr: Adam's learning rate, above 0.
        kernel_weight: :math:`\gamma^2`, at least 0.
        penalty: :math:`\lambda`, at least 0.
        mask_interval: Steps from one mask to the next, at least 1.
        samples: At most so many of each batch are used, at least 2; an even number of them.
        transfer_weights: Whether training starts from the student's weights and biases; False:
            from the teacher's, with the student's masks.
        data: Where samples come from, again and again: batches or a loader; None: the
            Trainer's training data, in an order of its own.
        forward_fn: ``forward_fn(pl_module, batch)`` gives the outputs, ``(batch, ...)``; None:
            the model is called with the first part of the batch.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the order of the data and of the controls; default that of
            ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[NeuralTangentTransfer(density=0.1, steps=500)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        steps: int = 1000,
        lr: float = 5e-4,
        kernel_weight: float = 1e-3,
        penalty: float = 1e-4,
        mask_interval: int = 100,
        samples: int = 64,
        transfer_weights: bool = True,
        data: Iterable[Any] | None = None,
        forward_fn: ForwardFunction | None = None,
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("steps", steps)
        self._check_positive("lr", lr)
        self._check_number("kernel_weight", kernel_weight, 0)
        self._check_number("penalty", penalty, 0)
        self._check_count("mask_interval", mask_interval)
        self._check_count("samples", samples, least=2)
        self._check_flag("transfer_weights", transfer_weights)
        self._check_callable("forward_fn", forward_fn, "a function of the module and a batch")
        super().__init__(
            density,
            distribution=distribution,
            data=data,
            mode="eval",
            shuffle=shuffle,
            reinitialize=reinitialize,
            weight_init=weight_init,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        self.default_distribution = uniform
        self.steps = plain(steps)
        self.lr = plain(lr)
        self.kernel_weight = plain(kernel_weight)
        self.penalty = plain(penalty)
        self.mask_interval = plain(mask_interval)
        self.samples = plain(samples)
        self.transfer_weights = transfer_weights
        self.forward_fn = forward_fn

    # ------------------------------------------------------------------------- start

    def estimate(self, layers: Layers, share: Share, view: ModelView) -> Layers:
        """Train the student; the layers get its weights, and what lives of them in a slot."""
        if self.density is None and self.distribution is None:
            return layers  # what is there stays
        layers = with_found(layers)
        self._budget.check_found(layers, share)
        if self._budget.first(layers, share) == [layer.live for layer in layers]:
            return layers  # nothing to prune, and nothing to imitate
        with view.open(
            layers, mode="eval", dtype=self.dtype, seed=self.seed, on_parts=False
        ) as opened:
            student = self._train(opened, layers, share)
        chosen = [
            dataclasses.replace(old, slots={**old.slots, _CHOSEN: new.mask.to(old.weight)})
            for old, new in zip(layers, student, strict=True)
        ]
        if not self.transfer_weights:
            return chosen
        return [
            dataclasses.replace(
                layer,  # off the student's mask as it was, for the controls
                weight=torch.where(new.mask, new.weight.to(layer.weight), layer.weight),
                bias=None if layer.bias is None or new.bias is None else new.bias.to(layer.bias),
            )
            for layer, new in zip(chosen, student, strict=True)
        ]

    def begin(self, layers: Layers, share: Share) -> Layers:
        """Make the student's masks, if there is one."""
        if not all(_CHOSEN in layer.slots for layer in layers):
            return super().begin(layers, share)
        live = [dataclasses.replace(x, mask=x.slots[_CHOSEN] > 0).live for x in layers]
        return self._start(self.initial, layers, live)

    # ---------------------------------------------------------------------- transfer

    def _train(self, opened: Pass, layers: Layers, share: Share) -> Layers:
        """The student's layers, with its masks, in the precision of the pass."""
        _refuse_mixing(opened.module)
        teacher = {name: weight.detach() for name, weight in opened.weights.items()}
        moving = [name for name in _stepped(layers) if name in opened.trained]
        leaves = [teacher[name].clone().requires_grad_() for name in moving]
        student = {**teacher, **dict(zip(moving, leaves, strict=True))}
        layers = [dataclasses.replace(x, weight=student[x.name].detach()) for x in layers]
        now = self._refreshed(layers, share)
        if not leaves:  # all are frozen: the student is the teacher
            return [_ended(layer, student) for layer in now]
        adam = torch.optim.Adam(leaves, self.lr)
        batches = self._samples(opened)
        for step in opened.progress(range(self.steps), self._name):
            if step and step % self.mask_interval == 0 and step + self.mask_interval <= self.steps:
                _check_finite(leaves, step)
                now = self._refreshed(layers, share)
            batch = next(batches)
            masks = {layer.name: layer.mask for layer in now}
            found = torch.autograd.grad(
                self._loss(opened, student, teacher, masks, batch, checks=step == 0)
                + self._decay(student, masks),
                leaves,
                allow_unused=True,
            )
            for leaf, grad in zip(leaves, found, strict=True):
                leaf.grad = None if grad is None else mean_over_ranks(grad)
            adam.step()
        _check_finite(leaves, self.steps)
        opened.use(opened.weights)
        return [_ended(layer, student) for layer in now]

    def _refreshed(self, layers: Layers, share: Share) -> Layers:
        """The layers, with the weights of largest magnitude for masks."""
        return drop(magnitude)(layers, self._budget.first(layers, share), 0.0)

    def _decay(self, student: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        live = sum(int(mask.count_nonzero()) for mask in masks.values())
        density = live / sum(mask.numel() for mask in masks.values())
        squares = [(student[name] * mask).square().sum() for name, mask in masks.items()]
        return self.penalty / density * torch.stack(squares).sum()

    def _loss(
        self,
        opened: Pass,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        batch: Any,
        checks: bool,
    ) -> Tensor:
        """How far the student is from the teacher on a batch."""
        theirs = self._tangents(opened, teacher, {}, batch, checks)
        mine = self._tangents(opened, student, masks, batch)
        outputs, kernel = ((a - b).square().mean() for a, b in zip(mine, theirs, strict=True))
        return outputs + self.kernel_weight * kernel

    def _tangents(
        self,
        opened: Pass,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        batch: Any,
        checks: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Outputs, ``(samples, outputs)``, and the kernel between the halves of the samples."""
        opened.use({n: w * masks[n] if n in masks else w for n, w in weights.items()})
        forward = self._forward(opened, batch, masks)
        samples = _tensors(batch)
        inputs = [t if _varies(t, len(samples[0])) else None for t in samples]
        varying = [tensor for tensor in inputs if tensor is not None]
        trained = {name: weight for name, weight in weights.items() if name in opened.trained}
        each = vmap(jacrev(forward, has_aux=True), in_dims=(None, 0))
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions cannot be derived twice
            try:
                slopes, outputs = each(trained, varying)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                raise MisconfigurationException(
                    "the tangent kernel of this model cannot be computed: "
                    f"{str(error).strip().splitlines()[0]} Its forward pass must work sample by "
                    "sample under torch.func.vmap, in eval mode: without batch statistics, random "
                    "numbers, and branches on values."
                ) from error
            if checks:
                opened.use(weights)  # those of the call are gone
                self._check_samples(opened, batch, outputs)
        half = len(outputs) // 2
        rows = half * outputs.shape[1]
        parts = [slope.reshape(outputs.numel(), -1) for slope in slopes.values()]
        return outputs, torch.stack([part[:rows] @ part[rows:].T for part in parts]).sum(0)

    def _forward(
        self, opened: Pass, batch: Any, masks: Mapping[str, Tensor]
    ) -> Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]:
        """The outputs of one sample, twice, as a function of weights and of its tensors."""
        count = len(_tensors(batch)[0])

        def forward(
            weights: Mapping[str, Tensor], sample: Sequence[Tensor]
        ) -> tuple[Tensor, Tensor]:
            opened.use({n: w * masks[n] if n in masks else w for n, w in weights.items()})
            given = iter(sample)

            def one(tensor: Tensor) -> Tensor:
                return next(given).unsqueeze(0) if _varies(tensor, count) else tensor

            output = opened.output(apply_to_collection(batch, Tensor, one), self.forward_fn)
            flat = output.reshape(-1)
            return flat, flat

        return forward

    def _samples(self, opened: Pass) -> Iterator[Any]:
        """Batches without end, cut to an even number of samples."""
        while True:
            empty = True
            for batch in opened.stream(self.data):
                empty = False
                yield self._cut(batch)
            if empty:
                raise ValueError(f"{self._name}: the data is empty, or can be read only once.")

    def _cut(self, batch: Any) -> Any:
        tensors = _tensors(batch)
        count = len(tensors[0]) if tensors and tensors[0].ndim else 0
        few = min(count, self.samples) // 2 * 2
        if not few:
            raise MisconfigurationException(
                f"a batch has {count} samples, and the kernel is between two halves; give data= "
                "with batches of at least 2, whose first tensor has a sample in each row."
            )
        return apply_to_collection(batch, Tensor, lambda t: t[:few] if _varies(t, count) else t)

    @torch.no_grad()
    def _check_samples(self, opened: Pass, batch: Any, outputs: Tensor) -> None:
        """Raise if the outputs of a batch are not those of its samples."""
        whole = opened.output(batch, self.forward_fn)
        if whole.numel() == outputs.numel():
            slack = 1e-4 * float(outputs.abs().max())
            if torch.allclose(whole.reshape(outputs.shape), outputs, rtol=1e-3, atol=slack):
                return
        raise MisconfigurationException(
            f"the model gives {tuple(whole.shape)} for {len(outputs)} samples, which is not what "
            "it gives for each of them alone. The kernel needs outputs that depend on one sample "
            "each; give forward_fn=, a function of the module and a batch."
        )


def _stepped(layers: Layers) -> list[str]:
    """What the student trains: the weights of the layers, and their biases."""
    biases = [_bias_of(layer.name) for layer in layers if layer.bias is not None]
    return [layer.name for layer in layers] + biases


def _check_finite(leaves: Sequence[Tensor], step: int) -> None:
    if not all(bool(leaf.isfinite().all()) for leaf in leaves):
        raise MisconfigurationException(
            f"after {step} steps the student is no longer finite; lower lr= or kernel_weight=."
        )


def _ended(layer: Layer, student: Mapping[str, Tensor]) -> Layer:
    """A layer as the student has it."""
    bias = None if layer.bias is None else student.get(_bias_of(layer.name), layer.bias).detach()
    return dataclasses.replace(layer, weight=layer.weight * layer.mask, bias=bias)


def _bias_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.bias"


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _varies(tensor: Tensor, count: int) -> bool:
    """Whether a tensor of a batch has a row for each of so many samples."""
    return bool(tensor.ndim) and len(tensor) == count


def _refuse_mixing(module: nn.Module) -> None:
    for name, inner in module.named_modules():
        if isinstance(inner, _BatchNorm) and inner.running_mean is None:
            raise MisconfigurationException(
                f"{name} is a {type(inner).__name__} without running statistics: what it makes of "
                "a sample depends on the others, and there is no tangent kernel. Build it with "
                "track_running_stats=True, or use GroupNorm."
            )
