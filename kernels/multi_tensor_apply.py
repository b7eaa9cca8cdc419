"""The device side that every kernel shares: all tensors of a call in one launch, through a table of addresses.

A table holds one record per tensor, then the index of its tensor for every chunk. Each program processes one chunk.
Whole blocks of 16-byte aligned tensors take a path without masks, whose accesses are 16 bytes wide. Everything else
goes through smaller, masked blocks of one scalar per thread, which need no data exchange between threads.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .sam_math import sqrt

CHUNK = tl.constexpr(8192)  # scalars per program; fixes the order of summation. A power of two
# A record: length, how much of it needs no mask, row of hyperparameters, index for random bits, first chunk, addresses,
# and for the random bits of shards their places.
LENGTH, UNMASKED, ROW, INDEX, FIRST, HEADER = (tl.constexpr(i) for i in range(6))


def kernel(function: Callable[..., Any], repr: Callable[[Any], str] | None = None) -> Any:
    """triton.jit with one binary per set of constants: no argument's value or alignment triggers another compilation.

    ``repr`` names a binary, see triton.jit. Annotations are read, so files with kernels must not postpone them (from
    __future__ import annotations).
    """
    given = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=given, do_not_specialize_on_alignment=given, repr=repr)


@triton.jit
def locate(table, tensors, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """(record of the tensor, where this program's chunk begins in it, scalars in the chunk, how many need no mask)."""
    chunk = tl.program_id(0).to(tl.int64)
    record = table + tl.load(table + tensors.to(tl.int64) * (HEADER + SLOTS) + chunk) * (HEADER + SLOTS)
    begin = (chunk - tl.load(record + FIRST)) * CHUNK
    count = tl.minimum(tl.load(record + LENGTH) - begin, CHUNK).to(tl.int32)
    unmasked = tl.minimum(tl.maximum(tl.load(record + UNMASKED) - begin, 0), CHUNK).to(tl.int32)
    return record, begin, count, unmasked // BLOCK * BLOCK


@triton.jit
def address(record, SLOT: tl.constexpr, begin, T: tl.constexpr):
    """Where the chunk begins in one operand of the tensor."""
    return tl.load(record + HEADER + SLOT).to(tl.pointer_type(T)) + begin


@triton.jit
def _pointers(base, offsets):
    """Of a whole block, whose base is aligned. The hint must be on a pointer made from a number: on an address plus an
    offset it does not reach the buffer instructions of AMD."""
    return tl.multiple_of(base.to(tl.int64).to(base.dtype), 16) + offsets


@triton.jit
def load(base, offsets, count, WHOLE: tl.constexpr):
    """Scalars missing from a partial block read as zero."""
    if WHOLE:
        return tl.load(_pointers(base, offsets))
    else:
        return tl.load(base + offsets, offsets < count, 0.0)


@triton.jit
def store(base, offsets, count, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(_pointers(base, offsets), value)
    else:
        tl.store(base + offsets, value, offsets < count)


@triton.jit
def magnitude(w, base, offsets, count, COMPLEX: tl.constexpr, WHOLE: tl.constexpr):
    """|w| per scalar; for complex w, |w| of the pair in both its scalars. w was loaded from base + offsets."""
    if COMPLEX:
        if WHOLE:
            re, im = tl.split(tl.reshape(w, [w.shape[0] // 2, 2]))
            root = sqrt(re * re + im * im)
            return tl.interleave(root, root)
        else:
            other = load(base, offsets ^ 1, count, WHOLE).to(w.dtype)
            tl.debug_barrier()  # it is another thread's scalar and may be written in place: read all of them first
            return sqrt(w * w + other * other)
    else:
        return tl.abs(w)
