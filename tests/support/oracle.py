"""What every op must compute, in float64 numpy: written from the papers, sharing no line with the package.

Foret et al. 2021 (SAM, arXiv 2010.01412), Kwon et al. 2021 (ASAM, arXiv 2102.11600), Zhao et al. 2022 (RST and G-RST,
arXiv 2203.09962), Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW), Reddi et al. 2018 (AMSGrad), Sutskever et
al. 2013 (Nesterov), with the conventions of torch.optim (dampening; decay added to the gradient; eps outside the root);
Chen et al. 2023 (Lion, arXiv 2302.06675).

Each result is a ``Bounded``: its value and the sum of the magnitudes of the terms it was made of. Rounding errors, in
any order of evaluation, are a small multiple of the unit roundoff times that sum: no tolerance is found by trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NORM_EPS = 1e-12
Array = np.ndarray
Results = dict[str, list["Bounded"]]


@dataclass(frozen=True)
class Bounded:
    value: Array
    scale: Array


def numbers(t: torch.Tensor) -> Array:
    """float64; a complex tensor as (real, imaginary) pairs in a last dimension, for the formulas act on both alike."""
    t = t.detach().cpu()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    return t.resolve_neg().double().numpy().copy()


def per_parameter(value: Any, sizes: Sequence[int]) -> list[float]:
    """The number of each parameter, from one for all or one per group."""
    given = list(value) if isinstance(value, Sequence) else [value] * len(sizes)
    return [float(x) for x, size in zip(given, sizes, strict=True) for _ in range(size)]


def steepness(w: torch.Tensor, eta: float) -> Array:
    """T of ASAM: |w| + eta; for a complex number its modulus, in both its parts."""
    x = numbers(w)
    return (np.hypot(x[..., :1], x[..., 1:]) if w.is_complex() else np.abs(x)) + eta


def grad_norm(
    grads: Any, params: Any = None, adaptive: bool = False, eta: float = 0.0, masters: Any = None
) -> float:
    """||g||, or ||T g||."""
    params = masters or params
    terms = []
    for i, grad in enumerate(grads):
        g = numbers(grad) * (steepness(params[i], eta) if adaptive else 1.0)
        terms.append((g * g).ravel())
    return math.sqrt(sum(np.sum(t, dtype=np.longdouble) for t in terms))


def finish_norm(squares: Any) -> float:
    """The norm over parts, from the squares of theirs."""
    return math.sqrt(math.fsum(squares.tolist()))


def stats_of(norm: float, count: int = 0) -> list[float]:
    """[norm, inverse, non_finite, count, ticket, squared_norm], where ``count`` calls were not finite before."""
    finite = math.isfinite(norm)
    inverse = 1 / (norm + NORM_EPS) if finite and norm > 0 else 0.0
    return [norm, inverse, float(not finite), float(count + (not finite)), 0.0, norm * norm]


def perturb_(
    params: Any, grads: Any, rho: Any, *, backups: Any = None, masters: Any = None, group_sizes: Any = None,
    adaptive: bool = False, eta: float = 0.0, norm: float | None = None, **_: Any,
) -> Results:  # fmt: skip
    """w + rho T^2 g / ||T g||; T = 1 for SAM."""
    norm = grad_norm(grads, params, adaptive, eta) if norm is None else norm
    rhos = per_parameter(rho, group_sizes or [len(params)])
    moved = []
    for i, p in enumerate(params):
        source = masters[i] if masters else p
        w = numbers(source)
        t = steepness(source, eta) if adaptive else 1.0
        e = rhos[i] * t * t * numbers(grads[i]) * stats_of(norm)[1] if stats_of(norm)[1] > 0 else 0.0 * w
        moved.append(Bounded(w + e, np.abs(w) + np.abs(e)))
    return {"params": moved}


def mixed(g1: Any, g2: Bounded, gamma: float) -> Bounded:
    """G-RST: (1 - gamma) g1 + gamma g2."""
    a = (1 - gamma) * numbers(g1)
    return Bounded(a + gamma * g2.value, np.abs(a) + abs(gamma) * g2.scale)


def exact(t: torch.Tensor) -> Bounded:
    x = numbers(t)
    return Bounded(x, np.abs(x))


def restore_(
    params: Any, *, grads: Any = None, first_grads: Any = None, gamma: Any = 1.0, group_sizes: Any = None, **_: Any
) -> Results:
    """The mixed gradients; the weights come back bit for bit, which needs no arithmetic."""
    gammas = per_parameter(gamma, group_sizes or [len(params)])
    if not first_grads:
        return {}
    return {"grads": [mixed(first_grads[i], exact(grads[i]), gammas[i]) for i in range(len(params))]}


def _inputs(
    i: int, gamma: float, lists: dict[str, Any], maximize: bool, grad_scale: Any
) -> tuple[Array, Bounded]:
    """The weights before the perturbation and the gradient to descend."""
    source = lists.get("masters") or lists.get("backups") or lists["params"]
    g = exact(lists["grads"][i])
    if lists.get("first_grads"):
        g = mixed(lists["first_grads"][i], g, gamma)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    return numbers(source[i]), Bounded(factor * g.value, abs(factor) * g.scale)


def restore_sgd_step_(
    *, lr: Any, gamma: Any = 1.0, momentum: Any = 0.0, dampening: Any = 0.0, weight_decay: Any = 0.0,
    nesterov: bool = False, maximize: bool = False, group_sizes: Any = None, grad_scale: Any = None,
    found_inf: Any = None, **lists: Any,
) -> Results:  # fmt: skip
    """d = g + decay w; m = momentum m + (1 - dampening) d; w - lr (m, or d + momentum m for Nesterov)."""
    sizes = group_sizes or [len(lists["params"])]
    columns = [per_parameter(x, sizes) for x in (lr, gamma, momentum, dampening, weight_decay)]
    buffers, skip = lists.get("momentum_buffers"), found_inf is not None and float(found_inf) != 0
    out: Results = {"params": [], "momentum_buffers": []}
    for i in range(len(lists["params"])):
        rate, mixing, mu, damp, decay = (column[i] for column in columns)
        w, g = _inputs(i, mixing, lists, maximize, grad_scale)
        d, ds = g.value + decay * w, g.scale + np.abs(decay * w)
        if buffers:
            old = numbers(buffers[i])
            m, ms = mu * old + (1 - damp) * d, np.abs(mu * old) + abs(1 - damp) * ds
            d, ds = (d + mu * m, ds + abs(mu) * ms) if nesterov else (m, ms)
            out["momentum_buffers"].append(Bounded(old, 0 * old) if skip else Bounded(m, ms))
        out["params"].append(Bounded(w, 0 * w) if skip else Bounded(w - rate * d, np.abs(w) + abs(rate) * ds))
    return _with_masters(out, lists)


def restore_adam_step_(
    *, step: Any, lr: Any = 1e-3, gamma: Any = 1.0, beta1: Any = 0.9, beta2: Any = 0.999, eps: Any = 1e-8,
    weight_decay: Any = 0.0, decoupled: bool = False, maximize: bool = False, group_sizes: Any = None,
    grad_scale: Any = None, found_inf: Any = None, **lists: Any,
) -> Results:  # fmt: skip
    """m and v as in Kingma & Ba; w - lr (m / c1) / (sqrt(v / c2) + eps), c = 1 - beta^step. AMSGrad: the largest v."""
    sizes = group_sizes or [len(lists["params"])]
    columns = [per_parameter(x, sizes) for x in (lr, gamma, beta1, beta2, eps, weight_decay, step)]
    skip = found_inf is not None and float(found_inf) != 0
    largest = lists.get("max_exp_avg_sqs")
    out: Results = {"params": [], "exp_avgs": [], "exp_avg_sqs": [], **({"max_exp_avg_sqs": []} if largest else {})}
    for i in range(len(lists["params"])):
        rate, mixing, b1, b2, epsilon, decay, t = (column[i] for column in columns)
        w0, g = _inputs(i, mixing, lists, maximize, grad_scale)
        m0, v0 = numbers(lists["exp_avgs"][i]), numbers(lists["exp_avg_sqs"][i])
        w = w0 * (1 - rate * decay) if decoupled else w0
        d, ds = (g.value, g.scale) if decoupled else (g.value + decay * w0, g.scale + np.abs(decay * w0))
        m, ms = b1 * m0 + (1 - b1) * d, np.abs(m0) + (1 - b1) * ds  # however the mean is written
        v, vs = b2 * v0 + (1 - b2) * d * d, b2 * v0 + (1 - b2) * (d * d + np.abs(d) * ds)
        c1, c2 = 1 - b1**t, 1 - b2**t
        top0 = numbers(largest[i]) if largest else v
        top = np.maximum(top0, v)
        root = np.sqrt(top / c2) + epsilon
        # A rounded d moves sqrt(v) by at most sqrt(1 - beta2) times the error of d, since v >= (1 - beta2) d^2; and the
        # root of max(v, ..) by no more than that of v.
        uncertain = np.abs(m) / root**2 * math.sqrt((1 - b2) / c2) * ds
        ws = np.abs(w0) + rate / c1 * (ms / root + uncertain)
        results = {
            "params": (w0, w - rate * m / c1 / root, ws), "exp_avgs": (m0, m, ms), "exp_avg_sqs": (v0, v, vs),
            "max_exp_avg_sqs": (top0, top, np.maximum(top0, vs)),
        }  # fmt: skip
        for name in out:
            old, new, scale = results[name]
            out[name].append(Bounded(old, 0 * old) if skip else Bounded(new, scale))
    return _with_masters(out, lists)


def restore_lion_step_(
    *, lr: Any = 1e-4, gamma: Any = 1.0, beta1: Any = 0.9, beta2: Any = 0.99, weight_decay: Any = 0.0,
    maximize: bool = False, group_sizes: Any = None, grad_scale: Any = None, found_inf: Any = None, **lists: Any,
) -> Results:  # fmt: skip
    """c = beta1 m + (1 - beta1) g; w - lr (sign(c) + decay w); m = beta2 m + (1 - beta2) g."""
    sizes = group_sizes or [len(lists["params"])]
    columns = [per_parameter(x, sizes) for x in (lr, gamma, beta1, beta2, weight_decay)]
    skip = found_inf is not None and float(found_inf) != 0
    out: Results = {"params": [], "exp_avgs": []}
    for i in range(len(lists["params"])):
        rate, mixing, b1, b2, decay = (column[i] for column in columns)
        w0, g = _inputs(i, mixing, lists, maximize, grad_scale)
        m0 = numbers(lists["exp_avgs"][i])
        c, m = b1 * m0 + (1 - b1) * g.value, b2 * m0 + (1 - b2) * g.value
        # However the means are written, m0 is added to (1 - beta) (g - m0).
        cs, ms = (np.abs(m0) + (1 - b) * (g.scale + np.abs(m0)) for b in (b1, b2))
        w = w0 - rate * (np.sign(c) + decay * w0)
        # Rounding errors are a multiple of the unit roundoff times cs. Where they reach |c| the sign may be the other
        # one, which moves w by two steps: cs / |c| allows that exactly there, and next to nothing where c is not small.
        doubt = cs / np.maximum(np.abs(c), 1e-300)
        ws = np.abs(w0) * (1 + abs(rate * decay)) + abs(rate) * (1 + 2 * doubt)
        for name, (old, new, scale) in {"params": (w0, w, ws), "exp_avgs": (m0, m, ms)}.items():
            out[name].append(Bounded(old, 0 * old) if skip else Bounded(new, scale))
    return _with_masters(out, lists)


def _with_masters(out: Results, lists: dict[str, Any]) -> Results:
    """The parameter is the rounded master, so both have one expected value."""
    return {**out, "masters": out["params"]} if lists.get("masters") else out


sgd_step_ = restore_sgd_step_
adam_step_ = restore_adam_step_
lion_step_ = restore_lion_step_
