"""The fused ops as functions of lists of tensors, for those who write their own training step.

Common to all: every list has one tensor per parameter; dtypes float32, float64, bfloat16, float16, complex64 and
complex128 may be mixed in one call; tensors may be non-contiguous (but not expanded, if they are written); companions
of a parameter share its shape, dtype and device, except that state beside a master is float32. ``masters`` are float32
copies of bfloat16 and float16 parameters, which take the place of backups, or, if they are int16, what bfloat16
parameters and their backups lack to be float32: bits(w) = bits(b) * 2^16 + r, where b is w rounded to nearest, ties
away from zero, so that 4 bytes per parameter keep what copies keep in 6. A hyperparameter is one number for all
parameters, or a sequence with one per group of consecutive parameters, whose lengths are in ``group_sizes``. Results
are in place. ``backend`` is "auto", "cuda", "cpu", "triton" or "reference".

Errors: ValueError names the argument that does not fit, or tensors that are written and share memory (TypeError: what
is not a tensor), before anything is changed; RuntimeError if a backend is missing. The traffic stated for each op is in
bytes per fp32 parameter, the least that can be moved.

Updates given ``rng``, (seed, step), round their first list of state (momentum_buffers, exp_avgs) stochastically where
it is bfloat16, as it then may be beside float32 parameters and masters too, which saves 4 bytes of traffic. The random
bits are a pure function of (seed, step, index, position of the element) and never those of perturb_. ``indices`` has
the index of each parameter, 0 to 2^31 - 1 (None: its position in the list), ``shards`` what perturb_ takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rst_fused._backends import bump_versions
from rst_fused._checks import are_copies, as_integer
from rst_fused._op_arguments import (
    Number,
    Tensors,
    check_apart,
    check_lists,
    check_numbers,
    each,
    listed,
    needed,
    ops_for,
    rounding,
    rows_of,
    shard_numbers,
    sizes_of,
)
from rst_fused._schemas import STATS

Shards = Sequence[Sequence[int]]
_READ = ("grads", "backups", "first_grads")  # the lists that no update writes


@torch.no_grad()
def grad_norm(
    grads: Tensors, params: Tensors | None = None, *, masters: Tensors | None = None, adaptive: bool = False,
    eta: float = 0.0, stats: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The norm over all gradients: ||g|| (SAM, Foret et al. 2021, eq. 2), or ||T g|| with T = |w| + eta when adaptive
    (ASAM, Kwon et al. 2021).

    Returns ``stats``, float64 of shape (6,): the norm, 1 / (norm + 1e-12) or 0 where the norm is zero or not finite,
    whether it was not finite (0 or 1), the count of such calls on this tensor, 0, which kernels use, and the sum of
    squares, of which the norm is the root. Sums are in fp64 and in a fixed order: two runs are bit-identical for any
    number of threads. Of numbers of up to four bytes, backend "cpu" first adds eight squares in fp32 (a relative error
    of at most 2^-22), and "cuda" 16 or 32 (at most 10 * 2^-24), unless that leaves the range of fp32. ``params``, and
    ``masters`` where there are any, are needed only when adaptive. Traffic: 4 (8).
    """
    if adaptive and params is None:
        raise ValueError("params=None with adaptive=True: ASAM scales gradients by |w|, pass the parameters")
    sources = listed("params", params) if adaptive else []
    check_numbers("eta", eta, 0)
    kept = listed("masters", masters) if adaptive else []
    check_lists("grads", grads, {"params": sources}, kept, {}, ["params"] if adaptive else [])
    if stats is None:
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=grads[0].device if grads else "cpu")
    ops_for(backend, grads, stats.device).grad_norm(stats, list(grads), sources, kept, adaptive, eta)
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
    ops_for(backend, [squares]).finish_norm(stats, squares)
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
    With float32 ``masters`` w is read there and no backup is written; ``backups`` is then None. With int16 ones w is
    the parameter with its remainder, and the backup is that of the parameter alone. bfloat16 and float16 results are
    rounded stochastically, by bits that are a pure function of (seed, step, first_index + position in the list,
    position of the element). rho may be negative: against the gradient.
    Where parameters are shards, ``shards`` has (offset, run, stride) for each, integers >= 0: element i, in the order
    of the shard's strides, has position ``offset + i // run * stride + i % run``, so that it is rounded as the whole
    tensor would be, however that is cut. A run of 0 stands for all elements: (0, 0, 0) is a whole tensor,
    (k * width, 0, 0) its rows from k on, and (k, n, width) its n columns from k on. Traffic: 16; bfloat16 with masters
    8, with remainders 10.
    """
    masters = listed("masters", masters)
    copies = are_copies(masters)
    backups = [] if copies else needed("backups", backups)
    check_numbers("eta", eta, 0)
    like = {"grads": grads, "backups": backups}
    check_lists("params", params, like, masters, {}, ["grads", "masters" if copies else "backups"])
    check_apart(params=params, backups=backups)
    sizes = sizes_of(params, group_sizes)
    counters = [as_integer("seed", seed, 0, 2**63 - 1), as_integer("step", step, 0, 2**63 - 1)]
    rng = torch.tensor(counters, dtype=torch.int64, device="cpu")
    ops_for(backend, params).perturb_(
        list(params), list(grads), backups, masters, stats, rows_of(sizes, rho=rho).flatten(), sizes, adaptive, eta,
        stochastic_rounding, rng, first_index, shard_numbers(params, shards),
    )  # fmt: skip
    bump_versions(params, backups)


@torch.no_grad()
def restore_(
    params: Tensors, backups: Tensors | None = None, *, masters: Tensors | None = None, grads: Tensors | None = None,
    first_grads: Tensors | None = None, gamma: Number = 1.0, group_sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """w <- backup, bit for bit (or the rounded master copy). For an update that is not fused.

    With ``first_grads`` also g <- (1 - gamma) g1 + gamma g (G-RST, Zhao et al. 2022). Pass ``grads`` whenever this is
    traced by torch.compile: the data dependence keeps the restore behind the second pass. Traffic: 8 (20 with mixing).
    """
    masters = listed("masters", masters)
    copies = are_copies(masters)
    backups = [] if copies else needed("backups", backups)
    firsts = listed("first_grads", first_grads)
    if firsts and grads is None:
        raise ValueError("grads=None with first_grads: mixing needs the gradients of the second pass")
    like = {"backups": backups, "grads": listed("grads", grads), "first_grads": firsts}
    check_lists("params", params, like, masters, {}, ["masters" if copies else "backups"])
    check_apart(params=params, grads=like["grads"] if firsts else [])
    sizes = sizes_of(params, group_sizes)
    ops_for(backend, params).restore_(
        list(params), backups, masters, like["grads"], firsts, rows_of(sizes, gamma=gamma).flatten(), sizes
    )
    bump_versions(params, like["grads"] if firsts else [])


def sgd_step_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors | None = None, *, lr: Number, momentum: Number = 0.0,
    dampening: Number = 0.0, weight_decay: Number = 0.0, nesterov: bool = False, maximize: bool = False,
    masters: Tensors | None = None, group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One step of SGD, as torch.optim.SGD: g += weight_decay w; m = momentum m + (1 - dampening) g; w -= lr m.

    ``momentum_buffers`` start at zero (torch.optim starts them from the gradient: pass dampening=0 in the first step)
    and are needed unless momentum is 0. With AMP, gradients are divided by ``grad_scale`` and nothing changes where
    ``found_inf`` is not 0 (both float32, one element). Traffic: 20.
    """
    restore_sgd_step_(
        params, grads, None, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, masters=masters, group_sizes=group_sizes,
        grad_scale=grad_scale, found_inf=found_inf, rng=rng, indices=indices, shards=shards,
        backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_sgd_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, momentum_buffers: Tensors | None = None, *, lr: Number,
    first_grads: Tensors | None = None, gamma: Number = 1.0, momentum: Number = 0.0, dampening: Number = 0.0,
    weight_decay: Number = 0.0, nesterov: bool = False, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and SGD in one pass: w is read from ``backups`` (or ``masters``), never from the perturbed
    parameter; g = (1 - gamma) g1 + gamma g2 when ``first_grads`` holds g1; then as sgd_step_.

    Where ``found_inf`` is not 0 only the weights are restored. Traffic: 20, no more than the step without SAM
    (24 with ``first_grads``).
    """
    buffers = listed("momentum_buffers", momentum_buffers)
    lists = _update_lists(params, grads, backups, first_grads, {"momentum_buffers": buffers}, masters, (), rng)
    check_numbers("momentum", momentum)
    if params and not buffers and any(float(x) != 0 for x in each(momentum)):
        raise ValueError(f"momentum_buffers=None with momentum={momentum!r}: pass zeros_like buffers, or momentum=0")
    if params and not buffers and nesterov:
        raise ValueError("nesterov=True without momentum: expected momentum > 0 and momentum_buffers")
    hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_sgd_step_", backend, lists, hyper, None, group_sizes, nesterov, maximize, grad_scale, found_inf,
            *rounding(params, rng, indices, shards))  # fmt: skip


def adam_step_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, *, step: Number,
    max_exp_avg_sqs: Tensors | None = None, lr: Number = 1e-3, beta1: Number = 0.9, beta2: Number = 0.999,
    eps: Number = 1e-8, weight_decay: Number = 0.0, decoupled: bool = False, maximize: bool = False,
    masters: Tensors | None = None, group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015) or, when ``decoupled``, AdamW (Loshchilov & Hutter 2019), as torch.optim.

    With ``max_exp_avg_sqs``, which start at zero, it is AMSGrad (Reddi et al. 2018): v_max = max(v_max, v) takes the
    place of v in the denominator. ``step`` counts from 1 and includes this step. AMP as in sgd_step_. Traffic: 28
    (AMSGrad 36).
    """
    restore_adam_step_(
        params, grads, None, exp_avgs, exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs, step=step, lr=lr, beta1=beta1,
        beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, masters=masters,
        group_sizes=group_sizes, grad_scale=grad_scale, found_inf=found_inf, rng=rng, indices=indices, shards=shards,
        backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_adam_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, exp_avgs: Tensors, exp_avg_sqs: Tensors, *, step: Number,
    max_exp_avg_sqs: Tensors | None = None, first_grads: Tensors | None = None, gamma: Number = 1.0, lr: Number = 1e-3,
    beta1: Number = 0.9, beta2: Number = 0.999, eps: Number = 1e-8, weight_decay: Number = 0.0,
    decoupled: bool = False, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and Adam(W) in one pass, as restore_sgd_step_, with AMSGrad as in adam_step_.

    Traffic: 28 (32 with ``first_grads``); AMSGrad 36 (40).
    """
    check_numbers("step", step, 1)
    state = {
        "exp_avgs": needed("exp_avgs", exp_avgs), "exp_avg_sqs": needed("exp_avg_sqs", exp_avg_sqs),
        "max_exp_avg_sqs": listed("max_exp_avg_sqs", max_exp_avg_sqs),
    }  # fmt: skip
    lists = _update_lists(params, grads, backups, first_grads, state, masters, ["exp_avgs", "exp_avg_sqs"], rng)
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_adam_step_", backend, lists, hyper, step, group_sizes, decoupled, maximize, grad_scale, found_inf,
            *rounding(params, rng, indices, shards))  # fmt: skip


def lion_step_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, *, lr: Number = 1e-4, beta1: Number = 0.9, beta2: Number = 0.99,
    weight_decay: Number = 0.0, maximize: bool = False, masters: Tensors | None = None,
    group_sizes: Sequence[int] | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One step of Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): c = beta1 m + (1 - beta1) g;
    w = (1 - lr weight_decay) w - lr sign(c); m = beta2 m + (1 - beta2) g.

    ``exp_avgs`` (m) start at zero. sign(0) is 0, and a NaN stays NaN; a complex number counts as two reals. AMP as in
    sgd_step_. Traffic: 20.
    """
    restore_lion_step_(
        params, grads, None, exp_avgs, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, maximize=maximize,
        masters=masters, group_sizes=group_sizes, grad_scale=grad_scale, found_inf=found_inf, rng=rng,
        indices=indices, shards=shards, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def restore_lion_step_(
    params: Tensors, grads: Tensors, backups: Tensors | None, exp_avgs: Tensors, *, first_grads: Tensors | None = None,
    gamma: Number = 1.0, lr: Number = 1e-4, beta1: Number = 0.9, beta2: Number = 0.99, weight_decay: Number = 0.0,
    maximize: bool = False, masters: Tensors | None = None, group_sizes: Sequence[int] | None = None,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    rng: Sequence[int] | None = None, indices: Sequence[int] | None = None, shards: Shards | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Restore, mixing and Lion in one pass, as restore_sgd_step_. Traffic: 20 (24 with ``first_grads``)."""
    state = {"exp_avgs": needed("exp_avgs", exp_avgs)}
    lists = _update_lists(params, grads, backups, first_grads, state, masters, ["exp_avgs"], rng)
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "gamma": gamma}
    _update("restore_lion_step_", backend, lists, hyper, None, group_sizes, maximize, grad_scale, found_inf,
            *rounding(params, rng, indices, shards))  # fmt: skip


# --- what the updates share -----------------------------------------------------------------------------------------
def _update_lists(
    params: Tensors, grads: Tensors, backups: Tensors | None, first_grads: Tensors | None,
    state: dict[str, list[Tensor]], masters: Tensors | None, required: Sequence[str] = (),
    rng: Any = None,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """All lists in the order of the schemas, checked. ``required`` are those of ``state`` that may not be empty."""
    kept, backed_up = listed("masters", masters), listed("backups", backups)
    firsts = listed("first_grads", first_grads)
    like = {"grads": grads, "backups": backed_up, "first_grads": firsts}
    first = next(iter(state)) if rng is not None else ""
    check_lists("params", params, like, kept, state, ["grads", *required], first)
    check_apart(params=params, **state, masters=kept)
    return {
        "params": list(params), "grads": list(grads), "backups": [] if are_copies(kept) else backed_up,
        "first_grads": firsts, **state, "masters": kept,
    }  # fmt: skip


def _update(
    op: str, backend: str, lists: dict[str, list[Tensor]], hyper: dict[str, Number], step: Number | None,
    group_sizes: Sequence[int] | None, *options: Any,
) -> None:  # fmt: skip
    """``hyper``: in the order of the op's columns (SGD_HYPER, ADAM_HYPER, LION_HYPER)."""
    params = lists["params"]
    sizes = sizes_of(params, group_sizes)
    steps = [] if step is None else [rows_of(sizes, step=step).flatten()]
    getattr(ops_for(backend, params), op)(*lists.values(), rows_of(sizes, **hyper), *steps, sizes, *options)
    bump_versions(*(tensors for name, tensors in lists.items() if name not in _READ))
