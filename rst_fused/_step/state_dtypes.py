"""In which dtype the fused base keeps its state, and what ``state_dtype`` asks for: a first moment in bfloat16.

Each update rounds it stochastically. To nearest it would stand still: of exp_avg (beta1 = 0.99, say) a step changes
less than half of what bfloat16 can tell apart. The random bits go by the position of a parameter among all of the
optimizer, with a gradient or without, and by the position of an element in the whole parameter, so that a run does not
depend on how a step is split into calls, or a parameter over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import SIXTEEN_BIT
from rst_fused._step.base import StepOptimizer


def has_master(opt: StepOptimizer, p: Tensor) -> bool:
    return opt.master_weights and p.dtype in SIXTEEN_BIT


def dtype_of(opt: StepOptimizer, p: Tensor, name: str) -> torch.dtype:
    """That of a state tensor of p, or of its master."""
    if opt.state_dtype is not None and opt.rule is not None and name == opt.rule.states[0]:
        return opt.state_dtype
    return torch.float32 if has_master(opt, p) else p.dtype


def checked(given: Any, of_instance: bool) -> torch.dtype | None:
    """The argument of the constructor. Raises ValueError for another one."""
    if given is not None and given is not torch.bfloat16:
        raise ValueError(f"state_dtype={given!r}: expected torch.bfloat16 or None")
    if given is not None and of_instance:
        raise ValueError(
            f"state_dtype={given} with an optimizer as base, which keeps its own state: expected None, or a base given "
            "by its name"
        )
    return given


def check_params(opt: StepOptimizer, params: Iterable[Any]) -> None:
    """Raises ValueError for parameters whose state no kernel keeps in ``state_dtype``."""
    for i, p in enumerate(params if opt.state_dtype is not None else ()):
        if isinstance(p, Tensor) and not serves(opt, p):
            raise ValueError(f"params[{i}] is {p.dtype}{_EXPECTED}")


def check_current(opt: StepOptimizer, what: str, p: Tensor) -> None:
    """Raises RuntimeError for a parameter that was converted since."""
    if not serves(opt, p):
        raise RuntimeError(f"{what} is {p.dtype}{_EXPECTED}")


_EXPECTED = (
    ", whose state is not kept in state_dtype=torch.bfloat16: expected float32 or bfloat16, or float16 with "
    "master_weights=True"
)


def serves(opt: StepOptimizer, p: Tensor) -> bool:
    """Whether updates of p compute in float32."""
    return opt.state_dtype is None or p.dtype in (torch.float32, torch.bfloat16) or has_master(opt, p)


def positions_in(opt: StepOptimizer) -> dict[Tensor, int]:
    """The place of each parameter among all, whichever of them an update takes."""
    return {p: i for i, p in enumerate(p for group in opt.param_groups for p in group["params"])}
