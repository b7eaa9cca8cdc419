"""torch.amp.GradScaler: for the time of one step it leaves two tensors on the optimizer, grad_scale and found_inf.

Nothing is unscaled between the passes, as the direction of the perturbation does not depend on the scale. The update
divides by grad_scale, and where found_inf is not 0 it only brings the weights back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rst_fused._step.base import StepOptimizer
from rst_fused._step.sharding import local


@dataclass(frozen=True)
class Scaling:
    """What a scaler has left for this step."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def overflowed(self) -> bool:
        """Whether the CPU knows of an overflow. What a GPU or a compiled graph finds, only the kernels see."""
        found = self.found_inf
        return found is not None and found.is_cpu and not torch.compiler.is_dynamo_compiling() and bool(found)

    def known_to_be_finite(self) -> Scaling:
        """Without the found_inf of the CPU, once it was asked."""
        return Scaling(self.grad_scale) if self.found_inf is not None and self.found_inf.is_cpu else self

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """For ops on ``device``: a number on the CPU serves everywhere, one on another GPU is copied."""
        scale, found_inf = (t if t is None or t.is_cpu else t.to(device) for t in (self.grad_scale, self.found_inf))
        return scale, found_inf

    def for_plan(self, device: torch.device, counts_steps: bool, as_tensors: bool) -> tuple[float, Any, Any] | None:
        """The scale where the CPU knows it, else grad_scale and found_inf on ``device`` or their addresses (0: absent).

        None if a plan can use neither: with found_inf on the GPU the CPU could not tell whether a step counts.
        """
        numbers = [t for t in (self.grad_scale, self.found_inf) if t is not None]
        if all(t.is_cpu for t in numbers):
            return 1.0 if self.grad_scale is None else float(self.grad_scale), 0, 0
        waits = counts_steps and self.found_inf is not None and not self.found_inf.is_cpu
        if waits or any((t.device, t.dtype) != (device, torch.float32) for t in numbers):
            return None
        given = (self.grad_scale, self.found_inf)
        scale, found_inf = (0 if t is None else t if as_tensors else t.data_ptr() for t in given)
        return 1.0, scale, found_inf


NONE = Scaling()
UNSCALED: tuple[float, Any, Any] = (1.0, 0, 0)  # for_plan without a scaler


def scaling(opt: StepOptimizer) -> Scaling:
    """What a scaler has left. For G-RST an overflow of the first gradients counts too."""
    if "found_inf" not in opt.__dict__ and "grad_scale" not in opt.__dict__:
        return NONE
    grad_scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
    if found_inf is not None:
        if not isinstance(found_inf, Tensor):  # the number 0 where there was no gradient at all
            found_inf = torch.tensor(found_inf, dtype=torch.float32, device="cpu")
        if opt._step_state.mixing:
            if grad_scale is None:
                raise RuntimeError(
                    "scaler.unscale_() with gamma != 1: the gradients of the second pass are unscaled, those of the "
                    "first are not; leave the unscaling to scaler.step()"
                )
            found_inf = found_inf + opt._devices[0].stats[2].to(found_inf)
    return Scaling(grad_scale, found_inf)


def check_closure(opt: StepOptimizer) -> None:
    """Raises for a closure that a scaler hands to step: it has looked for overflows in the earlier gradients."""
    if getattr(opt, "found_inf", None) is not None:
        forget(opt)
        raise RuntimeError(
            "step(closure) by a GradScaler: it looks for overflows before the closure has run; "
            "use scaler.scale(loss).backward(), perturb() and scaler.step(optimizer)"
        )


def forget(opt: StepOptimizer) -> None:
    """After an exception, which keeps the scaler from removing its tensors itself."""
    for name in ("grad_scale", "found_inf"):
        vars(opt).pop(name, None)


def unscale_grads(opt: StepOptimizer, grad_scale: Tensor) -> None:
    """For a base optimizer that is not fused."""
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                local(p.grad).div_(grad_scale.to(p.grad.device))
