"""``python -m benchmarks memory``: exact memory of training steps beside the weights, in bytes per parameter.

Each mode trains three steps in a child process, gradients included: over parameters of GPT-2 small whose gradients
appear one after another and need nothing else ("gradients alone"), and with GPT-2 small itself. Counted is what
torch's CPU allocator has handed out: at most, and after a step, once the gradients are gone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import record
from .allocated import Allocations
from .cases import CASES, DTYPES, Case, Hyper, gpt2
from .passes import gpt2_loss, gradients_alone
from .peers import PEERS, WEIGHTS, Unavailable, torch_base

STEPS = 3  # at p = 0.5 and seed 0: two base steps and a SAM step
TOKENS = 8  # a sequence so short that activations take little
WHATS = {"alone": "gradients alone", "gpt2": "GPT-2 small"}
PAGE_MARKS = ("<!-- python -m benchmarks memory -->", "<!-- end -->")
MOMENTS = {"sgd": 1, "adamw": 2}  # state tensors of the size of a parameter


@dataclass(frozen=True)
class Mode:
    """A way to train: torch's base optimizer, one of the peers, or ``options`` of RST."""

    title: str
    base: str = "sgd"
    options: dict[str, Any] | None = None
    peer: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def predicted(self, element: int) -> dict[str, int] | None:
        """Bytes per parameter at the peak and between the steps, but for a bucket of gradients; None for peers."""
        if self.peer is not None:
            return None
        o = self.options or {"schedule": 0.0}
        masters = o.get("master_weights", False)
        master = 2 if masters == "remainder" else 4 if masters else 0
        moment = 4 if masters else element
        first = o["state_dtype"].itemsize if "state_dtype" in o else moment
        state = first + moment * (MOMENTS[self.base] - 1) + master
        perturbs, mixes = o["schedule"] > 0, "gamma" in o
        weights = element if perturbs and masters is not True else 0  # kept while they are perturbed
        firsts = element if mixes else 0
        second = 0 if "release_gradients" in o else element
        backup = weights if mixes else 0
        return {"peak": state + max(element + backup, second + weights + firsts), "kept": state + backup}


