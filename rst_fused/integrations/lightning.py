"""Lightning, automatic optimization: SAM steps with accumulate_grad_batches and with a loss scaler.

Without either of them Lightning works as it is, since it hands a closure to step(). It needs nothing of Lightning's
modules, and so serves `lightning.pytorch` and `pytorch_lightning` alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from rst_fused._step.earlier_gradients import covered
from rst_fused.optimizer import RST


class RSTMixin:
    """Before LightningModule among the bases: ``class Model(RSTMixin, LightningModule)``.

    In a SAM step the second pass goes over all micro-batches since the last step, with the loss divided by
    accumulate_grad_batches and with one synchronization, as the first. Buffers of the module stay as the first pass
    left them, and what training_step logs is what it logs in the first pass. gradient_clip_val clips the gradients of
    each pass.

    A module that has on_train_batch_start or optimizer_step itself calls that of super().
    """

    trainer: Any  # of LightningModule
    _rst_window: tuple[tuple[Any, int], ...] = ()  # the micro-batches since the last step, and their batch_idx

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Keeps the batch, which stays in memory until the step."""
        starts = batch_idx % self.trainer.accumulate_grad_batches == 0
        self._rst_window = (*(() if starts else self._rst_window), (batch, batch_idx))
        return super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of RST whose second pass goes over all micro-batches; of another optimizer, one of Lightning."""
        rst = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(rst, RST):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]
            return
        window = self._window_until(batch_idx)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        runs = 0

        def closure() -> Any:
            nonlocal runs
            runs += 1
            loss = optimizer_closure() if runs == 1 else None
            if runs == 2 or (scaled and rst.perturb()):  # a scaler hands no closure to the optimizer
                with rst.second_pass(cast("torch.nn.Module", self)), _without_logging(self):
                    self._second_pass(rst, window)
            return loss

        try:
            with covered(rst):
                super().optimizer_step(epoch, batch_idx, optimizer, closure)  # type: ignore[misc]
        except BaseException:
            rst.restore()  # with a scaler, hooks of others run while the weights are perturbed
            raise
        self._rst_window = ()

    def _window_until(self, batch_idx: int) -> tuple[tuple[Any, int], ...]:
        """A run that is resumed within a window has gradients of the later micro-batches only."""
        seen = [index for _, index in self._rst_window]
        if not seen or seen != list(range(seen[0], batch_idx + 1)):
            first = batch_idx - batch_idx % self.trainer.accumulate_grad_batches
            raise RuntimeError(
                f"{type(self).__name__}: RSTMixin has seen the batches {seen} of this step, expected {first} to "
                f"{batch_idx}: let on_train_batch_start(self, batch, batch_idx) call that of super(), and name "
                "RSTMixin before LightningModule"
            )
        return self._rst_window

    def _second_pass(self, rst: RST, window: tuple[tuple[Any, int], ...]) -> None:
        trainer = self.trainer
        for batch, batch_idx in window:
            is_last = batch_idx == window[-1][1]
            with nullcontext() if is_last else _no_sync(trainer.strategy):
                output = trainer.strategy.training_step(batch, batch_idx)
                loss = output["loss"] if isinstance(output, dict) else output
                if loss is not None:
                    trainer.strategy.backward(loss / trainer.accumulate_grad_batches, rst)


def _no_sync(strategy: Any) -> AbstractContextManager[Any]:
    """Strategies of one process have nothing to block."""
    return strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext()


@contextmanager
def _without_logging(module: Any) -> Iterator[None]:
    """What a training_step logs at w + e would replace what it has logged at w."""
    vars(module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del vars(module)["log"]
