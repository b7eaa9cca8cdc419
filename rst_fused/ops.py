"""The fused ops as functions of lists of tensors, for those who write their own training step.

Common to all: every list has one tensor per parameter; dtypes float32, float64, bfloat16, float16, complex64 and
complex128 may be mixed in one call; tensors may be non-contiguous (but not expanded, if they are written); companions
of a parameter share its shape, dtype and device, except that state beside a master copy is float32. A hyperparameter is
one number for all parameters, or a sequence with one per group of consecutive parameters, whose lengths are in
``group_sizes``. Results are in place. ``backend`` is "auto", "cuda", "cpu", "triton" or "reference".

Errors: ValueError names the argument that does not fit, or tensors that are written and share memory (TypeError: what
is not a tensor), before anything is changed; RuntimeError if a backend is missing. The traffic stated for each op is in
bytes per fp32 parameter, the least that can be moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rst_fused._backends import backend_for, backend_named, bump_versions
from rst_fused._checks import DTYPES, SIXTEEN_BIT, as_integer, check_number, first_overlap
from rst_fused._schemas import STATS

Number = float | Tensor | Sequence[float | Tensor]
Tensors = Sequence[Tensor]
_CPU = torch.device("cpu")
_READ = ("grads", "backups", "first_grads")  # the lists that no update writes


@torch.no_grad()
def grad_norm(
    grads: Tensors, params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0,
    stats: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The norm over all gradients: ||g|| (SAM, Foret et al. 2021, eq. 2), or ||T g|| with T = |w| + eta when adaptive
    (ASAM, Kwon et al. 2021).

    Returns ``stats``, float64 of shape (6,): the norm, 1 / (norm + 1e-12) or 0 where the norm is zero or not finite,
    whether it was not finite (0 or 1), the count of such calls on this tensor, 0, which kernels use, and the sum of
    squares, of which the norm is the root. Sums are in fp64 and in a fixed order: two runs are bit-identical for any
    number of threads. Of numbers of up to four bytes, backend "cpu" first adds eight squares in fp32 (a relative error
    of at most 2^-22), and "cuda" 16 or 32 (at most 10 * 2^-24), unless that leaves the range of fp32. ``params`` is
    needed only when adaptive. Traffic: 4 (8).
    """
    if adaptive and params is None:
        raise ValueError("params=None with adaptive=True: ASAM scales gradients by |w|, pass the parameters")
    sources = _listed("params", params) if adaptive else []
    _check_number("eta", eta, 0)
    _check("grads", grads, {"params": sources}, [], {}, ["params"] if adaptive else [])
    if stats is None:
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=grads[0].device if grads else "cpu")
    _ops(backend, grads, stats.device).grad_norm(stats, list(grads), sources, adaptive, eta)
    return stats


