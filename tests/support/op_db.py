"""The table of ops and their samples. Tests cross it with every available backend, and with dtypes (tolerances.py).

A sample is described before it is built (``Spec``: the layout of its tensors, its lists, its options), so that a test
has a readable name and no tensor exists before it runs. Add a row to OPS for a new op, a Spec for a new case.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from tolerances import DTYPES, HALVES, KINDS, assert_close, bits, same_bits, whole  # noqa: F401
from torch import Tensor

from rst_fused import ops
from rst_fused._backends import backends
from rst_fused._schemas import SCHEMAS

# --- backends -------------------------------------------------------------------------------------------------------
# (name, device) of all that can run here; the reference runs on every device there is.
_DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
_PAIRS = [(b.name, d) for b in backends() if b.available for d in _DEVICES if b.supports(torch.device(d))]
BACKENDS = [pytest.param(name, d, marks=[] if d == "cpu" else [pytest.mark.gpu]) for name, d in _PAIRS]
BACKEND_IDS = [name if device == "cpu" else f"{name}-{device}" for name, device in _PAIRS]


# --- memory layouts -------------------------------------------------------------------------------------------------
class Place(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


def dense(size: Sequence[int], order: Sequence[int] | None = None, offset: int = 0) -> Place:
    """Without gaps, the dimensions from the outermost inwards in ``order``."""
    stride, step = [1] * len(size), 1
    for d in reversed(order if order is not None else range(len(size))):
        stride[d], step = step, step * max(size[d], 1)
    return Place(tuple(size), tuple(stride), offset)


# Around the widths of vectors, of gathered pieces (1024) and of chunks (16384).
SIZES = (0, 1, 3, 15, 16, 17, 1023, 1024, 1025, 16383, 16384, 16385, 40000)
# The names of all lists that ops take, and of those that base optimizers keep.
LISTS = tuple(dict.fromkeys(re.findall(r"Tensor(?:\(\w!\))?\[\] (\w+)", " ".join(SCHEMAS.values()))))
STATE = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
FIRST_STATE = ("momentum_buffers", "exp_avgs")  # bfloat16 beside float32 where an update is given rng
# Every op has a function in rst_fused.ops, and an update two: <rule>_step_ is restore_<rule>_step_ without backups.
FUNCTIONS = {
    name for name, value in vars(ops).items()
    if inspect.isfunction(value) and value.__module__ == ops.__name__ and not name.startswith("_")
}  # fmt: skip


def _apart(name: str) -> list[Place]:
    """Every list dense in another order of dimensions than the others, at another offset."""
    k = LISTS.index(name)
    turned = [(k + d) % 3 for d in range(3)]
    return [
        dense((37, 29), (0, 1) if k % 2 else (1, 0)),
        dense((9, 20, 110), turned, offset=k % 3),
        dense((4, 1, 6), turned),
        Place((50, 30), (30 + k, 1), k),
    ]


LAYOUTS: dict[str, Callable[[str], list[Place]]] = {
    "empty": lambda name: [],
    "scalars": lambda name: [dense(size) for size in ((), (1,), (1, 1, 1), (0,), (0, 3), (2, 0))],
    "sizes": lambda name: [dense((n,)) for n in SIZES],
    "small": lambda name: [dense((40,)), dense((7, 5)), dense((5, 7), (1, 0)), Place((30,), (2,), 1), dense((1100,))],
    "transposed": lambda name: [
        dense((37, 29), (1, 0)), dense((2, 3, 4, 5), (0, 2, 3, 1)),  # the second is channels_last
        dense((5, 6, 7), (2, 0, 1)), dense((150, 120), (1, 0)),
    ],
    "gaps": lambda name: [
        Place((500,), (2,), 1), Place((33, 17), (40, 2), 3),
        Place((130, 140), (150, 1), 5), Place((3, 1, 7), (7, 999, 1)),
    ],
    "misaligned": lambda name: [dense((n,), offset=1 + LISTS.index(name) % 3) for n in (5, 1000, 20000)],
    "apart": _apart,
    "expanded": lambda name: [
        Place((40, 30), (0, 1) if name in ("grads", "first_grads") else (30, 1)),
        Place((3000,), (0,) if name in ("grads", "first_grads") else (1,)),
    ],  # gradients are only read, so all rows of one may be one row: what loss.sum().backward() gives
}  # fmt: skip


# --- samples --------------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    lists: dict[str, list[Tensor]]
    options: dict[str, Any]

    def run(self, op: str, backend: str = "auto") -> Any:
        return getattr(ops, op)(**self.lists, **self.options, backend=backend)

    def copied(self) -> Sample:
        """With its own storages, laid out alike; tensors that share memory still do."""
        storages: dict[int, Any] = {}

        def copy(t: Tensor) -> Tensor:
            address = t.untyped_storage().data_ptr()
            if address == 0 or address not in storages:
                storages[address] = t.untyped_storage().clone()
            empty = torch.empty(0, dtype=t.dtype, device=t.device)
            return empty.set_(storages[address], t.storage_offset(), t.shape, t.stride())

        lists = {name: [copy(t) for t in tensors] for name, tensors in self.lists.items()}
        return Sample(lists, {k: copy(v) if isinstance(v, Tensor) else v for k, v in self.options.items()})


_SECOND_MOMENTS = dict.fromkeys(("exp_avg_sqs", "max_exp_avg_sqs"), 0.01)


@functools.cache
def _normal(name: str, i: int, length: int, pairs: bool) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {i}".encode()))
    flat = torch.randn((length, 2) if pairs else (length,), dtype=torch.float64, generator=generator)
    flat = flat.abs() if name in _SECOND_MOMENTS else flat
    flat = flat * {"grads": 0.1, "first_grads": 0.1, "exp_avgs": 0.1, **_SECOND_MOMENTS}.get(name, 1.0)
    return torch.view_as_complex(flat) if pairs else flat


def make(name: str, i: int, place: Place, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers that depend on (name, i) alone; second moments are positive."""
    last = place.offset + sum((n - 1) * s for n, s in zip(place.size, place.stride, strict=True))
    length = 4 + place.offset + max(last, 0)
    flat = _normal(name, i, length, dtype.is_complex).to(dtype, copy=True).to(device)
    return flat.as_strided(place.size, place.stride, place.offset)


