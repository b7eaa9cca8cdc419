"""The two phases of a step over lists of tensors: what runs under torch.compile and on every backend.

The eager path in rst_fused._plan does the same with less work on the host.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rst_fused import _amp
from rst_fused._core import Core
from rst_fused._places import Place, device_of, share_norm
from rst_fused._preconditions import SIXTEEN_BIT, check_base, check_rho, check_state
from rst_fused._rules import Group, as_rows


def has_master(opt: Core, p: Tensor) -> bool:
    return opt.master_weights and p.dtype in SIXTEEN_BIT


def with_gradients(opt: Core, group: Group, masters_only: bool) -> list[Tensor]:
    """The parameters of a group that have a gradient, and those of them with a master copy or without."""
    found = [p for p in group["params"] if p.grad is not None]
    return [p for p in found if has_master(opt, p) == masters_only] if opt.master_weights else found


def init_state(opt: Core, group: Group, p: Tensor, updating: bool) -> None:
    """Creates what p lacks: its fp32 master and, when ``updating``, what the base optimizer keeps. Buffers are zero."""
    rule, state = opt.rule, opt.state[p]
    known = set(state)
    if has_master(opt, p) and "master" not in state:
        state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format, copy=True)
    if rule is None or not updating:
        return
    dtype = torch.float32 if has_master(opt, p) else p.dtype
    for name in rule.buffer_names(rule.flags(group)):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if rule.name != "sgd" and "step" not in state:
        counters = (
            opt.state[q]["step"]
            for q in group["params"]
            if device_of(q) == device_of(p) and q in opt.state and "step" in opt.state[q]
        )
        like = next(counters, None)  # torch.compile may have moved them
        # A CUDA graph sees no changes on the CPU.
        device = p.device if group.get("capturable") else "cpu" if like is None else like.device
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if set(state) != known and not torch.compiler.is_compiling() and opt.capturing:
        raise RuntimeError(
            "a CUDA graph would make the optimizer's state anew at every replay: take a step with the same parameters "
            "before capturing"
        )


def share_steps(opt: Core, group: Group, mine: list[Tensor]) -> None:
    """Lets the parameters of one call that are at the same step count share one counter tensor, and no others."""
    taken = {id(state["step"]) for state in map(opt.state.__getitem__, mine) if "step" in state}  # none before a step
    members = set(map(id, mine))
    for p in group["params"]:
        if id(p) not in members and p in opt.state and id(opt.state[p].get("step")) in taken:
            opt.state[p]["step"] = opt.state[p]["step"].clone()
    if len(taken) > 1:
        shared: dict[float, Tensor] = {}
        for p in mine:
            if "step" in opt.state[p]:
                step = opt.state[p]["step"]
                opt.state[p]["step"] = shared.setdefault(float(step), step)


def backup_of(opt: Core, p: Tensor) -> Tensor:
    """The tensor that keeps p's weights while they are perturbed; allocated once (anew if the model was converted)."""
    backup = opt._backups.get(p)
    stale = backup is not None and (backup.dtype != p.dtype or backup.shape != p.shape) and p not in opt._perturbed
    if backup is None or stale:
        backup = opt._backups[p] = torch.empty_like(p, requires_grad=False, memory_format=torch.preserve_format)
    return backup


def kept_weights(opt: Core, p: Tensor) -> Tensor:
    """The weights of a perturbed parameter: its master, or its backup."""
    kept: Tensor = opt.state[p]["master"] if opt._perturbed[p] else opt._backups[p]
    return kept


def still_fits(opt: Core, p: Tensor) -> bool:
    """Whether a perturbed parameter is of the shape that it had then, and of a dtype that is served alike."""
    kept, by_master = kept_weights(opt, p), opt._perturbed[p]
    return kept.shape == p.shape and by_master == has_master(opt, p) and (by_master or kept.dtype == p.dtype)


