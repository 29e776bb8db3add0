"""Requested: the metrics that a monitor logs because the user asks for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_sparsity.core.storage import IGNORED_BY_DDP
from lightning_sparsity.metrics import GradientFlow, ParameterEfficiency, gradient_norms
from lightning_sparsity.ops.ranks import are_several, mean_over_ranks

_OWN = {
    *(f"{kind}/total" for kind in ("density", "churn", "itop", "collapse", "effective_density")),
    *(f"flops/{kind}" for kind in ("inference", "training", "inference_ratio", "training_ratio")),
}
"""Tags that the monitor has for numbers of its own."""


class Requested:
    """Metrics of one ``fit``: of gradients, of accuracy, and all others of masks.

    Args:
        metrics: By the tag under which they are logged.
        model: The model being fitted.
    """

    def __init__(self, metrics: Mapping[str, Metric], model: pl.LightningModule) -> None:
        # copies: the user's may be at work elsewhere
        self._all = mine = {tag: copy.deepcopy(metric) for tag, metric in metrics.items()}
        self._flows = {k: m for k, m in mine.items() if isinstance(m, GradientFlow)}
        self._efficiencies = {k: m for k, m in mine.items() if isinstance(m, ParameterEfficiency)}
        others = self._flows.keys() | self._efficiencies.keys()
        self._of_masks: dict[str, Any] = {k: m for k, m in mine.items() if k not in others}
        self._model = model
        self._norms: dict[str, dict[str, Tensor]] = {}

    def begin(self, state: Mapping[str, Any]) -> None:
        """Have metrics forget other trainings, and see the masks of the start.

        Args:
            state: What they remember of this training, if it goes on; else empty.
        """
        for metric in self._all.values():
            metric.reset()
        for key, metric in self._of_masks.items():
            if hasattr(metric, "recall"):
                metric.recall(state.get(key, {}))
            if key not in state:
                _number(key, metric(self._model))

    def see_gradients(self, optimizer: Optimizer) -> None:
        """Measure the gradients with which an optimizer is about to step."""
        if not self._flows:
            return
        mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with _averaged(self._model):
            for key, flow in self._flows.items():
                norms = gradient_norms(self._model, live=flow.live, among=mine)
                self._norms.setdefault(key, {}).update(norms)

    def forget_gradients(self) -> None:
        """What was measured belongs to a batch that is over."""
        self._norms = {}

    def measure(self, accuracy: float | None, per_layer: bool) -> dict[str, float]:
        """The values, by tag; to be called when they are logged, on all processes.

        Args:
            accuracy: Of the model, in [0, 1], if it is known.
            per_layer: Whether to give the gradient norm of each weight as well.
        """
        found = {key: _number(key, metric(self._model)) for key, metric in self._of_masks.items()}
        for key, metric in self._efficiencies.items():
            value = metric.at(0.0 if accuracy is None else accuracy, self._model)
            found |= {} if accuracy is None else {key: float(value)}
        for key, norms in self._norms.items():
            found[key] = float(self._flows[key](norms))
            if per_layer:
                found |= {f"{key}/{name}": float(norm) for name, norm in norms.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What metrics of masks remember, at one bit per weight."""
        return {
            key: metric.past() if hasattr(metric, "past") else {}
            for key, metric in self._of_masks.items()
        }


def check_metrics(metrics: Mapping[str, Metric] | None, accuracy: str | None) -> None:
    """Refuse what ``DensityMonitor`` cannot log.

    Raises:
        TypeError: If an argument is of the wrong type, or a metric is updated with others than
            a model.
        ValueError: If a tag is one of the monitor's own, an efficiency has no accuracy, or an
            accuracy no efficiency.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            f'DensityMonitor(metrics={metrics!r}): must be metrics by tag, such as {{"csr": '
            'CompressionRatio("csr")}, or None.'
        )
    for tag, metric in (metrics or {}).items():
        named = f"DensityMonitor(metrics={{{tag!r}: {metric!r}}})"
        if not isinstance(tag, str) or not isinstance(metric, Metric):
            raise TypeError(f"{named}: must be a name and a torchmetrics.Metric.")
        if tag in _OWN:
            raise ValueError(f"{named}: the monitor logs {tag} itself; take another tag.")
        if not isinstance(metric, ParameterEfficiency) and not _takes_a_model(metric):
            raise TypeError(
                f"{named}: its update needs other arguments than a model; log it in the model."
            )
    if accuracy is not None and not isinstance(accuracy, str):
        raise TypeError(
            f"DensityMonitor(accuracy={accuracy!r}): must be the name of a logged value, or None."
        )
    efficient = any(isinstance(metric, ParameterEfficiency) for metric in (metrics or {}).values())
    if efficient != (accuracy is not None):
        raise ValueError(
            f"DensityMonitor(accuracy={accuracy!r}): must be the name under which the model logs "
            "its accuracy if metrics= has a ParameterEfficiency, and None if not."
        )


def _number(tag: str, value: Any) -> float:
    """The value of a metric.

    Raises:
        TypeError: If it is not a single number.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(
        f"DensityMonitor(metrics={{{tag!r}: ...}}): its value is a {type(value).__name__}, and "
        "must be a single number; log it in the model."
    )


def _takes_a_model(metric: Metric) -> bool:
    try:
        inspect.signature(metric.update).bind(None)
    except TypeError:
        return False
    return True


@contextmanager
def _averaged(model: pl.LightningModule) -> Iterator[None]:
    """Gradients that ``DistributedDataParallel`` leaves to the keeper, as they are going to be."""
    ignored = set(getattr(model, IGNORED_BY_DDP, ())) if are_several() else set()
    own = [(p, p.grad) for name, p in model.named_parameters() if name in ignored]
    try:
        for parameter, grad in own:
            parameter.grad = mean_over_ranks(torch.zeros_like(parameter) if grad is None else grad)
        yield
    finally:
        for parameter, grad in own:
            parameter.grad = grad
