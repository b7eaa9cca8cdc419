"""How sharp a minimum is: the loss rise at w + e, and the largest eigenvalue of the Hessian.

Both look at the mean cross-entropy over a few fixed batches, in float32, with the model in eval mode:
BatchNorm then uses its running statistics, so that the loss is a function of the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rst_fused import SAM

Batches = Sequence[tuple[Tensor, Tensor]]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _terms(model: nn.Module, batches: Batches) -> Iterator[Tensor]:
    """Losses that sum to the mean over all images; one at a time, because each holds its graph in memory."""
    total = sum(len(labels) for _, labels in batches)
    for images, labels in batches:
        yield F.cross_entropy(model(images), labels, reduction="sum") / total


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy over the batches, in eval mode."""
    with eval_mode(model), torch.no_grad():
        return float(sum(_terms(model, batches)))


def loss_rise(model: nn.Module, batches: Batches, rho: float) -> float:
    """``L(w + e) - L(w)`` with ``e = rho * g / ||g||``, g the gradient of L (Foret et al. 2021, eq. 2).

    The weights are back bit for bit afterwards; gradients are dropped.
    """
    # No process group: where several processes train, the whole model may be on this one alone.
    probe = SAM(model.parameters(), base="sgd", lr=0.0, rho=rho, process_group=None)
    probe.zero_grad()
    before = 0.0
    with eval_mode(model):
        for term in _terms(model, batches):
            term.backward()
            before += float(term.detach())
    probe.perturb()
    try:
        return mean_loss(model, batches) - before
    finally:
        probe.restore()
        probe.zero_grad()


def top_eigenvalue(
    model: nn.Module, batches: Batches, iterations: int = 20, tolerance: float = 1e-2, seed: int = 0
) -> float:
    """The largest (not largest in magnitude) eigenvalue of the Hessian of L, by power iteration.

    Hessian-vector products are exact, by differentiating the gradient once more. The Rayleigh quotient is
    returned after ``iterations``, or once it moves by less than ``tolerance`` of itself; a start vector drawn
    from ``seed``. If the dominant eigenvalue m is negative, the iteration is repeated on ``H - m I``, whose
    dominant eigenvalue is the largest of H less m. A value that is not finite is returned as it is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def product(vector: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in parameters]
        for term in _terms(model, batches):
            gradients = torch.autograd.grad(term, parameters, create_graph=True)
            torch._foreach_add_(total, torch.autograd.grad(gradients, parameters, grad_outputs=vector))
        return total

    def dominant(shift: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        value = 0.0
        for _ in range(iterations):
            length = float(torch.nn.utils.get_total_norm(vector))
            if length == 0.0:  # the Hessian is shift * I on all that the start vector holds
                return 0.0
            vector = [v / length for v in vector]
            image = [h - shift * v for h, v in zip(product(vector), vector, strict=True)]
            previous = value
            value = float(sum((h * v).sum() for h, v in zip(image, vector, strict=True)))
            if not abs(value - previous) > tolerance * abs(value):
                break
            vector = image
        return value

    with eval_mode(model):
        value = dominant(0.0)
        return dominant(value) + value if value < 0 else value
