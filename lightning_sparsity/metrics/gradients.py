"""Metrics of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.shards import is_sharded, local, over_parts
from lightning_sparsity.metrics.base import MaskMetric
from lightning_sparsity.metrics.sources import trainer_of, weights_of


class GradientFlow(MaskMetric):
    r"""Norm of the gradient, :math:`\lVert g \rVert_2`, of the live or of all sparse weights.

    Update it where gradients are, in ``on_before_optimizer_step``. In that hook of a
    ``LightningModule`` they are masked already under a sparsity callback, so that ``live=False``
    shows more only where nothing masks them; ``DensityMonitor(metrics=...)`` sees them before.

    Args:
        live: Whether to leave out what is off the masks.
        kwargs: As for any ``torchmetrics.Metric``.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> GradientFlow()(layer), GradientFlow(live=False)(layer)
        (tensor(4.), tensor(5.))
    """

    norms: Tensor
    updates: Tensor

    def __init__(self, *, live: bool = True, **kwargs: Any) -> None:
        if not isinstance(live, bool):
            raise TypeError(f"GradientFlow(live={live!r}): must be True or False.")
        super().__init__(**kwargs)
        self.live = live
        self.add_state("norms", torch.zeros(()), dist_reduce_fx="sum")
        self._add_counts("updates")

    def update(self, source: nn.Module | Masks | Mapping[str, Tensor]) -> None:
        """Look at the gradients of a model, or take norms by weight.

        Args:
            source: A model, the masks of a fit, or what :func:`gradient_norms` found in them.

        Raises:
            ValueError: As in :func:`gradient_norms`.
        """
        found = source if isinstance(source, Mapping) else gradient_norms(source, live=self.live)
        if found:
            norms = torch.stack([norm.to(self.norms.device) for norm in found.values()])
            self.norms += torch.linalg.vector_norm(norms)
        self.updates += 1

    def compute(self) -> Tensor:
        """Mean of the norms over the updates."""
        return self.norms / self.updates.clamp(min=1)


def gradient_norms(
    source: nn.Module | Masks,
    *,
    live: bool = True,
    among: Iterable[Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Norm of the gradient, :math:`\lVert g \rVert_2`, of each sparse weight.

    What a GradScaler leaves in gradients that a fused optimizer is about to step is taken out,
    if the source is the LightningModule. Weights that lie in parts on several processes need
    the call on all of them.

    Args:
        source: A model or the masks of a fit.
        live: Whether to leave out what is off the masks.
        among: Parameters to look at, such as those of one optimizer; None: all.

    Returns:
        By plain parameter name, 0-d float32; weights without gradient are left out.

    Raises:
        ValueError: If gradients off the mask are asked for, and the weight is kept compressed.
    """
    chosen = None if among is None else {id(parameter) for parameter in among}
    scales = _scales(source)
    found = {}
    for name, parameter, shape, mask in weights_of(source):
        if parameter.grad is None or (chosen is not None and id(parameter) not in chosen):
            continue
        if not live and parameter.shape != shape:
            raise ValueError(
                f"gradients of {name} are asked for off its mask (live=False), and it is kept "
                "compressed, without any there; use live=True, or leave the layer out with "
                "SparseCompute(exclude=...)."
            )
        grad = local(parameter.grad)
        norm = torch.linalg.vector_norm((grad[local(mask)] if live else grad).float())
        if is_sharded(parameter):
            norm = over_parts(mask, norm.square()).sqrt()
        found[name] = norm / scales.get(id(parameter), 1.0)
    return found


def _scales(source: object) -> dict[int, float]:
    """What a GradScaler leaves in gradients, by parameter: fused optimizers take it out."""
    trainer = trainer_of(source)
    scaler = getattr(trainer.precision_plugin, "scaler", None) if trainer is not None else None
    if trainer is None or scaler is None:
        return {}
    fused = (o for o in trainer.optimizers if getattr(o, "_step_supports_amp_scaling", False))
    stepped = (p for o in fused for group in o.param_groups for p in group["params"])
    return {id(parameter): scaler.get_scale() for parameter in stepped}