@torch.no_grad()
def finish_norm(squares: Tensor, *, stats: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The norm over parts whose sums of squares are known: ||g|| = sqrt(sum of ||g_k||^2 over the parts k).

    ``squares`` is float64, contiguous, of one dimension and any length: what grad_norm left in ``stats[5]`` for each
    part, summed over the processes that share it. They are added in their order, so that every backend finds the same
    bits. Returns ``stats``, on the device of ``squares``, as grad_norm does. Errors: ValueError for other ``squares``,
    or ``stats`` elsewhere. Traffic: 8 bytes for each part, and those of ``stats``.
    """
    if not isinstance(squares, Tensor):
        raise TypeError(f"squares is {type(squares).__name__}: expected a tensor")
    if squares.dtype != torch.float64 or squares.dim() != 1 or not squares.is_contiguous():
        raise ValueError(
            f"squares is {tuple(squares.shape)} {squares.dtype}: expected a contiguous float64 tensor of one dimension"
        )
    if stats is None:
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=squares.device)
    if stats.device != squares.device:
        raise ValueError(f"stats is on {stats.device}, expected {squares.device}, where squares is")
    _ops(backend, [squares]).finish_norm(stats, squares)
    return stats


@torch.no_grad()
def perturb_(
    params: Tensors, grads: Tensors, backups: Tensors | None, stats: Tensor, *, rho: Number,
    masters: Tensors | None = None, group_sizes: Sequence[int] | None = None, adaptive: bool = False, eta: float = 0.0,
    stochastic_rounding: bool = True, seed: int = 0, step: int = 0, first_index: int = 0,
    shards: Sequence[Sequence[int]] | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """backup <- w; w <- w + e, e = rho g / ||g|| (SAM), or rho T^2 g / ||T g|| when adaptive (ASAM).

    ``stats`` is what grad_norm returned, with the same ``adaptive`` and ``eta``. A zero or non-finite norm gives e = 0.
    A backup may be the gradient of its parameter itself, which is lost then: (w, g) <- (w + e, w), without more memory.
    With ``masters`` (float32, beside bfloat16/float16 parameters) w is read there and no backup is written; ``backups``
    is then None. bfloat16 and float16 results are rounded stochastically, by bits that are a pure function of (seed,
    step, first_index + position in the list, position of the element). rho may be negative: against the gradient.
    Where parameters are shards, ``shards`` has (offset, run, stride) for each, integers >= 0: element i, in the order
    of the shard's strides, has position ``offset + i // run * stride + i % run``, so that it is rounded as the whole
    tensor would be, however that is cut. A run of 0 stands for all elements: (0, 0, 0) is a whole tensor,
    (k * width, 0, 0) its rows from k on, and (k, n, width) its n columns from k on. Traffic: 16; bfloat16 with masters
    8.
    """
    masters = _listed("masters", masters)
    backups = [] if masters else _needed("backups", backups)
    _check_number("eta", eta, 0)
    like = {"grads": grads, "backups": backups}
    _check("params", params, like, masters, {}, ["grads", "masters" if masters else "backups"])
    _check_apart(params=params, backups=backups)
    sizes = _sizes(params, group_sizes)
    counters = [as_integer("seed", seed, 0, 2**63 - 1), as_integer("step", step, 0, 2**63 - 1)]
    rng = torch.tensor(counters, dtype=torch.int64, device="cpu")
    _ops(backend, params).perturb_(
        list(params), list(grads), backups, masters, stats, _rows(sizes, rho=rho).flatten(), sizes, adaptive, eta,
        stochastic_rounding, rng, first_index, _shards(params, shards),
    )  # fmt: skip
    bump_versions(params, backups)


@torch.no_grad()
def restore_(
    params: Tensors, backups: Tensors | None = None, *, masters: Tensors | None = None, grads: Tensors | None = None,
    first_grads: Tensors | None = None, gamma: Number = 1.0, group_sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """w <- backup, bit for bit (or the rounded master). For an update that is not fused.

    With ``first_grads`` also g <- (1 - gamma) g1 + gamma g (G-RST, Zhao et al. 2022). Pass ``grads`` whenever this is
    traced by torch.compile: the data dependence keeps the restore behind the second pass. Traffic: 8 (20 with mixing).
    """
    masters = _listed("masters", masters)
    backups = [] if masters else _needed("backups", backups)
    firsts = _listed("first_grads", first_grads)
    if firsts and grads is None:
        raise ValueError("grads=None with first_grads: mixing needs the gradients of the second pass")
    like = {"backups": backups, "grads": _listed("grads", grads), "first_grads": firsts}
    _check("params", params, like, masters, {}, ["masters" if masters else "backups"])
    _check_apart(params=params, grads=like["grads"] if firsts else [])
    sizes = _sizes(params, group_sizes)
    _ops(backend, params).restore_(
        list(params), backups, masters, like["grads"], firsts, _rows(sizes, gamma=gamma).flatten(), sizes
    )
    bump_versions(params, like["grads"] if firsts else [])


def sgd_step_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors | None = None, *, lr: Number, momentum: Number = 0.0,
    dampening: Number = 0.0, weight_decay: Number = 0.0, nesterov: bool = False, maximize: bool = False,
    masters: Tensors | None = None, group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """One step of SGD, as torch.optim.SGD: g += weight_decay w; m = momentum m + (1 - dampening) g; w -= lr m.

    ``momentum_buffers`` start at zero (torch.optim starts them from the gradient: pass dampening=0 in the first step)
    and are needed unless momentum is 0. With AMP, gradients are divided by ``grad_scale`` and nothing changes where
    ``found_inf`` is not 0 (both float32, one element). Traffic: 20.
    """
    restore_sgd_step_(
        params, grads, None, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, masters=masters, group_sizes=group_sizes,
        grad_scale=grad_scale, found_inf=found_inf, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_sgd_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, momentum_buffers: Tensors | None = None, *, lr: Number,
    first_grads: Tensors | None = None, gamma: Number = 1.0, momentum: Number = 0.0, dampening: Number = 0.0,
    weight_decay: Number = 0.0, nesterov: bool = False, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and SGD in one pass: w is read from ``backups`` (or ``masters``), never from the perturbed
    parameter; g = (1 - gamma) g1 + gamma g2 when ``first_grads`` holds g1; then as sgd_step_.

    Where ``found_inf`` is not 0 only the weights are restored. Traffic: 20, no more than the step without SAM
    (24 with ``first_grads``).
    """
    buffers = _listed("momentum_buffers", momentum_buffers)
    lists = _update_lists(params, grads, backups, first_grads, {"momentum_buffers": buffers}, masters)
    _check_number("momentum", momentum)
    if params and not buffers and any(float(x) != 0 for x in _each(momentum)):
        raise ValueError(f"momentum_buffers=None with momentum={momentum!r}: pass zeros_like buffers, or momentum=0")
    if params and not buffers and nesterov:
        raise ValueError("nesterov=True without momentum: expected momentum > 0 and momentum_buffers")
    hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_sgd_step_", backend, lists, hyper, None, group_sizes, nesterov, maximize, grad_scale, found_inf)


def adam_step_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, *, step: Number,
    max_exp_avg_sqs: Tensors | None = None, lr: Number = 1e-3, beta1: Number = 0.9, beta2: Number = 0.999,
    eps: Number = 1e-8, weight_decay: Number = 0.0, decoupled: bool = False, maximize: bool = False,
    masters: Tensors | None = None, group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015) or, when ``decoupled``, AdamW (Loshchilov & Hutter 2019), as torch.optim.

    With ``max_exp_avg_sqs``, which start at zero, it is AMSGrad (Reddi et al. 2018): v_max = max(v_max, v) takes the
    place of v in the denominator. ``step`` counts from 1 and includes this step. AMP as in sgd_step_. Traffic: 28
    (AMSGrad 36).
    """
    restore_adam_step_(
        params, grads, None, exp_avgs, exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs, step=step, lr=lr, beta1=beta1,
        beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, masters=masters,
        group_sizes=group_sizes, grad_scale=grad_scale, found_inf=found_inf, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_adam_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, exp_avgs: Tensors, exp_avg_sqs: Tensors, *, step: Number,
    max_exp_avg_sqs: Tensors | None = None, first_grads: Tensors | None = None, gamma: Number = 1.0, lr: Number = 1e-3,
    beta1: Number = 0.9, beta2: Number = 0.999, eps: Number = 1e-8, weight_decay: Number = 0.0,
    decoupled: bool = False, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and Adam(W) in one pass, as restore_sgd_step_, with AMSGrad as in adam_step_.

    Traffic: 28 (32 with ``first_grads``); AMSGrad 36 (40).
    """
    _check_number("step", step, 1)
    state = {
        "exp_avgs": _needed("exp_avgs", exp_avgs), "exp_avg_sqs": _needed("exp_avg_sqs", exp_avg_sqs),
        "max_exp_avg_sqs": _listed("max_exp_avg_sqs", max_exp_avg_sqs),
    }  # fmt: skip
    lists = _update_lists(params, grads, backups, first_grads, state, masters, ["exp_avgs", "exp_avg_sqs"])
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_adam_step_", backend, lists, hyper, step, group_sizes, decoupled, maximize, grad_scale, found_inf)


