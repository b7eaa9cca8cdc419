"""Every formula in plain torch: the backend where nothing is compiled.

Formulas have the names they have in csrc/math; the ops have the signatures of rst_fused._schemas. Arithmetic is in the
dtype of the tensors given (in float32 for bfloat16 and float16), so float64 inputs give float64 results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import are_copies

NORM_EPS = 1e-12
_MASK32 = 0xFFFFFFFF
STATE_BITS = 1 << 32  # added to the index of a tensor for the random bits of its state, which no weight has

Tensors = Sequence[Tensor]
State = tuple[Tensor, ...]
Formula = Callable[..., tuple[Tensor, State]]  # of w, g, the state, the hyperparameters without gamma, and options
Op = Callable[..., None]


# --- formulas -------------------------------------------------------------------------------------------------------
def asam_scale(magnitude: Tensor, eta: float) -> Tensor:
    """T = |w| + eta (ASAM, Kwon et al. 2021, section 4)."""
    return magnitude + eta


def squared_norm(g: Tensor) -> Tensor:
    """One term of ||g||^2 (SAM, Foret et al. 2021, eq. 2)."""
    return g * g


def asam_squared_norm(g: Tensor, t: Tensor) -> Tensor:
    """One term of ||T g||^2."""
    return (t * g) * (t * g)


def perturb(w: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """w + e with e = scale * g, scale = rho / ||g||."""
    return w + scale * g


def asam_perturb(w: Tensor, g: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    """w + e with e = scale * T^2 g, scale = rho / ||T g||."""
    return w + (scale * (t * t)) * g


def mix(g1: Tensor, g2: Tensor, gamma: Tensor) -> Tensor:
    """G-RST: (1 - gamma) g1 + gamma g2 (Zhao et al. 2022, section 4.2)."""
    return gamma * g2 + (1 - gamma) * g1


def sgd(w: Tensor, g: Tensor, state: State, hyper: Sequence[Tensor], nesterov: bool) -> tuple[Tensor, State]:
    """The new w and state, as torch.optim.SGD (whose first step has a zero buffer and no dampening).

    The state is the momentum buffer; without one there is no momentum.
    """
    lr, momentum, dampening, weight_decay = hyper
    d = g + weight_decay * w
    if state:
        buffer = momentum * state[0] + (1 - dampening) * d
        state = (buffer,)
        d = d + momentum * buffer if nesterov else buffer
    return w - lr * d, state


def adam(
    w: Tensor, g: Tensor, state: State, hyper: Sequence[Tensor], step: Tensor, decoupled: bool
) -> tuple[Tensor, State]:
    """The new w and state, as torch.optim.Adam, or AdamW when ``decoupled``.

    The state is (exp_avg, exp_avg_sq), with max_exp_avg_sq for AMSGrad (Reddi et al. 2018).
    """
    lr, beta1, beta2, eps, weight_decay = hyper
    m, v, *largest = state
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    largest = [torch.maximum(x, v) for x in largest]
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    root = (largest[0] if largest else v).sqrt()
    return w - (lr / bias1) * m / (root / bias2.sqrt() + eps), (m, v, *largest)


def lion(w: Tensor, g: Tensor, state: State, hyper: Sequence[Tensor]) -> tuple[Tensor, State]:
    """The new w and state, the exp_avg, of Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""
    lr, beta1, beta2, weight_decay = hyper
    (m,) = state
    c = m + (1 - beta1) * (g - m)
    sign = torch.where(c.isnan(), c, c.sign())
    return w * (1 - lr * weight_decay) - lr * sign, (m + (1 - beta2) * (g - m),)


