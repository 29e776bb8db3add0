"""Monitors: callbacks that watch the masks and change nothing."""

from lightning_sparsity.monitors.density import DensityMonitor

__all__ = ["DensityMonitor"]
