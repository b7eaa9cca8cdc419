"""Whether all ranks take the same steps: each one draws by itself, which is right while all draw from the same numbers.

They compare what they draw from, through the store of their process group and not by collectives: a rank without data,
which follows the collectives of the others in join(), or an optimizer that some ranks do not have, would pair those
with the wrong ones. At the first draw of a StepState (a new optimizer, or one that has loaded) all compare with the
first rank of the group; then, every EVERY steps, that one writes down where it stands, and the others look, without
waiting.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from rst_fused import schedule as schedules

TIMEOUT = 60.0  # seconds for the others to come to their first step, or half of the store's own timeout
EVERY = 100  # steps from one look at the first rank to the next
_KEPT = 4  # windows of the first rank in the store, for ranks that are behind
_SHOWN = 4  # values in a message
_REMEDY = (
    "Every rank draws its steps by itself and has to draw the same ones: give all of them the same arguments and "
    "state_dict (a seed that depends on the rank belongs in the data loader), or, to an optimizer that not all ranks "
    "share, process_group: the group of those that do, or None for this process alone"
)
_Differing = dict[int, dict[str, list[Any]]]  # by rank and name: the value of the first rank and its own
_checks: dict[str, int] = {}  # in this process so far, by group: all of its ranks count the same ones


# --- the group --------------------------------------------------------------------------------------------------------
def check_group(given: Any) -> Any:
    """The argument process_group; raises TypeError for what is none."""
    if given is None or (isinstance(given, str) and given == "auto"):
        return given
    if dist.is_available() and isinstance(given, dist.ProcessGroup):
        return given
    hint = ", as mesh.get_group() gives of a DeviceMesh" if hasattr(given, "get_group") else ""
    if dist.is_available() and isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER:
        hint = "; this process is not in the group that new_group() was asked for"
    raise TypeError(f"process_group={given!r}: expected 'auto', None or a torch.distributed.ProcessGroup{hint}")


def group_of(given: Any) -> Any:
    """The group of the ranks that take the same steps; None where this process is alone."""
    if given is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if isinstance(given, str) else given
    if dist.get_world_size(group) < 2 or dist.get_backend(group) == "fake":  # ranks that do not exist
        return None
    return group


# --- what is compared -------------------------------------------------------------------------------------------------
def _described(given: Any) -> str:
    """A schedule or gamma in words that are the same on every rank: of a function, nothing but that it is one."""
    parts = [v for v in getattr(given, "__dict__", {}).values() if callable(v)]
    ours = type(given).__module__ == schedules.__name__ and type(given) is not schedules.from_callable
    if isinstance(given, (int, float)) or (ours and all(_described(part) != "a function" for part in parts)):
        return repr(given)
    return "a function"


def _plain(value: Any) -> Any:
    """A hyperparameter as a number, a flag or a list of those; None for what is none, or would wait for a GPU."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if type(value) is torch.Tensor and value.is_cpu and value.numel() == 1 else None
    if isinstance(value, (tuple, list)):
        numbers = [_plain(x) for x in value]
        return None if None in numbers else numbers
    return None


def _record(opt: Any, t: int, p: float, gamma: float) -> dict[str, Any]:
    """Where an optimizer stands, and what it draws from."""
    base = type(opt.base).__name__ if opt.rule is None else opt.rule.name
    record = {
        "seed": opt.seed, "steps": t, "sam_steps": opt._step_state.sam_steps,
        "schedule": _described(opt.schedule), "p(t)": float(p), "gamma": _described(opt.gamma), "gamma(t)": gamma,
        "adaptive": opt.adaptive, "eta": opt.eta, "m_sharpness": opt.m_sharpness,
        "master_weights": opt.master_weights, "stochastic_rounding": opt.stochastic_rounding, "base": base,
        "state_dtype": str(opt.state_dtype),
        "the number of parameter groups": len(opt.param_groups),
        "the number of parameters": sum(len(group["params"]) for group in opt.param_groups),
    }  # fmt: skip
    for i, group in enumerate(opt.param_groups):
        for name, value in group.items():
            if name != "params" and (plain := _plain(value)) is not None:
                record[f"param_groups[{i}][{name!r}]"] = plain
    return record


