"""Buffers, such as running statistics, belong to the first pass alone: the second one runs at perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check_model(model: Any) -> None:
    """Raises TypeError unless ``model`` is a module or None."""
    if not (model is None or isinstance(model, torch.nn.Module)):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module, or None")


@contextmanager
def freeze_batch_norm(model: torch.nn.Module | None) -> Iterator[None]:
    """Inside, forward passes leave the running statistics of ``model`` alone (num_batches_tracked too).

    Normalization itself is unchanged: layers in training mode use the statistics of the batch. Covers BatchNorm,
    SyncBatchNorm and InstanceNorm. None does nothing; what is not a module raises TypeError.
    """
    check_model(model)
    tracking = [] if model is None else [
        m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
    # InstanceNorm updates whatever statistics it has; without any it normalizes just the same.
    hidden = [(m, m.running_mean, m.running_var) for m in tracking if isinstance(m, _InstanceNorm)]
    try:
        for module in tracking:
            module.track_running_stats = False
        for module, _, _ in hidden:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for module, mean, var in hidden:
            module.running_mean, module.running_var = mean, var


@contextmanager
def keep_buffers(model: torch.nn.Module | None) -> Iterator[None]:
    """Afterwards every buffer of ``model`` is what it was before: the same tensor with the same bits.

    For what a forward pass writes: power iterations of spectral_norm, codebooks, a user's own statistics. Copies all
    buffers but those that freeze_batch_norm leaves alone. None does nothing; what is not a module raises TypeError.
    """
    check_model(model)
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in ([] if model is None else model.modules())
        for name, buffer in module._buffers.items()
        if buffer is not None and not (isinstance(module, _NormBase) and name in _STATISTICS)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in kept:
                if buffers.get(name) is not buffer:
                    buffers[name] = buffer
                buffer.copy_(value)
