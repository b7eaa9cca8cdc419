"""restore: reads the backup (or master copy), writes w: 8 bytes per fp32 parameter.

With mixing (G-RST) also g <- (1 - gamma) g1 + gamma g: 20 bytes per fp32 parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import Operand, are_remainders, check_scalars
from .device_cache import on_device
from .launch_groups import launches, validated_groups
from .launcher import run_all
from .multi_tensor_apply import ROW, address, kernel, load, locate, store
from .sam_math import mix

_PARAM, _SOURCE, _GRAD, _FIRST_GRAD, _SLOTS = (tl.constexpr(i) for i in range(5))


@triton.jit
def _restore_block(
    param, source, grad, first_grad, at, count, gamma, one_minus_gamma, T: tl.constexpr, V: tl.constexpr,
    MIXING: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kept = load(source, at, count, WHOLE)
    if MIXING:
        g1, g2 = load(first_grad, at, count, WHOLE).to(V), load(grad, at, count, WHOLE).to(V)
        store(grad, at, count, mix(gamma, one_minus_gamma, g1, g2).to(T), WHOLE)
    # Without master copies, source has dtype T: the bits are copied, including the payload of a NaN.
    store(param, at, count, kept.to(T), WHOLE)


@kernel
def restore_kernel(
    table, tensors, gammas, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr, MIXING: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SLOTS, BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, STATE)
    grad, first_grad = address(record, _GRAD, begin, T), address(record, _FIRST_GRAD, begin, T)
    gamma = tl.load(gammas + tl.load(record + ROW))
    one_minus_gamma, gamma = (1 - gamma).to(V), gamma.to(V)
    for at in range(0, whole, BLOCK):
        _restore_block(param, source, grad, first_grad, at + tl.arange(0, BLOCK), count, gamma, one_minus_gamma,
                       T, V, MIXING, True)  # fmt: skip
    for at in range(whole, count, TAIL):
        _restore_block(param, source, grad, first_grad, at + tl.arange(0, TAIL), count, gamma, one_minus_gamma,
                       T, V, MIXING, False)  # fmt: skip


@torch.no_grad()
def restore_(
    params: Sequence[Tensor], backups: Sequence[Tensor], masters: Sequence[Tensor], grads: Sequence[Tensor],
    first_grads: Sequence[Tensor], gamma: Tensor, group_sizes: Sequence[int],
) -> None:  # fmt: skip
    op = "restore_"
    check_scalars(op, "gamma", gamma, torch.float64, len(group_sizes))
    copies = bool(masters) and not are_remainders(masters)  # remainders stay as they are, and beside backups
    source = Operand("masters", masters, dtype=torch.float32) if copies else Operand("backups", backups)
    operands = [
        Operand("params", params, written=True, read=False), source,
        Operand("grads", grads if first_grads else [], written=True, optional=not first_grads),
        Operand("first_grads", first_grads, optional=True),
    ]  # fmt: skip
    calls: list[Callable[[], Any]] = []
    for work in validated_groups(op, operands, group_sizes):
        (gammas,) = on_device(work.group.device, gamma)
        calls += launches(restore_kernel, work, gammas, V=work.group.arithmetic, MIXING=bool(first_grads))
    run_all(calls)
