"""Adam and AdamW, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m, v (and
g1 for G-RST), writes w, m, v: 28 bytes per fp32 parameter (32 for G-RST).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_length, check_scalars
from .device_cache import on_device
from .launch_groups import launch, launch_groups, scaling, update_operands, validate
from .multi_tensor_apply import ROW, address, kernel, load, locate, store
from .sam_math import adam_decayed, adam_exp_avg, adam_exp_avg_sq, adam_shrunk, adam_update, mix

_PARAM, _SOURCE, _GRAD, _FIRST_GRAD, _BUFFER, _BUFFER2, _SLOTS = (tl.constexpr(i) for i in range(7))
_GIVEN = 6  # lr, beta1, beta2, eps, weight_decay, gamma
_COLUMNS = tl.constexpr(8)  # these, and both bias corrections


@triton.jit
def _step(
    param, source, grad, first_grad, buffer, buffer2, at, count, minus_step_size, one_minus_beta1, beta2,
    one_minus_beta2, bias2_sqrt, eps, weight_decay, decay, grad_multiplier, gamma, one_minus_gamma, skipped,
    T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr, MIXING: tl.constexpr, MASTER: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    kept = load(source, at, count, WHOLE)
    w, g = kept.to(V), load(grad, at, count, WHOLE).to(V)
    if MIXING:
        g = mix(gamma, one_minus_gamma, load(first_grad, at, count, WHOLE).to(V), g)
    g = adam_decayed(weight_decay, grad_multiplier, w, g)
    w = adam_shrunk(decay, w)
    m = adam_exp_avg(one_minus_beta1, load(buffer, at, count, WHOLE).to(V), g)
    v = adam_exp_avg_sq(beta2, one_minus_beta2, load(buffer2, at, count, WHOLE).to(V), g)
    updated = adam_update(minus_step_size, bias2_sqrt, eps, w, m, v)
    if not skipped:
        store(buffer, at, count, m.to(STATE), WHOLE)
        store(buffer2, at, count, v.to(STATE), WHOLE)
        if MASTER:
            store(source, at, count, updated.to(STATE), WHOLE)
    store(param, at, count, tl.where(skipped, kept.to(T), updated.to(T)), WHOLE)


@kernel
def adam_step_kernel(
    table, tensors, hyperparams, maximize_sign, grad_scale, found_inf, T: tl.constexpr, STATE: tl.constexpr,
    V: tl.constexpr, DECOUPLED: tl.constexpr, MIXING: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SLOTS, BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, STATE)
    grad, first_grad = address(record, _GRAD, begin, T), address(record, _FIRST_GRAD, begin, T)
    buffer, buffer2 = address(record, _BUFFER, begin, STATE), address(record, _BUFFER2, begin, STATE)
    row = hyperparams + tl.load(record + ROW) * _COLUMNS
    lr, beta1, beta2, eps = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(V)
    gamma, bias1, bias2 = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    minus_step_size, bias2_sqrt = (-lr / bias1).to(V), tl.sqrt(bias2).to(V)
    one_minus_beta1, one_minus_beta2, beta2 = (1 - beta1).to(V), (1 - beta2).to(V), beta2.to(V)
    one_minus_gamma, gamma = (1 - gamma).to(V), gamma.to(V)
    weight_decay = tl.load(row + 4)
    if DECOUPLED:
        decay, weight_decay = (1 - lr * weight_decay).to(V), tl.full([], 0, V)
    else:
        decay, weight_decay = tl.full([], 1, V), weight_decay.to(V)
    grad_multiplier = (maximize_sign / tl.load(grad_scale).to(tl.float64)).to(V)
    skipped = tl.load(found_inf) != 0
    for at in range(0, whole, BLOCK):
        _step(param, source, grad, first_grad, buffer, buffer2, at + tl.arange(0, BLOCK), count, minus_step_size,
              one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, weight_decay, decay, grad_multiplier, gamma,
              one_minus_gamma, skipped, T, STATE, V, MIXING, MASTER, True)  # fmt: skip
    for at in range(whole, count, TAIL):
        _step(param, source, grad, first_grad, buffer, buffer2, at + tl.arange(0, TAIL), count, minus_step_size,
              one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, weight_decay, decay, grad_multiplier, gamma,
              one_minus_gamma, skipped, T, STATE, V, MIXING, MASTER, False)  # fmt: skip


@torch.no_grad()
def restore_adam_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], first_grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor], hyper: Tensor, steps: Tensor,
    group_sizes: Sequence[int], decoupled: bool, maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    op = "restore_adam_step_"
    groups = len(group_sizes)
    check_scalars(op, "hyper", hyper, torch.float64, _GIVEN * groups)
    check_scalars(op, "steps", steps, torch.float64, groups)
    check_length(op, "exp_avgs", exp_avgs, params)
    check_length(op, "exp_avg_sqs", exp_avg_sqs, params)
    amp = scaling(op, grad_scale, found_inf)
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    operands = update_operands(op, params, grads, backups, first_grads, masters, state)
    call = validate(op, operands, group_sizes)
    device = next((x.device for x in (hyper, steps) if x.device.type != "cpu"), hyper.device)
    hyper, steps = on_device(device, hyper, steps)
    given, counts = hyper.reshape(-1)[: _GIVEN * groups].view(groups, _GIVEN), steps.reshape(-1)[:groups, None]
    full = torch.cat([given, 1 - given[:, 1:3] ** counts], 1)
    for group in launch_groups(call, operands):
        hyperparams, *amp_scalars = on_device(group.device, full, *amp)
        launch(
            adam_step_kernel, group, hyperparams, -1 if maximize else 1, *amp_scalars, V=group.arithmetic,
            DECOUPLED=decoupled, MIXING=bool(first_grads), MASTER=bool(masters), wide_state=bool(masters),
        )  # fmt: skip


def adam_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    *args: object,
) -> None:  # fmt: skip
    restore_adam_step_(params, grads, [], [], exp_avgs, exp_avg_sqs, *args)  # type: ignore[arg-type]