def lion_step_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, *, lr: Number = 1e-4, beta1: Number = 0.9, beta2: Number = 0.99,
    weight_decay: Number = 0.0, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One step of Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): c = beta1 m + (1 - beta1) g;
    w = (1 - lr weight_decay) w - lr sign(c); m = beta2 m + (1 - beta2) g.

    ``exp_avgs`` (m) start at zero. sign(0) is 0, and a NaN stays NaN; a complex number counts as two reals. AMP as in
    sgd_step_. Traffic: 20.
    """
    restore_lion_step_(
        params, grads, None, exp_avgs, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, maximize=maximize,
        masters=masters, group_sizes=group_sizes, grad_scale=grad_scale, found_inf=found_inf, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_lion_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, exp_avgs: Tensors, *, first_grads: Tensors | None = None,
    gamma: Number = 1.0, lr: Number = 1e-4, beta1: Number = 0.9, beta2: Number = 0.99, weight_decay: Number = 0.0,
    maximize: bool = False, masters: Tensors | None = None, group_sizes: Sequence[int] | None = None,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and Lion in one pass, as restore_sgd_step_. Traffic: 20 (24 with ``first_grads``)."""
    state = {"exp_avgs": _needed("exp_avgs", exp_avgs)}
    lists = _update_lists(params, grads, backups, first_grads, state, masters, ["exp_avgs"])
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_lion_step_", backend, lists, hyper, None, group_sizes, maximize, grad_scale, found_inf)