@dataclass(frozen=True)
class Spec:
    """One sample, still without tensors. ``lists`` come with the op's own; options that are lists go by group."""

    name: str
    layout: str = "small"
    lists: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    only: str = ""  # a kind of tensors, where there are no others

    def kinds(self) -> list[str]:
        """Masters go with 16-bit dtypes alone."""
        halves = ("bfloat16", "float16", "mixed")
        return [self.only] if self.only else [k for k in KINDS if k in halves or "masters" not in self.lists]


def build(op: OpInfo, spec: Spec, kind: str, device: str = "cpu") -> Sample:
    masters = "masters" in spec.lists
    dtypes = HALVES if masters and kind == "mixed" else KINDS[kind]
    names = [n for n in (*op.lists, *spec.lists) if not (masters and n == "backups")]
    lists = {}
    for name in names:
        wide = masters and name in ("masters", *STATE)
        rounded = name in FIRST_STATE and "rng" in spec.options
        kinds = [torch.bfloat16 if rounded and d == torch.float32 else d for d in ([torch.float32] if wide else dtypes)]
        places = enumerate(LAYOUTS[spec.layout](name))
        lists[name] = [make(name, i, place, kinds[i % len(kinds)], device) for i, place in places]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**op.options, **spec.options}.items()}
    lead = next(iter(lists.values()), [])
    if any(isinstance(value, list) for value in options.values()):
        options["group_sizes"] = [len(lead) // 3, 0, len(lead) - len(lead) // 3]
    if op.name == "perturb_":
        scaled = {k: options[k] for k in ("adaptive", "eta") if k in options}
        norm = oracle.grad_norm(lists["grads"], lists["params"], **scaled)
        options["stats"] = torch.tensor(oracle.stats_of(norm), dtype=torch.float64, device=device)
    if masters and "backups" in op.lists:
        options["backups"] = None
    if op.restores:
        for p in lists["params"]:  # the perturbed weights must not matter
            p.fill_(math.nan)
    return Sample(lists, options)


# --- rows -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OpInfo:
    name: str
    lists: tuple[str, ...]  # those every sample has
    written: tuple[str, ...]
    specs: tuple[Spec, ...]
    options: dict[str, Any] = field(default_factory=dict)
    oracle: Callable[..., oracle.Results] | None = None  # None: the result is not in the lists
    restores: bool = False  # reads backups or masters and never the parameters
    norm: Callable[..., float] | None = None  # of an op whose result is the stats of this norm

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names that its function in rst_fused.ops takes."""
        return tuple(inspect.signature(getattr(ops, self.name)).parameters)


def _everywhere(lists: tuple[str, ...] = (), **options: Any) -> tuple[Spec, ...]:
    return tuple(Spec(layout, layout, lists, options) for layout in LAYOUTS)


def _float32(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


_MASTERS = ("masters",)
_FIRST = ("first_grads",)
_AMP = {"grad_scale": _float32(1024.0), "found_inf": _float32(0.0)}
_GAMMAS = (0.0, 0.5, 1.0, 2.0)
_RNG = {"rng": (7, 3)}  # the seed and the step by which a first state in bfloat16 is rounded


def _rounding(buffer: tuple[str, ...] = (), **given: Any) -> tuple[Spec, ...]:
    options, masters = {**given, **_RNG}, (*buffer, *_MASTERS)
    return (
        *(Spec(f"rounding_{layout}", layout, buffer, options) for layout in LAYOUTS),
        *(Spec(f"rounding_masters_{layout}", layout, masters, options) for layout in ("sizes", "apart")),
        Spec("rounding_amp", lists=buffer, options={**options, **_AMP, "maximize": True}),
        Spec("rounding_overflow", lists=buffer, options={**options, "found_inf": _float32(1.0)}),
    )


_SGD_BUFFER = ("momentum_buffers",)
_SGD_RICH = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}
_SGD_BY_GROUP = {
    "lr": [0.1, 0.2, 0.3], "momentum": [0.9, 0.5, 0.0], "dampening": [0.0, 0.2, 0.4], "weight_decay": [0.01, 0.0, 0.1],
}  # fmt: skip
_SGD = (
    Spec("plain"),
    Spec("weight_decay", options={"weight_decay": 0.1}),
    Spec("momentum", lists=_SGD_BUFFER, options={"momentum": 0.9}),
    Spec("buffer_unused", lists=_SGD_BUFFER),
    Spec("nesterov", lists=_SGD_BUFFER, options={"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    Spec("maximize", lists=_SGD_BUFFER, options={**_SGD_RICH, "maximize": True}),
    Spec("groups", lists=_SGD_BUFFER, options=_SGD_BY_GROUP),
    Spec("tensor_lr", lists=_SGD_BUFFER, options={**_SGD_RICH, "lr": _float32(0.25)}),
    Spec("amp", lists=_SGD_BUFFER, options={**_SGD_RICH, **_AMP}),
    Spec("amp_maximize", lists=_SGD_BUFFER, options={**_SGD_RICH, **_AMP, "maximize": True}),
    Spec("overflow", lists=_SGD_BUFFER, options={**_SGD_RICH, "found_inf": _float32(2.0)}),
    Spec("masters", lists=(*_SGD_BUFFER, *_MASTERS), options={**_SGD_RICH, "nesterov": True}),
    Spec("masters_plain", "apart", _MASTERS),
    Spec("masters_overflow", lists=(*_SGD_BUFFER, *_MASTERS), options={**_SGD_RICH, "found_inf": _float32(1.0)}),
    *_everywhere(_SGD_BUFFER, **_SGD_RICH),
    *_rounding(_SGD_BUFFER, **_SGD_RICH), Spec("rounding_nothing", options=_RNG),
)
_LARGEST = ("max_exp_avg_sqs",)
_ADAM_BY_GROUP = {
    "step": [1, 7, 1000], "lr": [0.1, 0.01, 0.02], "beta1": [0.0, 0.9, 0.3], "beta2": [0.9, 0.999, 0.99],
    "eps": [1e-8, 1e-3, 0.1], "weight_decay": [0.01, 0.0, 0.1],
}  # fmt: skip
_ADAM = (
    Spec("first_step", options={"step": 1}),
    Spec("late_step", options={"step": 10**6}),
    Spec("l2", options={"weight_decay": 0.1}),
    Spec("adamw", options={"weight_decay": 0.1, "decoupled": True}),
    Spec("maximize", options={"weight_decay": 0.1, "maximize": True}),
    Spec("groups", options=_ADAM_BY_GROUP),
    Spec("groups_adamw", options={**_ADAM_BY_GROUP, "decoupled": True}),
    Spec("tensors", options={"lr": _float32(0.25), "step": _float32(3.0)}),
    Spec("amp", options={**_AMP, "weight_decay": 0.1}),
    Spec("overflow", options={"weight_decay": 0.1, "found_inf": _float32(2.0)}),
    Spec("masters", lists=_MASTERS, options={"weight_decay": 0.1}),
    Spec("masters_adamw", "apart", _MASTERS, {"weight_decay": 0.1, "decoupled": True}),
    Spec("masters_overflow", lists=_MASTERS, options={"found_inf": _float32(1.0)}),
    *_everywhere(weight_decay=0.1),
    *_rounding(weight_decay=0.1),
    Spec("rounding_amsgrad", "sizes", _LARGEST, {"weight_decay": 0.1, **_RNG}),
    Spec("rounding_amsgrad_masters", "apart", (*_LARGEST, *_MASTERS), {"decoupled": True, **_RNG}),
    Spec("rounding_small_eps", "sizes", options={"eps": 1e-30, **_RNG}),
    Spec("amsgrad_first_step", lists=_LARGEST, options={"step": 1}),
    Spec("amsgrad_groups", lists=_LARGEST, options=_ADAM_BY_GROUP),
    Spec("amsgrad_maximize", lists=_LARGEST, options={"weight_decay": 0.1, "maximize": True}),
    Spec("amsgrad_amp", lists=_LARGEST, options={**_AMP, "weight_decay": 0.1, "decoupled": True}),
    Spec("amsgrad_overflow", lists=_LARGEST, options={"found_inf": _float32(2.0)}),
    Spec("amsgrad_masters", "apart", (*_LARGEST, *_MASTERS), {"weight_decay": 0.1, "decoupled": True}),
    *(Spec(f"amsgrad_{layout}", layout, _LARGEST, {"weight_decay": 0.1}) for layout in LAYOUTS),
)
_LION_BY_GROUP = {
    "lr": [0.1, 0.01, 0.02], "beta1": [0.0, 0.9, 0.3], "beta2": [0.9, 0.999, 0.5], "weight_decay": [0.01, 0.0, 0.1],
}  # fmt: skip
_LION = (
    Spec("plain"),
    Spec("maximize", options={"weight_decay": 0.1, "maximize": True}),
    Spec("groups", options=_LION_BY_GROUP),
    Spec("tensor_lr", options={"lr": _float32(0.25), "weight_decay": 0.1}),
    Spec("amp", options={**_AMP, "weight_decay": 0.1}),
    Spec("overflow", options={"weight_decay": 0.1, "found_inf": _float32(2.0)}),
    Spec("masters", lists=_MASTERS, options={"weight_decay": 0.1}),
    Spec("masters_apart", "apart", _MASTERS, {"weight_decay": 0.1}),
    Spec("masters_overflow", lists=_MASTERS, options={"found_inf": _float32(1.0)}),
    *_everywhere(weight_decay=0.1),
    *_rounding(weight_decay=0.1),
)


def _with_restore(specs: tuple[Spec, ...], buffer: tuple[str, ...] = (), **options: Any) -> tuple[Spec, ...]:
    """The cases of a base step again, and those of mixing."""
    return (
        *specs,
        *(Spec(f"gamma_{g:g}", lists=(*buffer, *_FIRST), options={**options, "gamma": g}) for g in _GAMMAS),
        Spec("gamma_groups", lists=(*buffer, *_FIRST), options={**options, "gamma": [0.5, 1.0, 1.5]}),
        Spec("gamma_amp", lists=(*buffer, *_FIRST), options={**options, **_AMP, "gamma": 2.0, "maximize": True}),
        Spec("gamma_masters", lists=(*buffer, *_FIRST, *_MASTERS), options={**options, "gamma": 2.0}),
        Spec("gamma_overflow", lists=(*buffer, *_FIRST), options={**options, "found_inf": _float32(1.0), "gamma": 0.5}),
        Spec("gamma_sizes", "sizes", (*buffer, *_FIRST), {**options, "gamma": 0.5}),
        Spec("gamma_rounding", "sizes", (*buffer, *_FIRST), {**options, **_RNG, "gamma": 0.5}),
        Spec("gamma_rounding_masters", "sizes", (*buffer, *_FIRST, *_MASTERS), {**options, **_RNG, "gamma": 0.5}),
        Spec("gamma_apart", "apart", (*buffer, *_FIRST), {**options, "gamma": 2.0}),
        Spec("gamma_expanded", "expanded", (*buffer, *_FIRST), {**options, "gamma": 2.0}),
    )


_ASAM = {"adaptive": True, "eta": 0.01}
_NEAREST = {"stochastic_rounding": False}
_PERTURB = (
    *_everywhere(**_NEAREST),
    Spec("stochastic", "sizes", options={"seed": 7, "step": 3, "first_index": 5}),
    Spec("stochastic_apart", "apart", options={"seed": 7, "step": 3}),
    Spec("negative_rho", options={**_NEAREST, "rho": -0.1}),
    Spec("groups", options={**_NEAREST, "rho": [0.05, 0.1, 0.0]}),
    Spec("tensor_rho", options={**_NEAREST, "rho": _float32(0.5)}),
    Spec("asam", options={**_NEAREST, "adaptive": True}),
    Spec("asam_eta", options={**_NEAREST, **_ASAM}),
    Spec("asam_sizes", "sizes", options={**_NEAREST, **_ASAM}),
    Spec("asam_apart", "apart", options={**_NEAREST, **_ASAM}),
    Spec("asam_gaps", "gaps", options={**_NEAREST, **_ASAM}),
    Spec("asam_stochastic", options=_ASAM),
    Spec("masters", lists=_MASTERS, options=_NEAREST),
    Spec("masters_stochastic", "sizes", _MASTERS),
    Spec("masters_asam", "apart", _MASTERS, {**_NEAREST, **_ASAM}),
)
_GRAD_NORM = (
    *_everywhere(),
    *(Spec(f"asam_{layout}", layout, ("params",), {"adaptive": True, "eta": 0.01}) for layout in LAYOUTS),
    Spec("asam", lists=("params",), options={"adaptive": True}),
    Spec("asam_masters", "apart", ("params", "masters"), {"adaptive": True, "eta": 0.01}),
    Spec("params_unused", lists=("params",)),
)
_SQUARES = torch.tensor([0.1, 1e-3, 7.0, 2e5, 0.3], dtype=torch.float64)
_FINISH_NORM = tuple(
    Spec(name, options={"squares": torch.tensor(squares, dtype=torch.float64)}, only="float64")
    for name, squares in {
        "one": [4.0], "none": [], "zeros": [0.0, 0.0], "several": _SQUARES.tolist(), "infinite": [1.0, math.inf],
        "many": [1 / (k + 1) for k in range(1000)], "tiny": [1e-300, 3e-300], "huge": [1e300, 1e-300],
    }.items()
)  # fmt: skip
_RESTORE = (
    *_everywhere(),
    Spec("masters", "sizes", _MASTERS),
    Spec("masters_apart", "apart", _MASTERS),
    Spec("grads_unused", lists=("grads",)),
    *(Spec(f"gamma_{g:g}", lists=("grads", *_FIRST), options={"gamma": g}) for g in _GAMMAS),
    Spec("gamma_groups", "sizes", ("grads", *_FIRST), {"gamma": [0.5, 1.0, 1.5]}),
    Spec("gamma_apart", "apart", ("grads", *_FIRST), {"gamma": 0.5}),
    Spec("gamma_masters", "gaps", ("grads", *_FIRST, *_MASTERS), {"gamma": 2.0}),
)
_SGD_LISTS, _ADAM_LISTS = ("params", "grads"), ("params", "grads", "exp_avgs", "exp_avg_sqs")
_LION_LISTS, _LION_WRITTEN = ("params", "grads", "exp_avgs"), ("params", "exp_avgs", "masters")
_SGD_WRITTEN = ("params", "momentum_buffers", "masters")
_ADAM_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters")
_MOVED = ("params", "backups")
_LR, _STEP = {"lr": 0.1}, {"lr": 0.01, "step": 5}
OPS = {
    op.name: op
    for op in (
        OpInfo("grad_norm", ("grads",), (), _GRAD_NORM, norm=oracle.grad_norm),
        OpInfo("finish_norm", (), (), _FINISH_NORM, {"squares": _SQUARES}, norm=oracle.finish_norm),
        OpInfo("perturb_", ("params", "grads", "backups"), _MOVED, _PERTURB, {"rho": 0.1}, oracle.perturb_),
        OpInfo("restore_", ("params", "backups"), ("params", "grads"), _RESTORE, {}, oracle.restore_, True),
        OpInfo("sgd_step_", _SGD_LISTS, _SGD_WRITTEN, _SGD, _LR, oracle.sgd_step_),
        OpInfo("adam_step_", _ADAM_LISTS, _ADAM_WRITTEN, _ADAM, _STEP, oracle.adam_step_),
        OpInfo("lion_step_", _LION_LISTS, _LION_WRITTEN, _LION, {"lr": 0.01}, oracle.lion_step_),
        OpInfo(
            "restore_sgd_step_", (*_SGD_LISTS, "backups"), _SGD_WRITTEN,
            _with_restore(_SGD, _SGD_BUFFER, **_SGD_RICH), _LR, oracle.restore_sgd_step_, True,
        ),
        OpInfo(
            "restore_adam_step_", (*_ADAM_LISTS, "backups"), _ADAM_WRITTEN,
            (*_with_restore(_ADAM, weight_decay=0.1),
             Spec("gamma_amsgrad", "sizes", (*_LARGEST, *_FIRST), {"weight_decay": 0.1, "gamma": 2.0}),
             Spec("gamma_rounding_amsgrad", "sizes", (*_LARGEST, *_FIRST), {"gamma": 2.0, **_RNG}),
             Spec("gamma_amsgrad_masters", lists=(*_LARGEST, *_FIRST, *_MASTERS), options={"gamma": 0.5})),
            _STEP, oracle.restore_adam_step_, True,
        ),
        OpInfo(
            "restore_lion_step_", (*_LION_LISTS, "backups"), _LION_WRITTEN,
            _with_restore(_LION, weight_decay=0.1), {"lr": 0.01}, oracle.restore_lion_step_, True,
        ),
    )
}  # fmt: skip


def spec_of(op: str, name: str) -> Spec:
    return next(s for s in OPS[op].specs if s.name == name)
