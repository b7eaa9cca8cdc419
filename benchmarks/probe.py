"""The memory-bandwidth ceiling: builds ``probe.cpp`` with g++ and times the stream mix of each op."""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("probe.cpp")
ARRAYS = ("w", "g", "m", "backup")
MIXES = ("norm", "perturb", "update", "base")
# What an op must move, as a sum of mixes: a perturbation needs the norm of all gradients before it can start.
CEILING = {
    "perturb": ("norm", "perturb"),
    "update": ("update",),
    "step": ("norm", "perturb", "update"),
    "base": ("base",),
}
STREAMS = {"norm": 1, "perturb": 4, "update": 5, "base": 5}  # arrays read plus arrays written
VARIANTS = {0: "plain stores", 1: "non-temporal write-only stream", 2: "non-temporal stores everywhere"}
DISTINCT = {"norm": (0,), "perturb": (0, 1, 2), "update": (0, 1, 2), "base": (0, 2)}  # variants that differ
BLOCKS = (0, 1 << 16, 1 << 20)
STEP_BYTES = 128


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the bandwidth probe needs a C++ compiler: install g++, or pass --no-probe")
    folder = tempfile.mkdtemp(prefix="bandwidth-probe-")
    library = Path(folder, "probe.so")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    try:
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True, capture_output=True, text=True)
        loaded = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the bandwidth probe did not compile:\n{error.stderr}") from error
    finally:
        shutil.rmtree(folder)  # a loaded library stays mapped without its file
    loaded.probe_run.restype = ctypes.c_uint64
    loaded.probe_run.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 4 + [ctypes.c_size_t] * 2 + [ctypes.c_int]
    return loaded


class Probe:
    """One array per stream, each ``elements * element_size`` bytes, swept by ``threads`` threads.

    The arrays come from torch's allocator, so that the probe meets the same kind of pages as the ops.
    """

    def __init__(self, elements: int, element_size: int, threads: int) -> None:
        self.bytes = -(-elements * element_size // STEP_BYTES) * STEP_BYTES
        self.threads = threads
        self._library = _library()
        # Written once, so that every page is real memory: pages never written all share one page of zeros.
        self.arrays = {name: torch.full((self.bytes,), 7, dtype=torch.uint8) for name in ARRAYS}
        self._addresses = [array.data_ptr() for array in self.arrays.values()]
        self.choice: dict[str, tuple[int, int]] = dict.fromkeys(MIXES, (0, 0))

    def run(self, mix: str, variant: int, block: int) -> int:
        """One pass of ``mix`` over all arrays. The norm returns what it read, 8 bytes folded into 8."""
        return self._library.probe_run(MIXES.index(mix), variant, *self._addresses, self.bytes, block, self.threads)

    def call(self, mix: str) -> None:
        """One pass of ``mix`` in the variant that :meth:`calibrate` found fastest."""
        self.run(mix, *self.choice[mix])

    def calibrate(self, rounds: int = 5) -> dict[str, tuple[int, int]]:
        """Picks for each mix the fastest kind of stores and split between threads; returns the choice."""
        for mix in MIXES:
            best: dict[tuple[int, int], float] = {}
            for _ in range(rounds):
                for key in itertools.product(DISTINCT[mix], BLOCKS):
                    start = time.perf_counter()
                    self.run(mix, *key)
                    best[key] = min(best.get(key, float("inf")), time.perf_counter() - start)
            self.choice[mix] = min(best, key=best.__getitem__)
        return dict(self.choice)

    def seconds(self) -> dict[str, float]:
        """One pass of every mix, timed, summed into the ceiling of every part of a step."""
        mixes = {}
        for mix in MIXES:
            start = time.perf_counter()
            self.call(mix)
            mixes[mix] = time.perf_counter() - start
        return {part: sum(mixes[mix] for mix in sum_of) for part, sum_of in CEILING.items()}

    def bandwidth(self, part: str, seconds: float) -> float:
        """Bytes per second when ``part`` of a step takes so long."""
        return self.bytes * sum(STREAMS[mix] for mix in CEILING[part]) / seconds

    def describe(self) -> dict[str, str]:
        """The chosen variant of each mix, in words."""
        words = {}
        for mix, (variant, block) in self.choice.items():
            split = "one piece per thread" if block == 0 else f"interleaved blocks of {block >> 10} KiB"
            words[mix] = f"{VARIANTS[variant]}, {split}"
        return words
