"""Exactly how many bytes torch's CPU allocator has handed out, at every moment of what runs within.

From the memory events of torch.profiler: each has the total after it. What was allocated before is not in it, and
neither are the small tables that C++ code allocates by itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_PREFIX = "phase: "


@dataclass(frozen=True)
class Phase:
    name: str
    peak: int  # the largest total in it
    end: int


class Allocations:
    """``with Allocations() as found:``, within it ``with found.phase(name):``, and afterwards ``found.phases``."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._stack = ExitStack()

    def __enter__(self) -> Allocations:
        self._stack.enter_context(self._profile)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        if error[0] is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            self.phases = _phases(json.loads(path.read_text())["traceEvents"])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(_PREFIX + name):
            yield


def _phases(events: list[dict[str, Any]]) -> list[Phase]:
    allocations = sorted(((e["ts"], e["args"]) for e in events if e["name"] == "[memory]"), key=itemgetter(0))
    marks = [(e["ts"], e["dur"], e["name"].removeprefix(_PREFIX)) for e in events if e["name"].startswith(_PREFIX)]
    # An earlier recording in this process may have left a total behind.
    start = allocations[0][1]["Total Allocated"] - allocations[0][1]["Bytes"] if allocations else 0
    totals = [(ts, args["Total Allocated"] - start) for ts, args in allocations]
    found = []
    for begin, duration, name in sorted(marks):
        at_begin = next((total for ts, total in reversed(totals) if ts < begin), 0)
        within = [total for ts, total in totals if begin <= ts <= begin + duration]
        found.append(Phase(name, max([at_begin, *within]), [at_begin, *within][-1]))
    return found
