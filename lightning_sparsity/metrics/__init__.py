r"""Metrics of sparse models, for torchmetrics: on masks, models or whatever has been pruned.

Each takes a *source*: a model, ``{name: mask}``, or the ``Masks`` of a fit. Of a model that is
being trained by a sparsity callback the masks count, also where a live weight is zero just
now; of any other model the linear and convolutional weights, live where they are not zero.

A metric sums up over its updates, so that ``compute`` gives a mean over them; called like a
function it gives the value of that call. Masks and gradients are the same on every rank, so
that only accuracies are added up over ranks. None adds anything to a ``state_dict``.

Example::

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.ratio = CompressionRatio("csr")
            ...

        def on_train_epoch_end(self):
            self.log("compression", self.ratio(self))
"""

from lightning_sparsity.metrics.cost import FLOPs
from lightning_sparsity.metrics.gradients import GradientFlow, gradient_norms
from lightning_sparsity.metrics.masks import (
    ITOP,
    Churn,
    Density,
    EffectiveDensity,
    MaskSimilarity,
    expected_jaccard,
)
from lightning_sparsity.metrics.size import (
    CompressionRatio,
    HardnessNormalizedEfficiency,
    ParameterEfficiency,
    index_bits,
)
from lightning_sparsity.metrics.sources import live_masks

__all__ = [
    "ITOP",
    "Churn",
    "CompressionRatio",
    "Density",
    "EffectiveDensity",
    "FLOPs",
    "GradientFlow",
    "HardnessNormalizedEfficiency",
    "MaskSimilarity",
    "ParameterEfficiency",
    "expected_jaccard",
    "gradient_norms",
    "index_bits",
    "live_masks",
]
