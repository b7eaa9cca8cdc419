"""The base optimizers that the ops fuse. Each is one rule: its hyperparameters, its state, and the op of its update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rst_fused._checks import as_flag, check_number

Group = dict[str, Any]


class Flags(NamedTuple):
    """What must agree among the parameter groups that one call of an op updates."""

    states: int  # state tensors per parameter
    option: bool  # the flag of the rule's op: nesterov, or decoupled weight decay
    maximize: bool
    capturable: bool


class Rule:
    """A base optimizer. Adding one: a subclass here, and its name in RULES."""

    name: str
    index: ClassVar[int]  # of the rule in csrc/math/rules/all.h
    op: ClassVar[str]  # restore_<op>_step_
    twin: ClassVar[str | None]  # the optimizer of torch.optim with the same hyperparameters and state, if there is one
    states: tuple[str, ...]  # names of the state tensors; a group may use only the first of them
    numbers: tuple[str, ...]  # hyperparameters that are numbers, or pairs of numbers
    counts_steps = False
    takes_option = False  # whether the op takes Flags.option
    defaults: Group
    added: Mapping[str, Any] = {}  # hyperparameters that older checkpoints lack, with the values that they imply

    def check(self, group: Group) -> None:
        """Raises ValueError or TypeError for a hyperparameter that torch.optim would refuse."""
        for name in self.numbers:
            if name == "betas":
                check_betas(name, group[name])
            else:
                check_number(name, group[name], -math.inf if name == "dampening" else 0)
        for name, default in self.defaults.items():
            if isinstance(default, bool):
                as_flag(name, group[name])

    def flags(self, group: Group) -> Flags:
        return Flags(len(self.states), False, bool(group["maximize"]), False)

    def row(self, group: Group, is_first_step: bool, gamma: Any) -> list[Any]:
        """The group's hyperparameters in the order of the op's schema (rst_fused._schemas)."""
        raise NotImplementedError

    def state_names(self, group: Group) -> tuple[str, ...]:
        return self.states[: self.flags(group).states]

    def splits_first_step(self, group: Group) -> bool:
        """Whether the first step of a parameter has other hyperparameters than the later ones."""
        return False

    def call(
        self, ops: Any, lists: Sequence[Any], states: Sequence[list[Tensor]], masters: list[Tensor],
        hyper: Tensor, steps: Tensor | None, sizes: list[int], flags: Flags, rest: Sequence[Any],
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """The op and its arguments. ``lists``: params, grads, backups and first_grads; ``rest``: from grad_scale on."""
        absent: list[list[Tensor]] = [[]] * (len(self.states) - len(states))
        counts = [steps] if self.counts_steps else []
        option = [flags.option] if self.takes_option else []
        op = getattr(ops, f"restore_{self.op}_step_")
        return op, (*lists, *states, *absent, masters, hyper, *counts, sizes, *option, flags.maximize, *rest)


class SgdRule(Rule):
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

    name, index, op, twin = "sgd", 0, "sgd", "SGD"
    states = ("momentum_buffer",)
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    takes_option = True
    defaults: Group = {
        "lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    }  # fmt: skip

    def check(self, group: Group) -> None:
        super().check(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']!r}, dampening={group['dampening']!r}: "
                "expected momentum > 0 and dampening = 0"
            )

    def flags(self, group: Group) -> Flags:
        return Flags(int(group["momentum"] != 0), bool(group["nesterov"]), bool(group["maximize"]), False)

    def row(self, group: Group, is_first_step: bool, gamma: Any) -> list[Any]:
        """A new (zero) buffer starts from the whole gradient, as in torch: without dampening."""
        dampening = 0.0 if is_first_step else group["dampening"]
        return [group["lr"], group["momentum"], dampening, group["weight_decay"], gamma]

    def splits_first_step(self, group: Group) -> bool:
        return group["momentum"] != 0 and group["dampening"] != 0


class AdamRule(Rule):
    """torch.optim.Adam and AdamW, which decouples weight decay from the gradient; both with amsgrad."""

    index, op = 1, "adam"
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    numbers = ("lr", "betas", "eps", "weight_decay")
    counts_steps = takes_option = True
    added = {"amsgrad": False}

    def __init__(self, decoupled: bool) -> None:
        self.name, self.twin = ("adamw", "AdamW") if decoupled else ("adam", "Adam")  # type: ignore[misc]
        self.decoupled = decoupled
        self.defaults = {
            "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2 if decoupled else 0.0,
            "amsgrad": False, "maximize": False, "capturable": False,
        }  # fmt: skip

    def flags(self, group: Group) -> Flags:
        states = 3 if group.get("amsgrad") else 2
        return Flags(states, self.decoupled, bool(group["maximize"]), bool(group.get("capturable")))

    def row(self, group: Group, is_first_step: bool, gamma: Any) -> list[Any]:
        beta1, beta2 = group["betas"]
        return [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], gamma]


class LionRule(Rule):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum, decoupled decay."""

    name, index, op, twin = "lion", 2, "lion", None
    states = ("exp_avg",)
    numbers = ("lr", "betas", "weight_decay")
    defaults: Group = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}

    def row(self, group: Group, is_first_step: bool, gamma: Any) -> list[Any]:
        beta1, beta2 = group["betas"]
        return [group["lr"], beta1, beta2, group["weight_decay"], gamma]


