"""The memory-bandwidth ceiling: builds ``probe.cpp`` with g++ and times the stream mix of each op."""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
BLOCKS = (0, 1 << 16, 1 << 18, 1 << 20)  # bytes of one stream that a thread takes when it is free; 0: one share each
BACKWARDS = {"perturb": (False, True)}  # which ways to try; backwards meets what the norm left in the cache
ALIGNMENT = 32  # of every tensor: the width of a non-temporal store
KEEP = 0  # mask under which a pass leaves weights and state as they are


Choice = tuple[int, int, bool]  # variant, block, backwards


class Piece(ctypes.Structure):
    """A stretch of one parameter and its companions, with a thread to take it. Matches Piece of probe.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ARRAYS), ("bytes", ctypes.c_size_t), ("owner", ctypes.c_size_t))


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
    loaded.probe_run.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.POINTER(Piece), ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool,
        ctypes.c_size_t, ctypes.c_uint64, ctypes.POINTER(ctypes.c_double),
    ]  # fmt: skip
    return loaded


def cut(sizes: Sequence[int], block: int, threads: int) -> list[tuple[int, int, int, int]]:
    """(tensor, first byte, bytes, thread) of every stretch: blocks, or with block = 0 an equal share per thread."""
    share = -(-sum(sizes) // threads // ALIGNMENT) * ALIGNMENT
    cuts: list[tuple[int, int, int, int]] = []
    before = 0  # bytes of earlier tensors, each rounded up to ALIGNMENT
    for tensor, size in enumerate(sizes):
        begin = 0
        while begin < size:
            if block:
                owner, room = 0, block
            else:
                owner = min((before + begin) // share, threads - 1)
                room = (owner + 1) * share - before - begin if owner < threads - 1 else size
            count = min(size - begin, room)
            cuts.append((tensor, begin, count, owner))
            begin += count
        before += -(-size // ALIGNMENT) * ALIGNMENT
    return cuts


class Probe:
    """Sweeps the tensors of an optimizer: ``streams`` holds lists of weights, gradients, momentum and backups.

    They must be the very tensors that the op works on: how fast a stretch of memory is depends on where the system
    placed it, by a quarter from one allocation to the next on a virtual machine.
    """

    def __init__(self, streams: Mapping[str, Sequence[torch.Tensor]], threads: int) -> None:
        self.streams = {name: list(streams[name]) for name in ARRAYS}
        sizes = [t.nbytes for t in self.streams["w"]]
        for name, tensors in self.streams.items():
            if [t.nbytes for t in tensors] != sizes or any(t.data_ptr() % ALIGNMENT for t in tensors):
                raise ValueError(f"{name} must be as large as w, tensor by tensor, and aligned to {ALIGNMENT} bytes")
        self.bytes = sum(sizes)
        self.threads = threads
        self._library = _library()
        self._pieces: dict[int, ctypes.Array[Piece]] = {}
        for block in BLOCKS:
            cuts = cut(sizes, block, threads)
            self._pieces[block] = (Piece * len(cuts))(
                *(
                    Piece(*(self.streams[name][tensor].data_ptr() + begin for name in ARRAYS), count, owner)
                    for tensor, begin, count, owner in cuts
                )
            )
        self.choice: dict[str, Choice] = dict.fromkeys(MIXES, (0, 0, False))

    def run(self, mix: str, variant: int, block: int, backwards: bool, keep: int = KEEP) -> tuple[float, int]:
        """One pass of ``mix`` over all tensors: seconds, and what a norm read, folded into 8 bytes."""
        pieces, seconds = self._pieces[block], ctypes.c_double()
        seen = self._library.probe_run(
            MIXES.index(mix), variant, pieces, len(pieces), block != 0, backwards, self.threads, keep,
            ctypes.byref(seconds),
        )  # fmt: skip
        return seconds.value, seen

    def calibrate(self, before: Callable[[], object], rounds: int = 5) -> dict[str, Choice]:
        """Picks for each mix the fastest kind of stores, split between threads, and direction, timed as by seconds."""
        for mix in MIXES:
            best: dict[Choice, float] = {}
            for _ in range(rounds):
                for key in itertools.product(DISTINCT[mix], BLOCKS, BACKWARDS.get(mix, (False,))):
                    before()
                    if mix == "perturb":
                        self.run("norm", *self.choice["norm"])
                    best[key] = min(best.get(key, float("inf")), self.run(mix, *key)[0])
            self.choice[mix] = min(best, key=best.__getitem__)
        return dict(self.choice)

    def seconds(self, before: Callable[[], object]) -> dict[str, float]:
        """One pass of every mix as calibrated, summed into the ceiling of every part of a step.

        ``before`` runs before each pass, except that a perturbation follows its norm at once.
        """
        mixes = {}
        for mix in MIXES:
            if mix != "perturb":
                before()
            mixes[mix], _ = self.run(mix, *self.choice[mix])
        return {part: sum(mixes[mix] for mix in sum_of) for part, sum_of in CEILING.items()}

    def bandwidth(self, part: str, seconds: float) -> float:
        """Bytes per second when ``part`` of a step takes so long."""
        return self.bytes * sum(STREAMS[mix] for mix in CEILING[part]) / seconds

    def describe(self) -> dict[str, str]:
        """The chosen variant of each mix, in words."""
        words = {}
        for mix, (variant, block, backwards) in self.choice.items():
            split = "one share per thread" if block == 0 else f"blocks of {block >> 10} KiB"
            words[mix] = f"{VARIANTS[variant]}, {split}{', backwards' if backwards else ''}"
        return words
