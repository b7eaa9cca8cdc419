"""On the device: the random bits of stochastic rounding, for one block of elements after another."""

import triton
import triton.language as tl

from .multi_tensor_apply import CHUNK, HEADER
from .sam_math import key_in_block, random_bits, random_pair, shard_position

BLOCK_OF_POSITIONS = tl.constexpr(2**32)  # which share a key
# Added to the index of a tensor for the bits of its state, so that no weight is rounded by the same ones.
STATE_BITS = tl.constexpr(2**32)
SHARD_NUMBERS = tl.constexpr(3)  # of a record: offset, run and stride, which follow the addresses


@triton.jit
def random_of_run(key, first, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block that begins at element ``first``, which is even."""
    if WHOLE:
        bits = random_pair(key, (first >> 1) + tl.arange(0, BLOCK // 2).to(tl.uint32))
        return tl.interleave(bits & 0xFFFF, bits >> 16)
    else:
        return random_bits(key, first + tl.arange(0, BLOCK).to(tl.uint32))


@triton.jit
def place_of_chunk(record, SLOTS: tl.constexpr, begin):
    """Of a shard, whose chunk begins at element ``begin``: the position of that element, how many from there on follow
    one another in one block of positions, and what random_of_shard takes."""
    numbers = record + HEADER + SLOTS
    offset, run, stride = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    first = shard_position(begin, offset, run, stride)
    left = run - begin % run
    together = tl.minimum(left, BLOCK_OF_POSITIONS - first % BLOCK_OF_POSITIONS)
    # A chunk has fewer elements than these.
    shard = (first, tl.minimum(left, 2 * CHUNK).to(tl.int32), first + left - run + stride,
             tl.minimum(run, 2 * CHUNK).to(tl.int32), stride)  # fmt: skip
    return first, together, shard


@triton.jit
def random_of_shard(key, at, shard, BLOCK: tl.constexpr):
    """Of a block that begins at element ``at`` of its chunk: shard_position, dividing by 32 bits. ``shard``: the first
    position of the chunk; how many elements of it are in the same run; where the next run begins; run, stride."""
    past = at + tl.arange(0, BLOCK) - shard[1]
    beyond = shard[2] + (past // shard[3]).to(tl.int64) * shard[4] + past % shard[3]
    position = tl.where(past < 0, shard[0] + shard[1] + past, beyond)
    return random_bits(key_in_block(key, position // BLOCK_OF_POSITIONS), position.to(tl.uint32))