# --- what the updates share -----------------------------------------------------------------------------------------
def _update_lists(
    params: Tensors, grads: Tensors, backups: Tensors | None, first_grads: Tensors | None,
    state: dict[str, list[Tensor]], masters: Tensors | None, needed: Sequence[str] = (),
) -> dict[str, list[Tensor]]:  # fmt: skip
    """All lists in the order of the schemas, checked. ``needed`` are those of ``state`` that may not be empty."""
    kept, backed_up = _listed("masters", masters), _listed("backups", backups)
    firsts = _listed("first_grads", first_grads)
    like = {"grads": grads, "backups": backed_up, "first_grads": firsts}
    _check("params", params, like, kept, state, ["grads", *needed])
    _check_apart(params=params, **state, masters=kept)
    return {
        "params": list(params), "grads": list(grads), "backups": [] if kept else backed_up, "first_grads": firsts,
        **state, "masters": kept,
    }  # fmt: skip


def _update(
    op: str, backend: str, lists: dict[str, list[Tensor]], hyper: dict[str, Number], step: Number | None,
    group_sizes: Sequence[int] | None, *options: Any,
) -> None:  # fmt: skip
    """``hyper``: in the order of the op's columns (SGD_HYPER, ADAM_HYPER, LION_HYPER)."""
    params = lists["params"]
    sizes = _sizes(params, group_sizes)
    steps = [] if step is None else [_rows(sizes, step=step).flatten()]
    getattr(_ops(backend, params), op)(*lists.values(), _rows(sizes, **hyper), *steps, sizes, *options)
    bump_versions(*(tensors for name, tensors in lists.items() if name not in _READ))


# --- arguments ------------------------------------------------------------------------------------------------------
def _ops(backend: str, tensors: Tensors, otherwise: torch.device = _CPU) -> Any:
    """Of the backend for these tensors. Without any, there is nothing to do, and any will do it."""
    if tensors:
        return backend_for(backend, tensors[0].device).ops
    if backend != "auto":
        backend_named(backend)  # it must exist all the same
    return backend_for("auto", otherwise).ops


def _needed(name: str, tensors: Tensors | None) -> list[Tensor]:
    if tensors is None:
        raise ValueError(f"{name}=None: expected one tensor per parameter")
    return _listed(name, tensors)


def _listed(name: str, tensors: Tensors | None) -> list[Tensor]:
    if tensors is None:
        return []
    if isinstance(tensors, Tensor) or not hasattr(tensors, "__len__"):  # its rows, or what can be read only once
        raise TypeError(f"{name} is a {type(tensors).__name__}: expected a list of tensors")
    return list(tensors)


