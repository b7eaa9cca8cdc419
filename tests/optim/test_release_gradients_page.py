"""The script of docs/release_gradients.md runs, and takes steps of both kinds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/release_gradients.md"


@pytest.mark.usefixtures("one_thread")
def test_script() -> None:
    scripts = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(scripts) == 1
    names: dict[str, Any] = {}
    exec(compile(scripts[0], "docs/release_gradients.md", "exec"), names)
    opt = names["opt"]
    assert opt.steps == 20 and 0 < opt.sam_steps < 20
    assert all(p.grad is None for p in names["model"].parameters())
