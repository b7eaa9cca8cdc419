"""Executor 2 of a step: the registered ops over lists of tensors. It serves every backend, and torch.compile."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product, repeat
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rst_fused._backends import bump_versions
from rst_fused._step import columns, first_grads, norm
from rst_fused._step.amp import Scaling
from rst_fused._step.base import StepOptimizer
from rst_fused._step.devices import DeviceState, device_of
from rst_fused._step.rules import hyperparam_tensor
from rst_fused._step.sharding import local, locals_of, with_locals
from rst_fused._step.shards import set_grad
from rst_fused._step.state import StepState
from rst_fused._step.state_dtypes import copies_masters, kept_by_master
from rst_fused._step.validation import is_usable, names_of_lost, still_fits

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # an op and its arguments
_RUN = operator.methodcaller("__call__")


def run_together(calls: Iterable[Callable[[], Any]]) -> None:
    """Within one C call, in which Python interrupts no call that is not Python code itself."""
    deque(map(_RUN, calls), maxlen=0)


def frees_grads(params: Iterable[Tensor]) -> Call:
    """p.grad = None, in one C call."""
    return deque, (map(set_grad, list(params), repeat(None)), 0)


def setters(state: StepState, fields: dict[str, Any]) -> list[partial[None]]:
    return [partial(setattr, state, name, value) for name, value in fields.items()]


@torch.no_grad()
def perturb(opt: StepOptimizer, measured: bool = False) -> None:
    """grad_norm, unless it was ``measured``, and perturb_ over all groups."""
    state, everything = opt._step_state, range(len(opt.param_groups))
    later = is_dynamo_compiling() or opt.capturing  # what is called now runs then
    if len(opt._devices) > 1 and opt.capturing:
        devices = " and ".join(str(device.device) for device in opt._devices)
        raise RuntimeError(f"a CUDA graph holds the work of one GPU, but parameters are on {devices}")
    calls: list[tuple[DeviceState, columns.Columns]] = []
    parts: list[norm.Part] = []
    for device in opt._devices:
        here = [columns.gather(opt, everything, False, kind, device) for kind in columns.master_kinds(opt)]
        if not later:
            device.rng[1] = state.steps
        parts += _parts(opt, device, here, opt.adaptive)
        calls += [(device, c) for c in here if c.params]
    home = opt._devices[0]
    if not measured:
        norm.grad_norm(opt, parts, home.stats, opt.adaptive)
    for device in opt._devices[1:]:
        device.stats.copy_(home.stats)
    first_index = 0
    for device, c in calls:
        rho = hyperparam_tensor(columns.rho_rows(c), columns.graph_inputs(opt, c), c.params[0].device).flatten()
        kept = c.backups if len(c.backups) > 0 else c.masters
        saved = {**state.saved, **dict(zip(c.params, kept, strict=True))}
        after: dict[str, Any] = {"saved": saved}
        if state.mixing:
            kept_grads = first_grads.in_graph(c.grads) if is_dynamo_compiling() else c.grads
            after["first_grads"] = {**state.first_grads, **dict(zip(c.params, kept_grads, strict=True))}
        arguments: tuple[Any, ...] = (
            locals_of(c.params), locals_of(c.grads), c.backups, locals_of(c.masters),
            device.stats, rho, c.sizes, opt.adaptive, opt.eta, opt.stochastic_rounding, device.rng, first_index,
            c.shards,
        )  # fmt: skip
        swapped = [p for p, b, g in zip(c.params, c.backups, arguments[1], strict=False) if b is g]
        _perturb_and_note(opt, device.backend.ops.perturb_, arguments, c.params, swapped, after)
        first_index += len(c.params)
        for p in c.params:
            p.grad = None


@torch.no_grad()
def grad_norm(opt: StepOptimizer) -> None:
    """||g|| of the gradients in p.grad, in the first device's update_stats."""
    everything = range(len(opt.param_groups))
    parts: list[norm.Part] = []
    for device in opt._devices:
        here = [columns.gather(opt, everything, False, kind, device) for kind in columns.master_kinds(opt)]
        parts += _parts(opt, device, here, False)
    norm.grad_norm(opt, parts, opt._devices[0].update_stats, False)


def _parts(opt: StepOptimizer, device: DeviceState, here: list[columns.Columns], adaptive: bool) -> list[norm.Part]:
    """What the norm takes of the parameters on a device."""
    parts = []
    for number in range(opt._sharding.part_count):
        grads: list[Tensor] = []
        params: list[Tensor] = []
        masters: list[Tensor] = []  # a parameter without one stands for itself
        some = adaptive and any(c.masters for c in here)
        for c in here:
            mine = [i for i, part in enumerate(c.parts) if part == number]
            grads += [c.grads[i] for i in mine]
            params += [c.params[i] for i in mine] if adaptive else []
            masters += [(c.masters or c.params)[i] for i in mine] if some else []
        parts.append(norm.Part(device, number, grads, params, masters))
    return parts


