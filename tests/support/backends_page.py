"""The tables of docs/backends.md come from the backends and the op table; this file writes them:

    python tests/support/backends_page.py
"""

from __future__ import annotations

from pathlib import Path

import op_db
import torch

from rst_fused import _backends

PAGE = Path(__file__).parents[2] / "docs/backends.md"
START, END = "<!-- from here to the end of the tables: python tests/support/backends_page.py -->\n", "<!-- end -->\n"
SHORT = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
NEEDS = {
    "cpu": "the compiled extension", "triton": "`pip install triton`", "reference": "nothing but torch",
    "cuda": "the extension compiled with nvcc",
}  # fmt: skip


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def dtypes(op: op_db.OpInfo) -> str:
    """Those its samples are tested in, on every backend."""
    tested = {d for spec in op.specs for kind in spec.kinds() for d in op_db.KINDS[kind]}
    return " ".join(short for dtype, short in SHORT.items() if dtype in tested)


def with_masters(op: op_db.OpInfo) -> str:
    kinds = {kind for spec in op.specs if "masters" in spec.lists for kind in spec.kinds()}
    return " ".join(short for dtype, short in SHORT.items() if str(dtype).removeprefix("torch.") in kinds) or "-"


def tables() -> str:
    known = _backends.backends()
    devices = {b.name: "any" if b.device_types is None else ", ".join(b.device_types) for b in known}
    lines = [row(["backend", "devices", "needs"]), row(["---"] * 3)]
    lines += [row([f"`{b.name}`", devices[b.name], NEEDS[b.name]]) for b in known]
    heads = ["op", *(f"`{b.name}`" for b in known), "beside fp32 masters"]
    lines += ["\n", row(heads), row(["---"] * len(heads))]
    for op in op_db.OPS.values():
        lines.append(row([f"`{op.name}`", *[dtypes(op)] * len(known), with_masters(op)]))
    return "".join(lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + tables() + END + rest.partition(END)[2], encoding="utf-8")
