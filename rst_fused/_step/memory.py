"""What an optimizer and its parameters hold in memory, by kind. It looks at sizes alone: nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rst_fused._step.base import StepOptimizer
from rst_fused._step.state_dtypes import MASTERS


@dataclass(frozen=True, repr=False)
class Memory:
    """Bytes on this rank, by kind; each piece of memory counts once. As a string, a table."""

    elements: int  # of all parameters
    weights: int
    gradients: int  # in p.grad
    state: dict[str, int]  # of the base optimizer, by name
    masters: int
    backups: int  # of weights: kept from step to step
    weights_in_gradients: int  # between perturb() and step(): in the memory of the first gradients
    first_gradients: int  # between perturb() and step() of G-RST
    parameters: int  # how many there are, and
    backed_up: int  # how many of them have a backup

    @property
    def total(self) -> int:
        return sum(self._rows().values())

    def _rows(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            **self.state,
            "masters": self.masters,
            "backups": self.backups,
            "weights in gradients' memory": self.weights_in_gradients,
            "first gradients": self.first_gradients,
        }

    def __repr__(self) -> str:
        rows = {**self._rows(), "total": self.total}
        names, sizes = max(map(len, rows)), [f"{size:,}" for size in rows.values()]
        width = max(len("bytes"), *map(len, sizes))
        lines = [f"{'':{names}}  {'bytes':>{width}}  per element of {self.elements:,}"]
        for (name, size), text in zip(rows.items(), sizes, strict=True):
            each = f"{size / self.elements:.2f}" if self.elements else "-"
            lines.append(f"{name:{names}}  {text:>{width}}  {each:>11}")
        return "\n".join([*lines, f"backups of their own: {self.backed_up} of {self.parameters} parameters"])


def memory_of(opt: StepOptimizer) -> Memory:
    step, owner = opt._step_state, opt if opt.base is None else opt.base
    params = [p for group in owner.param_groups for p in group["params"]]
    counted: set[tuple[int, int, int]] = set()

    def size(*tensors: Any) -> int:
        """Of the memory that was not counted before."""
        found = {_place(t) for t in _plain(tensors)} - counted
        counted.update(found)
        return sum(nbytes for _, _, nbytes in found)

    weights = size(*params)  # in this order, since masters and backups are also among what keeps weights
    states = owner.state.values() if opt.master_weights else ()
    masters = size(*(t for state in states for name, t in state.items() if name in MASTERS))
    backups = size(*step.backups.values())
    state: dict[str, int] = {}
    for of_one in owner.state.values():
        for name, value in of_one.items() if isinstance(of_one, Mapping) else ():
            if name not in MASTERS or not opt.master_weights:
                state[name] = state.get(name, 0) + size(value)
    firsts = step.first_grads
    return Memory(
        elements=sum(t.numel() for t in _plain(params)), weights=weights, masters=masters, backups=backups,
        state={name: nbytes for name, nbytes in state.items() if nbytes},
        weights_in_gradients=size(*step.saved.values()),
        first_gradients=size(*(firsts.as_list() if step.holds_first_grads_elsewhere() else firsts.values())),
        gradients=size(*(p.grad for p in params)),
        parameters=len(params), backed_up=len(step.backups),
    )  # fmt: skip


def _plain(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in it that have memory: of a DTensor the one on this rank, whatever still fills it."""
    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            yield from _plain(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield from (value._indices(), value._values()) if value.layout is torch.sparse_coo else (value,)
        elif isinstance(value, Mapping):
            yield from _plain(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _plain(value)


def _place(t: Tensor) -> tuple[int, int, int]:
    """Which memory. Not by its address: to ask for that makes a lazy copy a real one."""
    return t.untyped_storage()._cdata, int(t.storage_offset()) * t.element_size(), t.numel() * t.element_size()
