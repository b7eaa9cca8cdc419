"""What is refused: at construction, and before a step changes anything."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rst_fused._checks import first_overlap, may_overlap_itself
from rst_fused._core import Core
from rst_fused._places import device_of
from rst_fused._rules import Group, check_current

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
COMMON = ("schedule", "gamma", "adaptive", "eta", "seed", "backend", "master_weights", "stochastic_rounding")
SUPPORTED = (torch.float32, torch.float64, *SIXTEEN_BIT, torch.complex64, torch.complex128)


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
        if p.dtype not in SUPPORTED:
            raise ValueError(f"params[{i}] is {p.dtype}: expected one of {[str(d) for d in SUPPORTED]}")
        if is_lazy(p):
            continue
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
    common = [name for name in COMMON if name in group]
    if common:
        raise TypeError(f"a parameter group sets {common}, which all groups share: pass it to the optimizer instead")


def check_apart(tensors: list[Any], others: list[Any]) -> None:
    """Raises ValueError for parameters that share memory with each other, or with those that the optimizer has."""
    ids = {id(p) for p in tensors}
    others = [p for p in others if id(p) not in ids]  # torch.optim refuses the same one itself
    shared = first_overlap([*tensors, *others])
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


def refuse_grad(p: Tensor, g: Tensor, where: str) -> NoReturn:
    if g.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {where} has layout {g.layout}: only dense gradients are supported; "
            "build the layer with sparse=False"
        )
    raise RuntimeError(
        f"the gradient of {where} is {tuple(g.shape)} {g.dtype} on {g.device}, but the parameter is "
        f"{tuple(p.shape)} {p.dtype} on {p.device}; they must agree"
    )


def check_state(opt: Core) -> None:
    """Raises unless the state of the fused base fits its parameters; before anything is changed."""
    rule = opt.rule
    if rule is None:
        return
    for i, group in enumerate(opt.param_groups):
        names = rule.buffer_names(rule.flags(group))
        for j, p in enumerate(group["params"]):
            state = opt.state.get(p, {}) if p.grad is not None else {}
            has_master = opt.master_weights and p.dtype in SIXTEEN_BIT
            dtype = torch.float32 if has_master else p.dtype
            for name in (*names, "master") if has_master else names:
                t = state.get(name)
                if t is not None and (t.dtype != dtype or t.shape != p.shape or t.device != p.device):
                    raise RuntimeError(
                        f"state {name!r} of parameter {j} of group {i} is {tuple(t.shape)} {t.dtype} on {t.device}, "
                        f"but its parameter needs {tuple(p.shape)} {dtype} on {p.device}: convert or move a model "
                        "before the optimizer is made, or state with it"
                    )


def check_grads(opt: Core) -> None:
    """Raises unless every gradient fits its parameter, before anything is changed."""
    devices, strided = [place.device for place in opt._places], torch.strided
    for i, group in enumerate(opt.param_groups):
        for j, p in enumerate(group["params"]):
            device = device_of(p)
            if device not in devices:
                made_for = " and ".join(map(str, devices))
                raise RuntimeError(
                    f"parameter {j} of group {i} is on {p.device}, but the optimizer was made for {made_for}: "
                    "make it after the model has been moved"
                )
            g = p.grad
            if g is None:
                continue
            if g.layout != strided or g.dtype != p.dtype or g.device != p.device or g.shape != p.shape:
                refuse_grad(p, g, f"parameter {j} of group {i}")


def check_grads_apart(opt: Core) -> None:
    """Raises where gradients share memory: around an optimizer instance, G-RST mixes them in place, and once each."""
    names = [(i, j, p.grad) for i, group in enumerate(opt.param_groups) for j, p in enumerate(group["params"])]
    names = [entry for entry in names if entry[2] is not None]
    shared = first_overlap([g for *_, g in names])
    if shared is not None:
        (i, j, _), (k, m, _) = (names[position] for position in shared)
        raise RuntimeError(
            f"the gradients of parameter {j} of group {i} and parameter {m} of group {k} share memory, in which gamma "
            "!= 1 with an optimizer as base would mix twice: give each parameter a gradient of its own"
        )


def check_rho(opt: Core) -> None:
    """Raises unless the rho of every group is a finite number >= 0: it may have been set since the group was added."""
    for i, group in enumerate(opt.param_groups):
        check_current(i, group, ("rho",), 0.0)


def check_base(opt: Core) -> None:
    """Raises unless the numbers that the fused base reads are finite."""
    if opt.rule is None:
        return
    for i, group in enumerate(opt.param_groups):
        check_current(i, group, opt.rule.numbers)


def explain(error: BaseException) -> None:
    """Raises RuntimeError in the words of the user for what is an internal assertion of torch; else does nothing."""
    if isinstance(error, RuntimeError) and "expect_autograd_hooks_" in str(error):
        raise RuntimeError(
            "the first backward of DistributedDataParallel(static_graph=True) ran inside no_sync(), which torch does "
            "not support and leaves the wrapper unusable: wrap the model anew, and run the first step outside of "
            "no_sync() or pass static_graph=False"
        ) from error
