"""grad_norm: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.

Two stages, both in a fixed order, so that two runs are bit-identical: a float64 sum per chunk, then one program adds
those sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_groups
from .checks import KEPT, Operand, check_scalars, runs_on
from .device_cache import on_device
from .launch_config import BUILT_IN
from .launch_groups import launch, validated_groups
from .multi_tensor_apply import address, kernel, load, locate, magnitude
from .sam_math import asam_scale, asam_squared_norm, squared_norm

NORM_EPS = tl.constexpr(1e-12)
_GRAD, _WEIGHT, _SLOTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SUMS = 1024  # partial sums that the last stage reads at once


@triton.jit
def _add(sum, grad, weight, at, count, eta, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, WHOLE: tl.constexpr):
    g = load(grad, at, count, WHOLE).to(tl.float64)
    if ADAPTIVE:
        w = load(weight, at, count, WHOLE).to(tl.float64)
        return asam_squared_norm(g, asam_scale(eta, magnitude(w, weight, at, count, COMPLEX, WHOLE)), sum)
    else:
        return squared_norm(g, sum)


@kernel
def grad_norm_kernel(
    table, tensors, partials, eta, T: tl.constexpr, STATE: tl.constexpr, ADAPTIVE: tl.constexpr,
    COMPLEX: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SLOTS, BLOCK)
    grad, weight = address(record, _GRAD, begin, T), address(record, _WEIGHT, begin, STATE)
    eta = tl.load(eta)
    sum, tail = tl.zeros([BLOCK], tl.float64), tl.zeros([TAIL], tl.float64)
    for at in range(0, whole, BLOCK):
        sum = _add(sum, grad, weight, at + tl.arange(0, BLOCK), count, eta, ADAPTIVE, COMPLEX, True)
    for at in range(whole, count, TAIL):
        tail = _add(tail, grad, weight, at + tl.arange(0, TAIL), count, eta, ADAPTIVE, COMPLEX, False)
    tl.store(partials + tl.program_id(0), tl.sum(sum, 0) + tl.sum(tail, 0))


@kernel
def finish_kernel(partials, count, stats, BLOCK: tl.constexpr):
    so_far = tl.load(stats + 3)  # before the sum, whose barrier separates it from the store
    sum = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        sum += tl.load(partials + offsets, offsets < count, 0.0)
    norm = tl.sqrt(tl.sum(sum, 0))
    finite = norm - norm == 0
    non_finite = tl.where(finite, 0.0, 1.0).to(tl.float64)
    tl.store(stats, norm)
    tl.store(stats + 1, tl.where(finite & (norm > 0), 1.0 / (norm + NORM_EPS), 0.0))
    tl.store(stats + 2, non_finite)
    tl.store(stats + 3, so_far + non_finite)


@torch.no_grad()
def grad_norm(stats: Tensor, grads: Sequence[Tensor], params: Sequence[Tensor], adaptive: bool, eta: float) -> None:
    op = "grad_norm"
    check_scalars(op, "stats", stats, torch.float64, 5, on=grads[0].device if grads else None)
    runs_on(op, "stats", stats)
    weights = Operand("params", params if adaptive else [], dtype=KEPT, optional=not adaptive)
    partials = [torch.empty(0, dtype=torch.float64, device=stats.device)]
    for group, table in validated_groups(op, [Operand("grads", grads), weights], [len(grads)]):
        (eta_scalar,) = on_device(group.device, torch.tensor([eta], dtype=torch.float64, device="cpu"))
        sums = torch.empty(group.chunks, dtype=torch.float64, device=group.device)
        launch(grad_norm_kernel, group, table, sums, eta_scalar, ADAPTIVE=adaptive, COMPLEX=group.dtype.is_complex)
        partials.append(sums.to(stats.device, non_blocking=True))
    joined = torch.cat(partials) if len(partials) > 2 else partials[-1]
    args = (joined, joined.numel(), stats)
    launch_groups.run(finish_kernel, stats.device, 1, args, {"BLOCK": SUMS}, BUILT_IN.warps)
