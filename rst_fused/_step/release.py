"""release_gradients=True: parameters are updated within the backward that ends a step, and their gradients freed.

A hook of torch runs when the gradient of a parameter is complete: in the only backward of a base step and the second
one of a SAM step, whose norm is known by then, so that nothing of an update waits for other gradients. Parameters wait
until there are enough of them for a launch; then those alone are restored and updated, and their gradients and the
memory that kept their weights are free. step() does the rest, and counts.

Step counters are left to the end, too: one that many parameters share would be split anew by every launch.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Variable

from rst_fused._step import agreement, amp, columns, dispatch, validation
from rst_fused._step.base import StepOptimizer
from rst_fused._step.sharding import is_dtensor, local, settle_grad

BUCKET = 4 * 2**20  # bytes of parameters that are updated by one launch


def nothing_released() -> dict[str, Any]:
    """The fields of StepState at the start of a step."""
    return {"waiting": {}, "released": {}}


class Releases:
    """The hooks of one optimizer, and what they find out about a backward. What a step has to know is in StepState."""

    def __init__(self) -> None:
        self.handles: dict[Tensor, Any] = {}
        self.keeping = 0  # contexts of accumulate_gradients() that are open
        self.bytes: dict[Any, int] = {}  # that wait, by stream
        self.task = -1  # the backward that was looked at last, as torch numbers them
        self.unfinished: set[int] = set()  # backwards that released and have not come to their end
        self.counters: list[int] = []  # which step counter each state has, by id
        self.lock = threading.RLock()  # every GPU has a thread of its own in a backward


# --- the hooks --------------------------------------------------------------------------------------------------------
def check_options(base: Any, m_sharpness: bool) -> None:
    """Raises ValueError for what needs all gradients at once."""
    if base is not None:
        raise ValueError(
            f"release_gradients=True with an optimizer as base ({type(base).__name__}): its step takes all gradients "
            "at once; expected one of 'sgd', 'adam', 'adamw' and 'lion'"
        )
    if m_sharpness:
        raise ValueError(
            "release_gradients=True with m_sharpness=True: DistributedDataParallel adds up gradients after they would "
            "be released; expected one of them"
        )


def watch(opt: StepOptimizer) -> None:
    """Hooks for the parameters that lack one: new ones, some that were frozen until now, some that were swapped. They
    go with the optimizer, which they do not keep alive."""
    if not opt.release_gradients:
        return
    handles = opt._releases.handles
    for group in opt.param_groups:
        for p in group["params"]:
            known = handles.get(p)
            if p.requires_grad and (known is None or known.id not in (p._post_accumulate_grad_hooks or ())):
                if not handles:
                    weakref.finalize(opt, _remove, handles).atexit = False
                handles[p] = p.register_post_accumulate_grad_hook(partial(_arrives, weakref.ref(opt)))


def _remove(handles: dict[Tensor, Any]) -> None:
    for handle in handles.values():
        handle.remove()


@torch._disable_dynamo  # which would trace it as a part of a compiled backward
def _arrives(reference: Any, p: Tensor) -> None:
    """The gradient of p is complete."""
    opt = reference()
    if opt is not None and p.grad is not None:
        with opt._releases.lock:
            _release(opt, p)


def _release(opt: StepOptimizer, p: Tensor) -> None:
    releases, state = opt._releases, opt._step_state
    if p in state.released or p in state.waiting:
        raise RuntimeError(
            f"{_name_of(opt, p)} has another gradient, but the one before it was released for its update "
            "(release_gradients=True). Of several backwards in a pass (micro-batches, several losses) run all but the "
            "last one within opt.accumulate_gradients(); call opt.step() after a pass of a base step, and "
            "opt.restore() after a backward that failed. Where reentrant checkpointing uses a parameter in several "
            "segments: use_reentrant=False"
        )
    if releases.keeping:
        return
    task = torch._C._current_graph_task_id()
    if task != releases.task or task == -1:
        _check_backward(opt)
        releases.task = task
    if not state.perturbed and _draws(opt):
        return  # the first pass of a SAM step: perturb() needs all gradients
    if task != -1 and task not in releases.unfinished and not _in_compiled_backward():
        releases.unfinished.add(task)
        Variable._execution_engine.queue_callback(partial(releases.unfinished.discard, task))  # unless it fails
    settle_grad(p)  # by collectives, in the order of the backward, which is that of all ranks
    w = local(p)
    stream = torch.cuda.current_stream(w.device) if w.is_cuda else None
    size = releases.bytes.get(stream, 0) + w.numel() * w.element_size()
    state.waiting[p] = stream
    releases.bytes[stream] = size
    if size >= BUCKET:
        _flush(opt, [q for q, where in state.waiting.items() if where == stream])
        releases.bytes[stream] = 0


def _check_backward(opt: StepOptimizer) -> None:
    """Once for each backward: raises RuntimeError where gradients cannot be released in it."""
    if opt.capturing:
        raise RuntimeError(
            "release_gradients=True in the capture of a CUDA graph: the backward would hold the updates of one draw; "
            "take release_gradients=False for CUDA graphs"
        )
    params = [p for group in opt.param_groups for p in group["params"]]
    if agreement.group_of(opt.process_group) is not None and not all(map(is_dtensor, params)):
        raise RuntimeError(
            "release_gradients=True with plain parameters on several ranks: DistributedDataParallel adds up gradients "
            "after they would be released; expected parameters sharded by fully_shard (FSDP2), "
            "release_gradients=False, or process_group=None for an optimizer of this process alone"
        )


def _in_compiled_backward() -> bool:
    """Whether compiled autograd runs, which drops what is queued for the end of a backward."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is None:
        return False
    return getattr(compiled, "compiled_autograd_enabled", False) or getattr(
        compiled, "in_compiled_autograd_region", False
    )


