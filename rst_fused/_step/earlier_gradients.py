"""Closures that add to gradients of before: of the micro-batches before the last one, say.

A SAM step runs its closure twice and uses up the gradients in between: the second time such a closure would give those
of the last micro-batch alone. So the first run watches one gradient that exists at its start: whether it is still
there, and unchanged, when the first one arrives that autograd would add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from rst_fused._step.base import StepOptimizer

_MESSAGE = (
    "step(closure): this is a SAM step, but the closure adds to gradients that were there before it (accumulated over "
    "micro-batches?), which its second run would lack: expected a closure that zeroes the gradients and goes over all "
    "micro-batches of the step, or one of rst_fused.integrations; nothing was perturbed"
)


class Watch:
    """One parameter and its gradient, from before the closure until it has run."""

    def __init__(self, p: Tensor, grad: Tensor) -> None:
        self._p, self._grad, self._version = p, grad, grad._version
        self._added = False
        # On the node that accumulates, rather than on the parameter: torch.autograd.grad does not run it. A parameter
        # does not keep its node alive.
        self._node = get_gradient_edge(p).node
        self._handle: Any = self._node.register_prehook(self._arrives)

    def _unchanged(self) -> bool:
        return self._p.grad is self._grad and self._grad._version == self._version

    def _arrives(self, _: Any) -> None:
        self._added = self._unchanged()
        self._stop()

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stop(self) -> bool:
        """Whether the gradient was added to, or is as it was: then nothing has zeroed it."""
        self._stop()
        return self._added or self._unchanged()


def watch(opt: StepOptimizer) -> Watch | None:
    """Watches the first parameter with a gradient, if there is any."""
    for group in opt.param_groups:
        for p in group["params"]:
            grad = p.grad
            if grad is not None and p.requires_grad and not grad.is_inference():
                return Watch(p, grad)
    return None


def first_pass(opt: StepOptimizer, closure: Callable[[], Any]) -> Any:
    """Runs the closure for the first time. Raises RuntimeError if a SAM step cannot run it again."""
    watched = None if opt._closure_covers_window else watch(opt)
    try:
        with torch.enable_grad():
            loss = closure()
    finally:
        added = watched is not None and watched.stop()
    if added and opt._draw():
        raise RuntimeError(_MESSAGE)
    return loss


@contextmanager
def covered(opt: StepOptimizer) -> Iterator[None]:
    """Within, the closure of a step goes over all micro-batches when it runs again: its first run may add to theirs."""
    before, opt._closure_covers_window = opt._closure_covers_window, True
    try:
        yield
    finally:
        opt._closure_covers_window = before
