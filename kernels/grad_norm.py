"""grad_norm: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.

Two stages, both in a fixed order, so that two runs are bit-identical: a float64 sum per chunk, then the last program to
finish adds those sums.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_groups
from .checks import KEPT, STATS, Operand, check_scalars, require, runs_on
from .device_cache import on_device
from .launch_config import BUILT_IN
from .launch_groups import LaunchGroup, launches, validated_groups
from .launcher import Launch, run_all
from .multi_tensor_apply import address, kernel, load, locate, magnitude
from .sam_math import asam_scale, asam_squared_norm, join, squared_norm

NORM_EPS = tl.constexpr(1e-12)
_GRAD, _PARAM, _MASTER, _SLOTS = (tl.constexpr(i) for i in range(4))
_TICKET = tl.constexpr(4)  # in stats: how many programs are done, as a 32-bit number; 0 between launches
_SQUARED_NORM = tl.constexpr(5)
SUMS = 1024  # partial sums that the last stage reads at once


@triton.jit
def _add(
    sum, grad, weight, remainder, at, count, eta, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    g = load(grad, at, count, WHOLE).to(tl.float64)
    if ADAPTIVE:
        w = load(weight, at, count, WHOLE)
        if len(remainder) == 1:
            w = join(w, load(remainder[0], at, count, WHOLE))
        w = w.to(tl.float64)
        return asam_squared_norm(g, asam_scale(eta, magnitude(w, weight, at, count, COMPLEX, WHOLE)), sum)
    else:
        return squared_norm(g, sum)


@triton.jit
def _write_stats(sum_of_squares, so_far, stats):
    """so_far: how many norms were not finite, read before a barrier that separates it from the store."""
    tl.store(stats + _SQUARED_NORM, sum_of_squares)
    norm = tl.sqrt(sum_of_squares)
    finite = norm - norm == 0
    non_finite = tl.where(finite, 0.0, 1.0).to(tl.float64)
    tl.store(stats, norm)
    tl.store(stats + 1, tl.where(finite & (norm > 0), 1.0 / (norm + NORM_EPS), 0.0))
    tl.store(stats + 2, non_finite)
    tl.store(stats + 3, so_far + non_finite)


@triton.jit
def _finish(partials, count, stats, SUMS: tl.constexpr):
    so_far = tl.load(stats + 3)
    sum = tl.zeros([SUMS], tl.float64)
    for at in range(0, count, SUMS):
        offsets = at + tl.arange(0, SUMS)
        sum += tl.load(partials + offsets, offsets < count, 0.0)
    _write_stats(tl.sum(sum, 0), so_far, stats)


@kernel
def grad_norm_kernel(
    table, tensors, partials, first, count, stats, eta, T: tl.constexpr, STATE: tl.constexpr,
    REMAINDERS: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Its partial sums begin at ``first``; with ``FINISH`` it is the last launch, and adds all ``count`` of them."""
    record, begin, size, whole = locate(table, tensors, _SLOTS, BLOCK)
    grad, weight = address(record, _GRAD, begin, T), address(record, _PARAM, begin, T)
    remainder = ()
    if REMAINDERS:
        remainder = (address(record, _MASTER, begin, tl.int16),)  # type: ignore[assignment]
    elif T != STATE:
        weight = address(record, _MASTER, begin, STATE)
    eta = tl.load(eta)
    sum, tail = tl.zeros([BLOCK], tl.float64), tl.zeros([TAIL], tl.float64)
    for at in range(0, whole, BLOCK):
        sum = _add(sum, grad, weight, remainder, at + tl.arange(0, BLOCK), size, eta, ADAPTIVE, COMPLEX, True)
    for at in range(whole, size, TAIL):
        tail = _add(tail, grad, weight, remainder, at + tl.arange(0, TAIL), size, eta, ADAPTIVE, COMPLEX, False)
    tl.store(partials + first + tl.program_id(0), tl.sum(sum, 0) + tl.sum(tail, 0))
    if FINISH:
        # Release: the sum above is there for whoever sees this count. Acquire: the last one sees all other sums.
        ticket = (stats + _TICKET).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            _finish(partials, count, stats, SUMS)
            tl.store(ticket, 0)


@kernel
def finish_kernel(partials, count, stats, SUMS: tl.constexpr):
    _finish(partials, count, stats, SUMS)


@kernel
def finish_norm_kernel(squares, count, stats):
    """The norm over parts, whose sums of squares are added in their order."""
    so_far = tl.load(stats + 3)
    sum = tl.full([], 0, tl.float64)
    for i in range(count):
        sum += tl.load(squares + i)
    tl.debug_barrier()
    _write_stats(sum, so_far, stats)


def variant(group: LaunchGroup, adaptive: bool, finish: bool) -> dict[str, Any]:
    return {
        "REMAINDERS": group.remainders, "ADAPTIVE": adaptive, "COMPLEX": group.dtype.is_complex, "FINISH": finish,
        "SUMS": SUMS,
    }  # fmt: skip


def finish_starter(device: torch.device) -> Callable[..., None]:
    """Of the kernel that adds partial sums, of which there may be none."""
    return launch_groups.starter(finish_kernel, device, {"SUMS": SUMS}, BUILT_IN.warps)


@torch.no_grad()
def grad_norm(
    stats: Tensor, grads: Sequence[Tensor], params: Sequence[Tensor], masters: Sequence[Tensor], adaptive: bool,
    eta: float,
) -> None:  # fmt: skip
    op = "grad_norm"
    check_scalars(op, "stats", stats, torch.float64, STATS, on=grads[0].device if grads else None)
    runs_on(op, "stats", stats)
    operands = [
        Operand("grads", grads), Operand("params", params if adaptive else [], optional=not adaptive),
        Operand("masters", masters if adaptive else [], dtype=KEPT, optional=True),
    ]  # fmt: skip
    works = [work for work in validated_groups(op, operands, [len(grads)]) if work.group.chunks]
    together = bool(works) and all(work.group.device == stats.device for work in works)
    counts = [work.group.chunks for work in works]
    etas = torch.tensor([eta], dtype=torch.float64, device="cpu")
    sums = torch.empty(sum(counts), dtype=torch.float64, device=stats.device)
    for work, begin, end in zip(works, [0, *accumulate(counts)], accumulate(counts), strict=False):
        (eta_scalar,) = on_device(work.group.device, etas)
        last = together and work is works[-1]
        here = sums if together else torch.empty(len(sums), dtype=torch.float64, device=work.group.device)
        chosen = variant(work.group, adaptive, finish=last)
        run_all(launches(grad_norm_kernel, work, here, begin, len(sums), stats, eta_scalar, **chosen))
        if not together:
            sums[begin:end].copy_(here[begin:end], non_blocking=True)
    if not together:  # on several devices, or nothing to add
        start = finish_starter(stats.device)
        run_all([Launch(start, 1, (sums, len(sums), stats))])


@torch.no_grad()
def finish_norm(stats: Tensor, squares: Tensor) -> None:
    op = "finish_norm"
    check_scalars(op, "stats", stats, torch.float64, STATS, on=squares.device)
    check_scalars(op, "squares", squares, torch.float64, 0)
    require(squares.dim() == 1, op, f"squares has {squares.dim()} dimensions, expected 1")
    runs_on(op, "stats", stats)
    start = launch_groups.starter(finish_norm_kernel, stats.device, {}, BUILT_IN.warps)
    run_all([Launch(start, 1, (squares, len(squares), stats))])
