"""Clipping by the norm of the gradient that an update applies: of the mixed one for G-RST, over all ranks.

As torch.nn.utils.clip_grad_norm_, which multiplies gradients by max_grad_norm / (norm + 1e-6) where that is below 1. An
update divides by the scale of AMP anyway, of which this becomes a part: only the norm costs a pass over memory.
"""

from __future__ import annotations

from torch.compiler import is_dynamo_compiling

from rst_fused._step import dispatch, validation
from rst_fused._step.amp import Scaling
from rst_fused._step.base import StepOptimizer
from rst_fused._step.state import NOTHING_KEPT

_EPS = 1e-6


def clipped(opt: StepOptimizer, scaling: Scaling) -> Scaling:
    """``scaling`` with the factor in it. Mixes first, in place: then p.grad is what the update applies. The norm stays
    on the device, in the first one's update_stats."""
    if opt.max_grad_norm is None:
        return scaling
    if opt._step_state.mixing:
        _check_update(opt)
        if not is_dynamo_compiling():
            validation.check_grads_apart(opt)
        dispatch.restore(opt, NOTHING_KEPT, mixing=True)
    if is_dynamo_compiling() or opt.capturing or not opt._plans.grad_norm(opt):
        _check_update(opt)
        dispatch.grad_norm(opt)
    norm, scale = opt._devices[0].update_stats[0], scaling.grad_scale
    if scale is not None:
        norm.div_(scale.to(norm))
    factor = ((norm + _EPS) / opt.max_grad_norm).clamp(min=1.0)
    if scale is not None:
        factor = factor * scale.to(factor)
    return Scaling(factor.float(), scaling.found_inf)


def _check_update(opt: StepOptimizer) -> None:
    if not is_dynamo_compiling():
        validation.check_phase(opt, updating=True)
