"""GraSP: prune so that the gradient keeps flowing, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from lightning_sparsity.callbacks.scored import ScoredStart
from lightning_sparsity.core.filters import Selection, linear_and_conv
from lightning_sparsity.core.layer import Distribution, Layers, Rule, Verb
from lightning_sparsity.core.numbers import plain
from lightning_sparsity.core.view import ForwardFunction, LossFunction, Pass
from lightning_sparsity.structures import Structure

_SEARCHED = 1000
"""At most so many batches are searched for samples of every class."""


class GraSP(ScoredStart):
    r"""Gradient signal preservation (Wang et al., 2020, arXiv:2002.07376).

    To first order, removing a weight changes the squared norm of the gradient :math:`g` by
    :math:`-2 w \, (H g)`, with the Hessian :math:`H` (Sec. 4; the paper's score is
    :math:`-w \, (H g)`, and the largest go). Here a weight's score is :math:`w \, (H g)`,
    with its sign, and the largest over all layers stay. Gradient and Hessian are those of
    the cross entropy of the logits over a temperature.

    As in the authors' program some samples of every class are gathered, sorted by class and
    cut in two halves, so that the halves hold different classes: :math:`g` is that of both,
    :math:`H g` is summed over them. Theirs redraws the linear layers of the copy that it
    scores, so that their mask fits other weights than those trained, keeps one weight more
    than asked for, and never ends where a class is missing. Here at most 1000 batches are
    searched, and a class may have fewer samples.

    Args:
        density: Live share of all sparse weights, in (0, 1].
        distribution: How ``density`` is split over layers, or densities by name pattern;
            default: the scores of all layers are ranked together, and each keeps at least
            one unit.
        temperature: Of the logits, above 0; not used with ``loss_fn``.
        samples_per_class: How many samples of every class are gathered, at least 1, on each
            rank. None: the first batches, as they come, in the place of the halves.
        batches: How many batches are looked at if ``samples_per_class`` is None.
        data: Where they come from: batches or a loader; None: the Trainer's training data.
        forward_fn: ``forward_fn(pl_module, batch)`` gives the logits, ``(batch, classes)``;
            None: the model is called with the first part of the batch.
        target_fn: ``target_fn(batch)`` gives the numbers of the classes; None: the second
            part of the batch.
        loss_fn: ``loss_fn(pl_module, batch)`` gives another loss in the place of the cross
            entropy; needs ``samples_per_class=None``.
        mode: "train" (the authors') or "eval": of all modules while scoring.
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

        Trainer(callbacks=[GraSP(density=0.05)])
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        distribution: Mapping[str, float] | Distribution | None = None,
        temperature: float = 200.0,
        samples_per_class: int | None = 10,
        batches: int = 2,
        data: Iterable[Any] | None = None,
        forward_fn: ForwardFunction | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        loss_fn: LossFunction | None = None,
        mode: Literal["train", "eval"] = "train",
        shuffle: bool = False,
        reinitialize: bool = False,
        weight_init: Rule | Verb | None = None,
        include: Selection = linear_and_conv,
        exclude: Selection = (),
        structure: Structure | None = None,
        seed: int | None = None,
    ) -> None:
        self._check_positive("temperature", temperature)
        if samples_per_class is not None:
            self._check_count("samples_per_class", samples_per_class)
        self._check_callable("forward_fn", forward_fn, "a function of the module and a batch")
        self._check_callable("target_fn", target_fn, "a function of a batch")
        self._check_callable("loss_fn", loss_fn, "a function of the module and a batch")
        if loss_fn is not None and samples_per_class is not None:
            raise ValueError(
                f"GraSP(loss_fn={loss_fn!r}, samples_per_class={samples_per_class}): a loss says "
                "nothing of classes; pass samples_per_class=None, and batches=."
            )
        if loss_fn is not None and (forward_fn or target_fn):
            raise ValueError(
                f"GraSP(loss_fn={loss_fn!r}): forward_fn and target_fn are for the cross entropy "
                "that it takes the place of; leave them out."
            )
        super().__init__(
            density,
            distribution=distribution,
            batches=batches,
            data=data,
            loss_fn=loss_fn,
            mode=mode,
            shuffle=shuffle,
            reinitialize=reinitialize,
            weight_init=weight_init,
            include=include,
            exclude=exclude,
            structure=structure,
            seed=seed,
        )
        self.temperature = plain(temperature)
        self.samples_per_class = plain(samples_per_class)
        self.forward_fn = forward_fn
        self.target_fn = target_fn

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """What the squared gradient norm would lose with every weight."""

        def loss(_: Any, batch: Any) -> Tensor:
            if self.loss_fn is not None:
                return opened.loss(batch, self.loss_fn)
            logits = opened.output(batch, self.forward_fn)
            return cross_entropy(logits / self.temperature, self._targets(batch))

        gradient = opened.gradients([layer.name for layer in layers], batches, loss)
        products = opened.hessian_times(gradient, batches, loss)
        return {name: opened.weights[name].detach() * product for name, product in products.items()}

    def look(self, opened: Pass) -> Sequence[Any]:
        """Samples of every class, sorted by class, in two halves."""
        if self.samples_per_class is None:
            return super().look(opened)
        samples = sorted(self._gather(opened), key=lambda sample: sample[0])
        half = len(samples) // 2
        halves = [[s for _, s in part] for part in (samples[:half], samples[half:]) if part]
        try:
            return [default_collate(part) for part in halves]
        except RuntimeError as error:
            raise MisconfigurationException(
                f"samples of several batches do not fit together ({error}); pass "
                "samples_per_class=None, and batches=."
            ) from None

    def _gather(self, opened: Pass) -> list[tuple[int, Any]]:
        """Classes and samples, until there are enough of every class."""
        assert self.samples_per_class is not None
        missing: dict[int, int] = {}
        found: list[tuple[int, Any]] = []
        for batch in islice(opened.stream(self.data), _SEARCHED):
            targets = self._targets(batch)
            if not missing:
                classes = self._classes(opened, batch, targets)
                missing = dict.fromkeys(classes, self.samples_per_class)
            for place, target in enumerate(targets.tolist()):
                if missing.get(target):
                    missing[target] -= 1
                    found.append((target, _sample(batch, place)))
            if not any(missing.values()):
                break
        if not found:
            raise MisconfigurationException("the data for scoring has no sample of any class.")
        if short := sum(n > 0 for n in missing.values()):
            rank_zero_info(
                f"GraSP: {short} of {len(missing)} classes have fewer than "
                f"{self.samples_per_class} samples in the data; it uses what there is."
            )
        return found

    def _classes(self, opened: Pass, batch: Any, targets: Tensor) -> range:
        with torch.no_grad():
            shape = tuple(opened.output(batch, self.forward_fn).shape)
        if targets.ndim != 1 or targets.is_floating_point() or len(shape) != 2:
            raise MisconfigurationException(
                f"the output has shape {shape} and the targets {tuple(targets.shape)}, "
                f"{targets.dtype}; samples of every class need (batch, classes) and class numbers "
                "(batch,). Give forward_fn= and target_fn=, or samples_per_class=None."
            )
        return range(shape[1])

    def _targets(self, batch: Any) -> Tensor:
        if self.target_fn is not None:
            found = self.target_fn(batch)
            if not isinstance(found, Tensor):
                raise MisconfigurationException(
                    f"target_fn gave {type(found).__name__}; it must give the class numbers of the "
                    "batch, a tensor."
                )
            return found
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise MisconfigurationException(
                f"the batch is a {type(batch).__name__}, and nothing says where its classes are; "
                "give target_fn=, a function of a batch."
            )
        targets: Tensor = batch[1]
        return targets


def _sample(batch: Any, place: int) -> Any:
    """One sample of a batch, its tensors without the batch dimension."""
    return apply_to_collection(batch, Tensor, lambda part: part[place] if part.ndim else part)
