"""Sharded parameters train as those of one process: FSDP2, HSDP, tensor parallel, both, and plain ones beside them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ranks
import sharded
from paths import needs_plans
from sharded import RECIPES, STEPS, TOLERANCE, alone, difference


@functools.cache
def reference(recipe: str) -> dict[str, Any]:
    return alone(RECIPES[recipe], STEPS)


# Every set-up with momentum, mixed gradients among them, and with AdamW; the other recipes in two of them.
COMBINATIONS = [
    (how, size, recipe)
    for how, size in sharded.CASES
    for recipe in RECIPES
    if recipe in ("g-rst", "adamw") or (how, size) in (("fsdp", 2), ("fsdp + tp", 4))
]


@pytest.mark.parametrize(("how", "size", "recipe"), COMBINATIONS)
def test_trains_as_one_process(how: str, size: int, recipe: str):
    results = ranks.run(size, sharded.on_ranks, how, RECIPES[recipe], STEPS)
    expected = reference(recipe)
    for result in results:
        assert difference(result["weights"], expected["weights"]) <= TOLERANCE
        assert result["sam_steps"] == expected["sam_steps"] and result["steps"] == STEPS
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert difference(result["weights"], results[0]["weights"]) == 0  # no drift between ranks
        assert result["norm"] == results[0]["norm"]


@needs_plans
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("how", "size"), [("fsdp, some plain", 2), ("fsdp + tp", 4)])
def test_plans_and_ops_agree(how: str, size: int, recipe: str):
    planned = ranks.run(size, sharded.on_ranks, how, RECIPES[recipe], 12)
    through_ops = ranks.run(size, sharded.on_ranks, how, RECIPES[recipe], 12, plans=False)
    for a, b in zip(planned, through_ops, strict=True):
        assert a["planned"] and not b["planned"]
        assert difference(a["weights"], b["weights"]) == 0
        assert a["norm"] == b["norm"] and a["sam_steps"] == b["sam_steps"]
