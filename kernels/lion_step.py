"""Lion, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m (and g1 for G-RST),
writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
"""

import triton
import triton.language as tl

from .sam_math import sign
from .update import Rule, op_of

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


RULE = Rule("lion", prepare, step, _COLUMNS, ("exp_avgs",), fewest_states=1)
restore_lion_step_ = op_of(RULE)
