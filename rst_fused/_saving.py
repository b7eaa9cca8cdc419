"""What a state_dict holds beyond that of torch.optim, and what torch's way of loading it would lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rst_fused import _engine
from rst_fused._core import Core
from rst_fused._rules import check_current
from rst_fused._run import Run


def completed(opt: Core, saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with the counters, which travel in the groups as torch casts what lies beside a parameter.

    Step counts that parameters share become one tensor each: an optimizer of torch that loads them counts each one.
    """
    for group in saved["param_groups"]:
        group.update(rst_steps=opt.steps, rst_sam_steps=opt.sam_steps, rst_seed=opt.seed)
        group["rst_non_finite_norms"] = opt.non_finite_norms
    if opt.rule is not None:
        saved["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in saved["state"].items()
        }
    return saved


def for_pickle(opt: Core) -> dict[str, Any]:
    """The attributes that outlive the process, and the first place's stats; backends are chosen anew."""
    transient = ("_backups", "_perturbed", "_plans", "step", "_warned_capturable_if_run_uncaptured")
    kept = {k: v for k, v in vars(opt).items() if k not in transient and not k.startswith("_optimizer_")}
    return {**kept, "_places": opt._places[0].stats}


def take_counters(opt: Core) -> None:
    """Moves the counters that were loaded out of the groups; without any, a run of torch.optim goes on, at step 0."""
    counters: dict[str, int] = {}
    for group in opt.param_groups:
        counters.update({name: group.pop(name) for name in list(group) if name.startswith("rst_")})
    opt._run = Run(counters.get("rst_steps", 0), counters.get("rst_sam_steps", 0))
    opt.seed = counters.get("rst_seed", opt.seed)
    for place in opt._places:
        place.rng.copy_(torch.tensor([opt.seed, opt.steps], dtype=torch.int64, device="cpu"))
        stats = [math.nan, 0, 0, counters.get("rst_non_finite_norms", 0), 0]
        place.stats.copy_(torch.tensor(stats, dtype=torch.float64, device="cpu"))


def _pairs(opt: Core, saved: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its saved state; torch.optim says so where their numbers differ."""
    params = [p for group in opt.param_groups for p in group["params"]]
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for p, key in zip(params, keys, strict=False):
        yield p, saved["state"].get(key, {})


def check(opt: Core, saved: dict[str, Any]) -> None:
    """Raises for the state of another model, an option that the fused base does not have, or numbers that none takes.

    ValueError, or TypeError for what is no number.
    """
    for i, group in enumerate(saved["param_groups"]):
        if "rho" in group:
            check_current(i, group, ("rho",), 0.0, "state_dict: ")
    if opt.rule is None:
        return
    for i, group in enumerate(saved["param_groups"]):
        missing = [name for name in opt.rule.defaults if name not in group]
        if missing:
            raise ValueError(
                f"state_dict lacks {missing} in group {i}: expected one saved by base={opt.rule.name!r} or its twin "
                "in torch.optim"
            )
        check_current(i, group, opt.rule.numbers, of="state_dict: ")
        if group.get("amsgrad"):
            raise ValueError(
                f"state_dict has amsgrad=True in group {i}, which base={opt.rule.name!r} does not offer: "
                "pass a torch.optim optimizer as base"
            )
    for i, (p, state) in enumerate(_pairs(opt, saved)):
        for name in (*opt.rule.buffers, "master"):
            value = state.get(name)
            if value is not None and value.shape != p.shape:
                raise ValueError(
                    f"state_dict has {name} of parameter {i} in shape {tuple(value.shape)}, but the parameter is "
                    f"{tuple(p.shape)}: it was saved from another model"
                )


def keep_dtypes(opt: Core, saved: dict[str, Any]) -> None:
    """Undoes what torch did to state beside a master copy, which is float32: it casts to the dtype of the parameter.

    A step count that is a plain number, as old checkpoints have it, becomes a tensor.
    """
    assert opt.rule is not None
    for p, state in _pairs(opt, saved):
        step = state.get("step")
        if step is not None and not isinstance(step, Tensor):
            opt.state[p]["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        if not _engine.has_master(opt, p):
            continue
        for name in (*opt.rule.buffers, "master"):
            if state.get(name) is not None:
                opt.state[p][name] = state[name].detach().to(p.device, torch.float32, copy=True)
