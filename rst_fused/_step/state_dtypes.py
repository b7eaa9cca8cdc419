"""In which dtype the fused base keeps its state, and what ``state_dtype`` asks for: a first moment in bfloat16; and how
16-bit parameters have weights in float32: as copies, or, ``master_weights="remainder"``, as what bfloat16 lacks.

Each update rounds the first moment stochastically. To nearest it would stand still: of exp_avg (beta1 = 0.99, say) a
step changes less than half of what bfloat16 can tell apart. The random bits go by the position of a parameter among all
of the optimizer, with a gradient or without, and by the position of an element in the whole parameter, so that a run
does not depend on how a step is split into calls, or a parameter over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import SIXTEEN_BIT, as_flag
from rst_fused._step.base import StepOptimizer
from rst_fused._step.sharding import as_dtype, local
from rst_fused.reference import join, split

MASTERS = ("master", "remainder")  # the names of their state
_EXPORTED_AS = {"master": torch.float32, "remainder": torch.bfloat16}


def has_master(opt: StepOptimizer, p: Tensor) -> bool:
    return bool(opt.master_weights) and p.dtype in SIXTEEN_BIT


def copies_masters(opt: StepOptimizer) -> bool:
    """Whether masters are copies, which take the place of backups, rather than remainders."""
    return opt.master_weights is True


def kept_by_master(opt: StepOptimizer, p: Tensor) -> bool:
    """Whether its master is a copy, so that p needs no backup."""
    return copies_masters(opt) and p.dtype in SIXTEEN_BIT


def master_name(opt: StepOptimizer) -> str:
    """Of the state that is a copy or a remainder: names of their own, so that no checkpoint takes one for the other."""
    return "remainder" if opt.master_weights == "remainder" else "master"


def create_master(opt: StepOptimizer, p: Tensor) -> None:
    """A copy of p, or no remainder; or from a master of the other kind, which a state_dict has brought. Not before a
    step needs it: weights may be loaded after the state.

    A copy rounds ties to even: then the remainder, from the weights of p, would be 2^15, one more than it can be.
    """
    state, copies = opt.state[p], kept_by_master(opt, p)
    other = state.pop("remainder" if copies else "master", None)
    master = torch.empty_like(p, dtype=torch.float32 if copies else torch.int16, memory_format=torch.preserve_format)
    w, to, given = local(p.detach()), local(master), None if other is None else local(other)
    if copies:
        to.copy_(w if given is None or w.dtype != torch.bfloat16 else join(w, given))
    elif given is None:
        to.zero_()
    else:
        b, r = split(given)
        is_next = b.view(torch.int16) == w.view(torch.int16) + 1
        to.copy_(torch.where((r == -(2**15)) & is_next, 2**15 - 1, r))
    state[master_name(opt)] = master


def exported(name: str, value: Any) -> Any:
    """As a state_dict has it: remainders look like numbers of the dtype of their parameters. Collectives know no int16,
    and torch.optim converts state to that dtype."""
    return as_dtype(value, _EXPORTED_AS[name]) if name == "remainder" and isinstance(value, Tensor) else value


def loaded(opt: StepOptimizer, p: Tensor, name: str, saved: Tensor) -> Tensor | None:
    """A master or a remainder out of a state_dict; None where it is out of date: no update of p would write it, or an
    optimizer of torch has converted it and gone on without it."""
    if not has_master(opt, p) or saved.dtype != _EXPORTED_AS[name]:
        return None
    saved = saved.detach().to(p.device, copy=True)
    return saved if name == "master" else as_dtype(saved, torch.int16)


def dtype_of(opt: StepOptimizer, p: Tensor, name: str) -> torch.dtype:
    """That of a state tensor of p, or of its master."""
    if opt.state_dtype is not None and opt.rule is not None and name == opt.rule.states[0]:
        return opt.state_dtype
    if name == "remainder":
        return torch.int16
    return torch.float32 if has_master(opt, p) else p.dtype


def checked_masters(given: Any, of_instance: bool) -> bool | str:
    """The argument of the constructor. Raises ValueError, or TypeError, for another one."""
    try:
        kind = given if isinstance(given, str) and given == "remainder" else as_flag("master_weights", given)
    except ValueError as error:
        raise ValueError(f"{error}, or 'remainder'") from None
    if kind and of_instance:
        raise ValueError(
            f"master_weights={given!r} with an optimizer as base: only 'sgd', 'adam', 'adamw' and 'lion' keep them"
        )
    return kind


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
    """Raises ValueError for parameters whose state no kernel keeps in ``state_dtype``, or that have no remainder."""
    for i, p in enumerate(params):
        if isinstance(p, Tensor) and (why := _refusal(opt, p)):
            raise ValueError(f"params[{i}] is {p.dtype}{why}")


def check_current(opt: StepOptimizer, what: str, p: Tensor) -> None:
    """Raises RuntimeError for a parameter that was converted since."""
    if why := _refusal(opt, p):
        raise RuntimeError(f"{what} is {p.dtype}{why}")


def _refusal(opt: StepOptimizer, p: Tensor) -> str:
    """Why p is not served; empty if it is."""
    if opt.master_weights == "remainder" and p.dtype == torch.float16:
        return ", which has no remainder: expected bfloat16, or master_weights=True"
    if opt.state_dtype is None or p.dtype in (torch.float32, torch.bfloat16) or has_master(opt, p):
        return ""  # the updates of p compute in float32
    return (
        ", whose state is not kept in state_dtype=torch.bfloat16: expected float32 or bfloat16, or float16 with "
        "master_weights=True"
    )


def positions_in(opt: StepOptimizer) -> dict[Tensor, int]:
    """The place of each parameter among all, whichever of them an update takes."""
    return {p: i for i, p in enumerate(p for group in opt.param_groups for p in group["params"])}
