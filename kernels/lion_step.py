"""Lion, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m (and g1 for G-RST),
writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scalars
from .sam_math import sign
from .update import launch_update

_COLUMNS = 5  # lr, beta1, beta2, weight_decay, gamma


@triton.jit
def prepare(row, FLAG: tl.constexpr, V: tl.constexpr):
    lr, weight_decay = tl.load(row), tl.load(row + 3)
    one_minus_beta1, one_minus_beta2 = (1 - tl.load(row + 1)).to(V), (1 - tl.load(row + 2)).to(V)
    return (-lr).to(V), one_minus_beta1, one_minus_beta2, (1 - lr * weight_decay).to(V)


@triton.jit
def step(prepared, w, g, state, FLAG: tl.constexpr):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""
    minus_lr, one_minus_beta1, one_minus_beta2, decay = prepared
    change = g - state[0]
    c = tl.fma(one_minus_beta1, change, state[0])
    m = tl.fma(one_minus_beta2, change, state[0])
    return tl.fma(minus_lr, sign(c), decay * w), (m,)


RULE = {"PREPARE": prepare, "STEP": step, "COLUMNS": _COLUMNS}


@torch.no_grad()
def restore_lion_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], first_grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], masters: Sequence[Tensor], hyper: Tensor, group_sizes: Sequence[int], maximize: bool,
    grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    op = "restore_lion_step_"
    check_scalars(op, "hyper", hyper, torch.float64, _COLUMNS * len(group_sizes))
    launch_update(
        op, RULE, params, grads, backups, first_grads, {"exp_avgs": exp_avgs}, masters, hyper, group_sizes,
        maximize, grad_scale, found_inf,
    )  # fmt: skip


def lion_step_(params: Sequence[Tensor], grads: Sequence[Tensor], *args: object) -> None:
    restore_lion_step_(params, grads, [], [], *args)  # type: ignore[arg-type]
