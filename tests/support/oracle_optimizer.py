"""The optimizers once more, in float64 numpy and straight from the papers: what the tests compare with.

Shares no code with the package but the draws, which are tested on their own. SAM: Foret et al. 2021, eq. 2. ASAM: Kwon
et al. 2021, section 4. RST and G-RST: Zhao, Zhang, Hu 2022, sections 3 and 4. Adam: Kingma & Ba 2015, algorithm 1.
AMSGrad: Reddi, Kale, Kumar 2018, algorithm 2, with the corrected bias of torch.optim. AdamW: Loshchilov & Hutter 2019,
algorithm 2. Lion: Chen et al. 2023, algorithm 2. SGD as torch.optim documents it. ``maximize`` of f is minimizing -f
throughout, the perturbation included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rst_fused._backends import backends
from rst_fused.schedule import draw

Array = Any  # numpy.ndarray of float64 or complex128
Gradients = Callable[[list[Array], int, int], Sequence[Array | None]]  # (weights, step, pass 1 or 2) -> gradients

BACKENDS = [b.name for b in backends() if b.available and b.supports(torch.device("cpu"))]
DEFAULTS = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False, "amsgrad": False},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False, "amsgrad": False},
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False},
}


class Oracle:
    """groups: dicts with "params" (arrays) and their own lr, rho, ...; the rest as for RST."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        base: str,
        schedule: float | Callable[[int], float],
        gamma: float | str | Callable[[int], float] = 1.0,
        adaptive: bool = False,
        eta: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.base, self.schedule, self.gamma = base, schedule, gamma
        self.adaptive, self.eta, self.seed = adaptive, eta, seed
        self.groups = [{**DEFAULTS[base], **group} for group in groups]
        self.w = [np.array(p, np.result_type(p, np.float64)) for group in groups for p in group["params"]]
        self.of = [group for group in self.groups for _ in group["params"]]
        self.state: list[dict[str, Any]] = [{} for _ in self.w]
        self.t = self.sam_steps = 0
        self.norm = 0.0

    def step(self, gradients: Gradients) -> list[Array] | None:
        """One step. Returns the perturbed weights, or None after a base step."""
        t, w = self.t, self.w
        self.t += 1
        p = self.schedule(t) if callable(self.schedule) else self.schedule
        first = gradients(w, t, 1)
        if not draw(self.seed, t, p):
            self._update(first)
            return None
        self.sam_steps += 1
        moved = self.perturbed(first)
        second = gradients(moved, t, 2)
        gamma = self.gamma(t) if callable(self.gamma) else 1.0 / p if self.gamma == "match" else self.gamma
        pairs = zip(first, second, strict=True)
        self._update([g2 if g1 is None or g2 is None else (1 - gamma) * g1 + gamma * g2 for g1, g2 in pairs])
        return moved

    def perturbed(self, grads: Sequence[Array | None]) -> list[Array]:
        scale = [np.abs(w) + self.eta if self.adaptive else np.ones(w.shape) for w in self.w]
        self.norm = np.sqrt(sum(np.sum(np.abs(s * g) ** 2) for s, g in zip(scale, grads, strict=True) if g is not None))
        if self.norm == 0 or not np.isfinite(self.norm):
            return list(self.w)
        moved = []
        for w, g, s, group in zip(self.w, grads, scale, self.of, strict=True):
            rho = -group["rho"] if group["maximize"] else group["rho"]
            moved.append(w if g is None else w + rho * s**2 * g / self.norm)
        return moved

    def _update(self, grads: Sequence[Array | None]) -> None:
        rule = {"sgd": self._sgd, "lion": self._lion}.get(self.base, self._adam)
        self.w = [
            w if g is None else rule(w, -g if group["maximize"] else g, state, group)
            for w, g, state, group in zip(self.w, grads, self.state, self.of, strict=True)
        ]

    def _sgd(self, w: Array, g: Array, state: dict[str, Any], group: dict[str, Any]) -> Array:
        g = g + group["weight_decay"] * w
        if group["momentum"]:
            if "m" in state:
                state["m"] = group["momentum"] * state["m"] + (1 - group["dampening"]) * g
            else:
                state["m"] = g
            g = g + group["momentum"] * state["m"] if group["nesterov"] else state["m"]
        return w - group["lr"] * g

    def _adam(self, w: Array, g: Array, state: dict[str, Any], group: dict[str, Any]) -> Array:
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["t"] = state.get("t", 0) + 1
        if self.base == "adamw":
            w = w - lr * group["weight_decay"] * w
        else:
            g = g + group["weight_decay"] * w
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g**2
        v = state["v"]
        if group["amsgrad"]:
            v = state["v_max"] = np.maximum(state.get("v_max", 0.0), v)
        m_hat, v_hat = state["m"] / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
        return w - lr * m_hat / (np.sqrt(v_hat) + group["eps"])

    def _lion(self, w: Array, g: Array, state: dict[str, Any], group: dict[str, Any]) -> Array:
        (beta1, beta2), lr, m = group["betas"], group["lr"], state.get("m", np.zeros_like(w))
        update = np.sign(beta1 * m + (1 - beta1) * g)
        state["m"] = beta2 * m + (1 - beta2) * g
        return w - lr * (update + group["weight_decay"] * w)


class Problem:
    """A noisy loss with known gradients, one tensor per shape: sum 3 w^2 / 2 + cos(2 w) / 2 - b_t w.

    Its curvature lies between 1 and 5, so rounding errors decay rather than grow. ``missing`` (step, tensor) pairs have
    no gradient in either pass.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], steps: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.start = [rng.standard_normal(s) for s in shapes]
        self.noise = [[2 * rng.standard_normal(s) for s in shapes] for _ in range(steps)]
        self.missing: set[tuple[int, int]] = set()

    def __call__(self, weights: list[Array], t: int, which: int) -> list[Array | None]:
        return [
            None if (t, i) in self.missing else 3 * w - np.sin(2 * w) - b
            for i, (w, b) in enumerate(zip(weights, self.noise[t], strict=True))
        ]

    def parameters(self, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in self.start]

    def backward(self, params: Sequence[torch.Tensor], t: int) -> torch.Tensor:
        """What a closure does: new gradients by autograd; returns the loss."""
        for p in params:
            p.grad = None
        used = [i for i in range(len(params)) if (t, i) not in self.missing]
        w = torch.cat([params[i].reshape(-1) for i in used])
        b = torch.tensor(np.concatenate([self.noise[t][i].reshape(-1) for i in used])).to(w.dtype)
        loss = (1.5 * w.square() + 0.5 * torch.cos(2 * w) - b * w).sum()
        loss.backward()
        return loss.detach()


def arrays(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """Copies as float64 numpy arrays."""
    return [t.detach().double().numpy().copy() for t in tensors]


def bits(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Exact contents, NaN and the sign of zero included."""
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().reshape(-1)) for t in tensors]
    return [t.view(torch.uint8).numpy().tobytes() for t in flat]
