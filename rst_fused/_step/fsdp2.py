"""What torch.distributed.fsdp.fully_shard keeps of the modules that it manages."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def modules_of(params: Iterable[Tensor]) -> list[weakref.ref[Any]]:
    """The modules to which torch.distributed.fsdp.fully_shard was applied and that have any of these parameters."""
    states, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("_composable_state", "fsdp"))
    if states is None or fsdp is None:
        return []
    wanted = set(map(id, params))
    return [
        weakref.ref(module)
        for module in list(states._module_state_mapping)
        if isinstance(module, fsdp.FSDPModule) and any(id(p) in wanted for p in _sharded_params(module))
    ]


def _param_groups(module: Any) -> list[Any]:
    """What FSDP2 keeps for a module, in places that are not public; torch 2.11 has one of it."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in ([getattr(state, "_fsdp_param_group", None)] if groups is None else groups) if g is not None]


def _sharded_params(module: Any) -> Iterator[Tensor]:
    """The parameters that FSDP2 manages for a module; while they are gathered, the module itself has others."""
    for group in _param_groups(module):
        yield from (p.sharded_param for p in group.fsdp_params)


def _holds_unreduced(module: Any) -> bool:
    """A torch that keeps such gradients elsewhere holds none."""
    for group in _param_groups(module):
        if getattr(group, "_partial_reduce_output", None) is not None:
            return True
        for p in getattr(group, "fsdp_params", ()):
            if getattr(p, "unsharded_accumulated_grad", None) is not None:
                return True
            if getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None:
                return True
    return False


def refuse_unreduced(modules: Iterable[weakref.ref[Any]]) -> None:
    """Before a perturbation: raises RuntimeError where FSDP2 still holds gradients that are not reduced over ranks.

    There is no gradient to perturb by then, and the second pass would be added to the first one.
    """
    for reference in modules:
        module = reference()
        if module is not None and _holds_unreduced(module):
            raise RuntimeError(
                "perturb() with gradients that fully_shard has not reduced over ranks yet: the last backward of "
                "the first pass ran after set_requires_gradient_sync(False), or set_requires_all_reduce(False). "
                "Set True before the last micro-batch of each pass; nothing was perturbed"
            )
