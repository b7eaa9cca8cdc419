"""The Trainer of Hugging Face: SAM steps over the micro-batches of its gradient accumulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rst_fused.integrations.accelerate import check_supported, rst_in


class RSTMixin:
    """Before Trainer among the bases: ``class RSTTrainer(RSTMixin, Trainer)``.

    In a SAM step training_step() of the last micro-batch is followed by training_step() of all of them again, at the
    perturbed weights, with the same num_items_in_batch. The reported loss is that of the first pass, the reported
    grad_norm that of the second. max_grad_norm clips the gradients of each pass; with a scaler (fp16) only those that
    are applied. on_pre_optimizer_step callbacks see the perturbed weights. Any exception brings the weights back.

    Errors: ValueError for a scaler with gamma != 1, RuntimeError for DeepSpeed.
    """

    optimizer: Any  # of Trainer, as the next two
    accelerator: Any
    args: Any
    _rst_window: list[dict[str, Any]] | None = None  # the micro-batches since the last step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Training of Trainer. Weights that an exception finds perturbed come back."""
        self._rst_window = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            rst = rst_in(self.optimizer)
            if rst is not None:
                rst.restore()
            raise

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The first pass of a micro-batch; with the last one of a step that is drawn, the second pass of all."""
        rst, accelerator = rst_in(self.optimizer), self.accelerator
        if rst is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        max_grad_norm = self.args.max_grad_norm
        check_supported(accelerator, rst, "Trainer, which takes the gradients' norm whether or not it clips them,")
        window = self._rst_window = [*(self._rst_window or []), {**inputs}]  # a step may take entries out of inputs
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            if not accelerator.sync_gradients:
                return loss
            self._rst_window = None
            if rst.draw() and max_grad_norm and accelerator.scaler is None:  # what is applied the Trainer clips itself
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            if rst.perturb():
                with rst.second_pass(accelerator.unwrap_model(model)):
                    for batch in window[:-1]:
                        with accelerator.no_sync(model):
                            super().training_step(model, {**batch}, num_items_in_batch)  # type: ignore[misc]
                    super().training_step(model, {**window[-1]}, num_items_in_batch)  # type: ignore[misc]
        except BaseException:
            self._rst_window = None
            raise
        return loss
