"""DTensor, in one place: which part of a parameter is here, and over which ranks a sum over all its elements goes.

Ops run on local tensors. Everything of a step is elementwise but the norm, whose squared sums are added over the mesh
dimensions on which a parameter is sharded; where it is replicated, it counts once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rst_fused._checks import PLAIN


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


def settle_grad(p: Tensor) -> None:
    """Brings the gradient of a DTensor, which may be a Partial sum, into the layout of the parameter: by collectives,
    in which all ranks take part, since they have the same layouts."""
    g: Any = p.grad
    if is_dtensor(p) and is_dtensor(g) and not same_layout(p, g):
        p.grad = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]


def _fsdp_modules(params: Iterable[Tensor]) -> list[weakref.ref[Any]]:
    """The modules to which torch.distributed.fsdp.fully_shard was applied and that have any of these parameters."""
    states, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("_composable_state", "fsdp"))
    if states is None or fsdp is None:
        return []
    wanted = set(map(id, params))
    return [
        weakref.ref(module)
        for module in list(states._module_state_mapping)
        if isinstance(module, fsdp.FSDPModule) and any(id(p) in wanted for p in module.parameters())
    ]


def _holds_unreduced(module: Any) -> bool:
    """Asks what torch does not say in public; a torch that keeps it elsewhere holds none."""
    state = module._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
        if getattr(group, "_partial_reduce_output", None) is not None:
            return True
        for p in getattr(group, "fsdp_params", ()):
            if getattr(p, "unsharded_accumulated_grad", None) is not None:
                return True
            if getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None:
                return True
    return False


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
        self.reductions: list[_Reduction] = []
        self._part_of: dict[Tensor, int] = {}
        self.parts = 1
        self.fsdp_modules: list[weakref.ref[Any]] = []
        if self.dtensors:
            self._find_parts()
            self.fsdp_modules = _fsdp_modules(self.dtensors)

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
        self.parts = len(parts)
        self._part_of = {p: parts.index(over.get(p, none)) for p in self.params}
        for ranks in in_order:
            _, group, device = groups[ranks]
            self.reductions.append(_Reduction(group, device, [i for i, part in enumerate(parts) if ranks in part]))

    def part_of(self, p: Tensor) -> int:
        return self._part_of.get(p, 0)

    def refuse_unreduced(self) -> None:
        """Before a perturbation: raises RuntimeError where FSDP2 still holds gradients that are not reduced over ranks.

        There is no gradient to perturb by then, and the second pass would be added to the first one.
        """
        for reference in self.fsdp_modules:
            module = reference()
            if module is not None and _holds_unreduced(module):
                raise RuntimeError(
                    "perturb() with gradients that fully_shard has not reduced over ranks yet: the last backward of "
                    "the first pass ran after set_requires_gradient_sync(False), or set_requires_all_reduce(False). "
                    "Set True before the last micro-batch of each pass; nothing was perturbed"
                )

    def is_current(self, params: Sequence[Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(_is, params, self.params))

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


def _is(a: Any, b: Any) -> bool:
    return a is b


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
