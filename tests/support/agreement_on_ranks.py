"""What the tests of agreement run on ranks: optimizers of two tensors, gradients by hand, so no collectives."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle_optimizer import bits
from torch import nn

from rst_fused import RST, schedule
from rst_fused._step import agreement

OPTIONS: dict[str, Any] = {"lr": 0.1, "schedule": 0.5, "rho": 0.05}


def params_of(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(1.0, 4.0) + i) for i in range(count)]


def step(opt: RST) -> None:
    def closure() -> None:
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = p.detach() * 0.1

    opt.step(closure)


def error_of(call: Callable[[], Any]) -> str:
    """The message of the RuntimeError that a call raises; "" where it raises none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def of_schedule(value: float) -> Callable[[int], float]:
    return lambda t: value


def made(how: str, differs: bool) -> RST:
    """An optimizer; one that differs in what ``how`` says if ``differs``."""
    options, params = dict(OPTIONS), params_of()
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 7}, "schedule": {"schedule": schedule.linear(0.5, steps=9)}, "p": {"schedule": 0.25},
        "gamma": {"gamma": 2.0}, "match": {"gamma": "match"}, "adaptive": {"adaptive": True}, "eta": {"eta": 0.5},
        "base": {"base": "adamw"}, "lr": {"lr": 0.2}, "rho": {"rho": 0.5}, "momentum": {"momentum": 0.5},
        "rounding": {"stochastic_rounding": False}, "state": {"state_dtype": torch.bfloat16},
    }  # fmt: skip
    if how == "function":
        options["schedule"] = of_schedule(0.25 if differs else 0.5)
    elif how == "gamma function":
        options["gamma"] = of_schedule(3.0 if differs else 2.0)
    elif differs:
        options.update(changes.get(how, {}))
    if differs and how == "parameters":
        params = params_of(3)
    groups = [{"params": [p]} for p in params] if differs and how == "groups" else params
    opt = RST(groups, **options)
    if differs and how == "steps":
        saved = opt.state_dict()
        for group in saved["param_groups"]:
            group.update(rst_steps=5, rst_sam_steps=2)
        opt.load_state_dict(saved)
    return opt


def differing(how: str, ranks: list[int]) -> tuple[str, bool, str]:
    """The error, whether everything is as before, and the error after a correction."""
    opt = made(how, dist.get_rank() in ranks)
    before = bits([p for group in opt.param_groups for p in group["params"]])
    said = error_of(lambda: step(opt))
    after = bits([p for group in opt.param_groups for p in group["params"]])
    same = before == after and not opt._step_state.perturbed and opt.steps == (5 if how == "steps" and
        dist.get_rank() in ranks else 0)  # fmt: skip
    if how == "seed":
        opt.seed = 0
        for _ in range(20):
            step(opt)
        return said, same, "" if opt.steps == 20 else "no steps"
    return said, same, ""


def all_differing(names: list[str], ranks: list[int]) -> dict[str, tuple[str, bool, str]]:
    return {how: differing(how, ranks) for how in names}


def later(what: str, at: int, steps: int) -> list[int | str]:
    """Where the last rank goes another way from step ``at`` on: the step and the words of its error."""
    agreement.TIMEOUT = 0.5
    opt = made("seed", False)
    for t in range(steps):
        dist.barrier()  # as all-reduces keep ranks together
        if t == at and dist.get_rank() == dist.get_world_size() - 1:
            if what == "seed":
                opt.seed = 9
            elif what == "schedule":
                opt.schedule = 0.75
            elif what == "gamma":
                opt.gamma = lambda t: 1.5
            else:
                opt.param_groups[0]["lr"] = 0.3
        said = error_of(lambda: step(opt))
        if said:
            for _ in range(t + 1, steps):
                dist.barrier()
            return [t, said]
    return []


def all_later(cases: list[tuple[str, int, int]]) -> list[list[int | str]]:
    return [later(*case) for case in cases]


