"""KeyboardInterrupt at a chosen place: before a line of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rst_fused

PACKAGE = Path(rst_fused.__file__).parent
SOURCES = (str(PACKAGE), str(PACKAGE.parent / "kernels"))  # where Triton's kernels lie in a checkout


def runs_on_device(frame: Any) -> bool:
    """Whether it is a function of a kernel, which only Triton's interpreter runs line by line."""
    return hasattr(frame.f_globals.get(frame.f_code.co_name), "arg_names")


class Interrupt:
    """Raises KeyboardInterrupt before the package's ``stop``-th line; counts the lines that ran."""

    def __init__(self, stop: int) -> None:
        self.stop, self.lines = stop, 0

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES) or runs_on_device(frame):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.stop:
                raise KeyboardInterrupt
        return self.trace