def _draws(opt: StepOptimizer) -> bool:
    """Whether the step under way is a SAM step. Nobody may ever ask for that: see rst_fused._step.without_draw."""
    state = opt._step_state
    known = state.drawn_at
    fires = opt._draw()
    if state.drawn_at != known:
        state.unasked_at = state.drawn_at
    return fires


@contextmanager
def keeping(opt: StepOptimizer) -> Iterator[None]:
    """Within, nothing is released."""
    releases = opt._releases
    releases.keeping += 1
    try:
        yield
    finally:
        releases.keeping -= 1


# --- updates ----------------------------------------------------------------------------------------------------------
def _flush(opt: StepOptimizer, params: list[Tensor]) -> None:
    """Updates these parameters, those that still have a gradient."""
    state = opt._step_state
    if not state.released:
        _check_pass(opt)
    taken = set(params)
    ready = {p: None for p in params if p.grad is not None}
    _check_grads(opt, ready)
    state.take_first_grads()
    state.take_saved()
    after = {
        "saved": {p: w for p, w in state.saved.items() if p not in ready},
        "first_grads": {p: g for p, g in state.first_grads.items() if p not in ready},
        "waiting": {p: stream for p, stream in state.waiting.items() if p not in taken},
        "released": {**state.released, **ready},
    }
    kept = (t for p in ready for t in (p.grad, state.saved.get(p), state.first_grads.get(p)))
    _on_this_stream(t for t in kept if t is not None)
    versions = [p._version for p in ready]
    try:
        dispatch.update(opt, amp.NONE, after, _by_group(opt, ready), [dispatch.frees_grads(ready)])
    except BaseException:
        moved = {p: None for p, version in zip(ready, versions, strict=True) if p._version != version}
        state.released = {**state.released, **moved}
        for p in moved:
            p.grad = None
        raise


def _check_pass(opt: StepOptimizer) -> None:
    """Before anything is updated in a pass."""
    opt._find_sharding()
    if opt._step_state.mixing and opt._step_state.norm_unseen:
        agreement.check_norm(opt)
    validation.check_hyperparams(opt)
    validation.check_saved(opt)


def _check_grads(opt: StepOptimizer, params: dict[Tensor, Any]) -> None:
    validation.check_grads(opt, params)
    validation.check_memory(opt, params)
    validation.check_state(opt, params)


def _by_group(opt: StepOptimizer, params: dict[Tensor, Any]) -> list[list[Tensor]]:
    return [[p for p in group["params"] if p in params] for group in opt.param_groups]


def _on_this_stream(kept: Iterable[Tensor]) -> None:
    """Memory that becomes free after the launch that follows may come from another stream (FSDP2 has several): it must
    not be taken there before this stream is done with it."""
    for t in map(local, kept):
        if t.is_cuda:
            t.record_stream(torch.cuda.current_stream(t.device))


