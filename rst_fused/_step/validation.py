"""What is refused: at construction, and before a step changes anything."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rst_fused._checks import DTYPES, PLAIN, SIXTEEN_BIT, address_of, first_overlap, last_offset, may_overlap_itself
from rst_fused._step.base import StepOptimizer
from rst_fused._step.devices import device_of
from rst_fused._step.rules import Group, check_current
from rst_fused._step.sharding import (
    check_layout,
    check_same_mesh,
    describe,
    is_dtensor,
    local,
    same_layout,
    settle_grad,
)
from rst_fused._step.state_dtypes import check_current as check_served
from rst_fused._step.state_dtypes import copies_masters, dtype_of, has_master, kept_by_master, master_name

_COMMON = (
    "schedule", "gamma", "adaptive", "eta", "seed", "backend", "master_weights", "stochastic_rounding", "process_group",
    "m_sharpness", "state_dtype", "release_gradients",
)  # fmt: skip
Only = Container[Tensor] | None  # the parameters that are looked at; None: all


# --- at construction --------------------------------------------------------------------------------------------------
def tensors_of(params: Iterable[Any]) -> list[Any]:
    """The parameters in what torch.optim takes: tensors, (name, tensor) pairs, or groups of those."""
    items: list[Any] = []
    for entry in [params] if isinstance(params, Tensor) else params:
        given = entry["params"] if isinstance(entry, dict) else [entry]
        items += [given] if isinstance(given, Tensor) else given
    return [item[1] if isinstance(item, tuple) else item for item in items]


def check_params(tensors: list[Any]) -> None:
    """Raises ValueError for parameters of one group that cannot be perturbed and restored."""
    if len({id(p) for p in tensors}) < len(tensors):
        raise ValueError("params holds a parameter twice: it would be perturbed twice and its weights lost")
    for i, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            continue  # torch.optim names what is wrong
        if p.is_meta:
            raise ValueError(f"params[{i}] is on meta, without data: expected weights, see Module.to_empty")
        if p.layout != torch.strided:
            raise ValueError(f"params[{i}] has layout {p.layout}: expected a dense tensor")
        if p.dtype not in DTYPES:
            raise ValueError(f"params[{i}] is {p.dtype}: expected one of {[str(d) for d in DTYPES]}")
        if is_lazy(p):
            continue
        check_layout(f"params[{i}]", p)
        p = local(p)
        if p.is_conj() or p.is_neg():
            raise ValueError(
                f"params[{i}] is a view that is conjugated or negated when read: expected a tensor as after "
                "resolve_conj().resolve_neg()"
            )
        if may_overlap_itself(p):
            raise ValueError(
                f"params[{i}] has shape {tuple(p.shape)} and strides {p.stride()}, so that elements share memory: "
                "expected a tensor of its own, as after clone(memory_format=torch.contiguous_format)"
            )


def check_options(group: Group) -> None:
    """Raises TypeError for a group that sets what is the same for all: it would have no effect."""
    common = [name for name in _COMMON if name in group]
    if common:
        raise TypeError(f"a parameter group sets {common}, which all groups share: pass it to the optimizer instead")


def check_apart(tensors: list[Any], others: list[Any]) -> None:
    """Raises ValueError for parameters that share memory with each other, or with those that the optimizer has."""
    ids = {id(p) for p in tensors}
    others = [p for p in others if id(p) not in ids]  # torch.optim refuses the same one itself
    shared = first_overlap([local(t) if isinstance(t, Tensor) else t for t in (*tensors, *others)])
    if shared is not None and shared[0] < len(tensors):
        i, j = shared
        other = f"params[{j}]" if j < len(tensors) else "a parameter of an earlier group"
        raise ValueError(
            f"params[{i}] and {other} share memory: it would be perturbed twice and its weights lost; tie modules by "
            "giving them the same Parameter, which is passed once"
        )


def check_base_instance(base: Optimizer, params: Iterable[Any] | None) -> None:
    """Raises ValueError for an optimizer that needs more than gradients, or has other parameters than ``params``."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base={type(base).__name__}(...): its step needs a closure, but the base of RST is given gradients alone; "
            "expected an optimizer whose step() takes none"
        )
    held = tensors_of(base.param_groups)
    check_apart(held, [])
    if params is None:
        return
    given = tensors_of(params)
    if [id(p) for p in given] != [id(p) for p in held]:
        raise ValueError(
            f"params ({len(given)} tensors) are not those of the base optimizer ({len(held)}): pass params=None"
        )


