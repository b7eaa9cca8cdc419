"""GPU kernels without a GPU: the PTX that nvcc makes of them, run by an interpreter on ordinary memory.

RST_FUSED_PTXSIM names the folder with the interpreter's module, ptxsim. Everything up to the launch is what a GPU would
get: the registered ops hand their launches to ``Simulator.launch`` instead.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ptx_order
import pytest
import torch
from side_by_side import side_by_side

from rst_fused import _backends
from rst_fused._schemas import ADAM_HYPER, LION_HYPER, SCHEMAS, SGD_HYPER, STATS

ROOT = Path(__file__).parents[2]
NAMESPACE = "rst_fused_gpu"  # the GPU ops, for tensors of any device: see csrc/torch/ops_cuda.cpp
VARIABLE = "RST_FUSED_PTXSIM"
ROWS, ARGUMENT_BYTES, THREADS = 64, 32764, 512  # csrc/cuda/args.h
STATS_BYTES = 8 * len(STATS)
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "16": 2, "32": 4, "64": 8}
# Operands of each kernel, in order: r read, w written, s state (fp32 beside a master), k where weights are kept (fp32
# in a master copy, which an update writes), c copy (the backup or such a master), m remainders (where there are any).
# Those of an update are followed by its states, and by its remainders.
OPERANDS = {
    "grad_norm": ("r", "k", "m"), "finish_norm": (), "perturb": ("w", "r", "c", "m"), "restore": ("w", "k"),
    "mix": ("w", "r"), **dict.fromkeys(("sgd_step", "adam_step", "lion_step"), ("w", "r", "k", "r")),
}  # fmt: skip
STATES = {"momentum": 1, "adam": 2, "amsgrad": 1, "lion": 1}  # by the words in the name of an update
# Bytes of a row of hyperparameters: rho, gamma, or what an update makes of its own.
ROW_BYTES = {"perturb": 8, "mix": 8, "sgd_step": 64, "adam_step": 88, "lion_step": 56}
COLUMNS = {"sgd_step": len(SGD_HYPER), "adam_step": len(ADAM_HYPER), "lion_step": len(LION_HYPER)}  # else rho or gamma


# How far a norm may be off, relatively, whose squares are added in fp32, 8 of a pack and 4 packs: 12 roundings of at
# most 2^-24, and 8 of each of ASAM's terms (|w|, eta and g; the square doubles them). The root halves all.
NORM_ERROR = 10 * 2.0**-24


def missing() -> str | None:
    """Why kernels cannot be simulated here; None if they can."""
    if _backends.build_info().get("CUDA", "not built") == "not built":
        return "the extension was built without CUDA"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} does not name the folder of a PTX interpreter"
    return None


needed = pytest.mark.skipif(missing() is not None, reason=f"GPU kernels cannot be simulated: {missing()}")


class FinishArgs(ctypes.Structure):
    _fields_ = [("squares", ctypes.c_void_p), ("count", ctypes.c_int64), ("stats", ctypes.c_void_p)]


class Shard(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_int64), ("run", ctypes.c_int64), ("stride", ctypes.c_int64)]


class LaunchParams(ctypes.Structure):
    _fields_ = [
        ("device_hyperparams", ctypes.c_void_p), ("device_steps", ctypes.c_void_p), ("rng", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p), ("found_inf", ctypes.c_void_p), ("stats", ctypes.c_void_p),
        ("eta", ctypes.c_double), ("grad_multiplier", ctypes.c_double), ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64), ("stochastic", ctypes.c_bool), ("flag", ctypes.c_bool),
        ("partials", ctypes.c_void_p), ("first_partial", ctypes.c_int64), ("all_partials", ctypes.c_int64),
        ("tensors", ctypes.c_int32), ("chunk", ctypes.c_int32), ("last", ctypes.c_bool),
    ]  # fmt: skip


def op_of(kernel: str) -> str:
    op = next((name for name in OPERANDS if kernel.startswith(f"rst_{name}_")), "")
    assert op, f"{kernel} is of no op in OPERANDS of {Path(__file__).name}: kernels are called rst_<op>_<dtype>"
    return op


def operands_of(kernel: str) -> tuple[str, ...]:
    words = kernel.split("_")
    states = sum(count for word, count in STATES.items() if word in words)
    remainders = ("wm",) if "step" in words and "remainder" in words else ()
    return OPERANDS[op_of(kernel)] + ("ws",) * states + remainders


def rounds(kernel: str) -> bool:
    """Whether its first state is bfloat16, and rounded stochastically."""
    return "rounding" in kernel.split("_")


@cache
def args_type(kernel: str) -> Any:
    """struct Args of csrc/cuda/args.h, as this kernel takes it."""
    if op_of(kernel) == "finish_norm":
        return FinishArgs
    operands, row_bytes = len(operands_of(kernel)), ROW_BYTES.get(op_of(kernel), 1)
    more = [("shard", Shard)] if kernel.endswith("_shard") or rounds(kernel) else []
    of_tensor = 8 + 8 * operands + 10 + sum(ctypes.sizeof(kind) for _, kind in more)
    n = (ARGUMENT_BYTES - ctypes.sizeof(LaunchParams) - ROWS * row_bytes - 16) // of_tensor

    class Args(ctypes.Structure):
        _fields_ = [
            ("params", LaunchParams), ("rows", ctypes.c_uint8 * row_bytes * ROWS), ("numel", ctypes.c_int64 * n),
            ("data", (ctypes.c_uint64 * n) * operands), ("first_chunk", ctypes.c_int32 * (n + 1)),
            ("index", ctypes.c_int32 * n), ("row", ctypes.c_uint16 * n), *((name, kind * n) for name, kind in more),
        ]  # fmt: skip

    return Args


def capacity(kernel: str) -> int:
    """How many tensors one launch takes."""
    return len(args_type(kernel)().numel)


def nvcc_flags() -> list[str]:
    """Those of setup.py that decide what a kernel computes."""
    return ["-O3", "-std=c++17", "-fmad=false", f"-DRST_CUDA_ARGUMENT_BYTES={ARGUMENT_BYTES}"]


def compile_ptx(folder: Path, architecture: str = "sm_90", csrc: Path = ROOT / "csrc") -> dict[str, Path]:
    """The PTX of every source, by its stem."""

    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}.ptx"
        command = ["nvcc", *nvcc_flags(), f"-I{csrc}", f"-arch={architecture}", "-ptx", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        return made

    sources = sorted((csrc / "cuda").glob("*.cu"), key=lambda source: "update" not in source.stem)  # longest first
    with side_by_side({source.stem: partial(compiled, source) for source in sources}) as started:
        return {stem: made.result() for stem, made in started.items()}


def decoded(kernel: str, data: bytes) -> Any:
    """The arguments of a launch."""
    args = args_type(kernel).from_buffer_copy(data)
    assert ctypes.sizeof(args) == len(data), "the structures of this file are not those of csrc/cuda/args.h"
    return args


class Simulator:
    """Runs launches, and keeps what the interpreter counted and reported."""

    def __init__(self, ptx: dict[str, Path]) -> None:
        folder = os.environ[VARIABLE]
        if folder not in sys.path:
            sys.path.insert(0, folder)
        from ptxsim import Module  # type: ignore[import-not-found]

        texts = {stem: path.read_text() for stem, path in ptx.items()}
        self.instructions = {name: lines for text in texts.values() for name, lines in ptx_order.kernels(text)}
        self.modules = {stem: Module(text) for stem, text in texts.items()}
        self.kernels = {name: stem for stem, module in self.modules.items() for name in module.names()}
        self.options: dict[str, Any] = {"check": 2}
        self.launches: list[tuple[str, int, Any, dict[str, Any]]] = []

    def launch(self, kernel: str, blocks: int, threads: int, data: bytes) -> None:
        args = decoded(kernel, data)
        result = self.modules[self.kernels[kernel]].launch(
            kernel, blocks, threads, [data], bufs=self._memory(kernel, args), **self.options
        )
        self.launches.append((kernel, blocks, args, result))
        assert not result["reports"], result["reports"]

    @staticmethod
    def _memory(kernel: str, args: Any) -> list[tuple[np.ndarray, bool]]:
        """Every byte that the launch may touch, and whether it may write there."""
        op, operands = op_of(kernel), operands_of(kernel)
        if op == "finish_norm":
            return [(_bytes_at(args.squares, 8 * args.count), False), (_bytes_at(args.stats, STATS_BYTES), True)]
        size = next(SIZES[part] for part in kernel.removeprefix(f"rst_{op}_").split("_") if part in SIZES)
        copies, remainders, updates = "master" in kernel, "remainder" in kernel, "step" in kernel
        params = args.params
        found: dict[int, tuple[int, bool]] = {}

        def allow(address: int | None, length: int, written: bool) -> None:
            if address and length:
                before = found.get(address, (0, False))
                found[address] = (max(before[0], length), before[1] or written)

        for s, kind in enumerate(operands):
            wide = (copies and kind in ("k", "c")) or (kind == "ws" and (copies or remainders))
            written = kind[0] == "w" or (kind == "c" and not copies) or (kind == "k" and copies and updates)
            each = 2 if rounds(kernel) and s == len(OPERANDS[op]) else 4 if wide else size
            for t in range(params.tensors):
                allow(args.data[s][t], args.numel[t] * each, written)
        rows = max((args.row[t] for t in range(params.tensors)), default=0) + 1
        allow(params.device_hyperparams, rows * COLUMNS.get(op, 1) * 8, False)
        allow(params.device_steps, rows * 8, False)
        allow(params.rng, 16, False)
        allow(params.stats, STATS_BYTES, op == "grad_norm")
        allow(params.partials, params.all_partials * 8, True)
        allow(params.grad_scale, 4, False)
        allow(params.found_inf, 4, False)
        return [(_bytes_at(address, length), written) for address, (length, written) in found.items()]


def _bytes_at(address: int | None, length: int) -> np.ndarray:
    if not address:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))


_libraries: list[torch.library.Library] = []


@contextmanager
def simulated(simulator: Simulator, monkeypatch: pytest.MonkeyPatch, *on_device: bool) -> Iterator[None]:
    """While it lasts, backend "simulated" runs the GPU ops on CPU tensors. ``on_device``: whether numbers are read by
    the kernel, as if they were on the device, and whether hyperparameters travel by value all the same."""
    if not _libraries:
        _libraries.append(torch.library.Library(NAMESPACE, "DEF"))
        for name, schema in SCHEMAS.items():
            _libraries[0].define(name + schema)
    backend = _backends.Backend("simulated", True, "interpreted PTX", ("cpu",), _backends._ops(NAMESPACE), "gpu")
    monkeypatch.setattr(_backends, "_BY_SPEED", (*_backends._BY_SPEED, backend))
    simulator.launches.clear()
    _backends.plan_extension().simulate_gpu(simulator.launch, *on_device)
    try:
        yield
    finally:
        _backends.plan_extension().simulate_gpu(None)


def tensors(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def aligned(n: int, dtype: torch.dtype, value: float = 1.0) -> torch.Tensor:
    """At a multiple of 64 bytes, as a GPU allocator gives it."""
    t = torch.empty(n + 64, dtype=dtype)
    first = -t.data_ptr() % 64 // t.element_size()
    return t[first : first + n].fill_(value)