RULES: dict[str, Rule] = {
    rule.name: rule for rule in (SgdRule(), AdamRule(decoupled=False), AdamRule(decoupled=True), LionRule())
}


def rule_for(base: Any) -> Rule:
    """The rule that ``base`` names."""
    rule = RULES.get(base) if isinstance(base, str) else None
    if rule is None:
        names = ", ".join(map(repr, RULES))
        raise ValueError(f"base={base!r}: expected {names} or a torch.optim.Optimizer instance")
    return rule


# --- numbers set by hand ----------------------------------------------------------------------------------------------
def check_current(i: int, group: Group, names: Sequence[str], low: float = -math.inf, of: str = "") -> None:
    """Raises unless these hyperparameters of group i, set since it was added or loaded, are finite and >= low.

    No other limits: as in torch.optim, a scheduler may take a learning rate below 0. Never waits for a GPU.
    """
    for name in names:
        value = group[name]
        if type(value) is float and low <= value and math.isfinite(value) and name != "betas":
            continue  # at every step of a run with a scheduler: no name is made for it
        full_name = f"{of}param_groups[{i}][{name!r}]"
        if name == "betas":
            check_betas(full_name, value)
        elif not _is_elsewhere(value):
            check_number(full_name, value, low)


def check_betas(name: str, betas: Any) -> None:
    """Raises unless ``betas`` is a pair of numbers in [0, 1). Never waits for a GPU."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}={betas!r}: expected a pair (beta1, beta2)")
    for i, beta in enumerate(betas):
        if not _is_elsewhere(beta):
            check_number(f"{name}[{i}]", beta, 0, 1)


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


# --- as tensors -------------------------------------------------------------------------------------------------------
def hyperparam_tensor(
    rows: list[list[Any]], graph_inputs: Sequence[list[Any]] = (), device: torch.device | None = None
) -> Tensor:
    """A float64 matrix of the given numbers: on the CPU, or where a number among them is a GPU tensor, on ``device``.

    While torch.compile traces, numbers enter as a product with a tensor, so that the graph holds them as inputs: a
    learning rate that changes each step then costs no new graph. Were a number that changes not used in a graph,
    Dynamo would compile for each value of the others: hence ``graph_inputs``, more numbers for each row, which enter
    and are dropped. Then too the matrix is made on ``device``, where CUDA graphs want all of theirs to be.
    """
    tensors = [x for row in rows for x in row if isinstance(x, Tensor)]
    if not torch.compiler.is_dynamo_compiling():
        if not tensors:
            return torch.tensor(rows, dtype=torch.float64, device="cpu")
        if all(x.is_cpu for x in tensors):
            device = torch.device("cpu")
        rows = [[x.to(device) if isinstance(x, Tensor) else x for x in row] for row in rows]
    one = torch.ones((), dtype=torch.float64, device=device)
    if not torch.compiler.is_dynamo_compiling() or not graph_inputs:
        return torch.stack([torch.stack([one * x for x in row]) for row in rows])
    wide = [torch.stack([one * x for x in (*row, *more)]) for row, more in zip(rows, graph_inputs, strict=True)]
    return torch.stack(wide)[:, : len(rows[0])].contiguous()
