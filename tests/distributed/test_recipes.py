"""Every script in docs/distributed.md runs as it stands. A first line "# ranks: 4" says on how many; else two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
import recipes_on_ranks
import torch
import torch.distributed as dist

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = {
    f"line {TEXT[: found.start()].count(chr(10)) + 1}": found[1]
    for found in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
}


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("line", BLOCKS)
def test_recipe(line: str) -> None:
    script = BLOCKS[line]
    number = re.match(r"# ranks: (\d+)\n", script)
    results = ranks.run(
        int(number[1]) if number else 2, recipes_on_ranks.run, script, f"{PAGE.name} {line}", seconds=60
    )
    first, steps = results[0]
    assert steps > 0 and all(torch.isfinite(w).all() for w in first)
    for weights, others in results:
        assert others == steps and all(torch.equal(a, b) for a, b in zip(weights, first, strict=True))


def test_the_page_has_recipes() -> None:
    assert len(BLOCKS) >= 6
