"""Compiles the Triton kernels for GPUs that need not be present, and reports what they use.

    python tests/support/triton_offline.py [REPORT.json]

Pointers and scalars are described as a launch describes them: kernels specialize on none of them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rst_fused  # noqa: F401  (makes rst_fused.kernels importable in a checkout)
from rst_fused.kernels import adam_step, lion_step, sgd_step
from rst_fused.kernels.grad_norm import SUMS, finish_kernel, finish_norm_kernel, grad_norm_kernel
from rst_fused.kernels.launch_config import BUILT_IN, WIDE_STATE
from rst_fused.kernels.launcher import OPTIONS
from rst_fused.kernels.perturb import perturb_kernel
from rst_fused.kernels.restore import restore_kernel
from rst_fused.kernels.update import update_kernel

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
    "gfx1100": GPUTarget("hip", "gfx1100", 32),  # RX 7900
}
ARGUMENTS = {
    "table": "*i64", "tensors": "i32", "partials": "*fp64", "first": "i32", "count": "i32", "stats": "*fp64",
    "squares": "*fp64", "rho": "*fp64", "eta": "*fp64", "rng": "*i64", "gammas": "*fp64", "hyperparams": "*fp64",
    "maximize_sign": "i32", "grad_scale": "*fp32", "found_inf": "*fp32",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget, warps: int = BUILT_IN.warps) -> Any:
    signature = {name: "constexpr" if name in constants else ARGUMENTS[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options={**OPTIONS, "num_warps": warps})


# --- what is reported -----------------------------------------------------------------------------------------------
F32, F64, BF16, F16 = tl.float32, tl.float64, tl.bfloat16, tl.float16


def _updating(rule: Any, state: Any) -> dict[str, Any]:
    plain = {"REMAINDERS": False, "ROUNDS": False, "SHARDS": False}
    return {**rule.constants, **plain, "config": BUILT_IN if state is None else WIDE_STATE}


def _rounding(constants: dict[str, Any], shards: bool = False) -> dict[str, Any]:
    return {**constants, "ROUNDS": True, "SHARDS": shards}


def _completed(constants: dict[str, Any], config: Any = BUILT_IN) -> dict[str, Any]:
    """With remainders beside bfloat16 parameters."""
    return {**constants, "REMAINDERS": True, "STATE": F32, "config": config}


def _types(t: Any, state: Any = None, arithmetic: bool = True) -> dict[str, Any]:
    wide = {"V": F64 if t is F64 else F32} if arithmetic else {}
    return {"T": t, "STATE": state or t, **wide, "config": BUILT_IN}


def _perturb(
    t: Any, state: Any = None, adaptive: bool = False, is_complex: bool = False, shards: bool = False
) -> dict[str, Any]:
    flags = {"ADAPTIVE": adaptive, "COMPLEX": is_complex, "STOCHASTIC": t in (BF16, F16), "SHARDS": shards}
    return _types(t, state) | flags | {"REMAINDERS": False}


def _sgd(t: Any, state: Any = None, mixing: bool = False, states: int = 1) -> dict[str, Any]:
    flags = {"FLAG": mixing, "STATES": states, "MIXING": mixing}
    return _types(t, state) | flags | _updating(sgd_step.RULE, state)


def _adam(t: Any, state: Any = None, mixing: bool = False, states: int = 2) -> dict[str, Any]:
    flags = {"FLAG": True, "STATES": states, "MIXING": mixing}
    return _types(t, state) | flags | _updating(adam_step.RULE, state)


def _lion(t: Any, state: Any = None, mixing: bool = False) -> dict[str, Any]:
    return _sgd(t, state, mixing) | {"FLAG": False} | lion_step.RULE.constants


def _norm(t: Any, adaptive: bool = False, is_complex: bool = False) -> dict[str, Any]:
    flags = {"ADAPTIVE": adaptive, "COMPLEX": is_complex, "FINISH": True, "SUMS": SUMS, "REMAINDERS": False}
    return _types(t, arithmetic=False) | flags


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grad_norm fp32": (grad_norm_kernel, _norm(F32)),
    "grad_norm asam complex64": (grad_norm_kernel, _norm(F32, True, True)),
    "grad_norm finish": (finish_kernel, {"SUMS": SUMS}),
    "finish_norm": (finish_norm_kernel, {}),
    "perturb fp32": (perturb_kernel, _perturb(F32)),
    "perturb bf16": (perturb_kernel, _perturb(BF16)),
    "perturb bf16 shards": (perturb_kernel, _perturb(BF16, shards=True)),
    "perturb fp16 master shards": (perturb_kernel, _perturb(F16, F32, shards=True)),
    "perturb fp16 master": (perturb_kernel, _perturb(F16, F32)),
    "perturb asam complex64": (perturb_kernel, _perturb(F32, None, True, True)),
    "restore bf16 master": (restore_kernel, _types(BF16, F32) | {"MIXING": False}),
    "restore fp32 mixing": (restore_kernel, _types(F32) | {"MIXING": True}),
    "sgd fp32": (update_kernel, _sgd(F32)),
    "sgd bf16 master mixing": (update_kernel, _sgd(BF16, F32, True)),
    "adam fp32": (update_kernel, _adam(F32)),
    "adam fp64 mixing": (update_kernel, _adam(F64, None, True)),
    "adam bf16 master mixing": (update_kernel, _adam(BF16, F32, True)),
    "adam fp32 rounding": (update_kernel, _rounding(_adam(F32) | {"config": WIDE_STATE})),
    "adam bf16 rounding shards": (update_kernel, _rounding(_adam(BF16, None, True), shards=True)),
    "sgd fp16 master rounding": (update_kernel, _rounding(_sgd(F16, F32))),
    "amsgrad fp32": (update_kernel, _adam(F32, states=3)),
    "amsgrad bf16 master mixing": (update_kernel, _adam(BF16, F32, True, 3)),
    "lion fp32": (update_kernel, _lion(F32)),
    "lion bf16 master mixing": (update_kernel, _lion(BF16, F32, True)),
    "grad_norm asam bf16 remainder": (grad_norm_kernel, _completed(_norm(BF16, True))),
    "perturb asam bf16 remainder shards": (perturb_kernel, _completed(_perturb(BF16, None, True, shards=True))),
    "sgd bf16 remainder": (update_kernel, _completed(_sgd(BF16, states=0))),
    "amsgrad bf16 remainder mixing": (update_kernel, _completed(_adam(BF16, F32, True, 3), WIDE_STATE)),
    "lion bf16 remainder rounding": (update_kernel, _completed(_rounding(_lion(BF16)))),
}


def for_target(constants: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """With block sizes in the place of a launch configuration."""
    config = constants.get("config")
    blocks = {} if config is None else {"BLOCK": config.block(target.warp_size), "TAIL": config.tail(target.warp_size)}
    return {**{name: value for name, value in constants.items() if name != "config"}, **blocks}


def nvidia_resources(ptx: str, target: GPUTarget) -> dict[str, Any]:
    """Registers, bytes of stack, and bytes of spilled registers, as the assembler reports them."""
    name = "ptxas-blackwell" if target.arch >= 100 else "ptxas"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    (chosen,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), f"-arch={chosen}", "--fmad=false", "-v", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack", "spills": r"(\d+) bytes spill"}
    return {name: sum(map(int, re.findall(pattern, text))) for name, pattern in patterns.items()}


def amd_resources(text: str) -> dict[str, Any]:
    """The same from what the compiler notes of a kernel; both kinds of registers may be spilled."""
    patterns = {
        "registers": r"\.vgpr_count:\s+(\d+)", "stack": r"\.private_segment_fixed_size:\s+(\d+)",
        "spills": r"\.[sv]gpr_spill_count:\s+(\d+)",
    }  # fmt: skip
    found = {name: list(map(int, re.findall(pattern, text))) for name, pattern in patterns.items()}
    assert all(found.values()), found  # otherwise they have other names now
    return {name: sum(numbers) for name, numbers in found.items()}


def widths(asm: dict[str, str]) -> dict[str, list[int]]:
    """Bytes per access, for all accesses to global memory in the text; on AMD also for the buffer instructions alone,
    which whole blocks use."""
    found: dict[str, set[int]] = {"ld": set(), "st": set()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", asm.get("ptx", "")):
        found[kind].add(int(vector or 1) * int(bits) // 8)
    for space, kind, size in re.findall(r"\b(global|buffer|flat)_(load|store)_(\w+)", asm.get("amdgcn", "")):
        found["ld" if kind == "load" else "st"].add(AMD_BYTES[size])
        if space == "buffer":
            found.setdefault("buffer", set()).add(AMD_BYTES[size])
    return {kind: sorted(sizes) for kind, sizes in found.items()}


# gfx9 counts in words, gfx11 in bits. u and i: without and with a sign; d16: to half of a register.
AMD_BYTES = {
    "ubyte": 1, "u8": 1, "ushort": 2, "short": 2, "short_d16": 2, "short_d16_hi": 2, "u16": 2, "b16": 2, "d16_b16": 2,
    "d16_hi_b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
}  # fmt: skip


def row(name: str, label: str) -> dict[str, Any]:
    (kernel, constants), target = VARIANTS[name], TARGETS[label]
    start = time.perf_counter()
    binary = compiled(kernel, for_target(constants, target), target)
    seconds = round(time.perf_counter() - start, 2)
    asm = binary.asm
    found = nvidia_resources(asm["ptx"], target) if "ptx" in asm else amd_resources(asm["amdgcn"])
    found |= {"shared": binary.metadata.shared, **widths(asm)}
    names = {"kernel": name, "function": kernel.__name__, "symbol": binary.metadata.name}
    return {**names, "target": label, **found, "seconds": seconds}


def report() -> list[dict[str, Any]]:
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as several:
        return several.starmap(row, itertools.product(VARIANTS, TARGETS), chunksize=1)


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = [" ".join(f"{key}={value}" for key, value in row.items()) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    rows = report()
    print(as_text(rows))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1), encoding="utf-8")
