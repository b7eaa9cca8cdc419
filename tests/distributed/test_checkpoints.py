"""Checkpoints of sharded runs: every form, also on another number of ranks; draws go on exactly."""

from __future__ import annotations

from pathlib import Path

import checkpoints_on_ranks as checkpoints
import pytest
import ranks
import torch
from sharded import RECIPES, TOLERANCE, alone, difference

STEPS = 18


@pytest.mark.parametrize(("form", "recipe"), [("nested", "g-rst"), ("flattened", "adamw")])
def test_resumes_on_other_numbers_of_ranks(tmp_path: Path, form: str, recipe: str):
    load = ""
    for first, size in ((0, 2), (6, 4), (12, 1)):
        save = str(tmp_path / str(size))
        results = ranks.run(
            size, checkpoints.go_on, "fsdp", RECIPES[recipe], form, first, first + 6, STEPS, load, save
        )
        load = save
    expected = alone(RECIPES[recipe], STEPS)
    assert difference(results[0]["weights"], expected["weights"]) <= TOLERANCE
    assert results[0]["sam_steps"] == expected["sam_steps"] and results[0]["steps"] == STEPS


@pytest.mark.parametrize(
    ("how", "size", "form", "asynchronous"),
    [("fsdp", 2, "nested", True), ("fsdp", 2, "full", False), ("hsdp", 4, "flattened", False),
     ("fsdp + tp", 4, "nested", False), ("fsdp, some plain", 2, "nested", False)],
)  # fmt: skip
def test_resumes_bit_exactly(tmp_path: Path, how: str, size: int, form: str, asynchronous: bool):
    at = str(tmp_path)
    recipe = {**RECIPES["g-rst"], "dampening": 0.5}
    whole = ranks.run(size, checkpoints.whole_and_half, how, recipe, form, 12, at, asynchronous)
    resumed = ranks.run(size, checkpoints.go_on, how, recipe, form, 6, 12, 12, at, "")
    for a, b in zip(whole, resumed, strict=True):
        assert difference(a["weights"], b["weights"]) == 0
        assert (a["steps"], a["sam_steps"], a["norm"]) == (b["steps"], b["sam_steps"], b["norm"])


def test_resumes_after_a_rank_was_killed(tmp_path: Path):
    at, recipe = str(tmp_path), RECIPES["g-rst"]
    whole = ranks.run(2, checkpoints.whole_and_half, "fsdp", recipe, "nested", 12, at)
    results, errors = ranks.outcomes(2, checkpoints.go_on_until_a_rank_is_killed, recipe, "nested", 12, at, seconds=20)
    assert "SIGKILL" in errors[1] and "not done" not in errors.get(0, "not done") and not results
    resumed = ranks.run(2, checkpoints.go_on, "fsdp", recipe, "nested", 6, 12, 12, at, "")
    for a, b in zip(whole, resumed, strict=True):
        assert difference(a["weights"], b["weights"]) == 0 and a["sam_steps"] == b["sam_steps"]


def test_nothing_is_saved_between_the_passes():
    for said in ranks.run(2, checkpoints.refuses_to_save_while_perturbed):
        assert "restore()" in said[0]


def test_remainders_are_gathered_and_resumed():
    """Also by collectives that know no int16; a checkpoint of the other kind is not read in their place."""
    for result in ranks.run(2, checkpoints.remainders_in_full):
        assert result == {"dtypes": {torch.bfloat16}, "resumed": True}


def test_state_of_another_layout_is_refused():
    for plain, other in ranks.run(2, checkpoints.refuses_state_of_another_layout):
        assert "set_optimizer_state_dict" in plain and "another model" in other
