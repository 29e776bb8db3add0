"""Export: sparse models that are faster in use, and files that are smaller."""

from lightning_sparsity.export.compact import load_weights, save_compact
from lightning_sparsity.export.compression import compress, compression_of
from lightning_sparsity.export.layers import (
    CompressedConv,
    CompressedLinear,
    SemiStructuredLinear,
)
from lightning_sparsity.export.report import Choice, Compression

__all__ = [
    "Choice",
    "CompressedConv",
    "CompressedLinear",
    "Compression",
    "SemiStructuredLinear",
    "compress",
    "compression_of",
    "load_weights",
    "save_compact",
]