def _differences(first: dict[str, Any], mine: dict[str, Any]) -> dict[str, list[Any]]:
    """By name, the value on the first rank and mine. As they were written: NaN is what it is."""
    names = dict.fromkeys([*first, *mine])
    pairs = {name: [first.get(name, "missing"), mine.get(name, "missing")] for name in names}
    return {name: pair for name, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


# --- how --------------------------------------------------------------------------------------------------------------
class Agreement:
    """What one StepState and those of the other ranks have compared."""

    def __init__(self, group: Any) -> None:
        from torch.distributed.distributed_c10d import _get_process_group_store

        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.me = dist.get_rank(group)  # in the group
        try:
            self.store = cast(Any, _get_process_group_store(group))
        except KeyError:
            raise RuntimeError(
                "process_group was destroyed: set opt.process_group to one that exists, to 'auto', or to None"
            ) from None
        # By name and members: a group of the same name may have had others, before torch.distributed was started anew.
        name = hashlib.sha1(f"{group.group_name} {self.ranks}".encode()).hexdigest()[:12]
        _checks[name] = _checks.get(name, 0) + 1
        self.key = f"rst_fused/{name}/{_checks[name]}"
        self.timeout = min(TIMEOUT, self.store.timeout.total_seconds() / 2)
        self.compared = 0  # times that all ranks were waited for
        self.absent: list[int] = []  # those that had not come then, or have no data
        self.awaited: tuple[str, dict[str, Any]] | None = None  # the key of their first record, and mine at that time
        self.agreed_at = 0  # the last step at which this rank knows that it stood where the first one did
        self.pending: tuple[int, str] | None = None  # a window that is not compared yet, and where this rank stood
        self.pending_since, self.looks = 0.0, 0  # when, and how often it was looked for in vain

    def compare(self, record: dict[str, Any], remedy: str, missing: str, has_data: bool = True) -> None:
        """Raises RuntimeError on every rank if a record differs from the first rank's. Warns of ranks that are not
        there after the timeout. A few accesses to the store for each rank.

        missing: what a rank that is not there did not do. has_data: whether this one goes on.
        """
        self.compared += 1
        stem = f"{self.key}/{self.compared}"
        self.store.set(f"{stem}/{self.me}", json.dumps([record, has_data]))
        if self.me == 0:
            differing, late = self._judge(stem, record, has_data)
        else:
            differing, late = self._ask(stem, record)
        if late:
            self.absent += late
            self._warn_of(late, missing)
        if differing:
            raise RuntimeError(f"{self._words(differing)}. {remedy}")

    def _judge(self, stem: str, record: dict[str, Any], has_data: bool) -> tuple[_Differing, list[int]]:
        """On the first rank: reads all records, and writes down which ones differ, and who is missing."""
        expected = [rank for rank in range(1, len(self.ranks)) if rank not in self.absent]
        came = self._wait([f"{stem}/{rank}" for rank in expected])
        late = [] if came else [rank for rank in expected if not self.store.check([f"{stem}/{rank}"])]
        differing: _Differing = {}
        there = [rank for rank in expected if rank not in late]
        keys = [f"{stem}/{rank}" for rank in there]
        for rank, key, written in zip(there, keys, self.store.multi_get(keys) if keys else [], strict=True):
            theirs, takes_steps = json.loads(written)
            if not takes_steps:
                self.absent.append(rank)
            if found := _differences(record, theirs):
                differing[rank] = found
            self.store.delete_key(key)
        self.store.set(f"{stem}/verdict", json.dumps([list(differing.items()), late, has_data]))
        if late:
            self.awaited = self.awaited or (stem, record)
        return differing, late

    def _look_for_late_ones(self) -> None:
        """On the first rank, without waiting: those that have come since."""
        if self.awaited is None:
            return
        stem, record = self.awaited
        for rank in [rank for rank in self.absent if self.store.check([f"{stem}/{rank}"])]:
            self.absent.remove(rank)
            if found := _differences(record, json.loads(self.store.get(f"{stem}/{rank}"))[0]):
                raise RuntimeError(f"{self._words({rank: found})}. {_REMEDY}")

    def _ask(self, stem: str, record: dict[str, Any]) -> tuple[_Differing, list[int]]:
        """On the others: what the first rank found."""
        if not self._wait([f"{stem}/0"]):
            return {}, [0]
        mine = _differences(json.loads(self.store.get(f"{stem}/0"))[0], record)
        if not self._wait([f"{stem}/verdict"], extra=5.0):  # the first rank may be waiting for one that does not come
            return {self.me: mine} if mine else {}, []
        differing, late, has_data = json.loads(self.store.get(f"{stem}/verdict"))
        if not has_data:
            self.absent.append(0)
        found = {rank: differences for rank, differences in differing}
        return {**found, self.me: mine} if mine and self.me in late else found, []

    def _wait(self, keys: list[str], extra: float = 0.0) -> bool:
        """Whether all keys came in time. Asks ever less often, and an interrupt gets through."""
        start = time.monotonic()
        while keys and not self.store.check(keys):
            waited = time.monotonic() - start
            if waited > self.timeout + extra:
                return False
            time.sleep(min(max(waited / 10, 0.0005), 0.5))
        return True

    def follow(self, opt: Any, t: int, p: float, gamma: float) -> None:
        """Where a look at the first rank is due. Raises RuntimeError if this one stood elsewhere at the same step."""
        if self.pending is None:
            window, record = t // EVERY, _record(opt, t, p, gamma)
            written = json.dumps(record)
            if self.me == 0:
                self.store.set(f"{self.key}/at/{window}", written)
                if window >= _KEPT:
                    self.store.delete_key(f"{self.key}/at/{window - _KEPT}")
                self._look_for_late_ones()
            else:
                self.pending, self.pending_since, self.looks = (window, written), time.monotonic(), 0
            return
        window, mine = self.pending
        key = f"{self.key}/at/{window}"
        if not self.store.check([key]):  # the first rank may be behind, where nothing keeps it and this one together
            self.looks += 1
            if time.monotonic() - self.pending_since > self.timeout:
                self.pending = None
                warnings.warn(
                    f"{self._names([0])} has not said where it stands since step {self.agreed_at}, so that nobody "
                    f"knows whether {self._names([self.me])} still takes the same steps. Where it has no data left, in "
                    f"join(), that is right. {_REMEDY}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        self.pending = None
        first = self.store.get(key).decode()
        if first != mine and (found := _differences(json.loads(first), json.loads(mine))):
            raise RuntimeError(f"{self._words({self.me: found})}. It came about after step {self.agreed_at}. {_REMEDY}")
        self.agreed_at = json.loads(mine)["steps"]

    def due_after(self, t: int) -> int:
        """The next step at which ``follow`` has something to do. The ranks take turns to look, each in its own step."""
        if self.pending is None:
            return (t // EVERY + 1) * EVERY
        return (self.pending[0] + self.looks) * EVERY + 2 + self.me % (EVERY - 2)

    # --- words --------------------------------------------------------------------------------------------------------
    def _names(self, members: Sequence[int]) -> str:
        """Of members of the group, as the ranks of torch.distributed: rank 3; ranks 1, 4-9."""
        ranks = sorted(self.ranks[member] for member in members)
        spans: list[list[int]] = []
        for rank in ranks:
            if spans and rank == spans[-1][1] + 1:
                spans[-1][1] = rank
            else:
                spans.append([rank, rank])
        names = ", ".join(str(a) if a == b else f"{a}{'-' if b > a + 1 else ', '}{b}" for a, b in spans)
        return f"rank{'s' if len(ranks) > 1 else ''} {names}"

    def _words(self, differing: _Differing) -> str:
        first = self._names([0])
        return f"{self._names([*differing])} and {first}, the first of the process group, do not agree: " + "; ".join(
            self._values(differing, first)
        )

    def _values(self, differing: _Differing, first: str) -> Iterator[str]:
        for name in dict.fromkeys(name for found in differing.values() for name in found):
            pairs = [(rank, found[name]) for rank, found in differing.items() if name in found]
            others = ", ".join(f"{theirs!r} on {self._names([rank])}" for rank, (_, theirs) in pairs[:_SHOWN])
            more = f" and others on {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
            yield f"{name} is {pairs[0][1][0]!r} on {first}, {others}{more}"

    def _warn_of(self, late: Sequence[int], missing: str) -> None:
        warnings.warn(
            f"{self._names(late)} {missing} within {self.timeout:g} s of "
            f"{self._names([self.me])}, so that nobody knows whether all ranks take the same ones; this one goes on. "
            f"For a rank without data, in join(), that is right. {_REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )


# --- when -------------------------------------------------------------------------------------------------------------
def check(opt: Any, t: int, p: float, gamma: float, has_data: bool = True) -> None:
    """At a draw, from StepState.check_at on. Raises RuntimeError, before anything changes, unless the ranks agree."""
    state = opt._step_state
    if state.agreement is None:
        group = group_of(opt.process_group)
        if group is None:
            state.check_at = math.inf
            return
        agreement = Agreement(group)
        agreement.compare(_record(opt, t, p, gamma), _REMEDY, "took no step with this optimizer", has_data)
        agreement.agreed_at = t
        state.agreement, state.check_at = agreement, agreement.due_after(t)
        state.norm_unseen = has_data and 0 not in agreement.absent  # who would compare?
        return
    try:
        state.agreement.follow(opt, t, p, gamma)
    finally:  # whoever goes on after the error is told again
        state.check_at = state.agreement.due_after(t)


def check_norm(opt: Any) -> None:
    """Once, before the first update that mixes the gradients of both passes: raises RuntimeError unless all ranks have
    the same ||g1||, bit for bit. Each would mix in its own g1 otherwise, and the replicas drift apart. Waits for a
    GPU."""
    state = opt._step_state
    norm = float(opt._devices[0].stats[0])
    state.agreement.compare(
        {"||g1||": norm},
        "With gamma != 1 the update takes in the gradients of both passes, so that both need the all-reduce: run the "
        "first backward outside of no_sync() too (of micro-batches the last one). To perturb every rank by its own "
        "gradient take gamma=1 and m_sharpness=True",
        "took no step that mixes gradients (gamma != 1)",
    )
    state.norm_unseen = False
