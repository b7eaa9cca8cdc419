"""``python -m benchmarks machine-code``: what nvcc makes of the CUDA kernels: registers, spills, instructions.

No GPU is needed: nvcc compiles, ptxas counts registers, nvdisasm (on PATH, or the one in Triton) shows instructions.
Instructions per element are those between head and end of the innermost loop with the most 16-byte accesses, over the
elements that one turn of it works on: an upper bound, since a turn may skip some of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from .record import table

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-DRST_CUDA_ARGUMENT_BYTES=32764")  # as in setup.py
THREADS = 512  # of a block: kThreads in csrc/cuda/args.h
REGISTERS, GRANULARITY = 65536, 8  # of a multiprocessor; a thread has a multiple of GRANULARITY
RESIDENT = {"80": 2048, "90": 2048, "100": 2048, "120": 1536}  # threads on a multiprocessor at most
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "16": 2, "32": 4, "64": 8}
# Kernel -> bytes that it moves for one element, from the size of the dtype and that of the state.
TRAFFIC = {
    "finish": lambda b, s: b, "grad_norm": lambda b, s: b, "grad_norm_adaptive": lambda b, s: b + s,
    "perturb": lambda b, s: 4 * b if s == b else 2 * b + s, "restore": lambda b, s: b + s, "mix": lambda b, s: 3 * b,
    "sgd": lambda b, s: 2 * b + 2 * s if s != b else 3 * b, "momentum": lambda b, s: 2 * s,
    "adam": lambda b, s: 2 * b + 6 * s if s != b else 7 * b, "lion": lambda b, s: 2 * b + 4 * s if s != b else 5 * b,
    "amsgrad": lambda b, s: 2 * s, "mixing": lambda b, s: b,
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str
    registers: int
    stack: int  # bytes of local memory
    spills: int  # bytes of spilled registers, stores and loads
    blocks: int  # that fit on one multiprocessor
    instructions: float | None  # per element in the loop over whole packs; None: there is no such loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="sources; default: those of this checkout")
    parser.add_argument("--define", nargs="*", default=[], metavar="NAME=VALUE", help="handed on to nvcc")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose names contain this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--before", type=Path, metavar="FILE", help="numbers of other sources, to print before these")


# --- what a kernel's name says --------------------------------------------------------------------------------------
def bytes_per_element(name: str) -> int:
    """rst_adam_step_bfloat16_master_amsgrad_mixing -> 38."""
    words = name.removeprefix("rst_").split("_")
    size = next(SIZES[word] for word in words if word in SIZES)
    state = 4 if {"master", "remainder"} & {*words} else size
    if words[0] == "grad":
        return TRAFFIC["grad_norm_adaptive" if "adaptive" in words else "grad_norm"](size, state)
    found = TRAFFIC[words[0]](size, state)
    if "remainder" in words:  # perturb reads it beside w; an update has it in the place of the upper half of a copy
        found += 2 if words[0] == "perturb" else -2
    if "rounding" in words:  # a first moment in bfloat16, read and written
        found += 2 * (2 - state)
    return found + sum(TRAFFIC[word](size, state) for word in ("momentum", "amsgrad", "mixing") if word in words)


# --- the disassembly ------------------------------------------------------------------------------------------------
def _tool(name: str) -> str:
    """Of CUDA, or the copy that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / name if triton else Path(name)
    found = shutil.which(name) or shutil.which(str(beside))
    if found is None:
        raise ValueError(f"{name} is neither on PATH nor in Triton: install the CUDA toolkit or pip install triton")
    return found


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """(kernel, its lines) in what nvdisasm prints."""
    for part in re.split(r"^\s*\.section\s+\.text\.", disassembly, flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+", part)
        yield name[0] if name else "", part.splitlines()


def loops(lines: Sequence[str]) -> list[list[str]]:
    """The instructions of every loop: from a label to the branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in lines:
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            instructions.append(line)
            target = re.search(r"\bBRA\b.*?\(?(\.L_\w+)", line)
            if target and target[1] in labels:
                found.append(instructions[labels[target[1]] :])
    return found


def widths(instructions: Sequence[str], kind: str) -> list[int]:
    """Bytes per thread of each global access of that kind, LD or ST."""
    found = []
    for line in instructions:
        if access := re.search(rf"\b{kind}G?\.E((?:\.\w+)*)", line):
            bits = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", access[1])
            found.append(int(bits[1]) // 8 if bits else 4)
    return found


def _has_arithmetic(instructions: Sequence[str]) -> bool:
    return any(re.search(r"\b[FDH]FMA|\b[FDH]MUL", line) for line in instructions)


def main_loop(lines: Sequence[str]) -> list[str] | None:
    """That of the common case: packs alone; computing, where any loop does; most of them at once; the shortest."""
    found = []
    for loop in loops(lines):
        sizes = [*widths(loop, "LD"), *widths(loop, "ST")]
        if sizes and min(sizes) >= 16:
            found.append((not _has_arithmetic(loop), -len(sizes), len(loop), loop))
    return min(found, key=lambda entry: entry[:3])[3] if found else None


# --- measuring ------------------------------------------------------------------------------------------------------
def blocks_that_fit(registers: int, architecture: str) -> int:
    rounded = -(-registers // GRANULARITY) * GRANULARITY
    return min(REGISTERS // (THREADS * rounded), RESIDENT[architecture] // THREADS)


def _compiled(source: Path, csrc: Path, architecture: str, defines: Sequence[str]) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = ["nvcc", *FLAGS, *(f"-D{d}" for d in defines), f"-I{csrc}", "-Xptxas=-v", f"-arch=sm_{architecture}"]
        done = subprocess.run([*command, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"nvcc failed on {source}:\n{done.stderr}")
        text = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    used = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers", done.stderr, flags=re.DOTALL,
    )  # fmt: skip
    lines = dict(functions(text))
    found = []
    for name, stack, stores, loads, registers in used:
        loop = main_loop(lines.get(name, [])) or []
        moved = sum(widths(loop, "LD")) + sum(widths(loop, "ST"))
        found.append(Kernel(
            architecture, name, int(registers), int(stack), int(stores) + int(loads),
            blocks_that_fit(int(registers), architecture),
            round(len(loop) * bytes_per_element(name) / moved, 1) if moved else None,
        ))  # fmt: skip
    return found


def measured(csrc: Path, architectures: Sequence[str], defines: Sequence[str] = ()) -> list[Kernel]:
    """Every kernel for every architecture, sorted by name."""
    if shutil.which("nvcc") is None:
        raise ValueError("nvcc is not on PATH: install the CUDA toolkit")
    jobs = [(source, a) for a in architectures for source in sorted((csrc / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda job: _compiled(job[0], csrc, job[1], defines), jobs)
        found = [kernel for part in parts for kernel in part]
    return sorted(found, key=lambda k: (k.name, int(k.architecture)))


def run(args: argparse.Namespace) -> int:
    found = [k for k in measured(args.csrc.resolve(), args.arch, args.define) if args.only in k.name]
    if args.json:
        args.json.write_text(json.dumps([asdict(k) for k in found], indent=1) + "\n")
    before = [Kernel(**fields) for fields in json.loads(args.before.read_text())] if args.before else []
    print(markdown(found, before))
    return 0


def _cell(kernel: Kernel | None) -> str:
    """registers (+ spilled bytes) / blocks / instructions."""
    if kernel is None:
        return "none"
    spilled = f" + {kernel.spills} B spilled" if kernel.spills else ""
    per_element = "" if kernel.instructions is None else f" / {kernel.instructions:g}"
    return f"{kernel.registers}{spilled} / {kernel.blocks}{per_element}"


def markdown(kernels: Sequence[Kernel], before: Sequence[Kernel] = ()) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=int)
    now, old = ({(k.name, k.architecture): k for k in found} for found in (kernels, before))
    rows = []
    for name in dict.fromkeys(k.name for k in kernels):
        cells = [_cell(now.get((name, a))) for a in architectures]
        if before:
            cells = [f"{_cell(old.get((name, a)))} -> {cell}" for a, cell in zip(architectures, cells, strict=True)]
        rows.append([name.removeprefix("rst_"), str(bytes_per_element(name)), *cells])
    head = "registers of a thread / blocks of 512 threads on a multiprocessor / instructions per element\n\n"
    return head + table(["kernel", "bytes per element", *(f"sm_{a}" for a in architectures)], rows)