# --- before a step ----------------------------------------------------------------------------------------------------
def check_phase(opt: StepOptimizer, updating: bool) -> None:
    """Raises unless all that a perturbation, or an update, reads and writes fits, before anything is changed."""
    opt._find_sharding()
    check_grads(opt)
    if not updating:
        check_rho(opt)
    check_hyperparams(opt)
    if updating:
        check_saved(opt)
    check_memory(opt)
    check_state(opt)


def check_rho(opt: StepOptimizer) -> None:
    """Raises unless the rho of every group is a finite number >= 0: it may have been set since the group was added."""
    for i, group in enumerate(opt.param_groups):
        check_current(i, group, ("rho",), 0.0)


def check_hyperparams(opt: StepOptimizer) -> None:
    """Raises unless the numbers that the fused base reads are finite."""
    if opt.rule is not None:
        for i, group in enumerate(opt.param_groups):
            check_current(i, group, opt.rule.numbers)


def _named(opt: StepOptimizer, only: Only = None) -> Iterator[tuple[str, Tensor]]:
    for i, group in enumerate(opt.param_groups):
        for j, p in enumerate(group["params"]):
            if only is None or p in only:
                yield f"parameter {j} of group {i}", p


def has_memory(t: Tensor) -> bool:
    """Whether a tensor has its elements in memory of its own: not so a wrapper, or one whose storage was freed."""
    if t.is_meta:
        return False
    if not (t.is_cpu or t.is_cuda or t.is_xpu):
        return True  # what an address means on other devices is for their backend to say
    return t.numel() == 0 or address_of(t) != 0


def _beyond_storage(t: Tensor) -> bool:
    """Whether the storage was cut below the tensor's last element."""
    if t.numel() == 0:
        return False
    return (t.storage_offset() + last_offset(t) + 1) * t.element_size() > t.untyped_storage().nbytes()


def is_usable(t: Tensor) -> bool:
    """Whether every element of a tensor (of a DTensor those on this rank) is in memory."""
    t = local(t)
    return has_memory(t) and not _beyond_storage(t)


def _check_readable(what: str, t: Tensor) -> None:
    if _len_torch_dispatch_stack() > 0:
        return  # a mode such as FakeTensorMode stands between the tensors and the kernels
    if not has_memory(t):
        kind = f"a {type(t).__name__}" if type(t) not in PLAIN else "a tensor whose storage was freed"
        raise RuntimeError(
            f"{what} is {kind}, without memory of its own that a kernel could use: expected a plain tensor, "
            "such as what to_local() gives, or the storage back before perturb() and step()"
        )
    if _beyond_storage(t):
        raise RuntimeError(
            f"{what} is {tuple(t.shape)}, but its storage of {t.untyped_storage().nbytes()} bytes ends before its last "
            "element: resize the storage back before perturb() and step()"
        )


def _check_own(what: str, t: Tensor) -> None:
    """Raises unless a tensor can be written in place."""
    _check_readable(what, t)
    if t.is_conj() or t.is_neg() or may_overlap_itself(t):
        raise RuntimeError(
            f"{what} is a view whose elements are computed or shared when it is read: expected a tensor of its own, as "
            "after clone(memory_format=torch.contiguous_format)"
        )


