"""Every script of docs/frameworks.md runs, and takes SAM steps."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FRAMEWORKS = ("pytorch_lightning", "accelerate", "transformers")


def test_the_page_has_a_script_for_each_framework():
    assert len(SCRIPTS) == 6
    for name in (*FRAMEWORKS, "torch.distributed.checkpoint"):
        assert any(name in script for script in SCRIPTS)


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
@pytest.mark.usefixtures("one_thread")
def test_a_script_runs(number, tmp_path, monkeypatch):
    script = SCRIPTS[number]
    for name in FRAMEWORKS:
        if re.search(rf"^(from|import) {name}\b", script, re.MULTILINE) and not importlib.util.find_spec(name):
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"script_{number}")  # Lightning looks for the module of a class
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(script, f"docs/frameworks.md, script {number}", "exec"), vars(module))
    opt = module.opt
    assert opt.steps >= 8 and 0 < opt.sam_steps < opt.steps
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
