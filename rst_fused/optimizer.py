"""RST and G-RST as a torch optimizer: a thin layer that draws, keeps state and calls the ops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from rst_fused._backends import backend_for
from rst_fused._checks import as_flag, as_integer, check_number, required_params
from rst_fused._step import (
    amp,
    columns,
    earlier_gradients,
    outside_of_graphs,
    release,
    state_dtypes,
    step,
    validation,
    without_draw,
)
from rst_fused._step import m_sharpness as local
from rst_fused._step.copies import drop_copies
from rst_fused._step.devices import DeviceState, device_of
from rst_fused._step.hooks import with_hooks
from rst_fused._step.memory import Memory, memory_of
from rst_fused._step.rules import Group, Rule, rule_for
from rst_fused._step.saved import SavedOptimizer
from rst_fused._step.state import StepState
from rst_fused._step.state_dict import NO_COUNTERS
from rst_fused.batch_norm import check_model, freeze_batch_norm, keep_buffers


class RST(SavedOptimizer):
    """Randomized Sharpness-Aware Training around SGD, Adam, AdamW or any torch optimizer.

    At step t a trial with probability p(t) decides between a base step and a SAM step::

        base step:  g = grad L(w)
        SAM step:   g1 = grad L(w);  e = rho g1 / ||g1||;  g2 = grad L(w + e);  g = (1 - gamma) g1 + gamma g2
        update:     the base optimizer applies g at w

    gamma = 1 is RST, anything else G-RST (Zhao, Zhang, Hu 2022, arXiv 2203.09962, sections 3 and 4); p = 1 and
    gamma = 1 is SAM (Foret et al. 2021). The draw is a pure function of (seed, step): equal on every rank, and resumed
    from the step count. docs/distributed.md: several ranks.

    Arguments:
        params: parameters or groups as for torch.optim; a group may set its own rho, lr and so on. May be None when
            ``base`` is an optimizer instance. They may lie on several devices: the norm is over all.
        base: "sgd", "adam", "adamw", "lion" (fused: restore, mixing and update are one pass), or a
            torch.optim.Optimizer, whose param_groups are then shared. That one's own step() runs inside this one's, so
            hooks that torch calls for every optimizer are called for both; those registered on one, for it alone.
            Hyperparameters of a named base (lr, momentum, betas, weight_decay, amsgrad, maximize, ...) are keyword
            arguments with the meaning and defaults of torch.optim. Lion (Chen et al. 2023, arXiv 2302.06675): lr 1e-4,
            betas (0.9, 0.99), decoupled weight_decay 0.
        rho: radius of the perturbation, >= 0, per group.
        schedule: p, or a callable step -> p in [0, 1] (see rst_fused.schedule).
        gamma: weight of the second gradient: a number, a callable step -> gamma (asked at every step, base steps too),
            or "match" for 1 / p(t).
        adaptive: ASAM (Kwon et al. 2021): e = rho T^2 g1 / ||T g1||, T = |w| + eta.
        seed: of the draws and of stochastic rounding, 0 <= seed < 2^63.
        backend: "auto", "cuda", "cpu", "triton" or "reference" (see rst_fused._backends).
        model: the second pass of step(closure) and what runs within second_pass() leave its buffers (BatchNorm
            statistics and all others) as the first pass left them.
        master_weights: True keeps fp32 copies of bfloat16/float16 parameters in the state and updates those, with fp32
            buffers and no backup. The next step overwrites what others write into such parameters. "remainder" keeps
            of bfloat16 parameters the 16 bits that they lack instead: the same weights in 2 bytes less.
        max_grad_norm: clip the norm of the gradient that an update applies (mixed, unscaled, over all ranks), as
            torch.nn.utils.clip_grad_norm_ does.
        stochastic_rounding: round w + e stochastically where w is bfloat16/float16: e is smaller than their spacing,
            and rounding to nearest would drop most of it.
        state_dtype: torch.bfloat16 keeps the first moment (momentum_buffer, exp_avg) so, and rounds it stochastically
            at each update; the other moments stay as they are. For parameters whose updates compute in float32.
        process_group: the ranks that take the same steps, which they check: "auto" (all, where torch.distributed runs
            at the first draw), a ProcessGroup, or None (this process alone).
        m_sharpness: under DistributedDataParallel (``model``) each rank perturbs by its own gradient; see first_pass().
        release_gradients: update parameters within the last backward of a step, a few MB at a time, and free their
            gradients there: a SAM step then needs no more memory than a base step. docs/release_gradients.md says what
            it excludes (max_grad_norm, GradScaler, DistributedDataParallel, ...) and what an exception leaves.

    Errors: ValueError or TypeError names the argument, what was given and what was expected, before anything changes.

    Memory, in bytes per fp32 parameter beside weights and gradients: momentum 4 (Lion 4, Adam 8, amsgrad 12; with
    state_dtype 2 less). While weights are perturbed, those of before lie in the memory of the first gradients, 4; where
    somebody else has a gradient, and for G-RST, in a backup, which stays. G-RST keeps the first gradients, too, 4
    between the passes. See memory() and docs/memory.md. Traffic: see rst_fused.ops.
    """

    _step_supports_amp_scaling = True  # to torch.amp.GradScaler: see rst_fused._step.amp

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        base: str | Optimizer = "sgd",
        *,
        rho: float = 0.05,
        schedule: float | Callable[[int], float] = 0.5,
        gamma: float | Callable[[int], float] | str = 1.0,
        adaptive: bool = False,
        eta: float = 0.0,
        seed: int = 0,
        backend: str = "auto",
        model: torch.nn.Module | None = None,
        master_weights: bool | str = False,
        stochastic_rounding: bool = True,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        process_group: Any = "auto",
        m_sharpness: bool = False,
        release_gradients: bool = False,
        **hyper: Any,
    ) -> None:
        self.base: Optimizer | None = base if isinstance(base, Optimizer) else None  # the instance given as base, or
        self.rule: Rule | None = None if self.base is not None else rule_for(base)  # the rule of the fused one
        check_number("rho", rho, 0)
        check_number("eta", eta, 0)
        self._reset(StepState())
        self._gamma_follows_schedule = False
        self.release_gradients, self._releases = as_flag("release_gradients", release_gradients), release.Releases()
        if self.release_gradients:
            release.check_options(self.base, m_sharpness)
        self.process_group, self.m_sharpness = process_group, as_flag("m_sharpness", m_sharpness)
        self.schedule, self.gamma = schedule, gamma
        self.max_grad_norm = max_grad_norm
        self.adaptive, self.eta = as_flag("adaptive", adaptive), float(eta)
        self.seed = as_integer("seed", seed, 0, 2**63 - 1)
        self.master_weights = state_dtypes.checked_masters(master_weights, self.base is not None)
        self.state_dtype = state_dtypes.checked(state_dtype, self.base is not None)
        self.stochastic_rounding = as_flag("stochastic_rounding", stochastic_rounding)
        check_model(model)
        self.requested_backend, self._model = backend, model
        self._devices: list[DeviceState] = []  # at least one; that of the first parameter leads
        self._constructed = False  # whether groups that are added are compared with those that are there
        if self.rule is not None:
            super().__init__(required_params(params), {**self._hyper(hyper), "rho": rho, **NO_COUNTERS})
            validation.check_apart(validation.tensors_of(self.param_groups), [])
        else:
            self._share(params, hyper, rho)
        self._constructed = True
        if self.m_sharpness:
            local.check_params(self)
        outside_of_graphs.prepare(step=inspect.unwrap(RST.step), perturb=RST.perturb, restore=RST.restore)

    # --- construction -----------------------------------------------------------------------------------------------
    def _hyper(self, hyper: Group) -> Group:
        assert self.rule is not None
        unknown = sorted(set(hyper) - set(self.rule.defaults))
        if unknown:
            known = sorted(self.rule.defaults)
            raise TypeError(f"base={self.rule.name!r} takes no {unknown}: expected some of {known}")
        return {**self.rule.defaults, **hyper}

    def _share(self, params: Iterable[Any] | None, hyper: Group, rho: float) -> None:
        """Takes over the groups and the state of an optimizer instance."""
        assert self.base is not None
        if hyper:
            raise TypeError(f"{sorted(hyper)} given beside an optimizer instance as base: set them there")
        validation.check_base_instance(self.base, params)
        # Copies, so that an error leaves the groups of the base as they are.
        super().__init__([{**group} for group in self.base.param_groups], {**self.base.defaults, "rho": rho})
        self._adopt()

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group as torch.optim does; checks its hyperparameters, dtypes and layouts first."""
        self._refuse_while_perturbed("add_param_group")
        group = {**self.defaults, **param_group}
        check_number("rho", group["rho"], 0)
        if self.rule is not None:
            self.rule.check(group)
            validation.check_options(param_group)
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("params is a set: expected ordered collections, since state is saved by position")
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = validation.tensors_of(params)
        validation.check_params(tensors)
        state_dtypes.check_params(self, tensors)
        if self._constructed:
            validation.check_apart(tensors, validation.tensors_of(self.param_groups))
        for device in {device_of(p) for p in tensors if isinstance(p, Tensor)}:
            backend_for(self.requested_backend, device)  # which says what is wrong before anything changes
        param_group["params"] = params
        if self.base is not None and self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)
            self._adopt()
        else:
            super().add_param_group(param_group)
        self._set_devices(self._devices)
        release.watch(self)

    # --- the step ---------------------------------------------------------------------------------------------------
    def draw(self) -> bool:
        """Whether the step under way is a SAM step: X_t ~ Bernoulli(p(t)). Asking again gives the same answer.

        Raises for numbers in the param_groups that perturb() and step() would refuse: compiled ones cannot look. So
        it also frees what FSDP2 has gathered.
        """
        self._adopt()
        self._step_state.unasked_at = -1
        validation.check_rho(self)
        validation.check_hyperparams(self)
        self._opt_called = True  # to LR schedulers, which would warn: a compiled step cannot say that it was called
        drawn = self._draw()
        self._find_sharding()
        drop_copies(self)  # for compiled steps, which cannot
        if not self.capturing:
            for device in self._devices:  # for compiled steps and CUDA graphs, which cannot note the step themselves
                device.rng[1] = self._step_state.steps
        return drawn

    def perturb(self, fire: bool | None = None) -> bool:
        """After the first backward: draws, and if it fires moves the weights to w + e and returns True.

        The gradients are consumed: p.grad is None afterwards (kept inside for G-RST), also if a kernel fails. A zero or
        non-finite gradient norm gives e = 0. ``fire`` overrides the draw. Under torch.compile pass ``fire=opt.draw()``,
        evaluated outside: without it there is a graph break, which fullgraph=True refuses. Raises RuntimeError if
        already perturbed, or for gradients that are sparse, of another dtype, or without memory of their own.
        """
        if is_dynamo_compiling():
            return self._perturb_in_graph(fire)
        if outside_of_graphs.is_around():
            return outside_of_graphs.call["perturb"](self, fire)
        state = self._step_state
        if state.perturbed:
            self._refuse_while_perturbed("perturb")
        if self.base is not None:
            self._adopt()
        drawn = self._draw()
        fire = drawn if fire is None else bool(fire)
        if self.m_sharpness:
            local.check_perturb(self, fire)
        state.unasked_at = -1
        if not fire:
            return False
        if state.released or state.waiting:
            release.refuse_perturb()
        try:
            step.perturb(self)
        except BaseException as error:
            self._restore_after(error)
            raise
        return True

    def _perturb_in_graph(self, fire: bool | None) -> Any:
        if fire is None or self.release_gradients:
            return outside_of_graphs.call["perturb"](self, fire)
        self._refuse_while_perturbed("perturb")
        if not fire:
            return False
        step.perturb(self, compiling=True)
        return True

    def _step_in_graph(self, closure: Callable[[], Any] | None = None) -> Any:
        state = self._step_state
        # Dynamo knows a tensor by where it sees it first, and as the key of a dict makes it a constant of the graph.
        _ = [p for group in self.param_groups for p in group["params"]]
        if state.finished or closure is not None or self.release_gradients or state.is_kept_by_plan():
            return outside_of_graphs.call["step"](self, closure)
        step.update(self, compiling=True)
        return None

    @partial(with_hooks, _step_in_graph)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restores the weights if they are perturbed, and applies the base optimizer to them, in one pass.

        closure: zeroes gradients, runs forward and backward and returns the loss; called once, or twice when the draw
        fires. The first loss is returned. One that adds to gradients of before raises RuntimeError in a SAM step.
        Without a closure the gradients in p.grad are used: those of the second pass after a perturb() that returned
        True; where nothing was drawn, a warning says once that these are base steps. An exception, an interrupt too,
        leaves weights, state and counters all as before the update or all as after it.
        """
        if outside_of_graphs.is_around():
            return outside_of_graphs.call["step"](self, closure)
        state = self._step_state
        if closure is not None:
            self._refuse_while_perturbed("step(closure)")
            amp.check_closure(self)
        if state.perturbed and state.captured != (self._on_gpu and self.capturing):
            raise RuntimeError("perturb() and step() must both be inside the capture of a CUDA graph, or both outside")
        try:  # around everything: an interrupt may strike anywhere
            if self.release_gradients:
                release.check_step(self)
            if closure is None and not state.perturbed and without_draw.only_creates_state(self):
                return None
            loss = None if closure is None else self._passes(closure)
            if self.base is not None:
                self._adopt()
            step.update(self)
        except BaseException as error:
            self._restore_after(error)
            amp.forget(self)
            validation.explain(error)
            raise
        return loss

    def replayed(self, sam: bool) -> None:
        """Counts a step that a CUDA graph took; ``sam``: the graph of a SAM step. Capturing counts nothing."""
        self._refuse_while_perturbed("replayed")
        state = self._step_state
        state.count()
        state.perturbed = bool(sam)
        state.become(state.after_step())

    def _passes(self, closure: Callable[[], Any]) -> Any:
        with local.within_closure(self):
            loss = earlier_gradients.first_pass(self, closure)
        if self.perturb():
            with torch.enable_grad(), self.second_pass():
                closure()
        return loss

    @contextmanager
    def second_pass(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Around the second forward and backward: the buffers of a model stay; on any exception the weights come back.

        model: whose buffers, BatchNorm statistics among them; without one, those of the model given to the constructor,
        if any.
        """
        model = self._model if model is None else model
        try:
            drop_copies(self)  # after a compiled perturb()
            with freeze_batch_norm(model), keep_buffers(model):
                yield
        except BaseException as error:
            self._restore_after(error)
            validation.explain(error)
            raise

    def accumulate_gradients(self) -> AbstractContextManager[None]:
        """With release_gradients=True, around every backward of a pass but the last one (of micro-batches, or
        of several losses): within, gradients add up in p.grad, and none is released."""
        return release.keeping(self)

    def _restore_after(self, error: BaseException) -> None:
        """restore(), while ``error`` is handled. That one is raised, whatever fails here, and says so."""
        if done := release.progress(self):
            validation.add_note(error, done)
        self._step_state.swaps = frozenset()  # an interrupt may have struck before perturb did that
        try:
            self._plans.take_back()
            self.restore()
        except Exception as second:
            validation.add_note(error, f"the weights could not be brought back: {second}")

    def restore(self) -> None:
        """Abandons a step: the weights are bit for bit those before perturb(). No update, no step counted. Parameters
        that release_gradients=True has updated already stay so."""
        compiling = is_dynamo_compiling()
        kept = compiling and (self.release_gradients or self._step_state.is_kept_by_plan())
        if kept or (not compiling and outside_of_graphs.is_around()):
            outside_of_graphs.call["restore"](self)
        else:
            step.restore(self, compiling)

    def _init_group(self, group: Group, *args: Any) -> None:
        """Dynamo looks for this name; see rst_fused._step.columns.init_group."""
        columns.init_group(self, group, *args)

    # --- where it stands --------------------------------------------------------------------------------------------
    @property
    def last_grad_norm(self) -> float:
        """||g1|| (ASAM: ||T g1||) of the last SAM step, NaN before the first. Waits for the device."""
        return float(self._devices[0].stats[0])

    def memory(self) -> Memory:
        """Bytes of weights, gradients, state and what keeps weights, on this rank; print it. See docs/memory.md."""
        return memory_of(self)

    def __repr__(self) -> str:
        base = self.rule.name if self.rule is not None else repr(self.base)
        used = [device.backend for device in self._devices]
        backends = (f"{b.name} ({self.requested_backend}: {b.reason})" for b in used)
        return (
            f"{type(self).__name__}(base={base}, schedule={self.schedule!r}, gamma={self.gamma!r}, "
            f"adaptive={self.adaptive}, seed={self.seed}, backend={' and '.join(dict.fromkeys(backends))}, "
            f"steps={self.steps}, cost={self.cost:.3f}, "
            f"backups={len(self._step_state.backups)} of {sum(len(group['params']) for group in self.param_groups)})\n"
            + super().__repr__()
        )
