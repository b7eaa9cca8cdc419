"""torch.amp.GradScaler: for the time of one step it leaves two tensors on the optimizer, grad_scale and found_inf.

Nothing is unscaled between the passes, as the direction of the perturbation does not depend on the scale. The update
divides by grad_scale, and where found_inf is not 0 it only brings the weights back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rst_fused._core import Core


def scaling(opt: Core) -> tuple[Tensor | None, Tensor | None]:
    """(grad_scale, found_inf) of this step, or None twice. For G-RST an overflow of the first gradients counts too."""
    grad_scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
    if found_inf is not None:
        if not isinstance(found_inf, Tensor):  # the number 0 where there was no gradient at all
            found_inf = torch.tensor(found_inf, dtype=torch.float32, device="cpu")
        if opt._run.mixing:
            if grad_scale is None:
                raise RuntimeError(
                    "scaler.unscale_() with gamma != 1: the gradients of the second pass are unscaled, those of the "
                    "first are not; leave the unscaling to scaler.step()"
                )
            found_inf = found_inf + opt._places[0].stats[2].to(found_inf)
    return grad_scale, found_inf


def on_device(device: torch.device, scaling: Tensor | None) -> Tensor | None:
    """For ops on ``device``: a number on the CPU serves everywhere, one on another GPU is copied."""
    return scaling if scaling is None or scaling.is_cpu or scaling.device == device else scaling.to(device)


def given(opt: Core) -> bool:
    """Whether a scaler has left anything: the attributes are there, or not at all."""
    return "found_inf" in opt.__dict__ or "grad_scale" in opt.__dict__


def active(opt: Core) -> bool:
    return getattr(opt, "found_inf", None) is not None


def check_closure(opt: Core) -> None:
    """Raises for a closure that a scaler hands to step: it has looked for overflows in the gradients of before."""
    if active(opt):
        forget(opt)
        raise RuntimeError(
            "step(closure) by a GradScaler: it looks for overflows before the closure has run; "
            "use scaler.scale(loss).backward(), perturb() and scaler.step(optimizer)"
        )


def forget(opt: Core) -> None:
    """After an exception, which keeps the scaler from removing its tensors itself."""
    for name in ("grad_scale", "found_inf"):
        vars(opt).pop(name, None)


def step_base(opt: Core) -> None:
    """A step of a base optimizer that is not fused, with unscaled gradients, or none after an overflow."""
    assert opt.base is not None
    grad_scale, found_inf = scaling(opt)
    if found_inf is not None and bool(found_inf):
        return
    if grad_scale is not None:
        for group in opt.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(grad_scale.to(p.grad.device))
    opt.base.step()
