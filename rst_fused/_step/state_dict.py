"""What a state_dict holds beyond that of torch.optim, and what torch's way of loading it would lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import as_flag, as_integer, check_number
from rst_fused._schemas import STATS
from rst_fused._step.base import StepOptimizer
from rst_fused._step.rules import RULES, check_current
from rst_fused._step.sharding import describe, same_layout
from rst_fused._step.state import StepState
from rst_fused._step.state_dtypes import MASTERS, dtype_of, exported, loaded

_STATE_NAMES = tuple(dict.fromkeys(name for rule in RULES.values() for name in rule.states))
_LIMITS = {"rst_steps": 2**63 - 1, "rst_sam_steps": 2**63 - 1, "rst_seed": 2**63 - 1, "rst_non_finite_norms": 2**53}
# What stands in the groups of an optimizer: torch.distributed.checkpoint loads no names from a flattened state_dict but
# those that it finds there. The numbers are put in when a state_dict is made, and taken out when one is loaded.
NO_COUNTERS = dict.fromkeys(_LIMITS)


def reserve_counters(group: dict[str, Any]) -> None:
    """In a group that somebody else has made."""
    for name in NO_COUNTERS:
        group.setdefault(name)


def completed(opt: StepOptimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with the counters, which travel in the groups as torch casts what stands beside a parameter.

    Step counts that parameters share become one tensor each: an optimizer of torch that loads them counts each one.
    """
    for group in saved["param_groups"]:
        group.update(rst_steps=opt.steps, rst_sam_steps=opt.sam_steps, rst_seed=opt.seed)
        group["rst_non_finite_norms"] = opt.non_finite_norms
    if opt.rule is not None:
        saved["state"] = {
            key: {
                name: value.clone() if name == "step" and isinstance(value, Tensor) else exported(name, value)
                for name, value in state.items()
            }
            for key, state in saved["state"].items()
        }
    return saved


def for_pickle(opt: StepOptimizer) -> dict[str, Any]:
    """The attributes that outlive the process, and the stats of the first device; backends are chosen again."""
    transient = (
        "_plans", "_devices", "_sharding", "_step_state", "_releases", "step", "_warned_capturable_if_run_uncaptured"
    )  # fmt: skip
    kept = {k: v for k, v in vars(opt).items() if k not in transient and not k.startswith("_optimizer_")}
    if kept.get("_process_group") != "auto":
        kept["_process_group"] = None  # a group belongs to this process
    return {**kept, "_saved_stats": opt._devices[0].stats, "_saved_counts": (opt.steps, opt.sam_steps)}


def take_counters(opt: StepOptimizer) -> StepState:
    """Moves the counters that were loaded out of the groups; without any, a run of torch.optim goes on, at step 0."""
    counters: dict[str, int] = {}
    for group in opt.param_groups:
        counters.update({name: int(group[name]) for name in _LIMITS if group.get(name) is not None})
        group.update(NO_COUNTERS)
    opt.seed = counters.get("rst_seed", opt.seed)
    state = StepState(counters.get("rst_steps", 0), counters.get("rst_sam_steps", 0))
    for device in opt._devices:
        device.rng.copy_(torch.tensor([opt.seed, state.steps], dtype=torch.int64, device="cpu"))
        stats = {"norm": math.nan, "non_finite_count": counters.get("rst_non_finite_norms", 0)}
        numbers = [stats.get(name, 0.0) for name in STATS]
        device.stats.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
    return state


