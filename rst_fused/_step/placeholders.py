"""State that was created without a step: zeros where the first step is going to put its own.

torch.distributed.checkpoint asks for such state, to know what to load. Most of it is what a first step would start
from. What is not must be gone when that step is taken: SGD's momentum buffer, whose first step knows no dampening;
master copies, since weights may be loaded alone; and everything of an optimizer instance. What was written or replaced
meanwhile (loaded, say) is state like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rst_fused._step.sharding import local

Placeholders = dict[int, tuple[Tensor, int]]  # by id: the tensor, and its version when it was created


def tensors_of(state: Any, but: str = "") -> Iterator[Tensor]:
    """The tensors in the state of an optimizer, without those of one name."""
    for of_parameter in state.values():
        yield from (value for name, value in of_parameter.items() if name != but and isinstance(value, Tensor))


def note(opt: Any, but: str = "") -> None:
    """All state that ``opt`` has consists of placeholders."""
    opt._step_state.placeholders = {id(t): (t, t._version) for t in tensors_of(opt.state, but)}


def note_zeros(opt: Any) -> None:
    """The same for state that was loaded, if all of it is zero and ``opt`` has taken no step. Waits for the device."""
    masters = "master" if opt.rule is not None else ""
    if opt._step_state.steps > 0 or not opt.state:
        return
    others = sum(bool(local(t).any()) for t in tensors_of(opt.state, masters))
    if opt._sharding.counts_over_ranks(others) == [0]:  # all ranks do the same, also those without elements
        note(opt, masters)


def discard(opt: Any) -> None:
    """Before the first step: what that one has to create itself."""
    noted: Placeholders = opt._step_state.placeholders
    if opt.base is not None:
        tensors = list(tensors_of(opt.state))
        if len(tensors) == len(noted) and all(_is_noted(noted, t) for t in tensors):
            opt.state.clear()
    else:
        for group in opt.param_groups:
            names = ("master", *(opt.rule.states[:1] if opt.rule.splits_first_step(group) else ()))
            for state in (opt.state[p] for p in group["params"] if p in opt.state):
                for name in names:
                    if _is_noted(noted, state.get(name)):
                        del state[name]
    opt._step_state.placeholders = {}


def _is_noted(noted: Placeholders, t: Tensor | None) -> bool:
    return t is not None and id(t) in noted and noted[id(t)][1] == t._version
