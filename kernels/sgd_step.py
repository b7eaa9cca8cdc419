"""SGD, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m (and g1 for G-RST),
writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scalars
from .device_cache import on_device
from .launch_groups import launch, launch_groups, scaling, update_operands, validate
from .multi_tensor_apply import ROW, address, kernel, load, locate, store
from .sam_math import mix, sgd_buffer, sgd_decayed, sgd_nesterov, sgd_update

_PARAM, _SOURCE, _GRAD, _FIRST_GRAD, _BUFFER, _SLOTS = (tl.constexpr(i) for i in range(6))
_COLUMNS = tl.constexpr(5)  # lr, momentum, dampening, weight_decay, gamma


@triton.jit
def _step(
    param, source, grad, first_grad, buffer, at, count, minus_lr, momentum, one_minus_dampening, weight_decay,
    grad_multiplier, gamma, one_minus_gamma, skipped, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MIXING: tl.constexpr, MASTER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kept = load(source, at, count, WHOLE)
    w, g = kept.to(V), load(grad, at, count, WHOLE).to(V)
    if MIXING:
        g = mix(gamma, one_minus_gamma, load(first_grad, at, count, WHOLE).to(V), g)
    d = sgd_decayed(weight_decay, grad_multiplier, w, g)
    if MOMENTUM:
        buf = sgd_buffer(momentum, one_minus_dampening, load(buffer, at, count, WHOLE).to(V), d)
        if NESTEROV:
            d = sgd_nesterov(momentum, buf, d)
        else:
            d = buf
    updated = sgd_update(minus_lr, w, d)
    if not skipped:
        if MOMENTUM:
            store(buffer, at, count, buf.to(STATE), WHOLE)
        if MASTER:
            store(source, at, count, updated.to(STATE), WHOLE)
    store(param, at, count, tl.where(skipped, kept.to(T), updated.to(T)), WHOLE)


@kernel
def sgd_step_kernel(
    table, tensors, hyperparams, maximize_sign, grad_scale, found_inf, T: tl.constexpr, STATE: tl.constexpr,
    V: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MIXING: tl.constexpr, MASTER: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SLOTS, BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, STATE)
    grad, first_grad = address(record, _GRAD, begin, T), address(record, _FIRST_GRAD, begin, T)
    buffer = address(record, _BUFFER, begin, STATE)
    row = hyperparams + tl.load(record + ROW) * _COLUMNS
    minus_lr, momentum = (-tl.load(row)).to(V), tl.load(row + 1).to(V)
    one_minus_dampening, weight_decay = (1 - tl.load(row + 2)).to(V), tl.load(row + 3).to(V)
    gamma = tl.load(row + 4)
    one_minus_gamma, gamma = (1 - gamma).to(V), gamma.to(V)
    grad_multiplier = (maximize_sign / tl.load(grad_scale).to(tl.float64)).to(V)
    skipped = tl.load(found_inf) != 0
    for at in range(0, whole, BLOCK):
        _step(param, source, grad, first_grad, buffer, at + tl.arange(0, BLOCK), count, minus_lr, momentum,
              one_minus_dampening, weight_decay, grad_multiplier, gamma, one_minus_gamma, skipped, T, STATE, V,
              MOMENTUM, NESTEROV, MIXING, MASTER, True)  # fmt: skip
    for at in range(whole, count, TAIL):
        _step(param, source, grad, first_grad, buffer, at + tl.arange(0, TAIL), count, minus_lr, momentum,
              one_minus_dampening, weight_decay, grad_multiplier, gamma, one_minus_gamma, skipped, T, STATE, V,
              MOMENTUM, NESTEROV, MIXING, MASTER, False)  # fmt: skip


@torch.no_grad()
def restore_sgd_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], first_grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor], masters: Sequence[Tensor], hyper: Tensor, group_sizes: Sequence[int],
    nesterov: bool, maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    op = "restore_sgd_step_"
    check_scalars(op, "hyper", hyper, torch.float64, _COLUMNS.value * len(group_sizes))
    amp = scaling(op, grad_scale, found_inf)
    operands = update_operands(op, params, grads, backups, first_grads, masters, {"momentum_buffers": momentum_buffers})
    call = validate(op, operands, group_sizes)
    for group in launch_groups(call, operands):
        hyperparams, *amp_scalars = on_device(group.device, hyper, *amp)
        launch(
            sgd_step_kernel, group, hyperparams, -1 if maximize else 1, *amp_scalars, V=group.arithmetic,
            MOMENTUM=bool(momentum_buffers), NESTEROV=nesterov, MIXING=bool(first_grads), MASTER=bool(masters),
            wide_state=bool(masters),
        )  # fmt: skip


def sgd_step_(params: Sequence[Tensor], grads: Sequence[Tensor], *args: object) -> None:
    restore_sgd_step_(params, grads, [], [], *args)  # type: ignore[arg-type]
