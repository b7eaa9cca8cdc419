"""DTensor, in one place: which part of a parameter is here, and over which ranks a sum over all its elements goes.

Ops run on local tensors. Everything of a step is elementwise but the norm, whose squared sums are added over the mesh
dimensions on which a parameter is sharded; where it is replicated, it counts once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rst_fused._checks import PLAIN
from rst_fused._step.fsdp2 import modules_of


def is_dtensor(t: Any) -> bool:
    if type(t) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(t, module.DTensor)


def waited(t: Tensor) -> Tensor:
    """The plain tensor of one that a collective of torch.distributed still fills."""
    if type(t) is Tensor:
        return t
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(t, collectives.AsyncCollectiveTensor):
        return t.wait()
    return t


def local(t: Tensor) -> Tensor:
    """What kernels are given of a tensor: of a DTensor the part on this rank, any other one itself."""
    if is_dtensor(t):
        t = t._local_tensor  # type: ignore[attr-defined]  # of which to_local() would make a new view each time
    return waited(t)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the same bits, of a dtype as wide."""
    if not is_dtensor(t):
        return t.view(dtype)
    of = {"device_mesh": t.device_mesh, "placements": t.placements, "shape": t.shape, "stride": t.stride()}  # type: ignore
    return type(t).from_local(local(t).view(dtype), **of, run_check=False)  # type: ignore[attr-defined]


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t if type(t) in PLAIN else local(t) for t in tensors]


def with_locals(params: Sequence[Tensor]) -> list[Tensor]:
    """Whose versions change with the parameters: themselves, and of DTensors the local tensors, too."""
    return [*params, *(shard for p, shard in zip(params, locals_of(params), strict=True) if shard is not p)]


def describe(t: Tensor) -> str:
    """The layout of a DTensor, for messages; of others the name of their class."""
    if not is_dtensor(t):
        return f"a {type(t).__name__}"
    return f"a DTensor with {list(t.placements)} on {t.device_mesh}"  # type: ignore[attr-defined]


def same_layout(a: Any, b: Any) -> bool:
    """Whether two tensors have the same part of the whole on every rank."""
    if not is_dtensor(a) or not is_dtensor(b):
        return is_dtensor(a) == is_dtensor(b)
    return a._spec is b._spec or (a.device_mesh == b.device_mesh and a.placements == b.placements)


def check_layout(what: str, p: Any) -> None:
    """Raises ValueError for a shard whose whole this rank cannot take part in."""
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{what} belongs to FullyShardedDataParallel, whose flat parameters do not say how they are sharded: shard "
            "the model by torch.distributed.fsdp.fully_shard"
        )
    if not is_dtensor(p):
        return
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{what} is {describe(p)}: expected Shard and Replicate; redistribute it first")
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(f"{what} is {describe(p)}, to which this rank does not belong: pass it on those ranks alone")


def check_same_mesh(what: str, g: Any, p: Any) -> None:
    """Raises RuntimeError for a gradient that cannot be brought into the layout of its parameter."""
    if is_dtensor(p) and g.device_mesh != p.device_mesh:
        raise RuntimeError(f"{what} is {describe(g)}, but the parameter is {describe(p)}: expected the same mesh")


def settle_grad(p: Tensor) -> None:
    """Brings the gradient of a DTensor, which may be a Partial sum, into the layout of the parameter: by collectives,
    in which all ranks take part, since they have the same layouts."""
    g: Any = p.grad
    if g is None or not is_dtensor(p) or not is_dtensor(g) or same_layout(p, g):
        return
    if g.device_mesh == p.device_mesh:  # type: ignore[attr-defined]  # another one is refused, before a step
        p.grad = settled(p, g)


def settled(p: Any, g: Any) -> Any:
    """A gradient in the layout of its parameter."""
    return g if same_layout(p, g) else g.redistribute(p.device_mesh, p.placements)


class _MeshDim(NamedTuple):
    """A dimension of a device mesh, as all ranks can name it."""

    name: str
    shape: tuple[int, ...]  # of the mesh
    dim: int
    stride: int  # from one rank of a group to the next


class _Reduction(NamedTuple):
    """One all-reduce: of the sums at these positions."""

    group: Any  # a ProcessGroup
    device: str  # on which it works
    positions: list[int]


