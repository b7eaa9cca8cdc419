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
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            self.phases = _phases(json.loads(path.read_text())["traceEvents"])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(_PREFIX + name):
            yield


def _phases(events: list[dict[str, Any]]) -> list[Phase]:
    totals = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e["name"] == "[memory]")
    marked = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(_PREFIX)) for e in events if e["name"].startswith(_PREFIX)
    )
    found, next_event, total = [], 0, 0
    for begin, end, name in marked:
        peak = None
        while next_event < len(totals) and totals[next_event][0] < end:
            at, after = totals[next_event]
            if at >= begin:
                peak = max(after, total if peak is None else peak)
            total = after
            next_event += 1
        found.append(Phase(name, total if peak is None else peak, total))
    return found
