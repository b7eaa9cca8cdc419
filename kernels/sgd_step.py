"""SGD, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m (and g1 for G-RST),
writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scalars
from .update import launch_update

_COLUMNS = 5  # lr, momentum, dampening, weight_decay, gamma


@triton.jit
def prepare(row, NESTEROV: tl.constexpr, V: tl.constexpr):
    minus_lr, momentum = (-tl.load(row)).to(V), tl.load(row + 1).to(V)
    one_minus_dampening, weight_decay = (1 - tl.load(row + 2)).to(V), tl.load(row + 3).to(V)
    return minus_lr, momentum, one_minus_dampening, weight_decay


@triton.jit
def step(prepared, w, g, state, NESTEROV: tl.constexpr):
    """As torch.optim.SGD. Without a state tensor there is no momentum."""
    minus_lr, momentum, one_minus_dampening, weight_decay = prepared
    d = tl.fma(weight_decay, w, g)
    if len(state) == 0:
        new = state
    else:
        buffer = tl.fma(one_minus_dampening, d, momentum * state[0])
        d = tl.fma(momentum, buffer, d) if NESTEROV else buffer
        new = (buffer,)
    return tl.fma(minus_lr, d, w), new


RULE = {"PREPARE": prepare, "STEP": step, "COLUMNS": _COLUMNS}


@torch.no_grad()
def restore_sgd_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], first_grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor], masters: Sequence[Tensor], hyper: Tensor, group_sizes: Sequence[int],
    nesterov: bool, maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    op = "restore_sgd_step_"
    check_scalars(op, "hyper", hyper, torch.float64, _COLUMNS * len(group_sizes))
    state = {"momentum_buffers": momentum_buffers} if momentum_buffers else {}
    launch_update(
        op, RULE, params, grads, backups, first_grads, state, masters, hyper, group_sizes, maximize,
        grad_scale, found_inf, nesterov,
    )  # fmt: skip


def sgd_step_(params: Sequence[Tensor], grads: Sequence[Tensor], *args: object) -> None:
    restore_sgd_step_(params, grads, [], [], *args)  # type: ignore[arg-type]