def _pairs(opt: StepOptimizer, saved: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """Each parameter with its saved group and state; torch.optim says so where their numbers differ."""
    params = [p for group in opt.param_groups for p in group["params"]]
    keys = [(group, key) for group in saved["param_groups"] for key in group["params"]]
    for p, (group, key) in zip(params, keys, strict=False):
        yield group, p, saved["state"].get(key, {})


def check(opt: StepOptimizer, saved: dict[str, Any]) -> None:
    """Raises for what cannot be loaded, before anything is: the state of another model, an option that the fused base
    does not have, numbers out of range. ValueError, or TypeError where a number was expected."""
    rule = opt.rule
    for i, group in enumerate(saved["param_groups"]):
        where = f"state_dict: param_groups[{i}]"
        if "rho" in group:
            check_current(i, group, ("rho",), 0.0, "state_dict: ")
        # All of them None, as in a live group: saved by the base optimizer alone.
        saved_counts = {name: group[name] for name in _LIMITS if name in group}
        if saved_counts == NO_COUNTERS:
            saved_counts = {}
        counts = {name: as_integer(f"{where}[{name!r}]", n, 0, _LIMITS[name]) for name, n in saved_counts.items()}
        if counts.get("rst_sam_steps", 0) > counts.get("rst_steps", 0):
            raise ValueError(
                f"{where}['rst_sam_steps']={counts['rst_sam_steps']}: expected no more than rst_steps, which is "
                f"{counts.get('rst_steps', 'missing')}"
            )
        if rule is None:
            continue
        missing = [name for name in rule.defaults if name not in group and name not in rule.added]
        if missing:
            raise ValueError(
                f"state_dict lacks {missing} in group {i}: expected one saved by base={rule.name!r} or its twin in "
                "torch.optim"
            )
        check_current(i, group, rule.numbers, of="state_dict: ")
        for name, default in rule.defaults.items():
            if isinstance(default, bool) and name in group:
                as_flag(f"{where}[{name!r}]", group[name])
    if rule is None:
        return
    for i, (group, p, state) in enumerate(_pairs(opt, saved)):
        if not isinstance(state, dict):
            raise TypeError(f"state_dict has {type(state).__name__} as the state of parameter {i}: expected a dict")
        others = [name for name in _STATE_NAMES if name in state and name not in rule.states]
        if others:
            raise ValueError(
                f"state_dict has {others} of parameter {i}, which base={rule.name!r} does not keep: it was saved "
                "by another base optimizer"
            )
        for name in (*rule.states, *MASTERS):
            if name not in state:
                continue
            value = state[name]
            if not isinstance(value, Tensor):
                if value is None and name not in MASTERS and name not in rule.state_names({**rule.added, **group}):
                    continue  # a momentum_buffer that torch.optim.SGD does not use
                raise ValueError(f"state_dict has {name}={value!r} of parameter {i}: expected a tensor")
            if value.shape != p.shape:
                raise ValueError(
                    f"state_dict has {name} of parameter {i} in shape {tuple(value.shape)}, but the parameter is "
                    f"{tuple(p.shape)}: it was saved from another model"
                )
            if not same_layout(value, p):
                raise ValueError(
                    f"state_dict has {name} of parameter {i} as {describe(value)}, but the parameter is {describe(p)}: "
                    "load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards it"
                )
        step = state.get("step", 0) if rule.counts_steps else 0
        if not isinstance(step, Tensor) or step.is_cpu or step.numel() != 1:  # nobody waits for a GPU
            check_number(f"state_dict: step of parameter {i}", step, 0)


def adapt(opt: StepOptimizer, saved: dict[str, Any]) -> None:
    """Undoes what torch did to state that has not the dtype of its parameter, to which it casts all of it.

    A step count that is a plain number, as old checkpoints have it, becomes a tensor; hyperparameters that they lack
    get the value that they imply; an entry of None, which stands for state that does not exist, goes.
    """
    assert opt.rule is not None
    for group in opt.param_groups:
        for name, value in opt.rule.added.items():
            group.setdefault(name, value)
    for _, p, state in _pairs(opt, saved):
        step = state.get("step")
        if step is not None and not isinstance(step, Tensor):
            opt.state[p]["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        for name in (name for name in opt.rule.states if name in state):
            if state[name] is None:
                del opt.state[p][name]
            elif dtype_of(opt, p, name) != p.dtype:
                opt.state[p][name] = state[name].detach().to(p.device, dtype_of(opt, p, name), copy=True)
        for name in (name for name in MASTERS if name in state):
            master = loaded(opt, p, name, state[name])
            if master is None:
                del opt.state[p][name]
            else:
                opt.state[p][name] = master
