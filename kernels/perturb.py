"""perturb: reads w, g; writes w + e and the backup: 16 bytes per fp32 parameter.

With a master copy: reads the master, g; writes the rounded w + e and no backup: 8 bytes per bf16 parameter. With a
remainder: reads w, remainder, g; writes the rounded w + e and the backup of w without its remainder: 10 bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import SIXTEEN_BIT, STATS, Operand, are_remainders, check_places, check_scalars
from .device_cache import on_device
from .launch_groups import LaunchGroup, launches, validated_groups
from .launcher import run_all
from .multi_tensor_apply import INDEX, ROW, address, kernel, load, locate, magnitude, store
from .random_bits import BLOCK_OF_POSITIONS, SHARD_NUMBERS, place_of_chunk, random_of_run, random_of_shard
from .sam_math import asam_perturb, asam_scale, join, key_in_block, perturb, random_key, to_bfloat16, to_float16

_PARAM, _SOURCE, _GRAD, _BACKUP, _REMAINDER, _SLOTS = (tl.constexpr(i) for i in range(6))
_SHARD_SLOTS = tl.constexpr(_SLOTS + SHARD_NUMBERS)


@triton.jit
def _move(
    param, source, grad, backup, remainder, at, count, scale, eta, moving, key, first, shard, T: tl.constexpr,
    STATE: tl.constexpr, V: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = at + tl.arange(0, BLOCK)
    kept = load(source, offsets, count, WHOLE)
    w, g = kept.to(V), load(grad, offsets, count, WHOLE).to(V)
    if len(remainder) == 1:
        w = join(kept, load(remainder[0], offsets, count, WHOLE))
    if ADAPTIVE:
        moved = asam_perturb(scale, w, g, asam_scale(eta, magnitude(w, source, offsets, count, COMPLEX, WHOLE)))
    else:
        moved = perturb(scale, w, g)
    if len(remainder) == 1 or T == STATE:  # otherwise the source is a master copy, which stays
        store(backup, offsets, count, kept, WHOLE)
    if STOCHASTIC:
        if len(shard) == 0:
            random = random_of_run(key, (first + at).to(tl.uint32), WHOLE, BLOCK)
        else:
            random = random_of_shard(key, at, shard, BLOCK)
        moved = to_bfloat16(moved, random) if tl.bfloat16 == T else to_float16(moved, random)
    if moving:
        store(param, offsets, count, moved.to(T), WHOLE)


@triton.jit
def _move_chunk(
    param, source, grad, backup, remainder, whole, count, scale, eta, moving, key, first, shard, T: tl.constexpr,
    STATE: tl.constexpr, V: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """``first``: the position of the first element, from which on all follow one another in one block of positions.
    Otherwise there is a ``shard``."""
    for at in range(0, whole, BLOCK):
        _move(param, source, grad, backup, remainder, at, count, scale, eta, moving, key, first, shard, T, STATE, V,
              ADAPTIVE, COMPLEX, STOCHASTIC, True, BLOCK)  # fmt: skip
    for at in range(whole, count, TAIL):
        _move(param, source, grad, backup, remainder, at, count, scale, eta, moving, key, first, shard, T, STATE, V,
              ADAPTIVE, COMPLEX, STOCHASTIC, False, TAIL)  # fmt: skip


@kernel
def perturb_kernel(
    table, tensors, stats, rho, eta, rng, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr,
    REMAINDERS: tl.constexpr, ADAPTIVE: tl.constexpr, COMPLEX: tl.constexpr, STOCHASTIC: tl.constexpr,
    SHARDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SHARD_SLOTS if SHARDS else _SLOTS, BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, T if REMAINDERS else STATE)
    grad, backup = address(record, _GRAD, begin, T), address(record, _BACKUP, begin, T)
    remainder = ()
    if REMAINDERS:
        remainder = (address(record, _REMAINDER, begin, tl.int16),)  # type: ignore[assignment]
    inverse = tl.load(stats + 1)
    moving = inverse != 0  # otherwise e = 0 whatever g is: 0 * inf would be NaN
    scale = (tl.load(rho + tl.load(record + ROW)) * inverse).to(V)
    eta = tl.load(eta).to(V)
    key = tl.full([], 0, tl.uint32)
    if STOCHASTIC:
        key = random_key(tl.load(rng), tl.load(rng + 1), tl.load(record + INDEX))
    if SHARDS:
        first, together, shard = place_of_chunk(record, _SLOTS, begin)
        if (first % 2 == 0) & (together >= count):
            key = key_in_block(key, first // BLOCK_OF_POSITIONS)
            _move_chunk(param, source, grad, backup, remainder, whole, count, scale, eta, moving, key, first, (), T,
                        STATE, V, ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip
        else:
            _move_chunk(param, source, grad, backup, remainder, whole, count, scale, eta, moving, key, first, shard, T,
                        STATE, V, ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip
    else:
        if STOCHASTIC:
            # A chunk never straddles a multiple of 2^32 elements: both are powers of two.
            key = key_in_block(key, begin // BLOCK_OF_POSITIONS)
        _move_chunk(param, source, grad, backup, remainder, whole, count, scale, eta, moving, key, begin, (), T, STATE,
                    V, ADAPTIVE, COMPLEX, STOCHASTIC, BLOCK, TAIL)  # fmt: skip


def variant(group: LaunchGroup, adaptive: bool, stochastic: bool) -> dict[str, Any]:
    rounds = stochastic and group.dtype in SIXTEEN_BIT
    return {
        "V": group.arithmetic, "REMAINDERS": group.remainders, "ADAPTIVE": adaptive, "COMPLEX": group.dtype.is_complex,
        "STOCHASTIC": rounds, "SHARDS": rounds and bool(group.shards),
        "name": "perturb_kernel" + (" remainders" if group.remainders else ""),  # which were not timed
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
    check_places(op, len(params), (), shards)
    remainders = are_remainders(masters)
    copies = bool(masters) and not remainders
    source = Operand("masters", masters, dtype=torch.float32) if copies else Operand("params", params)
    operands = [
        Operand("params", params, written=True, read=False), source, Operand("grads", grads),
        Operand("backups", [] if copies else backups, written=True, read=False, optional=copies),
        Operand("masters", masters if remainders else [], dtype=torch.int16, optional=not remainders),
    ]  # fmt: skip
    etas = torch.tensor([eta], dtype=torch.float64, device="cpu")
    calls: list[Callable[[], Any]] = []
    for work in validated_groups(op, operands, group_sizes, first_index, shards if stochastic else ()):
        scalars = on_device(work.group.device, stats, rho, etas, rng)
        calls += launches(perturb_kernel, work, *scalars, **variant(work.group, adaptive, stochastic))
    run_all(calls)
