"""Randomized Sharpness-Aware Training with fused kernels: RST, G-RST and SAM for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from rst_fused import ops, schedule
from rst_fused.batch_norm import freeze_batch_norm
from rst_fused.optimizer import RST
from rst_fused.sam import SAM

try:
    __version__ = version("rst_fused")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "unknown"

__all__ = ["RST", "SAM", "freeze_batch_norm", "ops", "schedule"]
