"""The base optimizers that the ops fuse: their hyperparameters, their state, and which op applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import as_flag, check_number
from rst_fused.schedule import Schedule, match

Group = dict[str, Any]


def check_current(i: int, group: Group, names: Sequence[str], low: float = -math.inf, of: str = "") -> None:
    """Raises unless these numbers of group i, set by hand since it was added or loaded, are finite and >= low.

    No other limits: as in torch.optim, a scheduler may take a learning rate below 0. Waits for no tensor on a GPU.
    """
    for name in names:
        value, full_name = group[name], f"{of}param_groups[{i}][{name!r}]"
        if name == "betas":
            check_betas(full_name, value)
        elif not (type(value) is float and low <= value and math.isfinite(value)) and not _is_elsewhere(value):
            check_number(full_name, value, low)


def check_betas(name: str, betas: Any) -> None:
    """Raises unless ``betas`` is a pair of numbers in [0, 1). Waits for no tensor on a GPU."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}={betas!r}: expected a pair (beta1, beta2)")
    for i, beta in enumerate(betas):
        if not _is_elsewhere(beta):
            check_number(f"{name}[{i}]", beta, 0, 1)


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


def as_gamma(gamma: float | Callable[[int], float] | str, schedule: Schedule) -> float | Callable[[int], float]:
    """gamma as a number or a function of the step; "match" is 1 / p(t) of the schedule."""
    if isinstance(gamma, str):
        if gamma != "match":
            raise ValueError(f"gamma={gamma!r}: expected a number, a callable step -> gamma, or 'match'")
        return match(schedule)
    if not callable(gamma):
        check_number("gamma", gamma, 0)
    return gamma


class SgdRule:
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

    name = "sgd"
    buffers: tuple[str, ...] = ("momentum_buffer",)
    numbers: tuple[str, ...] = ("lr", "momentum", "dampening", "weight_decay")
    defaults: Group = {
        "lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    }  # fmt: skip

    def check(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, group[name], 0)
        check_number("dampening", group["dampening"], -math.inf)
        for name in ("nesterov", "maximize"):
            as_flag(name, group[name])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']!r}, dampening={group['dampening']!r}: "
                "expected momentum > 0 and dampening = 0"
            )

    def flags(self, group: Group) -> tuple[bool, ...]:
        """What must agree among the groups of one call: (has buffers, nesterov, maximize)."""
        return (group["momentum"] != 0, bool(group["nesterov"]), bool(group["maximize"]))

    def buffer_names(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        return self.buffers if flags[0] else ()

    def row(self, group: Group, fresh: bool, gamma: Any) -> list[Any]:
        """Numbers in the order of SGD_HYPER. A fresh (zero) buffer starts from the whole gradient, as in torch."""
        dampening = 0.0 if fresh else group["dampening"]
        return [group["lr"], group["momentum"], dampening, group["weight_decay"], gamma]

    def splits_fresh(self, group: Group) -> bool:
        return group["momentum"] != 0 and group["dampening"] != 0

    def apply(
        self, ops: Any, restore: bool, lists: Sequence[Any], buffers: Sequence[list[Tensor]], masters: list[Tensor],
        hyper: Tensor, steps: Tensor | None, sizes: list[int], flags: tuple[bool, ...], amp: tuple[Any, Any],
    ) -> None:  # fmt: skip
        op = ops.restore_sgd_step_ if restore else ops.sgd_step_
        op(*lists, buffers[0] if buffers else [], masters, hyper, sizes, flags[1], flags[2], *amp)


class AdamRule:
    """torch.optim.Adam and AdamW (without amsgrad)."""

    buffers: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    numbers: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, decoupled: bool) -> None:
        self.name = "adamw" if decoupled else "adam"
        self.decoupled = decoupled
        self.defaults: Group = {
            "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2 if decoupled else 0.0,
            "maximize": False, "capturable": False,
        }  # fmt: skip

    def check(self, group: Group) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name], 0)
        check_betas("betas", group["betas"])
        for name in ("maximize", "capturable"):
            as_flag(name, group[name])

    def flags(self, group: Group) -> tuple[bool, ...]:
        return (True, self.decoupled, bool(group["maximize"]), bool(group.get("capturable")))

    def buffer_names(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        return self.buffers

    def row(self, group: Group, fresh: bool, gamma: Any) -> list[Any]:
        """Numbers in the order of ADAM_HYPER."""
        beta1, beta2 = group["betas"]
        return [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], gamma]

    def splits_fresh(self, group: Group) -> bool:
        return False

    def apply(
        self, ops: Any, restore: bool, lists: Sequence[Any], buffers: Sequence[list[Tensor]], masters: list[Tensor],
        hyper: Tensor, steps: Tensor | None, sizes: list[int], flags: tuple[bool, ...], amp: tuple[Any, Any],
    ) -> None:  # fmt: skip
        op = ops.restore_adam_step_ if restore else ops.adam_step_
        op(*lists, *buffers, masters, hyper, steps, sizes, self.decoupled, flags[2], *amp)


def rule_for(base: Any) -> SgdRule | AdamRule:
    """The rule that ``base`` names."""
    if base == "sgd":
        return SgdRule()
    if base in ("adam", "adamw"):
        return AdamRule(decoupled=base == "adamw")
    raise ValueError(f"base={base!r}: expected 'sgd', 'adam', 'adamw' or a torch.optim.Optimizer instance")


def as_rows(rows: list[list[Any]], traced: Sequence[list[Any]] = (), device: torch.device | None = None) -> Tensor:
    """A float64 matrix of the given numbers: on the CPU, or where a number among them is a GPU tensor, on ``device``.

    While torch.compile traces, numbers enter as a product with a tensor, so that the graph holds them as inputs: a
    learning rate that changes each step then costs no new graph. Were a number that changes not used in a graph,
    Dynamo would compile for each value of the others: hence ``traced``, more numbers for each row, which enter and
    are dropped. Then too the matrix lies on ``device``, as CUDA graphs want all of theirs to.
    """
    tensors = [x for row in rows for x in row if isinstance(x, Tensor)]
    if not torch.compiler.is_compiling():
        if not tensors:
            return torch.tensor(rows, dtype=torch.float64, device="cpu")
        if all(x.is_cpu for x in tensors):
            device = torch.device("cpu")
        rows = [[x.to(device) if isinstance(x, Tensor) else x for x in row] for row in rows]
    one = torch.ones((), dtype=torch.float64, device=device)
    if not torch.compiler.is_compiling() or not traced:
        return torch.stack([torch.stack([one * x for x in row]) for row in rows])
    wide = [torch.stack([one * x for x in (*row, *more)]) for row, more in zip(rows, traced, strict=True)]
    return torch.stack(wide)[:, : len(rows[0])].contiguous()