def _check(
    lead_name: str, lead: Tensors, like: Mapping[str, Tensors], masters: Tensors, state: Mapping[str, Tensors],
    needed: Sequence[str],
) -> None:  # fmt: skip
    """``like``: as the parameter; ``masters``: float32; ``state``: float32 beside masters, else as the parameter.

    A list may be empty unless it is in ``needed``.
    """
    companions = {**like, **state, "masters": masters}
    for name, tensors in {lead_name: lead, **companions}.items():
        for i, t in enumerate(_needed(name, tensors)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}] is {type(t).__name__}: expected a tensor")
    for i, p in enumerate(lead):
        if p.layout != torch.strided or p.dtype not in DTYPES:
            raise ValueError(f"{lead_name}[{i}] is {p.layout} of {p.dtype}: expected a dense tensor of {DTYPES}")
        if masters and p.dtype not in SIXTEEN_BIT:
            raise ValueError(f"masters given, but {lead_name}[{i}] is {p.dtype}: masters go with bfloat16 and float16")
    for name, tensors in companions.items():
        fp32 = name == "masters" or (bool(masters) and name in state)
        if len(tensors) != len(lead) and (tensors or name in needed):
            raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(lead)}, one for each of {lead_name}")
        for i, (t, p) in enumerate(zip(tensors, lead, strict=False)):
            dtype = torch.float32 if fp32 else p.dtype
            if t.layout != torch.strided or t.shape != p.shape or t.dtype != dtype or t.device != p.device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(t.shape)} {t.dtype} {t.layout} on {t.device}, expected "
                    f"{tuple(p.shape)} {dtype} {torch.strided} on {p.device} as {lead_name}[{i}]"
                )


def _check_apart(**lists: Tensors) -> None:
    """The lists that an op writes. Under torch.compile tensors have no addresses yet."""
    shared = None if is_compiling() else first_overlap([t for ts in lists.values() for t in ts])
    if shared is not None:
        names = [f"{name}[{i}]" for name, tensors in lists.items() for i in range(len(tensors))]
        one, other = (names[i] for i in shared)
        raise ValueError(f"{one} and {other} share memory, and both are written: expected separate tensors")


def _sizes(params: Tensors, group_sizes: Sequence[int] | None) -> list[int]:
    sizes = [len(params)] if group_sizes is None else list(group_sizes)
    if any(size < 0 for size in sizes) or sum(sizes) != len(params):
        raise ValueError(f"group_sizes={sizes}: expected counts >= 0 with the sum {len(params)}, one per parameter")
    return sizes


def _shards(params: Tensors, shards: Sequence[Sequence[int]] | None) -> list[int]:
    """The numbers of all shards, one after another."""
    given = [list(shard) for shard in shards or ()]
    if shards is not None and [len(shard) for shard in given] != [3] * len(params):
        raise ValueError(f"shards={shards!r}: expected (offset, run, stride) for each of {len(params)} parameters")
    return [as_integer(f"shards[{i}]", number, 0, 2**62) for i, shard in enumerate(given) for number in shard]


def _each(value: Number) -> list[float | Tensor]:
    return list(value) if isinstance(value, Sequence) else [value]


def _check_number(name: str, value: Number, low: float = -math.inf) -> None:
    """Finite and >= low. One-element tensors pass: they may be on a GPU, and nobody waits for their value."""
    if not is_compiling():
        for x in _each(value):
            if not (isinstance(x, Tensor) and x.numel() == 1):
                check_number(name, x, low)


def _rows(sizes: list[int], **columns: Number) -> Tensor:
    """float64 of shape (groups, columns); on a GPU if one of the numbers is there."""
    every = [x for value in columns.values() for x in _each(value)]
    device = next((x.device for x in every if isinstance(x, Tensor) and not x.is_cpu), torch.device("cpu"))
    rows: list[Tensor] = []
    for name, value in columns.items():
        given = _each(value)
        if len(given) not in (1, len(sizes)):
            raise ValueError(f"{name}={value!r} has {len(given)} values, expected 1 or {len(sizes)}, one per group")
        _check_number(name, value)
        numbers = [torch.as_tensor(x, dtype=torch.float64, device=device).reshape(()) for x in given]
        rows.append(torch.stack(numbers).expand(len(sizes)))
    return torch.stack(rows, dim=1).contiguous()
