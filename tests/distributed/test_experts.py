"""Experts on a mesh of their own, beside layers that are sharded over all ranks: the norm is over all of them."""

from __future__ import annotations

import experts_on_ranks
import pytest
import ranks
from paths import needs_plans
from sharded import RECIPES, STEPS, TOLERANCE, difference


@pytest.mark.parametrize("recipe", ["g-rst", "adamw", "asam"])
def test_trains_as_one_process(recipe: str):
    expected = experts_on_ranks.alone(RECIPES[recipe], STEPS)
    results = ranks.run(4, experts_on_ranks.on_ranks, RECIPES[recipe], STEPS)
    for found in results:
        assert difference(found["weights"], expected["weights"]) <= TOLERANCE
        assert (found["steps"], found["sam_steps"]) == (STEPS, expected["sam_steps"])
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert difference(found["weights"], results[0]["weights"]) == 0 and found["norm"] == results[0]["norm"]


@needs_plans
def test_plans_and_ops_agree():
    planned = ranks.run(4, experts_on_ranks.on_ranks, RECIPES["g-rst"], 12)
    through_ops = ranks.run(4, experts_on_ranks.on_ranks, RECIPES["g-rst"], 12, plans=False)
    for a, b in zip(planned, through_ops, strict=True):
        assert a["planned"] and not b["planned"]
        assert difference(a["weights"], b["weights"]) == 0 and a["norm"] == b["norm"]
