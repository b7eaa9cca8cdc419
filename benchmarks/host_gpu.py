"""``python -m benchmarks.host_gpu``: host time of the GPU backends per call, where no GPU is needed.

Tensors are on the CPU, and where a launch would go to the driver of a GPU, its arguments are dropped: what is measured
is all the work before that. Not in it: the driver's part of a launch (a few microseconds each), and for Triton copies
of numbers and tables to a GPU, which are made when a number changes or gradients come to new addresses.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # lets the Triton backend take CPU tensors

import torch

from rst_fused import RST, _backends

from .cases import HOST_SIZE, many
from .peers import attach
from .runner import quiet

BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "momentum": 0.9},
    "adamw": {"base": "adamw"},
}
# (backend, how its steps run): with a launch plan, or through the ops.
WAYS = (("cuda", "plan"), ("triton", "plan"), ("triton", "ops"))


def start_no_cuda() -> None:
    """From now on backend "cuda" takes CPU tensors, and its launches end where CUDA would be called."""
    extension = _backends.plan_extension()
    if extension is None or _backends.build_info()["CUDA"] == "not built":
        raise SystemExit("error: the extension was built without CUDA; choose --backend triton")
    extension.discard_gpu_launches()
    others = tuple(b for b in _backends.backends() if b.name != "cuda")
    stand_in = _backends.Backend("cuda", True, "", ("cpu",), None, "gpu")
    _backends._BY_SPEED = (*others, stand_in)  # type: ignore[assignment]


def start_no_triton() -> None:
    """From now on launches end where Triton would call the driver."""
    from triton.compiler import CompiledKernel

    from rst_fused.kernels import launch_groups, launcher

    class Binary(CompiledKernel):
        def __init__(self) -> None:
            self.module, self.function, self.packed_metadata = object(), 0, ()
            self._run = lambda *args: args[8](args[6])  # the hook that follows a launch

    def starter(function: Any, device: torch.device, constants: dict[str, Any], warps: int) -> Any:
        made = launcher.Launcher(function, device, constants, warps)
        made._binary = Binary()
        return made.start

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    type(launcher.driver).active = active
    launch_groups.starter = starter


def without_plans(opt: RST) -> None:
    for phase in ("perturb", "update", "restore", "renew"):
        setattr(opt._plans, phase, lambda *args, **options: False)


def measure(opt: RST, params: list[Any], grads: list[list[torch.Tensor]], calls: int) -> tuple[float, float]:
    """The median seconds of perturb() and of step()."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for times, call, given in zip(seconds, (opt.perturb, opt.step), grads, strict=True):
            attach(params, given)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    words = (__doc__ or "").split(": ", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_gpu", description=words)
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton"], choices=("cuda", "triton"))
    parser.add_argument("--count", nargs="+", type=int, default=[3, 150, 1000], help="numbers of tensors")
    parser.add_argument("--rounds", type=int, default=7, help="in which the ways take turns; the median counts")
    parser.add_argument("--calls", type=int, default=50, help="of each way in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "cuda" in args.backend:
        start_no_cuda()
    if "triton" in args.backend:
        start_no_triton()
    print(f"torch {torch.__version__}, microseconds, median of {args.rounds} rounds (best round)")
    for count in args.count:
        case = many(count, HOST_SIZE)
        grads = [case.tensors(torch.float32, seed=1 + i, scale=1e-3) for i in range(2)]
        for base, options in BASES.items():
            runs = {}
            for backend, way in (w for w in WAYS if w[0] in args.backend):
                params = [torch.nn.Parameter(t) for t in case.tensors(torch.float32, seed=0, scale=0.02)]
                opt = RST(params, schedule=1.0, backend=backend, **options)
                if way == "ops":
                    without_plans(opt)
                measure(opt, params, grads, 5)
                runs[backend, way] = opt, params
            rounds: dict[tuple[str, str], list[tuple[float, float]]] = {who: [] for who in runs}
            with quiet():
                for _ in range(args.rounds):
                    for who, (opt, params) in runs.items():
                        rounds[who].append(measure(opt, params, grads, args.calls))
            for who, found in rounds.items():
                perturb, step = (1e6 * statistics.median(column) for column in zip(*found, strict=True))
                best = 1e6 * min(map(sum, found))
                print(f"{count:5} tensors  {base:6} {' '.join(who):12} perturb {perturb:7.1f}  step {step:7.1f}  "
                      f"both {perturb + step:7.1f} ({best:.1f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
