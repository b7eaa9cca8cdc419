"""The DTensors of a launch plan, whose kernels and comparisons know local tensors alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from rst_fused._step.sharding import is_dtensor, same_layout, settle_grad, waited

# Reading attributes costs a tenth of what the methods do that give the same.
_local_of, _spec_of = attrgetter("_local_tensor"), attrgetter("_spec")
_grad_of = attrgetter("grad")
set_grad: Any = vars(torch._C.TensorBase)["grad"].__set__


def _set_grads(tensors: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    deque(map(set_grad, tensors, grads), maxlen=0)


class Shards:
    """For the time of a call each local tensor has the local gradient as its own, where a plan looks for it."""

    def __init__(self, params: Sequence[Tensor], companions: Sequence[Tensor], in_order: Sequence[Tensor]) -> None:
        """params: those with a gradient; companions: state and masters; in_order: all DTensors, in the order in which
        every rank settles gradients, whatever executor it takes."""
        self._in_order = in_order
        self._params: list[Any] = [p for p in params if is_dtensor(p)]
        self._dtensors = [*self._params, *(t for t in companions if is_dtensor(t))]
        self._tensors = list(map(_local_of, self._dtensors))
        self._shards: list[Tensor] = self._tensors[: len(self._params)]
        self._specs: list[Any] = []  # of the gradients that were last seen to be sharded as their parameters

    def are_current(self) -> bool:
        """Whether every DTensor has the local tensor that the plan knows."""
        return all(map(is_, map(_local_of, self._dtensors), self._tensors))

    @contextmanager
    def lent(self) -> Iterator[bool]:
        """Yields whether the local tensors have gradients."""
        grads = self._grads() if self.are_current() else None
        if grads is None:
            yield False
            return
        try:
            _set_grads(self._shards, grads)
            yield True
        finally:
            self.take_back()

    def take_back(self) -> None:
        _set_grads(self._shards, repeat(None))

    def drop_grads(self) -> None:
        _set_grads(self._params, repeat(None))

    def _grads(self) -> list[Tensor] | None:
        """The local gradients; None where one is missing, or cannot be brought into the layout of its parameter."""
        grads: list[Any] = list(map(_grad_of, self._params))
        try:
            specs = list(map(_spec_of, grads))
        except AttributeError:
            return None
        if not (len(specs) == len(self._specs) and all(map(is_, specs, self._specs))):
            for p in self._in_order:
                settle_grad(p)
            grads = list(map(_grad_of, self._params))
            if not all(map(same_layout, self._params, grads)):
                return None
            self._specs = specs if specs == list(map(_spec_of, grads)) else []
        return [g if type(g) is Tensor else waited(g) for g in map(_local_of, grads)]