def check_kept(opt: Core) -> None:
    """Raises if a parameter, or memory of its first gradient, got other data between the passes; changes nothing."""
    for i, group in enumerate(opt.param_groups):
        for j, p in enumerate(group["params"]):
            if p in opt._perturbed and not still_fits(opt, p):
                kept = kept_weights(opt, p)
                was = "kept by a float32 master" if opt._perturbed[p] else str(kept.dtype)
                raise RuntimeError(
                    f"parameter {j} of group {i} is {tuple(p.shape)} {p.dtype}, but when it was perturbed it was "
                    f"{tuple(kept.shape)} {was}: change it before perturb() or after step()"
                )
            first, g = opt._run.first_grads.get(p), p.grad
            if first is not None and type(g) is Tensor and (g is first or g.data_ptr() == first.data_ptr() != 0):
                raise RuntimeError(
                    f"the second gradient of parameter {j} of group {i} was written over the first one, which "
                    "gamma != 1 needs: give each pass gradients of its own (zero_grad(set_to_none=True), and "
                    "gradient_as_bucket_view=False in DistributedDataParallel)"
                )


def init_group(
    opt: Core, group: Group, updating: bool, masters_only: bool, device: str | None,
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor],
    buffers: list[Tensor], buffers2: list[Tensor], masters: list[Tensor],
    steps: list[Tensor], sizes: list[int], fresh: list[bool],
) -> None:  # fmt: skip
    """Appends what the ops need for this group's parameters that have a gradient, one row per step count.

    device: only those on it (None: all).

    Dynamo runs this outside the graph and treats the tensors as static inputs, as for the optimizers of torch.
    """
    rule = opt.rule
    names = rule.buffer_names(rule.flags(group)) if rule is not None else ()
    active = with_gradients(opt, group, masters_only)
    if device is not None:
        active = [p for p in active if str(device_of(p)) == device]
    states: list[dict[str, Any]] = [{}] * len(active)
    is_fresh = [False] * len(active)
    if rule is not None:
        needed = {"master"} if masters_only else set()
        if updating:
            needed.update(names, () if rule.name == "sgd" else ("step",))
        states = [opt.state[p] for p in active]
        if rule.splits_fresh(group):
            is_fresh = [names[0] not in state for state in states]
        for p, state in zip(active, states, strict=True):
            if not needed <= state.keys():
                init_state(opt, group, p, updating)
        if rule.name != "sgd":  # in both phases: it decides the order of the parameters
            share_steps(opt, group, active)
    rows: dict[Any, tuple[list[Tensor], list[dict[str, Any]]]] = defaultdict(lambda: ([], []))
    for p, state, new in zip(active, states, is_fresh, strict=True):
        members, kept = rows[id(state.get("step")), new]
        members.append(p)
        kept.append(state)
    for (_, new), (members, kept) in rows.items():
        sizes.append(len(members))
        fresh.append(new)
        params += members
        for p in members:
            assert p.grad is not None
            grads.append(p.grad.resolve_conj().resolve_neg() if p.is_complex() else p.grad)
        if masters_only:
            masters += [state["master"] for state in kept]
        elif updating:
            backups += [opt._backups[p] if p in opt._perturbed else p for p in members]
        else:
            backups += [backup_of(opt, p) for p in members]
        if updating:
            for out, name in zip((buffers, buffers2), names, strict=False):
                out += [state[name] for state in kept]
            if "step" in kept[0]:
                steps.append(kept[0]["step"])


