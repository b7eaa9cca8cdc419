"""SGD, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m (and g1 for G-RST),
writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
"""

import triton
import triton.language as tl

from .update import Rule, op_of

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


RULE = Rule("sgd", prepare, step, _COLUMNS, ("momentum_buffers",), fewest_states=0)
restore_sgd_step_ = op_of(RULE)
