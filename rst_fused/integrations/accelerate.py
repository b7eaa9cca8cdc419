"""Accelerate: steps of RST over accumulated micro-batches.

AcceleratedOptimizer has no perturb(), leaves out step() within a window, and hands no closure on where a scaler is at
work. Nothing of accelerate is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rst_fused._checks import check_number
from rst_fused.optimizer import RST

_OWN_STEPS = ("DEEPSPEED", "MEGATRON_LM")  # distributed types whose engine takes the step


class RSTLoop:
    """The body of a training loop: ``loss = loop.step(batch)`` for every micro-batch.

    Arguments:
        accelerator, model, optimizer: an Accelerator, and what its prepare() has made of a model and an RST.
        loss_of: (model, batch) -> loss of one micro-batch. Called again in a SAM step, over all micro-batches.
        max_grad_norm: the gradients of each pass are clipped to it. With a scaler (fp16) only those that are applied:
            the direction of the perturbation does not depend on it.

    Errors: TypeError where the optimizer holds no RST; ValueError for max_grad_norm with a scaler and gamma != 1, which
    mixes gradients of both passes; RuntimeError for DeepSpeed and Megatron-LM, whose engines take the step themselves.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        loss_of: Callable[[Any, Any], Tensor],
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        rst = rst_in(optimizer)
        if rst is None:
            raise TypeError(f"optimizer is {type(optimizer).__name__} without an RST in it: expected prepare(RST(...))")
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, 0)
        check_supported(accelerator, rst, f"max_grad_norm={max_grad_norm!r}" if max_grad_norm else None)
        self.accelerator, self.model, self.optimizer, self.rst = accelerator, model, optimizer, rst
        self.loss_of, self.max_grad_norm = loss_of, max_grad_norm
        self._window: list[Any] = []  # the micro-batches since the last step

    def step(self, batch: Any) -> Tensor:
        """Forward and backward of a micro-batch; with the last one of a window, the step. Returns the loss.

        An exception brings the weights back and drops what the window has so far, gradients and micro-batches.
        """
        self._window.append(batch)
        try:
            with self.accelerator.accumulate(self.model):
                loss = self._backward(batch)
                if self.accelerator.sync_gradients:
                    self._step()
                    self._window = []
        except BaseException:
            self._window = []
            self.rst.restore()
            self.rst.zero_grad()
            raise
        return loss

    def _backward(self, batch: Any) -> Tensor:
        loss = self.loss_of(self.model, batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def _step(self) -> None:
        if not self.rst.draw() or self.accelerator.scaler is None:
            self._clip()
        if self.rst.perturb():
            with self.rst.second_pass(self.accelerator.unwrap_model(self.model)):
                for batch in self._window[:-1]:
                    with self.accelerator.no_sync(self.model):
                        self._backward(batch)
                self._backward(self._window[-1])
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self) -> None:
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)


def rst_in(optimizer: Any) -> RST | None:
    """The RST within the wrappers of accelerate, if there is one."""
    while optimizer is not None and not isinstance(optimizer, RST):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def check_supported(accelerator: Any, rst: RST, unscales: str | None) -> None:
    """Raises for what cannot work. ``unscales``: what unscales the gradients before step(), if anything does."""
    kind = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
    if kind in _OWN_STEPS:
        raise RuntimeError(
            f"accelerate's distributed_type is {kind}, whose engine takes the step itself, without perturb(): use "
            "DistributedDataParallel, or a torch.optim optimizer"
        )
    if accelerator.scaler is not None and unscales and rst.gamma != 1.0:
        raise ValueError(
            f"{unscales} with a loss scaler (fp16) and gamma={rst.gamma!r}: it unscales the gradients, which a scaler "
            "does once in a step, but gamma != 1 mixes those of both passes; expected gamma=1, or bf16"
        )
