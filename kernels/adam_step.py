"""Adam and AdamW, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m, v (and
g1 for G-RST), writes w, m, v: 28 bytes per fp32 parameter (32 for G-RST). AMSGrad reads and writes one more state
tensor: 36 (40).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scalars
from .sam_math import divide, maximum, sqrt
from .update import Rule, op_of

_GIVEN = 6  # lr, beta1, beta2, eps, weight_decay, gamma
_COLUMNS = 8  # these, with both bias corrections before gamma


@triton.jit
def prepare(row, DECOUPLED: tl.constexpr, V: tl.constexpr):
    lr, beta1, beta2, eps = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(V)
    weight_decay, bias1, bias2 = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    minus_step_size, bias2_sqrt = (-lr / bias1).to(V), tl.sqrt(bias2).to(V)
    one_minus_beta1, one_minus_beta2, beta2 = (1 - beta1).to(V), (1 - beta2).to(V), beta2.to(V)
    if DECOUPLED:
        decay, weight_decay = (1 - lr * weight_decay).to(V), tl.full([], 0, V)
    else:
        decay, weight_decay = tl.full([], 1, V), weight_decay.to(V)
    return minus_step_size, one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, weight_decay, decay


@triton.jit
def step(prepared, w, g, state, DECOUPLED: tl.constexpr):
    """As torch.optim.Adam (Kingma & Ba 2015). A third state tensor makes it AMSGrad (Reddi et al. 2018)."""
    minus_step_size, one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, weight_decay, decay = prepared
    g = tl.fma(weight_decay, w, g)
    w = decay * w
    m = tl.fma(one_minus_beta1, g - state[0], state[0])
    v = tl.fma(one_minus_beta2 * g, g, beta2 * state[1])
    largest = maximum(state[2], v) if len(state) == 3 else v
    denominator = divide(sqrt(largest), bias2_sqrt) + eps
    return w + divide(minus_step_size * m, denominator), (m, v, largest)


def with_bias_corrections(rows: Sequence[Sequence[float]], steps: Sequence[float]) -> list[list[float]]:
    """Rows of _COLUMNS numbers: the kernels have no accurate power."""
    return [
        [*given, 1 - given[1] ** step, 1 - given[2] ** step, gamma]
        for (*given, gamma), step in zip(rows, steps, strict=True)
    ]


def _hyper(op: str, hyper: Tensor, steps: Tensor, groups: int) -> Tensor:
    """The same from tensors; on the device, where some of these numbers are there."""
    check_scalars(op, "hyper", hyper, torch.float64, _GIVEN * groups)
    check_scalars(op, "steps", steps, torch.float64, groups)
    given, counts = hyper.reshape(-1)[: _GIVEN * groups].view(groups, _GIVEN), steps.reshape(-1)[:groups]
    device = next((x.device for x in (hyper, steps) if x.device.type != "cpu"), None)
    if device is None:
        rows = with_bias_corrections(given.tolist(), counts.tolist())
        return torch.tensor(rows, dtype=torch.float64, device="cpu")
    given, counts = (x.to(device, non_blocking=True) for x in (given, counts))
    return torch.cat([given[:, :-1], 1 - given[:, 1:3] ** counts[:, None], given[:, -1:]], 1)


RULE = Rule(
    "adam", prepare, step, _COLUMNS, ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), fewest_states=2,
    with_steps=_hyper, rows_with_steps=with_bias_corrections,
)  # fmt: skip
restore_adam_step_ = op_of(RULE)
