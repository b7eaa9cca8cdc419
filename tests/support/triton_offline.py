"""Compiles the Triton kernels for GPUs that need not be present, and reports what they use.

    python tests/support/triton_offline.py [REPORT.json]

Pointers and scalars are described as a launch describes them: kernels specialize on none of them.
"""

from __future__ import annotations

import json
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
from rst_fused.kernels.grad_norm import SUMS, finish_kernel, grad_norm_kernel
from rst_fused.kernels.launch_config import BUILT_IN, WIDE_STATE
from rst_fused.kernels.launcher import OPTIONS
from rst_fused.kernels.perturb import perturb_kernel
from rst_fused.kernels.restore import restore_kernel
from rst_fused.kernels.update import update_kernel

ARCHITECTURES = (80, 90, 100)
ARGUMENTS = {
    "table": "*i64", "tensors": "i32", "partials": "*fp64", "first": "i32", "count": "i32", "stats": "*fp64", "rho": "*fp64",
    "eta": "*fp64", "rng": "*i64", "gammas": "*fp64", "hyperparams": "*fp64", "maximize_sign": "i32",
    "grad_scale": "*fp32", "found_inf": "*fp32",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], architecture: int, warps: int = BUILT_IN.warps) -> Any:
    signature = {name: "constexpr" if name in constants else ARGUMENTS[name] for name in kernel.arg_names}
    options = {**OPTIONS, "num_warps": warps}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


# --- what is reported -----------------------------------------------------------------------------------------------
F32, F64, BF16, F16 = tl.float32, tl.float64, tl.bfloat16, tl.float16
SIZES = {"BLOCK": BUILT_IN.block, "TAIL": BUILT_IN.tail}


def _updating(rule: Any, state: Any) -> dict[str, Any]:
    return {**rule.constants, "BLOCK": (BUILT_IN if state is None else WIDE_STATE).block}


def _types(t: Any, state: Any = None, arithmetic: bool = True) -> dict[str, Any]:
    wide = {"V": F64 if t is F64 else F32} if arithmetic else {}
    return {"T": t, "STATE": state or t, **wide, **SIZES}


def _perturb(t: Any, state: Any = None, adaptive: bool = False, is_complex: bool = False) -> dict[str, Any]:
    flags = {"ADAPTIVE": adaptive, "COMPLEX": is_complex, "STOCHASTIC": t in (BF16, F16)}
    return _types(t, state) | flags


def _sgd(t: Any, state: Any = None, mixing: bool = False) -> dict[str, Any]:
    flags = {"FLAG": mixing, "STATES": 1, "MIXING": mixing}
    return _types(t, state) | flags | _updating(sgd_step.RULE, state)


def _adam(t: Any, state: Any = None, mixing: bool = False, states: int = 2) -> dict[str, Any]:
    flags = {"FLAG": True, "STATES": states, "MIXING": mixing}
    return _types(t, state) | flags | _updating(adam_step.RULE, state)


def _lion(t: Any, state: Any = None, mixing: bool = False) -> dict[str, Any]:
    return _sgd(t, state, mixing) | {"FLAG": False} | lion_step.RULE.constants


def _norm(t: Any, adaptive: bool = False, is_complex: bool = False) -> dict[str, Any]:
    flags = {"ADAPTIVE": adaptive, "COMPLEX": is_complex, "FINISH": True, "SUMS": SUMS}
    return _types(t, arithmetic=False) | flags


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grad_norm fp32": (grad_norm_kernel, _norm(F32)),
    "grad_norm asam complex64": (grad_norm_kernel, _norm(F32, True, True)),
    "grad_norm finish": (finish_kernel, {"SUMS": SUMS}),
    "perturb fp32": (perturb_kernel, _perturb(F32)),
    "perturb bf16": (perturb_kernel, _perturb(BF16)),
    "perturb fp16 master": (perturb_kernel, _perturb(F16, F32)),
    "perturb asam complex64": (perturb_kernel, _perturb(F32, None, True, True)),
    "restore bf16 master": (restore_kernel, _types(BF16, F32) | {"MIXING": False}),
    "restore fp32 mixing": (restore_kernel, _types(F32) | {"MIXING": True}),
    "sgd fp32": (update_kernel, _sgd(F32)),
    "sgd bf16 master mixing": (update_kernel, _sgd(BF16, F32, True)),
    "adam fp32": (update_kernel, _adam(F32)),
    "adam fp64 mixing": (update_kernel, _adam(F64, None, True)),
    "adam bf16 master mixing": (update_kernel, _adam(BF16, F32, True)),
    "amsgrad fp32": (update_kernel, _adam(F32, states=3)),
    "amsgrad bf16 master mixing": (update_kernel, _adam(BF16, F32, True, 3)),
    "lion fp32": (update_kernel, _lion(F32)),
    "lion bf16 master mixing": (update_kernel, _lion(BF16, F32, True)),
}


def resources(ptx: str, architecture: int) -> dict[str, int]:
    """Registers, bytes of stack, and bytes of spilled registers, as the assembler reports them."""
    name = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), f"-arch={target}", "--fmad=false", "-v", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack", "spills": r"(\d+) bytes spill"}
    return {name: sum(map(int, re.findall(pattern, text))) for name, pattern in patterns.items()}


def widths(ptx: str) -> dict[str, list[int]]:
    """Bytes per access, for all accesses to global memory in the text."""
    found: dict[str, set[int]] = {"ld": set(), "st": set()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx):
        found[kind].add(int(vector or 1) * int(bits) // 8)
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def report() -> list[dict[str, Any]]:
    rows = []
    for name, (kernel, constants) in VARIANTS.items():
        for architecture in ARCHITECTURES:
            start = time.perf_counter()
            binary = compiled(kernel, constants, architecture)
            seconds = round(time.perf_counter() - start, 2)
            ptx = binary.asm["ptx"]
            found = {**resources(ptx, architecture), "shared": binary.metadata.shared, **widths(ptx)}
            names = {"kernel": name, "function": kernel.__name__, "symbol": binary.metadata.name}
            rows.append({**names, "sm": architecture, **found, "seconds": seconds})
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = [" ".join(f"{key}={value}" for key, value in row.items()) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    rows = report()
    print(as_text(rows))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1), encoding="utf-8")
