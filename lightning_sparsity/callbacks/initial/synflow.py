"""SynFlow: prune without data, so that no layer is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.shards import local
from lightning_sparsity.core.view import ForwardFunction, Pass
from lightning_sparsity.structures import Structure


class SynFlow(ScoredStart):
    r"""Iterative synaptic flow pruning (Tanaka et al., 2020, arXiv:2006.05467).

    With every parameter and buffer replaced by its absolute value and an input of ones,
    :math:`R` is the sum of the output, and the score of a weight is
    :math:`|w \, \partial R / \partial w|` (Sec. 6, Alg. 1). The largest over all layers stay.
    This is done n times on what is left, for the densities :math:`d^{k/n}`, k = 1 ... n:
    then no layer dies as long as there is a weight for each; in one round it may.

    Of the data only the shape of one sample is used: floating-point inputs become ones, and
    where the input is integers, such as tokens, every ``nn.Embedding`` gives ones. Deep
    networks leave the range of float32, so it is computed in float64. As in the authors'
    program biases count in the pass; the equal sums of scores over layers, from which the
    paper's theorem follows, hold without them only: ``zero_bias``. The theory is for
    activations such as ReLU, and for batch normalisation or none: the layer normalisation
    of ones is zero.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together, and each keeps at least
            one unit (``global_by(slot("score"), min_per_layer=0)`` is without this).
        rounds: n, at least 1.
        zero_bias: Compute the scores without biases and running means.
        double: Compute in float64; False: in float32, for devices that have no float64 and
            models that cast to float32.
        data: Where the shape of the input is taken from: batches or a loader; None: the
            Trainer's training data.
        forward_fn: ``forward_fn(pl_module, batch)`` gives the output for a batch of one
            sample of ones; None: the model is called with the first part of the batch.
        mode: "eval" (the authors') or "train": of all modules while scoring.
        shuffle: A control: the places of each layer's live weights are drawn at random.
        reinitialize: Another control: the values of each layer are dealt out anew.
        weight_init: A rule for the start values of the live weights, applied last, such as
            ``approximate_isometry()``; None keeps them.
        include: Which parameters are sparse: names, patterns, module types, callables.
        exclude: Which of those are left dense.
        structure: What one unit is, such as ``Rows()``; default single weights.
        seed: Of the controls; default that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.

    Example::

        Trainer(callbacks=[SynFlow(density=0.02)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        rounds: int = 100,
        zero_bias: bool = False,
        double: bool = True,
        data: Iterable[Any] | None = None,
        forward_fn: ForwardFunction | None = None,
        mode: Literal["train", "eval"] = "eval",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_count("rounds", rounds)
        self._check_callable("forward_fn", forward_fn, "a function of the module and a batch")
        self._check_flag("zero_bias", zero_bias)
        self._check_flag("double", double)
        super().__init__(
            density,
            distribution=distribution,
            data=data,
            mode=mode,
            shuffle=shuffle,
            reinitialize=reinitialize,
            weight_init=weight_init,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        self.zero_bias = zero_bias
        self.dtype = torch.float64 if double else torch.float32
        self.forward_fn = forward_fn
        self._rounds = plain(rounds)

    def rounds(self, density: float) -> list[float]:
        """The densities :math:`d^{k/n}`."""
        return [density ** (k / self._rounds) for k in range(1, self._rounds + 1)]

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """What every weight contributes to the sum of the output."""
        self._make_positive(opened)
        ones = self._ones(opened.module, batches[0])
        with _ones_embedded(opened.module):
            grads = opened.gradients(
                [layer.name for layer in layers],
                [ones],
                lambda _, batch: opened.output(batch, self.forward_fn).sum(),
            )
        return {name: (opened.weights[name].detach() * grad).abs() for name, grad in grads.items()}

    @torch.no_grad()
    def _make_positive(self, opened: Pass) -> None:
        for name, tensor in [*opened.weights.items(), *opened.module.named_buffers()]:
            last = name.rpartition(".")[2]
            if tensor.is_floating_point():
                local(tensor).abs_()
                if self.zero_bias and ("bias" in last or last == "running_mean"):
                    local(tensor).zero_()

    def _ones(self, module: nn.Module, batch: Any) -> Any:
        """The batch with one sample, of ones where it is floating point."""
        first = batch[0] if isinstance(batch, tuple | list) else batch
        integers = isinstance(first, Tensor) and not first.is_floating_point()
        embeds = any(isinstance(inner, nn.Embedding) for inner in module.modules())
        if integers and not embeds and self.forward_fn is None:
            raise MisconfigurationException(
                f"the input is {first.dtype}, which ones do not replace, and the model has no "
                "nn.Embedding whose output could be ones; give forward_fn=, a function of the "
                "module and a batch that calls the module with floating-point ones."
            )

        def one(tensor: Tensor) -> Tensor:
            sample = tensor[:1] if tensor.ndim else tensor
            return torch.ones_like(sample) if sample.is_floating_point() else sample

        return apply_to_collection(batch, Tensor, one)


@contextmanager
def _ones_embedded(module: nn.Module) -> Iterator[None]:
    """Every embedding gives ones, whatever it is asked for."""

    def ones(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return torch.ones_like(output)

    found = [inner for inner in module.modules() if isinstance(inner, nn.Embedding)]
    hooks = [inner.register_forward_hook(ones) for inner in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