SGD: dict[str, Any] = {"momentum": 0.9}
SAM, RELEASE, BF16_STATE = {"schedule": 1.0}, {"release_gradients": True}, {"state_dtype": torch.bfloat16}
REMAINDER = {"master_weights": "remainder"}
MODES = {
    "passes": Mode("no optimizer", peer="passes"),
    "torch-sgd": Mode("torch.optim.SGD, momentum, fused", dtypes=("fp32",)),
    "usual": Mode("usual per-tensor SAM, SGD", peer="usual"),
    "foreach": Mode("lean torch._foreach_ SAM, SGD", peer="foreach"),
    "pytorch_optimizer": Mode("pytorch_optimizer's SAM, SGD", peer="pytorch_optimizer"),
    "sgd": Mode("rst_fused: base SGD (p = 0)", options={"schedule": 0.0}),
    "sam": Mode("rst_fused: SAM, SGD", options=SAM),
    "rst": Mode("rst_fused: RST(0.5), SGD", options={"schedule": 0.5}),
    "grst": Mode("rst_fused: G-RST(0.5, match), SGD", options={"schedule": 0.5, "gamma": "match"}),
    "sam-release": Mode("rst_fused: SAM, SGD, gradients released", options={**SAM, **RELEASE}),
    "sam-bf16": Mode("rst_fused: SAM, SGD, bf16 momentum", options={**SAM, **BF16_STATE}, dtypes=("fp32",)),
    "sam-release-bf16": Mode(
        "rst_fused: SAM, SGD, both", options={**SAM, **RELEASE, **BF16_STATE}, dtypes=("fp32",)
    ),
    "torch-adamw": Mode("torch.optim.AdamW, fused", "adamw", dtypes=("fp32",)),
    "foreach-adamw": Mode("lean torch._foreach_ SAM, AdamW", "adamw", peer="foreach"),
    "adamw": Mode("rst_fused: base AdamW (p = 0)", "adamw", {"schedule": 0.0}),
    "sam-adamw": Mode("rst_fused: SAM, AdamW", "adamw", SAM),
    "sam-adamw-release": Mode("rst_fused: SAM, AdamW, gradients released", "adamw", {**SAM, **RELEASE}),
    "sam-adamw-bf16": Mode("rst_fused: SAM, AdamW, bf16 exp_avg", "adamw", {**SAM, **BF16_STATE}, dtypes=("fp32",)),
    "sam-adamw-release-bf16": Mode(
        "rst_fused: SAM, AdamW, both", "adamw", {**SAM, **RELEASE, **BF16_STATE}, dtypes=("fp32",)
    ),
    "sgd-master": Mode("rst_fused: base SGD (p = 0), fp32 masters",
                       options={"schedule": 0.0, "master_weights": True}, dtypes=("bf16",)),
    "sam-master": Mode("rst_fused: SAM, SGD, fp32 masters", options={**SAM, "master_weights": True}, dtypes=("bf16",)),
    "sam-release-master": Mode("rst_fused: SAM, SGD, fp32 masters, released",
                               options={**SAM, **RELEASE, "master_weights": True}, dtypes=("bf16",)),
    "sgd-remainder": Mode("rst_fused: base SGD (p = 0), remainders",
                          options={"schedule": 0.0, **REMAINDER}, dtypes=("bf16",)),
    "sam-remainder": Mode("rst_fused: SAM, SGD, remainders", options={**SAM, **REMAINDER}, dtypes=("bf16",)),
    "sam-release-remainder": Mode("rst_fused: SAM, SGD, remainders, released",
                                  options={**SAM, **RELEASE, **REMAINDER}, dtypes=("bf16",)),
    "sam-adamw-master": Mode("rst_fused: SAM, AdamW, fp32 masters", "adamw", {**SAM, "master_weights": True},
                             dtypes=("bf16",)),
    "sam-adamw-release-master": Mode("rst_fused: SAM, AdamW, fp32 masters, released", "adamw",
                                     {**SAM, **RELEASE, "master_weights": True}, dtypes=("bf16",)),
    "sam-adamw-remainder": Mode("rst_fused: SAM, AdamW, remainders", "adamw", {**SAM, **REMAINDER}, dtypes=("bf16",)),
    "sam-adamw-release-remainder": Mode("rst_fused: SAM, AdamW, remainders, released", "adamw",
                                        {**SAM, **RELEASE, **REMAINDER}, dtypes=("bf16",)),
    "sam-adamw-release-bf16-remainder": Mode("rst_fused: SAM, AdamW, remainders, bf16 exp_avg, released", "adamw",
                                             {**SAM, **RELEASE, **BF16_STATE, **REMAINDER}, dtypes=("bf16",)),
}  # fmt: skip

# --- measuring --------------------------------------------------------------------------------------------------------
class _Trainer:
    """An optimizer as the loop sees it."""

    def __init__(self, mode: Mode, params: list[torch.nn.Parameter]) -> None:
        self.ours: Any = None
        hyper = Hyper()
        self.perturb: Callable[[], object] = lambda: False
        self.update: Callable[[], object] = lambda: None
        if mode.options is not None:
            from rst_fused import RST

            more = SGD if mode.base == "sgd" else {}
            self.ours = RST(params, mode.base, lr=1e-3, weight_decay=5e-4, seed=0, **more, **mode.options)
            self.perturb, self.update = self.ours.perturb, self.ours.step
        elif mode.peer is None:
            self.update = torch_base(mode.base, params, hyper).step
        elif mode.peer != "passes":
            peer = PEERS[mode.peer](params, hyper, **({} if mode.base == "sgd" else {"base": mode.base}))
            self.perturb, self.update = peer.perturb, peer.update


