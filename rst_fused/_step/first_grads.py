"""G-RST keeps the first gradients while the second pass makes new ones: in memory that nothing else writes.

With gradient_as_bucket_view=True the gradients lie in the buckets of DistributedDataParallel, which the second backward
fills again. Such ones are copied, 4 bytes per fp32 parameter; all others stay where they are.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _storage_Use_Count

from rst_fused._step.base import StepOptimizer


def keep_apart(opt: StepOptimizer) -> None:
    """Gives each first gradient memory of its own if another tensor shares it; nothing without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()) or _len_torch_dispatch_stack():
        return
    with torch.no_grad():
        for group in opt.param_groups:
            for p in group["params"]:
                g = p.grad
                if type(g) is Tensor and g.layout == torch.strided and _is_shared(g):
                    p.grad = g.clone(memory_format=torch.preserve_format)


def in_graph(grads: list[Tensor]) -> list[Tensor]:
    """First gradients as a graph keeps them: it cannot ask who else holds a storage, so several ranks copy all."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return [g.clone(memory_format=torch.preserve_format) for g in grads]
    return grads


def _uses_of_storage(t: Tensor) -> int:
    """By tensors, and by the object which asks."""
    return _storage_Use_Count(t.untyped_storage()._cdata)


USES_ALONE = _uses_of_storage(torch.empty(0, device="cpu"))  # of a storage that only one tensor has


def _is_shared(g: Tensor) -> bool:
    try:
        return _uses_of_storage(g) > USES_ALONE
    except (RuntimeError, NotImplementedError):  # it has none: validation says what is wrong
        return False
