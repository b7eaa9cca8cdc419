"""What the updates of all base optimizers share: the kernel around a rule, and the ops that launch it.

A rule is two functions. ``PREPARE(row, FLAG, V)`` reads its row of hyperparameters and returns the tuple that
``STEP(prepared, w, g, state, FLAG)`` takes, which returns the new w and the new state tensors (more than there are in
``state``: the rest is not stored). Weights are read from the backup or the master copy where they are perturbed, so
that the restore is part of the update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import Operand, are_remainders, check_places, check_scalars
from .device_cache import on_device
from .launch_groups import LaunchGroup, launches, validated_groups
from .launcher import run_all
from .multi_tensor_apply import INDEX, ROW, address, kernel, load, locate, store
from .random_bits import BLOCK_OF_POSITIONS, SHARD_NUMBERS, STATE_BITS, place_of_chunk, random_of_run, random_of_shard
from .sam_math import join, key_in_block, mix, random_key, split, to_bfloat16

_PARAM, _SOURCE, _GRAD, _FIRST_GRAD, _STATE = (tl.constexpr(i) for i in range(5))
# State tensors follow one another, and then there is the remainder.


@triton.jit
def _update_block(
    param, source, grad, first_grad, state, remainder, begin, count, prepared, grad_multiplier, gamma, one_minus_gamma,
    skipped, key, first, shard, STEP: tl.constexpr, FLAG: tl.constexpr, T: tl.constexpr, STATE: tl.constexpr,
    V: tl.constexpr, MIXING: tl.constexpr, ROUNDS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = begin + tl.arange(0, BLOCK)
    kept = load(source, at, count, WHOLE)
    w, g = kept.to(V), load(grad, at, count, WHOLE).to(V)
    if len(remainder) == 1:
        w = join(kept, load(remainder[0], at, count, WHOLE))
    if MIXING:
        g = mix(gamma, one_minus_gamma, load(first_grad, at, count, WHOLE).to(V), g)
    old = ()
    for s in tl.static_range(len(state)):
        old = old + (load(state[s], at, count, WHOLE).to(V),)  # type: ignore[assignment]
    updated, new = STEP(prepared, w, grad_multiplier * g, old, FLAG)
    if len(remainder) == 1:
        rounded, rest = split(updated)
    else:
        rounded, rest = updated.to(T), updated
    if not skipped:
        for s in tl.static_range(len(state)):
            if ROUNDS and s == 0:
                if len(shard) == 0:
                    random = random_of_run(key, (first + begin).to(tl.uint32), WHOLE, BLOCK)
                else:
                    random = random_of_shard(key, begin, shard, BLOCK)
                store(state[s], at, count, to_bfloat16(new[s], random).to(tl.bfloat16), WHOLE)
            else:
                store(state[s], at, count, new[s].to(STATE), WHOLE)
        if len(remainder) == 1:
            store(remainder[0], at, count, rest, WHOLE)
        elif T != STATE:  # the source is a master copy
            store(source, at, count, updated.to(STATE), WHOLE)
    store(param, at, count, tl.where(skipped, kept.to(T), rounded), WHOLE)


@triton.jit
def _update_chunk(
    param, source, grad, first_grad, state, remainder, whole, count, prepared, grad_multiplier, gamma, one_minus_gamma,
    skipped, key, first, shard, STEP: tl.constexpr, FLAG: tl.constexpr, T: tl.constexpr, STATE: tl.constexpr,
    V: tl.constexpr, MIXING: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """``first``: the position of the first element, from which on all follow one another in one block of positions.
    Otherwise there is a ``shard``."""
    for at in range(0, whole, BLOCK):
        _update_block(param, source, grad, first_grad, state, remainder, at, count, prepared, grad_multiplier,
                      gamma, one_minus_gamma, skipped, key, first, shard, STEP, FLAG, T, STATE, V, MIXING, ROUNDS,
                      True, BLOCK)  # fmt: skip
    for at in range(whole, count, TAIL):
        _update_block(param, source, grad, first_grad, state, remainder, at, count, prepared, grad_multiplier,
                      gamma, one_minus_gamma, skipped, key, first, shard, STEP, FLAG, T, STATE, V, MIXING, ROUNDS,
                      False, TAIL)  # fmt: skip


def kernel_name(constants: dict[str, Any]) -> str:
    """What profilers show, and launch configurations are kept by: sgd_step_kernel for the rule in sgd_step.py."""
    return constants["STEP"].fn.__module__.rpartition(".")[2] + "_kernel"


@partial(kernel, repr=lambda specialization: kernel_name(specialization.constants))
def update_kernel(
    table, tensors, hyperparams, maximize_sign, grad_scale, found_inf, rng, PREPARE: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, FLAG: tl.constexpr, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr,
    STATES: tl.constexpr, REMAINDERS: tl.constexpr, MIXING: tl.constexpr, ROUNDS: tl.constexpr, SHARDS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows have ``COLUMNS`` hyperparameters, the last of which is gamma. ``ROUNDS``: the first state is bfloat16, and
    rounded stochastically."""
    SLOTS: tl.constexpr = _STATE + STATES + (1 if REMAINDERS else 0)
    record, begin, count, whole = locate(table, tensors, SLOTS + (SHARD_NUMBERS if SHARDS else 0), BLOCK)
    param, source = address(record, _PARAM, begin, T), address(record, _SOURCE, begin, T if REMAINDERS else STATE)
    grad, first_grad = address(record, _GRAD, begin, T), address(record, _FIRST_GRAD, begin, T)
    state = ()
    for s in tl.static_range(STATES):
        if ROUNDS and s == 0:
            state = state + (address(record, _STATE + s, begin, tl.bfloat16),)  # type: ignore[assignment]
        else:
            state = state + (address(record, _STATE + s, begin, STATE),)  # type: ignore[assignment]
    remainder = ()
    if REMAINDERS:
        remainder = (address(record, _STATE + STATES, begin, tl.int16),)  # type: ignore[assignment]
    row = hyperparams + tl.load(record + ROW) * COLUMNS
    prepared = PREPARE(row, FLAG, V)
    gamma = tl.load(row + COLUMNS - 1)
    one_minus_gamma, gamma = (1 - gamma).to(V), gamma.to(V)
    grad_multiplier = (maximize_sign / tl.load(grad_scale).to(tl.float64)).to(V)
    skipped = tl.load(found_inf) != 0
    key = tl.full([], 0, tl.uint32)
    if ROUNDS:
        key = random_key(tl.load(rng), tl.load(rng + 1), tl.load(record + INDEX) + STATE_BITS)
    if SHARDS:
        first, together, shard = place_of_chunk(record, SLOTS, begin)
        if (first % 2 == 0) & (together >= count):
            key = key_in_block(key, first // BLOCK_OF_POSITIONS)
            _update_chunk(param, source, grad, first_grad, state, remainder, whole, count, prepared, grad_multiplier,
                          gamma, one_minus_gamma, skipped, key, first, (), STEP, FLAG, T, STATE, V, MIXING, ROUNDS,
                          BLOCK, TAIL)  # fmt: skip
        else:
            _update_chunk(param, source, grad, first_grad, state, remainder, whole, count, prepared, grad_multiplier,
                          gamma, one_minus_gamma, skipped, key, first, shard, STEP, FLAG, T, STATE, V, MIXING, ROUNDS,
                          BLOCK, TAIL)  # fmt: skip
    else:
        if ROUNDS:
            key = key_in_block(key, begin // BLOCK_OF_POSITIONS)  # which no chunk straddles
        _update_chunk(param, source, grad, first_grad, state, remainder, whole, count, prepared, grad_multiplier,
                      gamma, one_minus_gamma, skipped, key, begin, (), STEP, FLAG, T, STATE, V, MIXING, ROUNDS, BLOCK,
                      TAIL)  # fmt: skip


# --- host -----------------------------------------------------------------------------------------------------------
_ONE = torch.ones(1, dtype=torch.float32, device="cpu")
_ZERO = torch.zeros(1, dtype=torch.float32, device="cpu")
NO_RNG = torch.zeros(2, dtype=torch.int64, device="cpu")  # where nothing is rounded


def scaling(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
    """Both as tensors: 1 and 0 where AMP is not used."""
    scalars = [_ONE if grad_scale is None else grad_scale, _ZERO if found_inf is None else found_inf]
    for name, given in zip(("grad_scale", "found_inf"), scalars, strict=True):
        check_scalars(op, name, given, torch.float32, 1)
    return scalars


@dataclass(frozen=True)
class Rule:
    """A base optimizer: its two functions, and what its op is given, see rst_fused._schemas."""

    name: str
    prepare: Any
    step: Any
    columns: int  # of a row that PREPARE reads, gamma last
    state: tuple[str, ...]  # the lists of state, in their order
    fewest_states: int  # of these, which every variant has
    # Where steps count, the rows that PREPARE reads: from the op's tensors, and from numbers.
    with_steps: Callable[[str, Tensor, Tensor, int], Tensor] | None = None
    rows_with_steps: Callable[[Sequence[Sequence[float]], Sequence[float]], list[list[float]]] | None = None

    @property
    def constants(self) -> dict[str, Any]:
        return {"PREPARE": self.prepare, "STEP": self.step, "COLUMNS": self.columns}


def variant(rule: Rule, group: LaunchGroup, flag: bool, states: int, mixing: bool) -> dict[str, Any]:
    wide_state = group.state != group.dtype or (group.rounds_state and group.dtype == torch.float32)
    if group.remainders:
        wide_state = states > group.rounds_state
    return {
        **rule.constants, "FLAG": flag, "STATES": states, "REMAINDERS": group.remainders, "MIXING": mixing,
        "V": group.arithmetic, "ROUNDS": group.rounds_state, "SHARDS": bool(group.shards), "wide_state": wide_state,
        # What was not timed keeps the built-in configuration.
        "name": kernel_name(rule.constants) + (" remainders" if group.remainders else "")
        + (" rounding" if group.rounds_state else ""),
    }  # fmt: skip


def op_of(rule: Rule) -> Callable[..., None]:
    """restore_<rule>_step_."""
    op = f"restore_{rule.name}_step_"

    @torch.no_grad()
    def restore_step_(
        params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor], first_grads: Sequence[Tensor],
        *args: Any,
    ) -> None:  # fmt: skip
        lists, (masters, hyper, *rest) = args[: len(rule.state)], args[len(rule.state) :]
        if rule.with_steps is not None:
            steps = rest.pop(0)
            hyper = rule.with_steps(op, hyper, steps, len(rest[0]))
        group_sizes, *flag, maximize, grad_scale, found_inf, rng, indices, shards = rest
        check_scalars(op, "hyper", hyper, torch.float64, rule.columns * len(group_sizes))
        amp = scaling(op, grad_scale, found_inf)
        check_scalars(op, "rng", NO_RNG if rng is None else rng, torch.int64, 2)
        check_places(op, len(params), indices, shards)
        wide, remainders = torch.float32 if masters else None, are_remainders(masters)
        if masters and not remainders:
            source = Operand("masters", masters, written=True, dtype=wide)
        else:
            source = Operand("backups", backups) if backups else Operand("params", params)
        given = zip(rule.state, lists, strict=True)
        state = [(name, tensors) for i, (name, tensors) in enumerate(given) if tensors or i < rule.fewest_states]
        operands = [
            Operand("params", params, written=True, read=False), source, Operand("grads", grads),
            Operand("first_grads", first_grads, optional=True),
            *(Operand(name, tensors, written=True, dtype=wide, rounded=rng is not None and s == 0)
              for s, (name, tensors) in enumerate(state)),
            *([Operand("masters", masters, written=True, dtype=torch.int16)] if remainders else []),
        ]  # fmt: skip
        calls: list[Callable[[], Any]] = []
        places = (shards, indices) if rng is not None else ()
        for work in validated_groups(op, operands, group_sizes, 0, *places):
            hypers, *others = on_device(work.group.device, hyper, *amp, NO_RNG if rng is None else rng)
            chosen = variant(rule, work.group, any(flag), len(state), bool(first_grads))
            calls += launches(update_kernel, work, hypers, -1 if maximize else 1, *others, **chosen)
        run_all(calls)

    return restore_step_
