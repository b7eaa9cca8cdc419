"""The stage ``tune``: block sizes and warps of the Triton kernels, timed and kept for later processes.

It runs only if it is asked for. Stages after it use what it found.
"""

from __future__ import annotations

import sys
from functools import partial

from . import stage


def measure(part: stage.Part) -> None:
    if part.device.name == "cpu":
        part.note("tune: there is nothing to tune on the CPU")
        return
    from rst_fused.kernels import autotune

    for what, times in autotune(part.device.name).items():
        part.add("sizes", {
            "what": what,
            "times": [{"per_thread": s.per_thread, "warps": s.warps, "seconds": t} for s, t in times.items()],
        })  # fmt: skip


def main() -> int:
    part = stage.start(stage.parser(__doc__).parse_args())
    part.attempt("tune", partial(measure, part))
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