# --- the end of a step ------------------------------------------------------------------------------------------------
def refuse_perturb() -> NoReturn:
    """Raises RuntimeError for a perturbation in the middle of a base step."""
    raise RuntimeError(
        "perturb(fire=True), but the draw of this step was False, and its backward has released gradients "
        "(release_gradients=True): finish the base step by step(). To decide by yourself run the first backward "
        "within opt.accumulate_gradients()"
    )


def check_step(opt: StepOptimizer) -> None:
    """Raises RuntimeError where a GradScaler calls, or after a backward that came to no end."""
    state = opt._step_state
    if "found_inf" in vars(opt) or "grad_scale" in vars(opt):
        raise RuntimeError(
            "release_gradients=True with a GradScaler: whether a gradient overflowed is known when all are there; "
            "train in bfloat16, which needs no scaler, or take release_gradients=False"
        )
    if opt._releases.unfinished and (state.released or state.waiting):
        raise RuntimeError(
            "step() after a backward that ended with an exception: some gradients do not exist, and others were "
            "released already (release_gradients=True); call zero_grad() and go on with the next batch"
        )


def finish(opt: StepOptimizer) -> None:
    """The updates that are left, what no gradient came for goes back to its weights, and the step is counted."""
    state = opt._step_state
    if not state.released:
        _check_pass(opt)
    left = {p: None for group in opt.param_groups for p in group["params"] if p.grad is not None}
    _check_grads(opt, left)
    state.take_first_grads()
    state.take_saved()
    counts = _count_calls(opt, {**state.released, **left})
    restores = dispatch.restore_calls(opt, {p: w for p, w in state.saved.items() if p not in left})
    after = {**state.after_step(), **nothing_released()}
    dispatch.update(opt, amp.NONE, after, _by_group(opt, left), [*restores, *counts, dispatch.frees_grads(left)])
    _forget_backwards(opt)
    counters = [id(known.get("step")) for known in opt.state.values()]
    if counters != opt._releases.counters:  # parameters share them in another way now, by which a plan orders them
        opt._releases.counters = counters
        opt._plans.drop()
    watch(opt)


def abandon(opt: StepOptimizer) -> None:
    """Parameters that were updated stay so, with their counters. The others are for restore() to bring back."""
    state = opt._step_state
    calls = [partial(op, *arguments) for op, arguments in _count_calls(opt, state.released)]
    dispatch.run_together([*calls, *dispatch.setters(state, nothing_released())])
    _forget_backwards(opt)


def _forget_backwards(opt: StepOptimizer) -> None:
    opt._releases.bytes.clear()
    opt._releases.unfinished.clear()


def _count_calls(opt: StepOptimizer, updated: dict[Tensor, Any]) -> list[dispatch.Call]:
    """One more step for these parameters."""
    assert opt.rule is not None
    if not opt.rule.counts_steps:
        return []
    steps: dict[int, Tensor] = {}
    for group, params in zip(opt.param_groups, _by_group(opt, updated), strict=True):
        for p in params:
            if "step" not in opt.state[p]:
                columns.init_state(opt, group, p, updating=True)
        for device in {p.device for p in params}:
            columns.share_steps(opt, group, [p for p in params if p.device == device])
        steps.update((id(opt.state[p]["step"]), opt.state[p]["step"]) for p in params)
    return [(torch._foreach_add_, (list(steps.values()), 1))] if steps else []


def progress(opt: StepOptimizer) -> str:
    """What a step that is abandoned has done already; empty if it is nothing."""
    done = len(opt._step_state.released)
    if not done:
        return ""
    total = sum(p.requires_grad for group in opt.param_groups for p in group["params"])
    return (
        f"release_gradients=True: {done} of {total} parameters had been updated by this step, and stay so; all others "
        "are at their weights of before, and the step is not counted"
    )


def _name_of(opt: StepOptimizer, p: Tensor) -> str:
    for i, group in enumerate(opt.param_groups):
        for j, q in enumerate(group["params"]):
            if p is q:
                names = group.get("param_names")
                return f"parameter {j} of group {i}" + (f" ({names[j]})" if names else "")
    return "a parameter that is in no group any more"
