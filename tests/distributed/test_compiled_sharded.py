"""Full graphs of both phases over sharded parameters, collectives included."""

from __future__ import annotations

import compiled_on_ranks
import pytest
import ranks
from sharded import RECIPES, alone, difference

STEPS = 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "size", "model_too", "recipe"), [("fsdp", 2, True, "g-rst"), ("fsdp + tp", 4, False, "adamw")]
)
def test_full_graphs_train_as_one_process(how: str, size: int, model_too: bool, recipe: str):
    results = ranks.run(size, compiled_on_ranks.train, how, RECIPES[recipe], model_too, STEPS, seconds=600)
    expected = alone(RECIPES[recipe], STEPS)
    for result in results:
        assert difference(result["weights"], expected["weights"]) <= 2e-7
        assert result["sam_steps"] == expected["sam_steps"]
        assert difference(result["weights"], results[0]["weights"]) == 0
        # Both kinds of step were there twice: whatever comes later is one of their graphs.
        fired = result["fired"]
        seen = max(fired.index(kind, fired.index(kind) + 1) for kind in (True, False))
        assert result["graphs"][seen:] == [result["graphs"][-1]] * (STEPS - seen)
