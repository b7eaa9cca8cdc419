"""The competitors. Each owns its parameters and does optimizer work; gradients are attached from outside.

Each has three calls: ``perturb`` (norm, backup, w + e), ``update`` (restore, then SGD with momentum or AdamW) and
``base`` (SGD or AdamW alone, no perturbation before it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .cases import Case, Hyper

EPS = 1e-12
WEIGHTS: dict[str, Any] = {"seed": 0, "scale": 0.02}  # the first weights of every competitor
# Torch's fused SGD leaves bf16 and fp16 parameters unchanged on the CPU (torch 2.13); on CUDA it serves all of them.
FUSED_ON_CPU = (torch.float32, torch.float64)


class Unavailable(Exception):
    """A competitor that cannot run here; the message says why."""


def attach(params: Iterable[torch.Tensor], grads: Iterable[torch.Tensor]) -> None:
    """Sets every ``p.grad``. A perturbation may consume gradients, so all competitors get them back alike."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def attach_copies(params: Sequence[torch.Tensor], grads: Iterable[torch.Tensor]) -> None:
    """Sets every ``p.grad`` to a copy that nobody else refers to, after the old ones were dropped: as zero_grad() and a
    backward do, which leaves no Python object of a gradient."""
    for p in params:
        p.grad = None
    torch.autograd.backward(params, list(grads))  # copies what somebody holds


def torch_base(base: str, params: Sequence[torch.Tensor], hyper: Hyper) -> torch.optim.Optimizer:
    """The fastest SGD or AdamW of torch that is right here: fused, or foreach where fused does nothing."""
    fused = params[0].is_cuda or params[0].dtype in FUSED_ON_CPU
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[base]
    return kind(params, **hyper.of(base), fused=True if fused else None, foreach=None if fused else True)


class Competitor(ABC):
    """One way to take a SAM step over ``self.params``."""

    name: str
    title: str

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper) -> None:
        self.params = params
        self.hyper = hyper

    def grads(self) -> list[torch.Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    @abstractmethod
    def perturb(self) -> None: ...

    @abstractmethod
    def update(self) -> None: ...

    @abstractmethod
    def base(self) -> None: ...


class Usual(Competitor):
    """SAM one tensor at a time, with the operations of the best-known PyTorch implementation (github.com/davda54/sam).

    Norms are stacked, a clone is kept, e_w is formed and added, and the old tensor is swapped back. Without ASAM its
    factor T is the number 1.0, which is multiplied with every gradient all the same, for the norm and again for e_w: a
    perturbation moves 48 bytes per fp32 parameter.
    """

    name, title = "usual", "usual per-tensor SAM"

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper) -> None:
        super().__init__(params, hyper)
        self.optimizer = torch.optim.SGD(params, **hyper.sgd)
        self.old: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def perturb(self) -> None:
        t = 1.0
        norm = torch.norm(torch.stack([(t * g).norm(p=2) for g in self.grads()]), p=2)
        scale = self.hyper.rho / (norm + EPS)
        for p in self.params:
            if p.grad is None:
                continue
            self.old[p] = p.data.clone()
            e_w = t * p.grad * scale.to(p)
            p.add_(e_w)

    @torch.no_grad()
    def update(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.optimizer.step()

    def base(self) -> None:
        self.optimizer.step()


class Foreach(Competitor):
    """A lean SAM from torch's list operations, with a backup that is allocated once."""

    name, title = "foreach", "lean torch._foreach_ SAM"

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper, base: str = "sgd") -> None:
        super().__init__(params, hyper)
        self.optimizer = torch_base(base, params, hyper)
        self.weights: list[torch.Tensor] = list(params)
        self.backup = [torch.empty_like(p, requires_grad=False) for p in params]

    @torch.no_grad()
    def perturb(self) -> None:
        grads = self.grads()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scale = self.hyper.rho / (norm + EPS)
        torch._foreach_copy_(self.backup, self.weights)
        torch._foreach_add_(self.weights, list(torch._foreach_mul(grads, scale)))

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_copy_(self.weights, self.backup)
        self.optimizer.step()

    def base(self) -> None:
        self.optimizer.step()


def compiled_perturb(
    params: list[torch.Tensor], grads: list[torch.Tensor], backup: list[torch.Tensor], rho: float
) -> None:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    scale = rho / (norm + EPS)
    torch._foreach_copy_(backup, params)
    torch._foreach_add_(params, list(torch._foreach_mul(grads, scale)))