def measure_here(mode: Mode, dtype: torch.dtype, case: Case, what: str) -> dict[str, Any]:
    """Bytes beside the weights in this process: ``peak`` and where it was, ``kept`` between the steps, ``made`` by the
    constructor of the optimizer, and what opt.memory() has ``reported`` between the steps."""
    tokens = torch.randint(case.shapes[0][0], (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    with Allocations() as found:
        with found.phase("weights"):
            params = [torch.nn.Parameter(t) for t in case.tensors(dtype, **WEIGHTS)]
        with found.phase("constructor"):
            trainer = _Trainer(mode, params)

        def passes(name: str) -> None:
            for p in params:
                p.grad = None
            if what == "alone":
                with found.phase(f"{name} backward"):
                    gradients_alone(params)
                return
            with found.phase(f"{name} forward"):
                loss = gpt2_loss(params, tokens)
            with found.phase(f"{name} backward"):
                loss.backward()

        for _ in range(STEPS):
            passes("first")
            with found.phase("perturb"):
                fired = trainer.perturb()
            if fired is not False:
                passes("second")
            with found.phase("update"):
                trainer.update()
            with found.phase("between"):
                for p in params:
                    p.grad = None
        report = None if trainer.ours is None else trainer.ours.memory()
    weights, constructor, *rest = found.phases
    highest = max(rest, key=lambda phase: phase.peak)
    return {
        "peak": highest.peak - weights.end, "at": highest.name, "kept": rest[-1].end - weights.end,
        "made": constructor.end - weights.end, "reported": None if report is None else report.total - report.weights,
    }  # fmt: skip


def case_of(size: tuple[int, int, int, int] | None) -> Case:
    """GPT-2 small, or a GPT-2 of this width, number of layers, vocabulary and context."""
    return CASES["gpt2"]() if size is None else gpt2("gpt2", "a small GPT-2", *size)


def measure(
    name: str, dtype: str, whats: list[str], threads: int = 2, size: tuple[int, int, int, int] | None = None
) -> dict[str, dict[str, Any]] | str:
    """The same for each of ``whats``, in a child process; why not, where the mode cannot run here."""
    given = json.dumps([name, dtype, whats, threads, size])
    command = [sys.executable, "-m", "benchmarks.memory", given]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} in {dtype} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(given: str) -> None:
    name, dtype, whats, threads, size = json.loads(given)
    torch.set_num_threads(threads)
    mode, case = MODES[name], case_of(size)
    try:
        print(json.dumps({what: measure_here(mode, DTYPES[dtype], case, what) for what in whats}))
    except (Unavailable, ImportError) as error:
        print(json.dumps(str(error)))


# --- the command ------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--what", nargs="+", choices=list(WHATS), default=list(WHATS), metavar="WHAT",
                        help="alone: gradients without a model; gpt2: whole steps, in fp32")  # fmt: skip
    parser.add_argument("--size", nargs=4, type=int, metavar=("WIDTH", "LAYERS", "VOCABULARY", "CONTEXT"),
                        help="of another GPT-2 than the small one")  # fmt: skip
    parser.add_argument("--page", metavar="FILE", type=Path,
                        help="also put the tables into this page, and draw its picture (needs matplotlib)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    env = record.environment(record.cpu_device())
    out = Path(args.out) if args.out else record.path_for(env, "memory")
    record.refuse_overwrite(out, args.force)
    case = case_of(args.size)
    data: dict[str, Any] = {**env, "command": "memory", "memory": [], "notes": []}
    for name in args.mode:
        mode = MODES[name]
        for dtype in (d for d in args.dtype if d in mode.dtypes):
            predicted = mode.predicted(DTYPES[dtype].itemsize)
            entry: dict[str, Any] = {"mode": mode.title, "dtype": dtype, "predicted": predicted}
            whats = [what for what in args.what if what == "alone" or dtype == "fp32"]
            found = measure(name, dtype, whats, args.threads, args.size)
            for what in whats:
                entry[what] = found if isinstance(found, str) else {**found[what], "elements": case.elements}
            data["memory"].append(entry)
    data["notes"].append(
        f"{case.title}, {case.elements:,} parameters in {len(case.shapes)} tensors; {STEPS} steps; {TOKENS} tokens; "
        "gradients counted, weights not"
    )
    record.write(out, data, args.force)
    print(record.markdown(data))
    print(f"written to {out}")
    if args.page is not None:
        write_page(args.page, data)
    return 0


def write_page(page: Path, data: dict[str, Any]) -> None:
    """Replaces what stands between the two comments in ``page``, and figures/memory.png beside it."""
    from .plots import plot

    begin, end = PAGE_MARKS
    before, _, rest = page.read_text().partition(begin + "\n")
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no place for the tables: expected {begin!r}, and after it {end!r}")
    page.write_text(f"{before}{begin}\n{record.memory_tables(data['memory'])}{end}{after}")
    plot(data, page.parent / "figures" / "memory.png")


if __name__ == "__main__":
    _child(sys.argv[1])
