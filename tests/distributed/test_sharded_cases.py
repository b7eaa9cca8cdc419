"""What people add to sharded training: AMP, 16-bit weights, offloading, accumulation; and what goes wrong."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch
from sharded import RECIPES, TOLERANCE, alone, difference


@functools.cache
def sixteen_bit_alone(dtype: torch.dtype, master: bool, stochastic: bool) -> dict[str, Any]:
    return ranks.run(1, cases.sixteen_bit, "alone", dtype, _options(master, stochastic))[0]


def _options(master: bool, stochastic: bool) -> dict[str, Any]:
    return {"master_weights": master, "stochastic_rounding": stochastic, "seed": 5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("master", "stochastic"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("how", "size"), [("fsdp", 2), ("fsdp", 4), ("fsdp + tp", 4)])
def test_sixteen_bit_weights_do_not_depend_on_the_number_of_ranks(
    how: str, size: int, master: bool, stochastic: bool, dtype: torch.dtype
):
    """Bit for bit, random bits too. (The norm, of which eight squares are added in fp32, has an error of up to 2^-22:
    what that changes is far below the spacing of 16-bit numbers, and moves none of these over a boundary.)"""
    expected = sixteen_bit_alone(dtype, master, stochastic)
    for result in ranks.run(size, cases.sixteen_bit, how, dtype, _options(master, stochastic)):
        assert result["norm"] == pytest.approx(expected["norm"], rel=2**-22)
        for seen, wanted in zip(result["seen"], expected["seen"], strict=True):
            assert all(a.equal(b) for a, b in zip(seen, wanted, strict=True))


@functools.cache
def bfloat16_state_alone(dtype: torch.dtype, master: bool | str) -> dict[str, Any]:
    return ranks.run(1, cases.sixteen_bit, "alone", dtype, _with_state(master))[0]


def _with_state(master: bool | str) -> dict[str, Any]:
    return {"master_weights": master, "state_dtype": torch.bfloat16, "seed": 5, "stochastic_rounding": bool(master)}


@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, "remainder")],
    ids=["fp32", "master", "remainder"],
)  # fmt: skip
@pytest.mark.parametrize(("how", "size"), [("fsdp", 2), ("fsdp", 4), ("fsdp + tp", 4)])
def test_a_bfloat16_state_does_not_depend_on_the_number_of_ranks(
    how: str, size: int, master: bool | str, dtype: torch.dtype
):
    expected = bfloat16_state_alone(dtype, master)
    for result in ranks.run(size, cases.sixteen_bit, how, dtype, _with_state(master)):
        for seen, wanted in zip(result["seen"][1::2], expected["seen"][1::2], strict=True):  # after each update
            assert all(a.equal(b) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("recipe", ["g-rst", "adamw"])
def test_a_scaler_changes_nothing(recipe: str):
    expected = alone(RECIPES[recipe], 10)
    for result in ranks.run(2, cases.scaled, "fsdp", RECIPES[recipe], None, 10):
        assert difference(result["weights"], expected["weights"]) <= TOLERANCE
        assert result["sam_steps"] == expected["sam_steps"] and all(result["taken"])


@pytest.mark.parametrize(("number", "recipe"), [(1, "g-rst"), (2, "g-rst"), (2, "sgd")])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all(rank: int, number: int, recipe: str):
    options = {**RECIPES[recipe], "schedule": 1.0, "gamma": 2.0 if recipe == "g-rst" else 1.0}
    results = ranks.run(2, cases.scaled, "fsdp", options, (3, number, rank), 6)
    for result in results:
        assert result["taken"] == [True, True, True, False, True, True]
        # The scaler itself looks at the gradients of the second pass alone.
        assert result["scales"] == ([64.0] * 6 if number == 1 else [64.0] * 3 + [32.0] * 3)
        assert difference(result["weights"], results[0]["weights"]) == 0
        assert all(w.isfinite().all() for w in result["weights"])


@pytest.mark.parametrize("offload", [False, True])
def test_mixed_precision_sees_the_perturbation(offload: bool):
    """The passes gather bfloat16 copies of float32 shards, anew in the second one."""
    results = ranks.run(2, cases.mixed_precision, 5, offload)
    for result in results:
        assert result["dtype"] == torch.float32
        assert all(second > 1.01 * first for first, second in result["losses"])
        assert difference(result["weights"], results[0]["weights"]) == 0


@pytest.mark.parametrize("closure_form", [False, True])
def test_accumulates_over_micro_batches(closure_form: bool):
    expected = alone({"base": "sgd", "lr": 0.05, "momentum": 0.9, "gamma": 2.0}, 20)
    for result in ranks.run(2, cases.accumulated, 20, 2, closure_form):
        assert difference(result["weights"], expected["weights"]) <= TOLERANCE
        assert result["sam_steps"] == expected["sam_steps"]


@pytest.mark.parametrize(("how", "size"), [("fsdp", 2), ("fsdp, kept after backward", 2), ("fsdp + tp", 4)])
def test_an_exception_between_the_passes_brings_the_weights_back(how: str, size: int):
    for result in ranks.run(size, cases.fails_between_the_passes, how):
        assert difference(result["before"], result["moved"]) > 0
        assert difference(result["before"], result["after"]) == 0 and result["steps"] == 0


@pytest.mark.parametrize("at", ["before the norm", "between the passes"])
def test_nobody_waits_for_ever_for_a_rank_that_failed(at: str):
    _, errors = ranks.outcomes(2, cases.one_rank_fails, at, seconds=60)
    assert "ZeroDivisionError" in errors[1]
    assert "Connection closed by peer" in errors[0] or "Connection reset by peer" in errors[0]


def test_weights_gathered_by_hand_are_gathered_again():
    for result in ranks.run(2, cases.unsharded_by_hand):
        first, second, third = result["losses"]
        assert second > 1.01 * first and third == first


def test_gradients_in_other_layouts():
    expected = [w.clone() for w in ranks.run(2, cases.settled, "replicate")[0]]
    for placement in ("partial", "shard"):
        for result in ranks.run(2, cases.settled, placement):
            assert all(a.equal(b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_gradients_meet_the_others(rank: int):
    results = ranks.run(2, cases.unused_on, rank)
    expected = math.sqrt(results[1 - rank]["elements"])
    assert [result["norm"] for result in results] == pytest.approx([expected] * 2, rel=1e-12)


def test_what_does_not_fit_is_refused():
    for partial, flat, state in ranks.run(2, cases.misfits):
        assert "Partial" in partial and "redistribute" in partial
        assert "FullyShardedDataParallel" in flat and "fully_shard" in flat
        assert "momentum_buffer" in state and "set_optimizer_state_dict" in state