class Sharding:
    """How the parameters of one optimizer are sharded: in parts, all parameters of which are so over the same ranks."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.dtensors: list[Any] = [p for p in params if is_dtensor(p)]
        self._specs = [p._spec for p in self.dtensors]
        self.reductions: list[_Reduction] = []
        self._part_of: dict[Tensor, int] = {}
        self.part_count = 1
        self.fsdp_modules: list[weakref.ref[Any]] = []
        if self.dtensors:
            self._find_parts()
            self.fsdp_modules = modules_of(self.dtensors)
        self.adds_up = self.part_count > 1 or bool(self.reductions)  # whether one norm is not yet ||g||

    def _find_parts(self) -> None:
        """Of all parameters, with a gradient or without: every rank has to come to the same all-reduces, in one order,
        whatever the order of its parameters."""
        groups: dict[tuple[int, ...], tuple[_MeshDim, Any, str]] = {}  # by the ranks in it
        over: dict[Tensor, frozenset[tuple[int, ...]]] = {}
        for p in self.dtensors:
            mesh, sharded = p.device_mesh, set()
            for dim, placement in enumerate(p.placements):
                if placement.is_replicate() or mesh.size(dim) == 1:
                    continue
                group = mesh.get_group(dim)
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                names = mesh.mesh_dim_names or [""] * mesh.ndim
                name = _MeshDim(names[dim], tuple(mesh.shape), dim, ranks[1] - ranks[0])
                if ranks not in groups or name < groups[ranks][0]:
                    groups[ranks] = name, group, mesh.device_type
                sharded.add(ranks)
            over[p] = frozenset(sharded)
        in_order = sorted(groups, key=lambda ranks: groups[ranks][0])
        none: frozenset[tuple[int, ...]] = frozenset()
        parts = sorted(
            {none, *over.values()} if len(self.dtensors) < len(self.params) else set(over.values()),
            key=lambda part: [in_order.index(ranks) for ranks in in_order if ranks in part],
        )
        self.part_count = len(parts)
        self._part_of = {p: parts.index(over.get(p, none)) for p in self.params}
        for ranks in in_order:
            _, group, device = groups[ranks]
            self.reductions.append(_Reduction(group, device, [i for i, part in enumerate(parts) if ranks in part]))

    def part_of(self, p: Tensor) -> int:
        return self._part_of[p] if self._part_of else 0

    def is_current(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, in the layouts that they had: torch.utils.swap_tensors changes one."""
        same = len(params) == len(self.params) and all(map(is_, params, self.params))
        return same and all(p._spec is s or p._spec == s for p, s in zip(self.dtensors, self._specs, strict=True))

    def counts_over_ranks(self, *counts: int) -> list[int]:
        """Their sums over the ranks among which anything is sharded, all of which have to ask. They wait for each
        other."""
        total = torch.tensor(counts)
        for group, device, _ in self.reductions:
            on_device = total.to(device)
            torch.distributed.all_reduce(on_device, group=group)
            total = on_device.cpu()
        return total.tolist()

    def add_over_ranks(self, squares: Tensor) -> Tensor:
        """The sums of squares of all parts, one number each, over all elements rather than those of this rank.

        One all-reduce for each group of ranks over which anything is sharded; nobody waits for it on the host.
        """
        for group, device, positions in self.reductions:
            everything = len(positions) == len(squares)
            mine = (squares if everything else squares[positions]).to(device)
            torch.distributed.all_reduce(mine, group=group)
            mine = mine.to(squares.device)
            squares = mine if everything else squares.index_copy(0, torch.tensor(positions, device=mine.device), mine)
        return squares


def positions_of(p: Any) -> tuple[int, int, int] | None:
    """(offset, run, stride), as rst_fused._schemas has them: where elements of the local tensor are in the whole one.
    None where no such numbers are.

    Dimensions are taken from the outermost to the innermost. Behind the last one that is cut all are whole, so its
    elements are in runs; and runs follow one another regularly if no other but the outermost dimension is cut.
    """
    if not is_dtensor(p):
        return 0, 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if local(p).numel() == 0:
        return 0, 0, 0
    order = sorted(range(p.dim()), key=lambda d: -p.stride(d))  # of the whole: here a dimension may have one element
    sizes, whole = [shape[d] for d in order], [p.shape[d] for d in order]
    offset, step = 0, 1
    for d in reversed(range(len(order))):
        offset += offsets[order[d]] * step
        step *= whole[d]
    cut = [d for d in range(len(order)) if sizes[d] != whole[d]]
    last = cut[-1] if cut else 0
    if last == 0:
        return offset, 0, 0
    if any(d not in (0, last) for d in cut):
        return None
    inner = 1
    for d in range(last + 1, len(order)):
        inner *= whole[d]
    return offset, sizes[last] * inner, whole[last] * inner
