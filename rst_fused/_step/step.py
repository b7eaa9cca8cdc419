"""One step: perturb, update, restore. What a step decides stands here; how it runs is up to its two executors, the
cached launch plan (rst_fused._step.plan) and the registered ops (rst_fused._step.dispatch).
"""

from __future__ import annotations

from typing import Any

from rst_fused._step import agreement, amp, dispatch, first_grads, gradient_memory, m_sharpness, release, validation
from rst_fused._step.base import StepOptimizer
from rst_fused._step.clipping import clipped
from rst_fused._step.copies import drop_copies
from rst_fused._step.fsdp2 import refuse_unreduced
from rst_fused._step.state import AFTER_RESTORE, NOTHING_KEPT


def perturb(opt: StepOptimizer, compiling: bool = False) -> None:
    """Moves the weights to w + e, keeps them, and takes the gradients out of p.grad."""
    # Conditions stand here, not in what they guard: from cold caches a call takes five microseconds.
    state = opt._step_state
    if not compiling and opt._sharding.fsdp_modules:
        refuse_unreduced(opt._sharding.fsdp_modules)
    state.perturbed = True
    state.mixing = state.mixes
    state.local_grads = False
    if compiling:
        dispatch.perturb(opt)
        return
    if state.mixing:
        first_grads.keep_apart(opt)
    state.captured = capturing = opt._on_gpu and opt.capturing
    # In a graph, random bits and hyperparameters on the GPU must stay there, which those of a plan do not.
    if capturing or not opt._plans.perturb(opt):
        validation.check_phase(opt, updating=False)
        refuse_unreduced(opt._sharding.fsdp_modules)  # which that has found, where a wrapper replaced the parameters
        try:
            gradient_memory.choose(opt)
            if capturing or opt._plans.measured or not _perturb_by_new_plan(opt):
                measured = not capturing and opt._plans.measured
                if measured:
                    opt._plans.drop()
                dispatch.perturb(opt, measured)
        finally:  # the gradients of another call are others
            state.swaps = frozenset()
    drop_copies(opt)


def _perturb_by_new_plan(opt: StepOptimizer) -> bool:
    state, plans = opt._step_state, opt._plans
    if not plans.renew(opt, for_update=False):
        return False
    if plans.perturb(opt):
        return True
    if not state.swaps or plans.measured:
        return False
    state.swaps = frozenset()  # a plan sees references that Python cannot count
    return plans.renew(opt, for_update=False) and plans.perturb(opt)


def update(opt: StepOptimizer, compiling: bool = False) -> None:
    """Brings the weights back if they are perturbed, and applies the base optimizer to them."""
    state = opt._step_state
    if not compiling:
        if state.finished:
            state.count()
        if state.local_grads:
            m_sharpness.refuse_update()
        if state.mixing and state.norm_unseen:
            agreement.check_norm(opt)
    if compiling and opt.base is None:
        after = state.after_step()
        dispatch.update(opt, clipped(opt, amp.scaling(opt)), after)
        return
    if opt.base is not None:
        _update_by_instance(opt)
    elif opt.release_gradients:
        release.finish(opt)
    else:
        _update(opt)
    if not compiling:
        drop_copies(opt)


def _update(opt: StepOptimizer) -> None:
    state, scaling = opt._step_state, amp.scaling(opt)
    capturing = opt._on_gpu and opt.capturing
    after = state.after_step(counts=not capturing)
    if scaling is not amp.NONE and not capturing:
        if scaling.overflowed():
            validation.check_saved(opt)
            _restore(opt, after)
            return
        scaling = scaling.known_to_be_finite()
    if opt._max_grad_norm is not None:
        scaling = clipped(opt, scaling)
    if not capturing and opt._plans.update(opt, scaling, after):
        return
    validation.check_phase(opt, updating=True)
    if not capturing and opt._plans.renew(opt, for_update=True) and opt._plans.update(opt, scaling, after):
        return
    dispatch.update(opt, scaling, after)
    opt._plans.drop()  # step counters may be shared in another way now


def restore(opt: StepOptimizer, compiling: bool = False) -> None:
    """Abandons a perturbation."""
    state = opt._step_state
    if state.released or state.waiting:
        release.abandon(opt)
    if compiling:
        dispatch.restore(opt, AFTER_RESTORE)
    elif state.captured:  # nothing has been perturbed, and no backup written
        state.become(AFTER_RESTORE)
    elif state.perturbed or state.saved:
        _restore(opt, AFTER_RESTORE)


def _restore(opt: StepOptimizer, after: dict[str, Any]) -> None:
    if not opt._plans.restore(opt, after):
        dispatch.restore(opt, after)
    drop_copies(opt)


def _update_by_instance(opt: StepOptimizer) -> None:
    """A step of a base optimizer that is not fused: with mixed and unscaled gradients, or none after an overflow."""
    assert opt.base is not None
    state = opt._step_state
    after = state.after_step(counts=not opt.capturing)
    if state.mixing:
        validation.check_grads(opt)
        validation.check_grads_apart(opt)
    scaling = amp.scaling(opt)
    validation.check_saved(opt)
    if state.mixing:
        dispatch.restore(opt, NOTHING_KEPT, mixing=True)
    else:
        _restore(opt, NOTHING_KEPT)
    if scaling.found_inf is not None and bool(scaling.found_inf):
        state.become(after)
        return
    scaling = clipped(opt, scaling)
    if scaling.grad_scale is not None:
        amp.unscale_grads(opt, scaling.grad_scale)
    # In one C call: an interrupt after the step of the base finds it counted.
    dispatch.run_together([opt.base.step, *dispatch.setters(state, after)])