def check_grads(opt: StepOptimizer, only: Only = None) -> None:
    """Raises unless every parameter is where it was and every gradient fits it. Partial sums are added up."""
    devices = [state.device for state in opt._devices]
    for name, p in _named(opt, only):
        device = device_of(p)
        if device not in devices:
            made_for = " and ".join(map(str, devices))
            raise RuntimeError(
                f"{name} is on {p.device}, but the optimizer was made for {made_for}: make it after the model has been "
                "moved"
            )
        if p.dtype not in DTYPES:
            raise RuntimeError(f"{name} is {p.dtype}: expected one of {[str(d) for d in DTYPES]}")
        g = p.grad
        if g is None:
            continue
        if g.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name} has layout {g.layout}: only dense gradients are supported; build the layer "
                "with sparse=False"
            )
        if g.dtype != p.dtype or g.device != p.device or g.shape != p.shape:
            raise RuntimeError(
                f"the gradient of {name} is {tuple(g.shape)} {g.dtype} on {g.device}, but the parameter is "
                f"{tuple(p.shape)} {p.dtype} on {p.device}; they must agree"
            )
        if is_dtensor(g) != is_dtensor(p):
            raise RuntimeError(
                f"the gradient of {name} is {describe(g)}, but the parameter is {describe(p)}: expected both sharded "
                "alike, as backward() leaves them"
            )
        check_same_mesh(f"the gradient of {name}", g, p)
    for name, p in _named(opt, only):
        if p.grad is None:
            continue
        settle_grad(p)
        _check_readable(f"the gradient of {name}", local(p.grad))


def check_memory(opt: StepOptimizer, only: Only = None) -> None:
    """Raises unless every parameter with a gradient has memory, which no other one shares."""
    if _len_torch_dispatch_stack() > 0:
        return
    params = [(name, local(p)) for name, p in _named(opt, only) if p.grad is not None]
    addresses = [p.data_ptr() if has_memory(p) else 0 for _, p in params]
    if addresses == opt._step_state.apart:
        return
    for name, p in params:
        _check_own(name, p)
    shared = first_overlap([p for _, p in params])
    if shared is not None:
        raise RuntimeError(
            f"{params[shared[0]][0]} and {params[shared[1]][0]} share memory: they would be perturbed twice and their "
            "weights lost; tie modules by giving them the same Parameter, before the optimizer is made"
        )
    if only is None:
        opt._step_state.apart = addresses


def check_state(opt: StepOptimizer, only: Only = None) -> None:
    """Raises unless the state of the fused base fits its parameters."""
    rule = opt.rule
    if rule is None:
        return
    for i, group in enumerate(opt.param_groups):
        names = rule.state_names(group)
        for j, p in enumerate(group["params"]):
            if p.grad is None or (only is not None and p not in only):
                continue
            where, state = f"parameter {j} of group {i}", opt.state.get(p, {})
            check_served(opt, where, p)
            for name in (*names, master_name(opt)) if has_master(opt, p) else names:
                if name in state:
                    _check_entry(f"state {name!r} of {where}", state[name], p, dtype_of(opt, p, name))
            if rule.counts_steps and "step" in state:
                check_step_count(f"state 'step' of {where}", state["step"])


def check_step_count(what: str, step: Any) -> None:
    if not isinstance(step, Tensor) or step.numel() != 1 or step.is_complex() or not has_memory(step):
        given = f"a tensor of shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise RuntimeError(
            f"{what} is {given}: expected a tensor of one number, such as torch.tensor(7.0), as torch.optim keeps it"
        )


def _check_entry(what: str, t: Any, p: Tensor, dtype: torch.dtype) -> None:
    needs = f"but its parameter needs {tuple(p.shape)} {dtype} on {p.device}"
    if not isinstance(t, Tensor):
        raise RuntimeError(f"{what} is {t!r}, {needs}: delete the entry, or put a tensor there")
    if (t.dtype, t.shape, t.device, t.layout) != (dtype, p.shape, p.device, torch.strided):
        raise RuntimeError(
            f"{what} is {tuple(t.shape)} {t.dtype} on {t.device}, {needs}: convert or move a model before the "
            "optimizer is made, or state with it"
        )
    if not same_layout(t, p):
        raise RuntimeError(
            f"{what} is {describe(t)}, but its parameter is {describe(p)}: shard a model before the optimizer is made, "
            "and load state by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards it"
        )
    _check_own(what, local(t))


def check_grads_apart(opt: StepOptimizer) -> None:
    """Raises where gradients share memory: around an optimizer instance, and to clip, G-RST mixes them in place, and
    once each. Those whose elements are computed or shared when they are read become tensors of their own."""
    for _, p in _named(opt):
        g = p.grad
        if type(g) is Tensor and (g.is_conj() or g.is_neg() or may_overlap_itself(g)):
            p.grad = g.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    named = [(name, local(p.grad)) for name, p in _named(opt) if p.grad is not None]
    shared = first_overlap([g for _, g in named])
    if shared is not None:
        one, other = (named[position][0] for position in shared)
        raise RuntimeError(
            f"the gradients of {one} and {other} share memory, in which gamma != 1 with max_grad_norm, or with an "
            "optimizer as base, would mix twice: give each parameter a gradient of its own"
        )