def _perturb_and_note(
    opt: StepOptimizer, op: Callable[..., Any], arguments: tuple[Any, ...], owners: list[Tensor],
    swapped: list[Tensor], after: Any,
) -> None:  # fmt: skip
    """Runs perturb_, and the step state is ``after``, in one C call. Where the op is itself Python code it may be
    interrupted: then what it has moved is noted, which the versions of the parameters tell. The weights of those are
    kept, for a version changes after the backup was written. The gradients of those that are ``swapped`` go first:
    nobody may find weights in p.grad.
    """
    state, params = opt._step_state, arguments[0]
    if is_dynamo_compiling():
        op(*arguments)
        state.become(after)
        return
    versions = [p._version for p in params]
    free, freed = frees_grads(swapped)
    calls: list[partial[Any]] = [
        partial(free, *freed), partial(getattr(op, "_op", op), *arguments),
        partial(torch._C._increment_version, with_locals(owners)),
    ]  # fmt: skip
    try:
        run_together([*calls, *setters(state, after)])
    except BaseException:
        kept = zip(owners, params, versions, strict=True)
        moved = {owner: after["saved"][owner] for owner, p, version in kept if p._version != version}
        state.saved = {**state.saved, **moved}
        raise


@torch.no_grad()
def update(
    opt: StepOptimizer, scaling: Scaling, after: dict[str, Any], only: list[list[Tensor]] | None = None,
    others: list[Call] | None = None,
) -> None:  # fmt: skip
    """Restore, mix and base step, in one op per set of groups that agree in all flags; then the step state is
    ``after``. ``only``: of each group, these parameters. ``others``: calls in place of those that count their steps and
    bring back the weights of parameters without gradient."""
    rule, state = opt.rule, opt._step_state
    assert rule is not None
    if not is_dynamo_compiling():
        state.take_first_grads()
        state.take_saved()
        for device in opt._devices if opt.state_dtype is not None and not opt.capturing else ():
            device.rng[1] = state.steps
    firsts, saved = state.first_grads, state.saved
    updates: list[Call] = []
    counts: list[Call] = []
    updated: list[list[Tensor]] = []
    new: list[Tensor] = []  # with a first step that has hyperparameters of its own
    for flags, indices in columns.partition(opt):
        assert flags is not None
        for device, kind in product(opt._devices, columns.master_kinds(opt)):
            c = columns.gather(opt, indices, True, kind, device, only)
            if not c.params:
                continue
            if c.steps and c.steps[0].is_cpu and not is_dynamo_compiling() and opt.capturing:
                raise RuntimeError("Adam in a CUDA graph: its step count must lie on the GPU, pass capturable=True")
            restores = state.perturbed and not (c.masters and copies_masters(opt))
            backups = [saved.get(p, p) for p in c.params] if restores else []
            mixed = [firsts.get(p, g) for p, g in zip(c.params, c.grads, strict=True)] if state.mixing else []
            hyper = hyperparam_tensor(columns.hyperparam_rows(opt, c), columns.graph_inputs(opt, c), c.params[0].device)
            steps = torch.stack([step.reshape(()) for step in c.steps]).double() + 1 if c.steps else None
            lists = tuple(map(locals_of, (c.params, c.grads, backups, mixed)))
            states, masters = [locals_of(column) for column in c.states], locals_of(c.masters)
            rng = None if opt.state_dtype is None else device.rng
            rest = (*scaling.on(device.device), rng, c.indices, c.shards)
            updates.append(rule.call(device.backend.ops, lists, states, masters, hyper, steps, c.sizes, flags, rest))
            updated.append(c.params)
            if c.steps:
                counts.append((torch._foreach_add_, (c.steps, _increments(c.steps, scaling.found_inf))))
            new += c.of_first_steps()
    if others is None:
        done = {p for params in updated for p in params}
        left = {p: w for p, w in state.saved.items() if p not in done}
        others = [*(restore_calls(opt, left) if state.perturbed else []), *counts]
    _commit(opt, updates, updated, others, after)
    if new and scaling.found_inf is not None and bool((scaling.found_inf != 0).any()):
        for p in new:  # the step was skipped: the first one that counts starts these buffers, undampened
            for name in rule.states:
                opt.state[p].pop(name, None)