class Lists:
    """The arguments of one call of an op, gathered over parameter groups that agree in all flags."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.backups: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.buffers2: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.sizes: list[int] = []
        self.rows: list[tuple[Group, bool]] = []

    def extend(self, other: Lists) -> None:
        self.params += other.params
        self.grads += other.grads
        self.backups += other.backups
        self.buffers += other.buffers
        self.buffers2 += other.buffers2
        self.masters += other.masters
        self.steps += other.steps
        self.sizes += other.sizes
        self.rows += other.rows


def gather(opt: Core, indices: list[int], updating: bool, masters_only: bool, place: Place) -> Lists:
    """The lists of the given groups: parameters on one place, with a master copy or those without."""
    out = Lists()
    device = None if len(opt._places) == 1 else str(place.device)
    for i in indices:
        group = opt.param_groups[i]
        c = Lists()
        fresh: list[bool] = []
        # Dynamo fills the lists of a call to _init_group only if they are empty, so each group has its own.
        opt._init_group(
            group, updating, masters_only, device, c.params, c.grads, c.backups, c.buffers, c.buffers2, c.masters,
            c.steps, c.sizes, fresh,
        )  # fmt: skip
        c.rows = [(group, new) for new in fresh]
        out.extend(c)
    return out


def partition(opt: Core) -> list[list[int]]:
    """Indices of the parameter groups, those that one call can serve together."""
    if opt.rule is None:
        return [list(range(len(opt.param_groups)))]
    parts: dict[tuple[bool, ...], list[int]] = {}
    for i in range(len(opt.param_groups)):
        parts.setdefault(opt.rule.flags(opt.param_groups[i]), []).append(i)
    return list(parts.values())


def master_kinds(opt: Core) -> tuple[bool, ...]:
    return (False, True) if opt.master_weights else (False,)


def signed_rho(group: Group) -> Any:
    """rho, negative where the objective is maximized: the perturbation always makes the objective worse."""
    return -group["rho"] if group.get("maximize") else group["rho"]


def traced(opt: Core, group: Group) -> list[Any]:
    """All numbers of a group that may change from step to step."""
    return [group["rho"], *(opt.rule.row(group, False, 1.0) if opt.rule is not None else [])]


def recording(opt: Core) -> bool:
    """Whether what is called now runs later: under torch.compile, or in a CUDA graph."""
    return torch.compiler.is_compiling() or opt.capturing


@torch.no_grad()
def perturb(opt: Core) -> None:
    """grad_norm and perturb_ over all groups."""
    if not torch.compiler.is_compiling():
        check_rho(opt)
        check_base(opt)
        check_state(opt)
    everything = list(range(len(opt.param_groups)))
    recorded = recording(opt)
    calls: list[tuple[Place, Lists]] = []
    for place in opt._places:
        here = [gather(opt, everything, False, kind, place) for kind in master_kinds(opt)]
        here = [c for c in here if c.params]
        grads = [g for c in here for g in c.grads]
        sources = [p for c in here for p in (c.masters or c.params)] if opt.adaptive else []
        if opt._rounds and not recorded:
            place.rng[1] = opt._run.steps
        place.backend.ops.grad_norm(place.stats, grads, sources, opt.adaptive, opt.eta)
        calls += [(place, c) for c in here]
    if len(opt._places) > 1:
        if opt.capturing:
            devices = " and ".join(str(place.device) for place in opt._places)
            raise RuntimeError(f"a CUDA graph holds the work of one GPU, but parameters are on {devices}")
        share_norm(opt._places)
    first_index = 0
    for place, c in calls:
        own = [[signed_rho(group)] for group, _ in c.rows]
        rho = as_rows(own, [traced(opt, group) for group, _ in c.rows], c.params[0].device).flatten()
        if not recorded:
            # An interrupt may strike between the op and the note that it ran, or (in plain torch) inside the op: with
            # backups written beforehand, restoring is right in every case.
            if not c.masters:
                torch._foreach_copy_(c.backups, c.params)
            opt._perturbed.update(dict.fromkeys(c.params, bool(c.masters)))
        place.backend.ops.perturb_(
            c.params, c.grads, [] if c.masters else c.backups, c.masters, place.stats, rho, c.sizes, opt.adaptive,
            opt.eta, opt.stochastic_rounding, place.rng, first_index,
        )  # fmt: skip
        first_index += len(c.params)
        for p, g in zip(c.params, c.grads, strict=True):
            if recorded:
                opt._perturbed[p] = len(c.masters) > 0  # Dynamo of torch 2.11 knows no bool of a list
            if opt._run.mixing:
                opt._run.first_grads[p] = g
            p.grad = None
        touched(c.params)


@torch.no_grad()
def update(opt: Core) -> None:
    """Restore, mix and base step, in one op per set of groups that agree in all flags."""
    rule = opt.rule
    perturbed, mixing = opt._run.perturbed, opt._run.mixing
    assert rule is not None
    if not torch.compiler.is_compiling():
        check_base(opt)
        check_kept(opt)
        check_state(opt)
    given = _amp.scaling(opt)
    for indices in partition(opt):
        for place, kind in product(opt._places, master_kinds(opt)):
            c = gather(opt, indices, True, kind, place)
            if not c.params:
                continue
            flags = rule.flags(opt.param_groups[indices[0]])
            gamma = opt._run.gamma if mixing else 1.0
            if c.steps and c.steps[0].is_cpu and not torch.compiler.is_compiling() and opt.capturing:
                raise RuntimeError("Adam in a CUDA graph: its step count must lie on the GPU, pass capturable=True")
            steps = advanced(c.steps, given[1])
            lists: list[Any] = [c.params, c.grads]
            if perturbed:
                firsts = opt._run.first_grads
                mixed = [firsts.get(p, g) for p, g in zip(c.params, c.grads, strict=True)] if mixing else []
                lists += [[] if c.masters else c.backups, mixed]
            buffers = [b for b in (c.buffers, c.buffers2) if b]
            rows = [rule.row(group, new, gamma) for group, new in c.rows]
            hyper = as_rows(rows, [traced(opt, group) for group, _ in c.rows], c.params[0].device)
            amp = (_amp.on_device(place.device, given[0]), _amp.on_device(place.device, given[1]))
            rule.apply(place.backend.ops, perturbed, lists, buffers, c.masters, hyper, steps, c.sizes, flags, amp)
            if given[1] is not None and any(new for _, new in c.rows) and bool((given[1] != 0).any()):
                stay_fresh(opt, c)
            forget(opt, c.params)
            touched(c.params)
    if perturbed:
        restore(opt)


def stay_fresh(opt: Core, c: Lists) -> None:
    """After a step that AMP skipped: buffers made for it go, for the first real step starts them undampened."""
    assert opt.rule is not None
    first = 0
    for size, (_, new) in zip(c.sizes, c.rows, strict=True):
        for p in c.params[first : first + size] if new else []:
            for name in opt.rule.buffers:
                opt.state[p].pop(name, None)
        first += size


def advanced(steps: list[Tensor], found_inf: Tensor | None) -> Tensor | None:
    """Counts this step in every counter (unless AMP found an overflow) and returns them as one tensor."""
    if not steps:
        return None
    torch._foreach_add_(steps, 1)
    counted = torch.stack(steps).double()
    if found_inf is not None:
        for step in steps:  # a counter on the CPU must wait for the GPU here: capturable=True keeps it there
            step.sub_((found_inf != 0).to(step.device, step.dtype).squeeze())
    return counted


@torch.no_grad()
def restore(opt: Core, mixing: bool = False) -> None:
    """Every parameter that is still perturbed goes back to its weights.

    With ``mixing`` (a base optimizer that is not fused) p.grad becomes (1 - gamma) g1 + gamma g2 where both exist.
    """
    for place, kind in product(opt._places, master_kinds(opt)):
        for mixed in (True, False) if mixing else (False,):
            params = [
                p
                for p in opt._perturbed
                if has_master(opt, p) == kind
                and device_of(p) == place.device
                and still_fits(opt, p)
                and (not mixing or mixed == (p.grad is not None and p in opt._run.first_grads))
            ]
            if not params:
                continue
            weights = [kept_weights(opt, p) for p in params]
            backups, masters = ([], weights) if kind else (weights, [])
            grads = [p.grad for p in params] if mixed else []
            firsts = [opt._run.first_grads[p] for p in params] if mixed else []
            gamma = as_rows([[opt._run.gamma]]).flatten()
            place.backend.ops.restore_(params, backups, masters, grads, firsts, gamma, [len(params)])
            forget(opt, params)
            touched(params)
    for p in list(opt._perturbed):  # moved to another device or converted meanwhile
        kept = kept_weights(opt, p)
        if kept.shape == p.shape:  # else its data was replaced, and nothing of it is perturbed
            p.copy_(kept)
        forget(opt, [p])


def forget(opt: Core, params: list[Tensor]) -> None:
    """These parameters are back at their weights."""
    for notes in (opt._perturbed, opt._run.first_grads):
        for p in params if notes else ():
            notes.pop(p, None)


def touched(params: list[Tensor]) -> None:
    """Tells autograd that the parameters changed: the compiled ops cannot."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)