def random_bits(rng: Tensor, tensor_index: int, element: Tensor) -> Tensor:
    """16 random bits per element (int64 in [0, 2^16)): a pure function of rng = [seed, step] and both indices.

    Two neighbours share one hash: element 2k has its low half, element 2k + 1 its high half.
    """

    def mixed(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
        return x ^ (x >> 16)

    def folded(h: Tensor, x: Tensor) -> Tensor:
        h = (mixed(h ^ (x & _MASK32)) + 0x9E3779B9) & _MASK32
        return (mixed(h ^ ((x >> 32) & _MASK32)) + 0x9E3779B9) & _MASK32

    rng = rng.to(element.device)
    key = torch.zeros((), dtype=torch.int64, device=element.device)
    for part in (rng[0], rng[1], torch.full_like(key, tensor_index), element >> 32):
        key = folded(key, part)
    pair = (element & _MASK32) >> 1
    return (mixed(((pair * 0x9E3779B9) & _MASK32) ^ key) >> 16 * (element & 1)) & 0xFFFF


def shard_position(element: Tensor, offset: int, run: int, stride: int) -> Tensor:
    """Where an element of a shard is in the whole tensor: in runs of consecutive elements, a stride apart; a run of 0
    stands for all elements."""
    return offset + (element // run * stride + element % run if run > 0 else element)


def stochastic_round(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` rounded to bfloat16 or float16, away from zero with probability equal to the fraction cut off."""
    shift = torch.zeros_like(x)
    dropped = 0xFFFF
    if dtype == torch.float16:  # below 2^-14 the quantum is 2^-24: round 2^-14 + |x|, which has that quantum
        shift = torch.where(x.abs() < 2.0**-14, 2.0**-14, shift)
        dropped = 0x1FFF
    magnitude = (x.abs() + shift).view(torch.int32).to(torch.int64)
    bits = (magnitude + (random & dropped)) & ~dropped
    rounded = torch.copysign((bits & _MASK32).to(torch.int32).view(torch.float32) - shift, x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, rounded to float32, as bfloat16 and int16, exactly: (b, r) with bits(w) = bits(b) * 2^16 + r.

    b is w rounded to nearest, ties away from zero, and r has the lower half of w's bits. A NaN is quiet, without r.
    """
    w = w.float()
    bits = torch.where(w.isnan(), 0x7FC00000, w.view(torch.int32).to(torch.int64) & _MASK32)
    return _signed(((bits + 0x8000) & _MASK32) >> 16).view(torch.bfloat16), _signed(bits & 0xFFFF)


def join(b: Tensor, r: Tensor) -> Tensor:
    """The float32 weights that ``split`` has split; b alone where that, written by somebody else, is 0 or infinite and
    r leads out of all numbers."""
    bits = (b.view(torch.int16).to(torch.int64) * 0x10000 + r) & _MASK32
    w = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    return torch.where(w.isnan(), b.float(), w)


def _signed(half: Tensor) -> Tensor:
    """int16 of the same 16 bits."""
    return torch.where(half >= 0x8000, half - 0x10000, half).to(torch.int16)


# --- helpers --------------------------------------------------------------------------------------------------------
def _rows(group_sizes: Sequence[int]) -> Iterator[int]:
    return (row for row, size in enumerate(group_sizes) for _ in range(size))


def _wide(x: Tensor) -> Tensor:
    """The tensor in the dtype it is computed in; complex tensors as pairs of reals."""
    x = x.detach()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _result(
    to: Tensor, value: Tensor, kept: Tensor | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is to be copied where, for to <- value; where ``keep`` holds, the bits of ``kept`` instead (a NaN's payload
    does not survive float32)."""
    if to.is_complex():
        to, kept = torch.view_as_real(to), None if kept is None else torch.view_as_real(kept)
    if kept is not None and keep is not None:
        value = torch.where(keep, kept.to(to.dtype), value.to(to.dtype))
    return to, value


def _write(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """All of them within one C call, which no interrupt parts."""
    deque(starmap(Tensor.copy_, results), maxlen=0)


def _weights(params: Tensors, masters: Tensors, i: int) -> Tensor:
    """Those of one parameter, or of its backup, in the dtype that they are kept in."""
    if not masters:
        return params[i]
    return join(params[i], masters[i]) if masters[i].dtype == torch.int16 else masters[i]


def _magnitude(w: Tensor) -> Tensor:
    """|w|; of a complex tensor, for each of both parts."""
    return w.abs().unsqueeze(-1) if w.is_complex() else _wide(w).abs()


def element_positions(p: Tensor) -> Tensor:
    """int64, shaped as p: the position of each element in the order of p's strides, largest first."""
    strides = p.stride()
    order = sorted(range(p.dim()), key=lambda d: -strides[d] if p.shape[d] > 1 else 0)
    sizes = [p.size(d) for d in order]
    inverse = [order.index(d) for d in range(p.dim())]
    return torch.arange(p.numel(), device=p.device).view(sizes).permute(inverse)


def _positions(p: Tensor, shards: Sequence[int], i: int) -> Tensor:
    """The same in the whole tensor, of which p may be the shard number ``i``."""
    positions = element_positions(p)
    return shard_position(positions, *shards[3 * i : 3 * i + 3]) if shards else positions


# --- ops ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def grad_norm(
    stats: Tensor, grads: Tensors, params: Tensors, masters: Tensors, adaptive: bool, eta: float
) -> None:
    total = torch.zeros((), dtype=torch.float64, device=stats.device)
    for i, grad in enumerate(grads):
        g = _wide(grad).double()
        if adaptive:
            terms = asam_squared_norm(g, asam_scale(_magnitude(_weights(params, masters, i)).double(), eta))
        else:
            terms = squared_norm(g)
        total = total + terms.sum().to(stats.device)
    finish_norm(stats, total.reshape(1))


@torch.no_grad()
def finish_norm(stats: Tensor, squares: Tensor) -> None:
    total = torch.zeros((), dtype=torch.float64, device=stats.device)
    for square in squares.unbind():
        total = total + square
    norm = total.sqrt()
    finite = norm.isfinite()
    stats[0] = norm
    stats[1] = torch.where(finite & (norm > 0), 1 / (norm + NORM_EPS), 0)
    stats[2] = torch.where(finite, 0.0, 1.0)
    stats[3] += stats[2]
    stats[5] = total


@torch.no_grad()
def perturb_(
    params: Tensors, grads: Tensors, backups: Tensors, masters: Tensors, stats: Tensor, rho: Tensor,
    group_sizes: Sequence[int], adaptive: bool, eta: float, stochastic: bool, rng: Tensor, first_index: int,
    shards: Sequence[int],
) -> None:  # fmt: skip
    for i, row in enumerate(_rows(group_sizes)):
        p = params[i]
        source = _weights(params, masters, i)
        w, g = _wide(source), _wide(grads[i]).to(_wide(source).dtype)
        scale = rho[row].to(stats.device) * stats[1]
        if adaptive:
            moved = asam_perturb(w, g, asam_scale(_magnitude(source), eta), scale)
        else:
            moved = perturb(w, g, scale)
        if stochastic and p.dtype in (torch.bfloat16, torch.float16):
            bits = random_bits(rng, first_index + i, _positions(p, shards, i))
            moved = stochastic_round(moved.float(), bits, p.dtype)
        # The backup, which may be the gradient, first: p changes with it, or not at all.
        kept = [] if are_copies(masters) else [(backups[i], p)]
        _write([*kept, _result(p, moved, p, scale == 0)])  # 0 * inf would be NaN


@torch.no_grad()
def restore_(
    params: Tensors, backups: Tensors, masters: Tensors, grads: Tensors, first_grads: Tensors, gamma: Tensor,
    group_sizes: Sequence[int],
) -> None:  # fmt: skip
    for p, saved in zip(params, masters if are_copies(masters) else backups, strict=True):
        p.copy_(saved)
    if first_grads:
        for i, row in enumerate(_rows(group_sizes)):
            _write([_result(grads[i], mix(_wide(first_grads[i]), _wide(grads[i]), gamma[row]))])


def _op_of(formula: Formula, states: int, counts_steps: bool = False) -> Op:
    """The op restore_<rule>_step_ of a base optimizer with so many lists of state.

    Weights are those before the perturbation. Where ``found_inf`` is not 0, they are only restored. All results are
    there before the first is written, so an interrupt leaves weights and state all as before or all as after.
    """

    @torch.no_grad()
    def restore_step_(params: Tensors, grads: Tensors, backups: Tensors, first_grads: Tensors, *args: Any) -> None:
        state_lists, (masters, hyper, *rest) = args[:states], args[states:]
        steps = rest.pop(0) if counts_steps else None
        group_sizes, *option, maximize, grad_scale, found_inf, rng, indices, shards = rest
        results = []
        for i, row in enumerate(_rows(group_sizes)):
            *numbers, gamma = hyper[row].unbind()
            source = _weights(backups or params, masters, i)
            w, g = _wide(source), _wide(grads[i])
            if first_grads:
                g = mix(_wide(first_grads[i]), g, gamma)
            if grad_scale is not None:
                g = g / grad_scale.to(g.device)
            state = [tensors[i] for tensors in state_lists if tensors]
            options = option if steps is None else [steps[row], *option]
            updated, new_state = formula(w, -g if maximize else g, tuple(map(_wide, state)), numbers, *options)
            if rng is not None and state and state[0].dtype == torch.bfloat16:
                index = indices[i] if indices else i
                bits = random_bits(rng, STATE_BITS + index, _positions(params[i], shards, i))
                new_state = (stochastic_round(new_state[0].float(), bits, torch.bfloat16), *new_state[1:])
            skip = None if found_inf is None else (found_inf != 0).to(w.device)
            results += [_result(old, new, old, skip) for old, new in zip(state, new_state, strict=True)]
            kept = source
            if masters and not are_copies(masters):
                kept = (backups or params)[i]
                updated, remainder = split(updated)
                results.append(_result(masters[i], remainder, masters[i], skip))
            elif masters:
                results.append(_result(masters[i], updated, masters[i], skip))
            results.append(_result(params[i], updated, kept, skip))
        _write(results)

    return restore_step_


restore_sgd_step_ = _op_of(sgd, states=1)
restore_adam_step_ = _op_of(adam, states=3, counts_steps=True)
restore_lion_step_ = _op_of(lion, states=1)