def compiled_update(
    params: list[torch.Tensor], source: list[torch.Tensor], grads: list[torch.Tensor],
    buffers: list[torch.Tensor], lr: torch.Tensor, momentum: float, weight_decay: float,
) -> None:  # fmt: skip
    step = torch._foreach_add(grads, source, alpha=weight_decay)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, step)
    torch._foreach_copy_(params, torch._foreach_sub(source, torch._foreach_mul(buffers, lr)))


class Compiled(Competitor):
    """torch.compile of the lean SAM, with the restore folded into a functional SGD.

    The learning rate is a tensor, so that a schedule would not recompile; shapes are static.
    """

    name, title = "compile", "torch.compile of foreach SAM"

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper) -> None:
        super().__init__(params, hyper)
        # Plain tensors that share the parameters' memory keep autograd out of the traced graph.
        self.plain = [p.detach() for p in params]
        self.backup = [torch.empty_like(p) for p in self.plain]
        self.buffers = [torch.zeros_like(p) for p in self.plain]
        self.lr = torch.tensor(hyper.lr, device=self.plain[0].device)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._perturb = torch.compile(compiled_perturb, fullgraph=True, dynamic=False)
        self._update = torch.compile(compiled_update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def perturb(self) -> None:
        self._perturb(self.plain, self.grads(), self.backup, self.hyper.rho)

    @torch.no_grad()
    def _sgd(self, source: list[torch.Tensor]) -> None:
        hyper = self.hyper
        self._update(self.plain, source, self.grads(), self.buffers, self.lr, hyper.momentum, hyper.weight_decay)

    def update(self) -> None:
        self._sgd(self.backup)

    def base(self) -> None:
        self._sgd(self.plain)


class PytorchOptimizer(Competitor):
    """SAM of the pytorch_optimizer package over torch.optim.SGD, both with their defaults."""

    name, title = "pytorch_optimizer", "pytorch_optimizer's SAM"

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper) -> None:
        super().__init__(params, hyper)
        try:
            from pytorch_optimizer import SAM
        except ImportError as error:
            raise Unavailable(f"pytorch_optimizer is not installed ({error})") from error
        self.optimizer = SAM(params, torch.optim.SGD, rho=hyper.rho, **hyper.sgd)

    def perturb(self) -> None:
        self.optimizer.first_step()

    def update(self) -> None:
        self.optimizer.second_step()

    def base(self) -> None:
        self.optimizer.base_optimizer.step()


class Ours(Competitor):
    """rst_fused's optimizer through its public two-phase form, with a perturbation at every step."""

    name, title = "ours", "rst_fused"
    options: dict[str, Any] = {}

    def __init__(
        self, params: list[torch.nn.Parameter], hyper: Hyper, backend: str = "cpu", base: str = "sgd", **options: Any
    ) -> None:
        super().__init__(params, hyper)
        try:
            from rst_fused import RST
        except ImportError as error:
            raise Unavailable(f"rst_fused does not import ({error})") from error
        try:
            self.optimizer = RST(
                params, base=base, rho=hyper.rho, schedule=1.0, backend=backend, **hyper.of(base),
                **self.options, **options,
            )  # fmt: skip
        except RuntimeError as error:  # the backend was not built
            raise Unavailable(str(error)) from error

    def perturb(self) -> None:
        self.optimizer.perturb()

    def update(self) -> None:
        self.optimizer.step()

    def base(self) -> None:
        self.optimizer.step()

    def streams(self) -> dict[str, list[torch.Tensor]]:
        """What a step with SGD reads and writes, once one was taken; the gradients are those attached last."""
        optimizer, backups = self.optimizer, self.optimizer._step_state.backups
        return {
            "w": [p.detach() for p in self.params],
            "g": self.grads(),
            "m": [optimizer.state[p]["momentum_buffer"] for p in self.params],
            # A gradient that keeps weights is another one at every step: here a tensor like it.
            "backup": [backups[p] if p in backups else p.detach().clone() for p in self.params],
        }


class OursMaster(Ours):
    """rst_fused with fp32 master weights beside low-precision parameters: no backup is needed."""

    name, title = "ours-master", "rst_fused, fp32 masters"
    options = {"master_weights": True}


PEERS: dict[str, Callable[..., Competitor]] = {
    kind.name: kind for kind in (Usual, Foreach, Compiled, PytorchOptimizer, Ours, OursMaster)
}


def make(
    name: str, case: Case, dtype: torch.dtype, hyper: Hyper, device: torch.device | str = "cpu", **options: Any
) -> Competitor:
    """A competitor over fresh parameters of ``case``, the same values for every one; ``options`` are its own."""
    params = [torch.nn.Parameter(t) for t in case.tensors(dtype, **WEIGHTS, device=device)]
    return PEERS[name](params, hyper, **options)