# --- between the passes -----------------------------------------------------------------------------------------------
def still_fits(opt: StepOptimizer, p: Tensor, kept: Tensor) -> bool:
    """Whether a perturbed parameter is of the shape that it had then, and of a dtype that is served alike."""
    by_master = is_master(p, kept, opt)
    same_shape = local(kept).shape == local(p).shape
    return same_shape and by_master == kept_by_master(opt, p) and (by_master or kept.dtype == p.dtype)


def is_master(p: Tensor, kept: Tensor, opt: StepOptimizer) -> bool:
    """Whether the weights of p are kept by its master copy, rather than by a backup or what was its gradient."""
    if not copies_masters(opt) or kept is opt._step_state.backups.get(p) or kept.dtype != torch.float32:
        return False
    return p.dtype in SIXTEEN_BIT or kept is opt.state.get(p, {}).get("master")


def names_of_lost(opt: StepOptimizer) -> list[str]:
    """The perturbed parameters whose weights are kept nowhere any more."""
    saved = opt._step_state.saved_now()
    return [name for name, p in _named(opt) if p in saved and not is_usable(saved[p])] if saved else []


def check_saved(opt: StepOptimizer) -> None:
    """Raises if a parameter, its master or the memory of its first gradient was replaced between the passes."""
    state = opt._step_state
    if not state.saved:
        return
    state.take_first_grads()
    saved = state.saved_now()
    for name, p in _named(opt):
        kept = saved.get(p)
        if kept is not None and not still_fits(opt, p, kept):
            by_master = is_master(p, kept, opt)
            was = "kept by a float32 master" if by_master else str(kept.dtype)
            raise RuntimeError(
                f"{name} is {tuple(local(p).shape)} {p.dtype}, but when it was perturbed it was "
                f"{tuple(local(kept).shape)} {was}: "
                "change it before perturb() or after step()"
            )
        if kept is not None and is_master(p, kept, opt) and opt.state.get(p, {}).get("master") is not kept:
            raise RuntimeError(
                f"{name} is {p.dtype}, but when it was perturbed it was float32, or had another tensor as its master "
                "copy: change either before perturb() or after step()"
            )
        if kept is not None and not is_usable(kept):
            raise RuntimeError(f"the memory that keeps the weights of {name} was freed between perturb() and step()")
        first, g = (None if t is None else local(t) for t in (state.first_grads.get(p), p.grad))
        if first is not None and g is not None and not (first.shape == g.shape and is_usable(first)):
            raise RuntimeError(
                f"the first gradient of {name}, which gamma != 1 needs, was {tuple(local(p).shape)} and is now "
                f"{tuple(first.shape)}: leave gradients as they are until step()"
            )
        if first is not None and type(g) is Tensor and (g is first or g.data_ptr() == first.data_ptr() != 0):
            raise RuntimeError(
                f"the second gradient of {name} was written over the first one, which gamma != 1 needs: give each pass "
                "gradients of its own (zero_grad(set_to_none=True), and gradient_as_bucket_view=False in "
                "DistributedDataParallel)"
            )


def explain(error: BaseException) -> None:
    """Raises RuntimeError with a remedy for what is an internal assertion of torch; else does nothing."""
    if isinstance(error, RuntimeError) and "expect_autograd_hooks_" in str(error):
        raise RuntimeError(
            "the first backward of DistributedDataParallel(static_graph=True) ran inside no_sync(), which torch does "
            "not support and leaves the wrapper unusable: wrap the model again, and run the first step outside of "
            "no_sync() or pass static_graph=False"
        ) from error


def add_note(error: BaseException, words: str) -> None:
    """Beside the message of ``error``, which somebody is going to raise."""
    if hasattr(error, "add_note"):
        error.add_note(words)
    else:  # Python 3.10
        warnings.warn(words, RuntimeWarning, stacklevel=2)
