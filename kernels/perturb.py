"""perturb: reads w, g; writes w + e and the backup: 16 bytes per fp32 parameter.

With a master copy: reads the master, g; writes the rounded w + e and no backup: 8 bytes per bf16 parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import SIXTEEN_BIT, STATS, Operand, are_shards, check_scalars, require
from .device_cache import on_device
from .launch_groups import LaunchGroup, launches, validated_groups
from .launcher import run_all
from .multi_tensor_apply import CHUNK, HEADER, INDEX, ROW, address, kernel, load, locate, magnitude, store
from .sam_math import (
    asam_perturb,
    asam_scale,
    key_in_block,
    perturb,
    random_bits,
    random_key,
    random_pair,
    shard_position,
    to_bfloat16,
    to_float16,
)  # fmt: skip

_PARAM, _SOURCE, _GRAD, _BACKUP, _SLOTS = (tl.constexpr(i) for i in range(5))
# Of shards the addresses are followed by their offset, run and stride.
_OFFSET, _RUN, _STRIDE, _SHARD_SLOTS = (tl.constexpr(i) for i in range(4, 8))
_BLOCK_OF_POSITIONS = tl.constexpr(2**32)  # which share a key


@triton.jit
def _random(key, first, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block that begins at element ``first``, which is even."""
    if WHOLE:
        bits = random_pair(key, (first >> 1) + tl.arange(0, BLOCK // 2).to(tl.uint32))
        return tl.interleave(bits & 0xFFFF, bits >> 16)
    else:
        return random_bits(key, first + tl.arange(0, BLOCK).to(tl.uint32))


@triton.jit
def _random_of_shard(key, at, shard, BLOCK: tl.constexpr):
    """Of a block that begins at element ``at`` of its chunk: shard_position, dividing by 32 bits. ``shard``: the first
    position of the chunk; how many elements of it are in the same run; where the next run begins; run, stride."""
    past = at + tl.arange(0, BLOCK) - shard[1]
    beyond = shard[2] + (past // shard[3]).to(tl.int64) * shard[4] + past % shard[3]
    position = tl.where(past < 0, shard[0] + shard[1] + past, beyond)
    return random_bits(key_in_block(key, position // _BLOCK_OF_POSITIONS), position.to(tl.uint32))


@triton.jit
def _move(
    param, source, grad, backup, at, count, scale, eta, moving, key, first, shard, T: tl.constexpr, STATE: tl.constexpr,
    V: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = at + tl.arange(0, BLOCK)
    kept = load(source, offsets, count, WHOLE)
    w, g = kept.to(V), load(grad, offsets, count, WHOLE).to(V)
    if ADAPTIVE:
        moved = asam_perturb(scale, w, g, asam_scale(eta, magnitude(w, source, offsets, count, COMPLEX, WHOLE)))
    else:
        moved = perturb(scale, w, g)
    if T == STATE:  # otherwise the source is a master, which stays
        store(backup, offsets, count, kept, WHOLE)
    if STOCHASTIC:
        if len(shard) == 0:
            random = _random(key, (first + at).to(tl.uint32), WHOLE, BLOCK)
        else:
            random = _random_of_shard(key, at, shard, BLOCK)
        moved = to_bfloat16(moved, random) if tl.bfloat16 == T else to_float16(moved, random)
    if moving:
        store(param, offsets, count, moved.to(T), WHOLE)


@triton.jit
def _move_chunk(
    param, source, grad, backup, whole, count, scale, eta, moving, key, first, shard, T: tl.constexpr,
    STATE: tl.constexpr, V: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """``first``: the position of the first element, from which on all follow one another in one block of positions.
    Otherwise there is a ``shard``."""
    for at in range(0, whole, BLOCK):
        _move(param, source, grad, backup, at, count, scale, eta, moving, key, first, shard, T, STATE, V, ADAPTIVE,
              COMPLEX, STOCHASTIC, True, BLOCK)  # fmt: skip
    for at in range(whole, count, TAIL):
        _move(param, source, grad, backup, at, count, scale, eta, moving, key, first, shard, T, STATE, V, ADAPTIVE,
              COMPLEX, STOCHASTIC, False, TAIL)  # fmt: skip


@kernel
def perturb_kernel(
    table, tensors, stats, rho, eta, rng, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr,
    ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr, SHARDS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SHARD_SLOTS if SHARDS else _SLOTS, BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, STATE)
    grad, backup = address(record, _GRAD, begin, T), address(record, _BACKUP, begin, T)
    inverse = tl.load(stats + 1)
    moving = inverse != 0  # otherwise e = 0 whatever g is: 0 * inf would be NaN
    scale = (tl.load(rho + tl.load(record + ROW)) * inverse).to(V)
    eta = tl.load(eta).to(V)
    key = tl.full([], 0, tl.uint32)
    if STOCHASTIC:
        key = random_key(tl.load(rng), tl.load(rng + 1), tl.load(record + INDEX))
    if SHARDS:
        offset, run, stride = (tl.load(record + HEADER + _OFFSET), tl.load(record + HEADER + _RUN),
                               tl.load(record + HEADER + _STRIDE))  # fmt: skip
        first = shard_position(begin, offset, run, stride)
        left = run - begin % run
        together = tl.minimum(left, _BLOCK_OF_POSITIONS - first % _BLOCK_OF_POSITIONS)
        if (first % 2 == 0) & (together >= count):
            key = key_in_block(key, first // _BLOCK_OF_POSITIONS)
            _move_chunk(param, source, grad, backup, whole, count, scale, eta, moving, key, first, (), T, STATE, V,
                        ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip
        else:
            # A chunk has fewer elements than these.
            shard = (first, tl.minimum(left, 2 * CHUNK).to(tl.int32), first + left - run + stride,
                     tl.minimum(run, 2 * CHUNK).to(tl.int32), stride)  # fmt: skip
            _move_chunk(param, source, grad, backup, whole, count, scale, eta, moving, key, first, shard, T, STATE, V,
                        ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip
    else:
        if STOCHASTIC:
            # A chunk never straddles a multiple of 2^32 elements: both are powers of two.
            key = key_in_block(key, begin // _BLOCK_OF_POSITIONS)
        _move_chunk(param, source, grad, backup, whole, count, scale, eta, moving, key, begin, (), T, STATE, V,
                    ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip


def variant(group: LaunchGroup, adaptive: bool, stochastic: bool) -> dict[str, Any]:
    rounds = stochastic and group.dtype in SIXTEEN_BIT
    return {
        "V": group.arithmetic, "ADAPTIVE": adaptive, "COMPLEX": group.dtype.is_complex, "STOCHASTIC": rounds,
        "SHARDS": rounds and bool(group.shards),
    }  # fmt: skip


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], masters: Sequence[Tensor],
    stats: Tensor, rho: Tensor, group_sizes: Sequence[int], adaptive: bool, eta: float, stochastic: bool, rng: Tensor,
    first_index: int, shards: Sequence[int],
) -> None:  # fmt: skip
    op = "perturb_"
    check_scalars(op, "stats", stats, torch.float64, STATS)
    check_scalars(op, "rng", rng, torch.int64, 2)
    check_scalars(op, "rho", rho, torch.float64, len(group_sizes))
    require(
        are_shards(shards, len(params)), op,
        f"shards has {len(shards)} numbers, expected none, or three numbers >= 0 for each of {len(params)} parameters",
    )  # fmt: skip
    source = Operand("masters", masters, dtype=torch.float32) if masters else Operand("params", params)
    operands = [
        Operand("params", params, written=True, read=False), source, Operand("grads", grads),
        Operand("backups", [] if masters else backups, written=True, read=False, optional=bool(masters)),
    ]  # fmt: skip
    etas = torch.tensor([eta], dtype=torch.float64, device="cpu")
    calls: list[Callable[[], Any]] = []
    for work in validated_groups(op, operands, group_sizes, first_index, shards if stochastic else ()):
        scalars = on_device(work.group.device, stats, rho, etas, rng)
        calls += launches(perturb_kernel, work, *scalars, **variant(work.group, adaptive, stochastic))
    run_all(calls)
