"""Runs the script of docs/finetuning.md on a rank, and counts the collectives of each of its steps."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_on_ranks import drift
from sharded import batches, difference, sharded_model, weights, whole
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rst_fused import RST

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"
_alive: list[Any] = []  # gloo may wait for a thread of its own where a model, and with it the group, is freed
_NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class Counter(TorchDispatchMode):
    """Of collectives, by name: for each call the bytes of the whole tensor. Only around the passes: within a mode G-RST
    cannot see which gradients lie in buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            given = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            self.calls.setdefault(_NAMES.get(name, name), []).append(max(t.nbytes for t in given))
        return func(*args, **(kwargs or {}))


def script() -> dict[str, Any]:
    """The names that the script defines."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "finetune"}
    exec(compile(found[0], "docs/finetuning.md", "exec"), names)
    _alive.append(names)
    return names


def _nbytes(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def run(*arguments: str) -> dict[str, Any]:
    """What a run of the script ends with, and what each of its steps did."""
    names = script()
    kinds: list[bool] = []
    collectives: list[dict[str, list[int]]] = []
    rates: list[float] = []
    kept: list[int] = []
    train_step, one_pass = names["train_step"], names["one_pass"]
    running: list[Any] = []
    counters: list[Counter] = []
    all_reduce = dist.all_reduce

    def watched_pass(*given: Any) -> Any:
        if running[0]._step_state.perturbed:
            kept.append(_nbytes(running[0]._step_state.saved.values()))
        with counters[-1]:
            return one_pass(*given)

    def watched_all_reduce(t: torch.Tensor, *given: Any, **options: Any) -> Any:
        if counters:
            counters[-1].calls.setdefault("all-reduce", []).append(t.nbytes)
        return all_reduce(t, *given, **options)

    def watched_step(model: Any, opt: Any, micros: Any, args: Any) -> Any:
        before, running[:] = opt.sam_steps, [opt]
        rates.append(opt.param_groups[0]["lr"])
        counters.append(Counter())
        loss = train_step(model, opt, micros, args)
        kinds.append(opt.sam_steps > before)
        collectives.append(counters.pop().calls)
        return loss

    names["train_step"], names["one_pass"] = watched_step, watched_pass
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(dist, "all_reduce", watched_all_reduce)
        model, opt, held_out = names["main"](list(arguments))
    _alive.append(model)
    params = [p for group in opt.param_groups for p in group["params"]]
    return {
        "weights": weights(model), "drift": drift(model) if "ddp" in arguments else 0.0, "held_out": held_out,
        "steps": opt.steps, "sam_steps": opt.sam_steps, "p": [opt.schedule(t) for t in range(opt.steps)],
        "kinds": kinds, "collectives": collectives, "rates": rates, "kept": kept,
        "local": _nbytes(p.detach() for p in params), "whole": 4 * sum(p.numel() for p in params),
        "norm": opt.last_update_norm, "said": said.getvalue(),
        "state": [whole(t) for p in params for _, t in sorted(opt.state[p].items())],
    }  # fmt: skip


def run_all(*runs: tuple[str, ...]) -> list[dict[str, Any]]:
    """One after another, each with its arguments, in the process group there is: gloo may hang at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda backend: None)
        return [run(*arguments) for arguments in runs]


def unreduced(mixed: bool, replaced: bool) -> tuple[str, float, float]:
    """A first pass that FSDP2 has not reduced: what is said, whether the weights moved, and a right step thereafter."""
    model, mine = sharded_model("fsdp, mixed" if mixed else "fsdp")
    opt = RST([torch.nn.Parameter(torch.zeros(1))] if replaced else model.parameters(), schedule=1.0, lr=0.1)
    opt.param_groups[0]["params"] = list(model.parameters())  # as a wrapper does that shards both
    x, y = batches(1)[0]
    model.set_requires_gradient_sync(False)
    (model(mine(x)).float() - mine(y)).square().mean().backward()
    before = weights(model)
    with pytest.raises(RuntimeError) as caught:
        opt.perturb()
    moved = difference(before, weights(model))
    model.set_requires_gradient_sync(True)
    (model(mine(x)).float() - mine(y)).square().mean().backward()  # adds to the first one
    return str(caught.value), moved, float(opt.perturb())
