"""Runs every op once over small tensors of odd sizes and compares with the reference on the CPU.

Short enough to run under compute-sanitizer, where torch's own kernels are slow, too: inputs are made on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rst_fused import ops
from rst_fused._schemas import SCHEMAS, STATS
from rst_fused.reference import join

from .device import available_backends, device_of
from .stages import write_part

SIZES = (0, 1, 3, 17, 1025, 4097, 70001)  # around the widths of vectors, blocks and chunks
# The dtypes of parameters and masters.
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None), "bf16": (torch.bfloat16, None),
    "bf16, fp32 masters": (torch.bfloat16, torch.float32), "bf16, remainders": (torch.bfloat16, torch.int16),
}  # fmt: skip
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # |difference| <= this * (1 + |expected|)
# For the norm: squares of a few packs may be added in fp32, with up to 14 roundings of 2^-24 one after another (of T g
# and its square, and of the additions), halved by the root. The smallest tensors apart, one element is worth 6e-6.
CLOSE_NORM = 7 * 2.0**-24
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM: dict[str, Any] = {"lr": 0.1, "step": 3, "weight_decay": 0.01, "decoupled": True}
# With beta1 = 0.9 some bfloat16 numbers cancel but for their rounding, on which the sign, and so the update, depends.
LION: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "beta1": 0.5}
WITH_NORM = ("grad_norm", "finish_norm", "perturb_")
AMSGRAD, SHARDS, ROUNDED = " (amsgrad)", " (shards)", " (bfloat16 moment)"
CALLS = (
    *SCHEMAS, "sgd_step_", "adam_step_", "lion_step_", f"adam_step_{AMSGRAD}", f"restore_adam_step_{AMSGRAD}",
    f"perturb_{SHARDS}", *(f"restore_{rule}_step_{ROUNDED}" for rule in ("sgd", "adam", "lion")),
)  # fmt: skip
Lists = dict[str, list[Tensor]]


def inputs(dtype: torch.dtype, masters: torch.dtype | None, shift: int = 0, rounded: bool = False) -> Lists:
    """The lists that the ops take; each tensor starts ``shift`` elements after its storage does. ``rounded``: first
    moments are bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def tensors(kind: torch.dtype, positive: bool = False) -> list[Tensor]:
        made = (torch.randn(size + shift, generator=generator) for size in SIZES)
        return [(t.abs() if positive else t).to(kind)[shift:] for t in made]

    state = torch.float32 if masters else dtype
    first = torch.bfloat16 if rounded else state
    lists = {
        "params": tensors(dtype), "grads": tensors(dtype), "first_grads": tensors(dtype), "backups": tensors(dtype),
        "momentum_buffers": tensors(first), "exp_avgs": tensors(first), "exp_avg_sqs": tensors(state, positive=True),
        "max_exp_avg_sqs": tensors(state, positive=True),
    }  # fmt: skip
    if masters == torch.int16:
        lists["masters"] = [(t * 5e3).to(masters) for t in tensors(torch.float32)]
    elif masters:
        lists["masters"] = [p.float() for p in lists["params"]]
    return lists


def moved(lists: Lists, device: str) -> Lists:
    """Copies on ``device`` with the alignment of the originals."""
    copies: Lists = {}
    for name, tensors in lists.items():
        bases = [torch.empty(t.numel() + t.storage_offset(), dtype=t.dtype, device=device) for t in tensors]
        copies[name] = [b[t.storage_offset() :].copy_(t) for b, t in zip(bases, tensors, strict=True)]
    return copies