def without_one(timeout: float, late: bool, other_seed: bool) -> dict[str, Any]:
    """The last rank does not step; or it does after the others have given it up."""
    agreement.TIMEOUT = timeout
    opt = made("seed", other_seed and dist.get_rank() == dist.get_world_size() - 1)
    last = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, Any] = {"error": "", "warnings": []}
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not last:
            step(opt)
        found["seconds"] = time.monotonic() - start
        dist.barrier()
        if last and late:
            found["error"] = error_of(lambda: step(opt))
        dist.barrier()
        if not last:
            for _ in range(agreement.EVERY + 2):
                found["error"] = found["error"] or error_of(lambda: step(opt))
    found["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    found["steps"] = opt.steps
    return found


def first_one_missing(timeout: float) -> tuple[list[str], int]:
    agreement.TIMEOUT = timeout
    opt = made("seed", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() > 0:
            for _ in range(3):
                step(opt)
    return [str(w.message) for w in caught if w.category is RuntimeWarning], opt.steps


def only_on_rank_0(group: str) -> str:
    """A second optimizer that rank 0 alone has, and steps first."""
    said = ""
    if dist.get_rank() == 0:
        options = {} if group == "auto" else {"process_group": None}
        said = error_of(lambda: step(RST(params_of(3), **OPTIONS, seed=5, **options)))
    return said or error_of(lambda: step(made("seed", False)))


def in_subgroups() -> list[str]:
    """Two pairs of ranks, each with a seed of its own; and the pairs the other way."""
    rank, errors = dist.get_rank(), []
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[rank // 2]
    opt = RST(params_of(), **OPTIONS, seed=rank // 2, process_group=mine)
    errors.append(error_of(lambda: [step(opt) for _ in range(110)]))
    opt = RST(params_of(), **OPTIONS, seed=rank, process_group=mine)
    errors.append(error_of(lambda: step(opt)))
    return errors


def started_again(kind: str, path: str) -> list[str]:
    """Groups of one process, one after another, over the same store or a new file."""
    errors = []
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    for life in range(3):
        dist.barrier()
        dist.destroy_process_group()
        given = dist.PrefixStore(f"again {life}", store) if kind == "tcp" else dist.FileStore(f"{path}/{life}", world)
        dist.init_process_group("gloo", store=given, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        opt = RST(params_of(), **OPTIONS, seed=rank if life == 1 else life)
        errors.append(error_of(lambda opt=opt: [step(opt) for _ in range(110)]))  # type: ignore[misc]
    return errors


def loading(how: str, timeout: float) -> tuple[str, list[str]]:
    """Loading is followed by another comparison, where all ranks loaded the same, others did, or only one did."""
    agreement.TIMEOUT = timeout
    opt = made("seed", False)
    for _ in range(5):
        step(opt)
    saved = opt.state_dict()
    for _ in range(3):
        step(opt)
    if how == "another" and dist.get_rank() == 1:
        for group in saved["param_groups"]:
            group["rst_steps"] = 4
    if how != "one" or dist.get_rank() == 0:
        opt.load_state_dict(saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = error_of(lambda: step(opt))
    return said, [str(w.message) for w in caught if w.category is RuntimeWarning]


def keys_in_store(steps: int) -> tuple[int, int]:
    """Keys of the store after the first step, and at most after later ones."""
    store = dist.distributed_c10d._get_default_store()
    opt = made("seed", False)
    counts = []
    for _ in range(steps):
        step(opt)
        dist.barrier()
        counts.append(store.num_keys())
    return counts[0], max(counts)


def copies() -> list[str]:
    """A copy draws on; one of an optimizer with a group of its own has none."""
    opt = RST(params_of(), **OPTIONS, process_group=dist.group.WORLD)
    step(opt)
    twin, other = copy.deepcopy(opt), copy.deepcopy(made("seed", False))
    said = error_of(lambda: step(other))
    step(twin)
    return [repr(twin.process_group), repr(other.process_group), said]


def temporary() -> str:
    return str(Path(tempfile.mkdtemp()))


def out_of_step(timeout: float) -> tuple[list[str], str, int]:
    """Without collectives one rank runs ahead, and waits at last: nothing is wrong with that."""
    opt = made("seed", False)
    step(opt)
    opt._step_state.agreement.timeout = timeout
    store = dist.distributed_c10d._get_default_store()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() == 0:
            store.wait(["ahead"], timedelta(seconds=30))
        said = error_of(lambda: [step(opt) for _ in range(350)])
        if dist.get_rank() == 1:
            store.set("ahead", "")
            store.wait(["behind"], timedelta(seconds=30))
            said = said or error_of(lambda: [step(opt) for _ in range(150)])
        store.set("behind", "")
    agreed = opt._step_state.agreement.agreed_at
    return [str(w.message) for w in caught if w.category is RuntimeWarning], said, agreed
