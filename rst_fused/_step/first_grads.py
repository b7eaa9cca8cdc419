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

_ALONE = 2  # references to a storage: its one tensor's, and that of the object which asks


def keep_apart(opt: StepOptimizer, compiling: bool) -> None:
    """Gives each first gradient memory of its own if another tensor shares it; nothing without torch.distributed.

    A graph cannot ask who else holds a storage: where there are several ranks, it copies all of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if compiling:
        if dist.get_world_size() == 1:
            return
    elif _len_torch_dispatch_stack():
        return
    with torch.no_grad():
        for group in opt.param_groups:
            for p in group["params"]:
                g = p.grad
                if type(g) is Tensor and g.layout == torch.strided and (compiling or _is_shared(g)):
                    p.grad = g.clone(memory_format=torch.preserve_format)


def _is_shared(g: Tensor) -> bool:
    try:
        return _storage_Use_Count(g.untyped_storage()._cdata) > _ALONE
    except (RuntimeError, NotImplementedError):  # it has none: validation says what is wrong
        return False
