"""Whether the tensors of a launch plan are those that it was made for: csrc/plan/match.cpp and watch.cpp in Python.

``matcher`` is a plan in C++, where there is one: it compares in a tenth of the time.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

from torch import Tensor

from .launch_groups import TensorGuards

_END = object()
_CONSTANT = (type(None), bool, float, int, str)

grad_of = attrgetter("grad")
_params_of = itemgetter("params")


def addresses_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _same(found: Iterable[Any], known: Sequence[Any]) -> bool:
    """Whether these are the same objects; ``known`` has _END as its last one."""
    return all(map(is_, chain(found, (_END,)), known))


def has_memory(t: Tensor) -> bool:
    """Whether all elements of a dense tensor are in its storage."""
    end = (t.storage_offset() + t.numel()) * t.element_size()
    return t.numel() == 0 or (t.data_ptr() != 0 and end <= t.untyped_storage().nbytes())


def _is_constant(x: Any) -> bool:
    return type(x) in _CONSTANT or (type(x) is tuple and all(map(_is_constant, x)))


def complete(tensors: list[Any]) -> list[Tensor]:
    """Nothing where one is missing."""
    return [] if any(t is None for t in tensors) else tensors


def guard(*tensors: Tensor) -> Callable[..., bool]:
    """Compares tensors with these, but for their addresses, without keeping them."""
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


class Match:
    """The tensors and other objects of one optimizer."""

    def __init__(
        self, grads: Sequence[Tensor], groups: list[Any], everything: list[Tensor], active: list[Tensor],
        idle: list[Tensor], masters: list[Any], states: list[list[Tensor]], backups: list[Any], steps: list[Tensor],
        state: dict[Any, Any], matcher: Any,
    ) -> None:  # fmt: skip
        self._groups, self._everything = [*groups, _END], [*everything, _END]
        self._active, self._idle = active, idle
        self._masters, self._backups = complete(masters), [b for b in backups if b is not None]
        self._state, self._matcher = state, matcher
        self._state_dicts = [*state.values(), _END]
        self._state_tensors = [*chain.from_iterable(d.values() for d in state.values()), _END]
        self._own = [*active, *self._masters]  # what all phases compare, beside gradients and backups
        self._others = [*chain.from_iterable(states), *steps]
        self._perturb_guard = guard(*grads, *self._own)
        self._update_guard = guard(*grads, *self._own, *self._others)
        self._first_guard = guard(*grads)
        self._restore_guard = guard(*self._own)
        self._own_addresses, self._backup_addresses = addresses_of(self._own), addresses_of(self._backups)
        self._other_addresses = addresses_of(self._others)
        self._held: list[Tensor] = []  # gradients, while kernels are started
        self._hyperparams: list[tuple[list[Any], list[Any]]] | None = None
        self._version = 0

    def poll(self, groups: list[Any]) -> int:
        """Bit 0: whether these are the plan's groups, with its parameters; from bit 1 on a number that changes whenever
        a hyperparameter may have changed."""
        if self._matcher is not None:
            return self._matcher.poll(groups)
        seen = self._hyperparams
        if seen is None or not (
            len(seen) == len(groups)
            and all(
                list(group) == names and _same(group.values(), values)
                for group, (names, values) in zip(groups, seen, strict=True)
            )
        ):
            self._version += 1
            constant = all(
                _is_constant(value) or (type(value) is list and name in ("params", "param_names"))
                for group in groups for name, value in group.items()
            ) and all(type(group) is dict for group in groups)  # fmt: skip
            self._hyperparams = [(list(group), [*group.values(), _END]) for group in groups] if constant else None
        same = _same(groups, self._groups) and _same(chain.from_iterable(map(_params_of, groups)), self._everything)
        return self._version << 1 | same

    def _grads(self) -> list[Tensor] | None:
        if any(map(is_not, map(grad_of, self._idle), repeat(None))):
            return None
        return list(map(grad_of, self._active))

    def _in_place(self, backups: bool) -> bool:
        return self._own_addresses == addresses_of(self._own) and (
            not backups or self._backup_addresses == addresses_of(self._backups)
        )

    def _same_state(self) -> bool:
        """Whether the optimizer's state holds the same tensors."""
        try:
            found = chain.from_iterable(map(dict.values, self._state.values()))
            return _same(self._state.values(), self._state_dicts) and _same(found, self._state_tensors)
        except TypeError:  # an entry is no dict
            return False

    def _match(self, updating: bool, restores: bool) -> Any:
        """The addresses of the gradients, which are held until _release(); None if anything is not as it was."""
        if self._matcher is not None:
            return self._matcher.match(updating, restores)
        grads = self._grads()
        if grads is None or not self._in_place(restores or not updating):
            return None
        if not (self._update_guard(*grads, *self._own, *self._others) if updating
                else self._perturb_guard(*grads, *self._own)):  # fmt: skip
            return None
        if (updating or self._masters) and not self._same_state():
            return None
        if updating and self._other_addresses != addresses_of(self._others):
            return None
        self._held = grads
        return addresses_of(grads)

    def _match_norm(self) -> Any:
        """The same for the norm, which reads parameters, masters and gradients."""
        if self._matcher is not None:
            return self._matcher.match_norm()
        grads = self._grads()
        if grads is None or not self._in_place(False) or not self._perturb_guard(*grads, *self._own):
            return None
        if self._masters and not self._same_state():
            return None
        self._held = grads
        return addresses_of(grads)

    def _release(self) -> None:
        self._held = []
        if self._matcher is not None:
            self._matcher.release()

    def _grads_now(self) -> list[Tensor]:
        """While they are held."""
        return self._held or list(map(grad_of, self._active))
