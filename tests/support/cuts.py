"""A tensor cut into shards, in the ways that meshes cut one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    index: tuple[slice, ...]
    shard: tuple[int, int, int]  # offset, run, stride


def along(shape: Sequence[int], dim: int, *bounds: int) -> list[Cut]:
    """One dimension cut at these places: for 0, runs that follow one another."""
    inner = math.prod(shape[dim + 1 :])
    return [
        Cut((*[slice(None)] * dim, slice(a, b)), (a * inner, (b - a) * inner, shape[dim] * inner))
        for a, b in itertools.pairwise(bounds)
    ]


def blocks(shape: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> list[Cut]:
    width = shape[1]
    return [
        Cut((slice(a, b), slice(c, d)), (a * width + c, d - c, width))
        for a, b in itertools.pairwise(rows) for c, d in itertools.pairwise(columns)
    ]  # fmt: skip


CUTS: dict[str, tuple[tuple[int, ...], list[Cut]]] = {
    "rows": ((12, 10), along((12, 10), 0, 0, 3, 6, 9, 12)),
    "uneven rows": ((7, 9), along((7, 9), 0, 0, 1, 1, 4, 7)),  # at odd places, and one empty
    "columns": ((33, 16), along((33, 16), 1, 0, 8, 16)),
    "uneven columns": ((33, 17), along((33, 17), 1, 0, 5, 5, 16, 17)),
    "single columns": ((60, 3), along((60, 3), 1, 0, 1, 2, 3)),
    "blocks": ((12, 15), blocks((12, 15), (0, 5, 12), (0, 4, 7, 15))),
    "middle": ((4, 6, 5), along((4, 6, 5), 1, 0, 1, 4, 6)),
    "long rows": ((3, 20_001), along((3, 20_001), 0, 0, 1, 3)),
    "long columns": ((10, 8_000), along((10, 8_000), 1, 0, 3_001, 8_000)),
    "whole": ((7, 9), [Cut((slice(None),), (0, 0, 0)), Cut((slice(None),), (0, 63, 63))]),
}  # fmt: skip