def run_op(call: str, lists: Lists, backend: str, adaptive: bool) -> list[Tensor]:
    """Runs one of CALLS in place, after the norm that it needs; returns what may have changed."""
    op = call.partition(" ")[0]
    params, grads, masters = lists["params"], lists["grads"], lists.get("masters")
    device = params[0].device
    own: dict[str, Any] = {"backend": backend, "masters": masters}
    amp: dict[str, Any] = {"grad_scale": torch.full((1,), 2.0).to(device), "found_inf": torch.zeros(1).to(device)}
    mixing: dict[str, Any] = {"first_grads": lists["first_grads"], "gamma": 1.5}
    if call.endswith(ROUNDED):
        mixing["rng"] = (1, 2)
    adam: dict[str, Any] = {"exp_avgs": lists["exp_avgs"], "exp_avg_sqs": lists["exp_avg_sqs"], **ADAM}
    if call.endswith(AMSGRAD):
        adam["max_exp_avg_sqs"] = lists["max_exp_avg_sqs"]
    lion: dict[str, Any] = {"exp_avgs": lists["exp_avgs"], **LION}
    calls: dict[str, Callable[[], object]] = {
        "sgd_step_": lambda: ops.sgd_step_(params, grads, lists["momentum_buffers"], **SGD, **amp, **own),
        "restore_sgd_step_": lambda: ops.restore_sgd_step_(
            params, grads, lists["backups"], lists["momentum_buffers"], **SGD, **mixing, **own),
        "adam_step_": lambda: ops.adam_step_(params, grads, **adam, **amp, **own),
        "restore_adam_step_": lambda: ops.restore_adam_step_(
            params, grads, lists["backups"], **adam, **mixing, **own),
        "lion_step_": lambda: ops.lion_step_(params, grads, **lion, **amp, **own),
        "restore_lion_step_": lambda: ops.restore_lion_step_(
            params, grads, lists["backups"], **lion, **mixing, **own),
        "restore_": lambda: ops.restore_(params, lists["backups"], grads=grads, **mixing, **own),
    }  # fmt: skip
    if op not in WITH_NORM:
        calls[op]()
        if masters and masters[0].dtype == torch.int16:  # either half says little of the weights
            weights = [join(p, r) for p, r in zip(params, masters, strict=True)]
            lists = {**lists, "params": weights, "masters": []}
        return [t for tensors in lists.values() for t in tensors]
    scaled: dict[str, Any] = {"adaptive": adaptive, "eta": 0.01}
    stats = torch.zeros(len(STATS), dtype=torch.float64).to(device)
    ops.grad_norm(grads, params, masters=masters, stats=stats, backend=backend, **scaled)
    if op == "finish_norm":
        ops.finish_norm(stats[-1:].repeat(3), stats=stats, backend=backend)
    elif op == "perturb_":
        shards = [(5, 7, 11)] * len(params) if call.endswith(SHARDS) else None
        more = {**scaled, **own, "shards": shards}
        ops.perturb_(params, grads, lists["backups"], stats, rho=0.05, seed=1, step=2, **more)
    return [*(t for tensors in lists.values() for t in tensors), stats]


def compare(call: str, backend: str, device: str, mode: str, shift: int, adaptive: bool) -> str | None:
    """A message about what is wrong with one call, or None."""
    lists = inputs(*MODES[mode], shift, call.endswith(ROUNDED))
    expected = run_op(call, moved(lists, "cpu"), "reference", adaptive)
    found = run_op(call, moved(lists, device), backend, adaptive)
    for e, f in zip(expected, found, strict=True):
        tolerance = CLOSE.get(e.dtype, CLOSE_NORM) * (1 + e.double().abs())
        wrong = ~((f.cpu().double() - e.double()).abs() <= tolerance)  # NaN is wrong
        if wrong.any():
            return f"{backend}: {call}, {mode}, offset {shift}, adaptive {adaptive}: {int(wrong.sum())} of {e.numel()}"
    return None


def exercise(backend: str, device: str) -> list[str]:
    """Runs all ops in all modes; returns messages about what is wrong."""
    found = []
    for call in CALLS:
        print(f"{backend}: {call}", flush=True)  # so that a crash or a hang can be located
        for mode in MODES:
            for shift in (0, 1):
                for adaptive in (False, True) if call.startswith(WITH_NORM) else (False,):
                    message = compare(call, backend, device, mode, shift, adaptive)
                    found += [] if message is None else [message]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--backend", nargs="+", default=None, help="default: the first that is available")
    parser.add_argument("--out", type=Path, help="JSON file for what is wrong")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = device_of(args.device)
    names, notes = available_backends(device, args.backend)
    names = names[:1] if args.backend is None else names
    wrong = [message for name in names for message in exercise(name, device.name)]
    device.synchronize()
    for line in (*notes, *wrong):
        print(line)
    print(f"{len(CALLS)} calls on {names}: {len(wrong)} comparisons are wrong")
    if args.out:
        nothing = [] if names else ["no backend is available"]
        write_part(args.out, {"backends": names, "notes": notes, "errors": [*nothing, *wrong]})
    return 1 if wrong or not names else 0


if __name__ == "__main__":
    sys.exit(main())
