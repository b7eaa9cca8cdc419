"""Whether a kernel that takes a ticket sees what the blocks before it wrote: the acquiring side of its atomics.

An interpreter that runs threads one after another cannot miss a write, and so cannot see a missing acquire. This
follows the PTX instead: from every atomic that does not acquire, along all branches, up to a fence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# With the scope of the device or more.
ACQUIRES = re.compile(r"\bmembar\.(gl|sys)\b|\bfence\.(sc|acq_rel)\.(gpu|sys)\b|\.(acquire|acq_rel)\.(gpu|sys)\b")
ATOMIC = re.compile(r"\batom\.")
READ = re.compile(r"\bld\.(?!param|shared|const|local)")
BRANCH = re.compile(r"(@!?%p\d+\s+)?\bbra(?:\.uni)?\s+(\$?[\w$]+)")


def kernels(ptx: str) -> Iterator[tuple[str, list[str]]]:
    """(name, its instructions and labels) of every kernel."""
    for name, body in re.findall(r"\.entry (\w+)\(.*?\)\s*(?:\.\w+[^{;]*)*\{(.*?)^\}", ptx, re.DOTALL | re.MULTILINE):
        yield name, [line.strip() for line in body.splitlines() if line.strip()]


def _next(lines: list[str], at: int, labels: dict[str, int]) -> list[int]:
    """What may run after instruction ``at``."""
    line = lines[at]
    if branch := BRANCH.search(line):
        return [labels[branch[2]], *([at + 1] if branch[1] else [])]
    return [] if re.match(r"(ret|exit)\b", line) else [at + 1]


def unacquired_reads(lines: list[str]) -> list[str]:
    """Reads of global memory after an atomic, with nothing between that acquires."""
    labels = {line.removesuffix(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    starts = [i for i, line in enumerate(lines) if ATOMIC.search(line) and not ACQUIRES.search(line)]
    seen: set[int] = set()
    found = []
    ahead = [after for start in starts for after in _next(lines, start, labels)]
    while ahead:
        at = ahead.pop()
        if at in seen or at >= len(lines) or ACQUIRES.search(lines[at]):
            continue
        seen.add(at)
        if READ.search(lines[at]):
            found.append(lines[at])
        ahead += _next(lines, at, labels)
    return found