def _increments(steps: list[Tensor], found_inf: Tensor | None) -> Any:
    """What this step adds to each counter: 1, or 0 where AMP found an overflow. A counter on the CPU must wait for the
    GPU then: capturable=True keeps it there."""
    if found_inf is None:
        return 1
    return [(found_inf == 0).to(step.device, step.dtype).squeeze() for step in steps]


def _commit(
    opt: StepOptimizer, updates: list[Call], updated: list[list[Tensor]], others: list[Call], after: dict[str, Any]
) -> None:
    """Runs the calls; then the step state is ``after``. Weights, state and counters are all as before or all as after,
    whatever interrupts this: the calls follow one another within one C call, which Python does not interrupt between
    them; and where an op is itself Python code (which writes its results in one go), what it began is finished.
    """
    state = opt._step_state
    if is_dynamo_compiling():
        for op, arguments in (*updates, *others):
            op(*arguments)
        state.become(after)
        return
    calls: list[partial[Any]] = [partial(getattr(op, "_op", op), *arguments) for op, arguments in (*updates, *others)]
    for params in updated:
        calls.append(partial(torch._C._increment_version, with_locals(params)))  # which the compiled ops do not
    calls += setters(state, after)
    versions = [[p._version for p in locals_of(params)] for params in updated]
    queue = iter(calls)
    try:
        run_together(queue)
    except BaseException:
        at = len(calls) - len(list(queue)) - 1  # the one that was interrupted
        if at < 0:
            raise
        done: list[Tensor] = []
        if at < len(updates):
            written = zip(updated[at], locals_of(updated[at]), versions[at], strict=True)
            done = [owner for owner, p, version in written if p._version != version]
        if at < len(updates) and len(done) == len(updated[at]):
            at += 1  # it had written its results
        elif done:  # it failed between launches, and the rest goes back to its weights
            state.forget(done)
        if at > 0:
            try:
                run_together(calls[at:])
            except Exception:  # it was no interrupt: the op itself fails, and the rest goes back to its weights
                before = [p for params in updated[:at] for p in params]
                torch._C._increment_version(with_locals(before))
                state.forget(before)
        raise


@torch.no_grad()
def restore(opt: StepOptimizer, after: dict[str, Any], mixing: bool = False) -> None:
    """Every parameter that is still perturbed goes back to its weights; then the step state is ``after``.

    With ``mixing`` (a base optimizer that is not fused) p.grad becomes (1 - gamma) g1 + gamma g2 where both exist.
    """
    state = opt._step_state
    if mixing:
        state.take_first_grads()
    saved = state.saved_now() if is_dynamo_compiling() else state.take_saved()
    lost = [] if is_dynamo_compiling() else names_of_lost(opt)
    for op, arguments in restore_calls(opt, saved, mixing):
        op(*arguments)
    bump_versions(with_locals(list(state.saved)))
    firsts, elsewhere = state.first_grads, state.holds_first_grads_elsewhere()
    state.become(after)
    if elsewhere and not is_dynamo_compiling():
        firsts.clear()
    if lost:
        raise RuntimeError(
            f"the memory that kept the weights of {' and '.join(lost)} was freed after perturb(): they stay perturbed"
        )


def restore_calls(opt: StepOptimizer, saved: Mapping[Tensor, Tensor], mixing: bool = False) -> list[Call]:
    """w <- its backup or master copy, for these parameters."""
    calls: list[Call] = []
    firsts = opt._step_state.first_grads
    backends = {str(state.device): state.backend for state in opt._devices}
    parts: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for p, kept in saved.items():
        usable = is_dynamo_compiling() or (is_usable(p) and is_usable(kept))
        if usable and still_fits(opt, p, kept) and str(device_of(p)) in backends:
            mixed = mixing and p.grad is not None and p in firsts
            parts.setdefault((str(device_of(p)), kept_by_master(opt, p), mixed), []).append(p)
        elif usable and local(kept).shape == local(p).shape and local(p).numel() > 0:
            # Moved or converted meanwhile. Where its data was replaced or freed, nothing of it is perturbed.
            calls.append((Tensor.copy_, (local(p), local(kept))))
    for (device, by_master, mixed), params in parts.items():
        weights = [local(saved[p]) for p in params]
        backups, masters = ([], weights) if by_master else (weights, [])
        grads = [local(p.grad) for p in params if p.grad is not None] if mixed else []
        first_grads = [local(firsts[p]) for p in params] if mixed else []
        gamma = hyperparam_tensor([[opt._step_state.gamma]]).flatten()
        lists = (locals_of(params), backups, masters, grads, first_grads)
        calls.append((backends[device].ops.restore_, (*lists, gamma, [len(params)])))
    return calls
