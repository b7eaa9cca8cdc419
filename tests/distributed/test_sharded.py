"""Sharded parameters train as those of one process: FSDP2, HSDP, tensor parallel, both, and plain ones beside them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ranks
import sharded
from sharded import RECIPES, alone, difference

STEPS = 60
# Gradients are sums over ranks in another order than on one process: an error of some 2^-24 in each, which 60 steps of
# momentum 0.9 do not amplify here.
TOLERANCE = 2e-7


@functools.cache
def reference(recipe: str) -> dict[str, Any]:
    return alone(RECIPES[recipe], STEPS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("how", "size"), sharded.CASES)
def test_trains_as_one_process(how: str, size: int, recipe: str):
    results = ranks.run(size, sharded.on_ranks, how, RECIPES[recipe], STEPS)
    expected = reference(recipe)
    for result in results:
        assert difference(result["weights"], expected["weights"]) <= TOLERANCE
        assert result["sam_steps"] == expected["sam_steps"] and result["steps"] == STEPS
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert difference(result["weights"], results[0]["weights"]) == 0  # no drift between ranks
        assert result["norm"] == results[0]["norm"]
