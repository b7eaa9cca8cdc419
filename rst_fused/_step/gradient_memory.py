"""Weights that are kept where their gradient was, instead of in a backup.

perturb() takes the gradients out of p.grad. With gamma = 1 nothing reads them again, so perturb_ may exchange w and g:
(w, g) -> (w + e, w), which moves the same bytes and allocates none. It may do so where nobody else can see the memory
of the gradient, now or later: a reference to it, to its storage or to another view of that would find weights there.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _storage_Use_Count

from rst_fused._backends import knows_references, may_be_seen_weakly
from rst_fused._checks import PLAIN, last_offset
from rst_fused._step.base import StepOptimizer
from rst_fused._step.first_grads import USES_ALONE
from rst_fused._step.sharding import is_dtensor, local
from rst_fused._step.state_dtypes import kept_by_master

_KNOWN = hasattr(Tensor, "_use_count")


class SavedByPlan(Mapping[Tensor, Tensor]):
    """StepState.saved of a launch plan, which keeps weights in gradients that only the plan has."""

    def __init__(self, order: Sequence[Tensor], fixed: dict[Tensor, Tensor], swapped: Sequence[Tensor], kept: Any):
        """fixed: masters and backups; kept: the gradients of those that are swapped, as KeptGrads in csrc/plan."""
        self._order, self._fixed, self._swapped, self._kept = order, fixed, swapped, kept

    def as_dict(self) -> dict[Tensor, Tensor]:
        found = {**self._fixed, **dict(zip(self._swapped, self._kept.as_list(), strict=True))}
        return {p: found[p] for p in self._order}

    def clear(self) -> None:
        """Lets go of the gradients."""
        self._kept.clear()

    def __getitem__(self, p: Tensor) -> Tensor:
        return self.as_dict()[p]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def items(self) -> Any:
        return self.as_dict().items()

    def values(self) -> Any:
        return self.as_dict().values()


def never_mixes(opt: StepOptimizer) -> bool:
    """Whether gamma is 1 at every step: no other one can do without the first gradients."""
    return opt._gamma == 1.0


def choose(opt: StepOptimizer) -> None:
    """Notes in StepState.swaps, by id, the parameters whose weights the perturbation that follows is to keep in their
    gradients, and frees their backups. None in a CUDA graph, where memory of one replay is that of the next."""
    state = opt._step_state
    state.swaps = frozenset()
    if not never_mixes(opt) or opt.capturing or _len_torch_dispatch_stack() or not knows_references(opt.backend.plans):
        return
    params = (p for group in opt.param_groups for p in group["params"])
    state.swaps = frozenset(map(id, serving(p for p in params if not kept_by_master(opt, p))))
    if any(id(p) in state.swaps for p in state.backups):
        state.backups = {p: b for p, b in state.backups.items() if id(p) not in state.swaps}


def swaps_of(
    opt: StepOptimizer, params: Sequence[Tensor], before: Mapping[Tensor, Tensor], updates: bool
) -> list[bool]:
    """Which parameters a launch plan swaps: none that a master copy keeps. ``before``: where weights are kept while
    they are perturbed. ``updates``: the plan is not made for a perturbation, for which ``choose`` looks at gradients.
    """
    state = opt._step_state
    if not updates:
        swaps = [id(p) in state.swaps for p in params]
    elif before:
        swaps = [p in before and before[p] is not state.backups.get(p) for p in params]
    elif never_mixes(opt) and knows_references(opt.backend.plans):
        swaps = [p not in state.backups and _is_dense(local(p)) for p in params]
    else:
        return [False] * len(params)
    return [swap and not kept_by_master(opt, p) for swap, p in zip(swaps, params, strict=True)]


def serving(params: Iterable[Tensor]) -> list[Tensor]:
    """Those of the parameters whose gradient fits them, and can be seen through p.grad alone."""
    sharing: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for p in params:
        if not (_KNOWN and _only_here(p)):
            continue
        assert p.grad is not None
        g, w = local(p.grad), local(p)
        storage = _storage_alone(g) if _fits(g, w) and not may_be_seen_weakly(g) else None
        if storage is not None:
            begin = int(g.storage_offset()) * g.element_size()
            sharing[storage].append((begin, begin + g.nbytes, p))
    found = []
    for storage, pieces in sharing.items():  # FSDP2 cuts the gradients of a module from one storage
        pieces.sort(key=lambda piece: piece[:2])
        apart = all(a[1] <= b[0] for a, b in zip(pieces, pieces[1:], strict=False))
        bases = _bases_alone([p for *_, p in pieces])
        if apart and bases is not None and _storage_Use_Count(storage) == USES_ALONE - 1 + len(pieces) + bases:
            found += [p for *_, p in pieces]
    return found


def _bases_alone(params: list[Tensor]) -> int | None:
    """How many tensors the gradients are views of, as autograd notes them; None if something else has one of those."""
    views: dict[int, int] = defaultdict(int)
    grads = [local(p.grad) for p in params if p.grad is not None]
    for g in grads:
        if g._base is not None:
            views[id(g._base)] += 1
    for g in grads:
        if g._base is not None and _references_of_base(g) != (_AS_BASE, _BASE_OF_ONE - 1 + views[id(g._base)], 0):
            return None
    return len(views)


def _references_of_base(g: Tensor) -> tuple[int, int, int]:
    return sys.getrefcount(g._base), g._base._use_count(), getweakrefcount(g._base)  # type: ignore[union-attr]


def _only_here(p: Tensor) -> bool:
    """Whether p.grad is all that refers to the gradient: no variable, no list, no weak reference, nothing in C++."""
    if type(p.grad) is not Tensor and not (is_dtensor(p.grad) and type(p.grad._local_tensor) is Tensor):  # type: ignore
        return False
    if sys.getrefcount(p.grad) != _AS_GRAD or p.grad._use_count() != 2 or getweakrefcount(p.grad):  # type: ignore
        return False
    return type(p.grad) is Tensor or (
        sys.getrefcount(p.grad._local_tensor) == _AS_ATTRIBUTE  # type: ignore[union-attr]
        and p.grad._local_tensor._use_count() == 1  # type: ignore[union-attr]
        and not getweakrefcount(p.grad._local_tensor)  # type: ignore[union-attr]
    )


def _fits(g: Tensor, w: Tensor) -> bool:
    """Whether the elements of a gradient lie in memory as those of the parameter do, without gaps."""
    return (
        type(w) in PLAIN
        and (g.dtype, g.device, g.shape, g.layout) == (w.dtype, w.device, w.shape, torch.strided)
        and not (g.is_conj() or g.is_neg() or g.requires_grad or g.is_inference())
        and all(a == b for a, b, size in zip(g.stride(), w.stride(), g.shape, strict=True) if size > 1)
        and _is_dense(g)
    )


def _is_dense(t: Tensor) -> bool:
    return t.numel() == 0 or last_offset(t) == t.numel() - 1


def _storage_alone(g: Tensor) -> int | None:
    """The address of its StorageImpl, if no Python object of that is somewhere else and torch has allocated its memory:
    that of NumPy, DLPack, files and other processes is seen by whoever lent it."""
    storage = g.untyped_storage()
    if sys.getrefcount(storage) != _AS_STORAGE or getweakrefcount(storage):
        return None
    lent = not storage.resizable() or (g.is_cpu and storage.is_shared())
    return None if lent else storage._cdata


def _references_to_storage(g: Tensor) -> int:
    """As ``_storage_alone`` counts them: Python 3.14 does not count the variables of the function that asks."""
    storage = g.untyped_storage()
    return sys.getrefcount(storage)


class _Example:
    """How many references there are where nobody else has one; those of the call that asks are among them."""

    def __init__(self) -> None:
        self.p = torch.nn.Parameter(torch.empty(1, device="cpu"))
        self.p.grad = torch.empty(1, device="cpu")
        self.attribute = torch.empty(1, device="cpu")
        self.view = torch.empty(1, device="cpu").view(1)


_example = _Example()
_AS_GRAD, _AS_ATTRIBUTE = sys.getrefcount(_example.p.grad), sys.getrefcount(_example.attribute)
_AS_STORAGE = _references_to_storage(_example.attribute)
_AS_BASE, _BASE_OF_ONE, _ = _references_of_base(_example.view) if _KNOWN else (0, 0, 0)
del _example
