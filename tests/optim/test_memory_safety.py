"""Tensors that are changed under an optimizer: the value of torch.optim, or an error that names the parameter.

Never a crash, nor a byte written outside of a tensor, nor another parameter changed. The cases are in
tests/support/spoilt_memory.py, which runs in processes of its own.
"""

from __future__ import annotations

import pytest
from paths import needs_plans
from spoilt_memory import KINDS
from triton_processes import SUPPORT, run_python

pytestmark = needs_plans


def outcomes(kind: str) -> dict[str, str]:
    """{case: what is wrong with it} of a kind; after a crash another process goes on with the next case."""
    found: dict[str, str] = {}
    while True:
        done = run_python(SUPPORT / "spoilt_memory.py", kind, len(found))
        lines = done.stdout.splitlines()
        begun = [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]
        ended = dict(line.removeprefix("end ").split(": ", 1) for line in lines if line.startswith("end "))
        found |= ended
        if len(begun) == len(ended):
            assert done.returncode == 0, done.stderr[-4000:]
            return found
        found[begun[-1]] = f"process ended with {done.returncode}"


@pytest.mark.parametrize("kind", KINDS)
def test_changed_under_the_optimizer(kind: str) -> None:
    found = outcomes(kind)
    assert found
    wrong = [f"{case}: {what}" for case, what in found.items() if what]
    assert wrong == [], f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


# Internal ops are reached as easily as the others: by numbers that are no handles.
INTERNAL = """
import torch, rst_fused
names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("rst_fused::_")]
for name in names:
    op = getattr(torch.ops.rst_fused, name.split(".")[0]).default
    kinds = [str(argument.type) for argument in op._schema.arguments]
    for number in (0, 1, -1, 12345, 2**40, 2**62):
        values = {"int": number, "bool": False, "float": 1.0, "Tensor": torch.ones(3), "List[Tensor]": [torch.ones(3)],
                  "List[int]": [number], "Optional[Tensor]": None}
        try:
            op(*(values[kind] for kind in kinds))
        except (RuntimeError, ValueError) as error:
            assert str(error)
        else:
            assert "int" not in kinds and "List[int]" not in kinds, f"{name} took {number}"
print("done")
"""


def test_internal_ops_check_their_handles() -> None:
    done = run_python("-c", INTERNAL)
    assert done.stdout.strip() == "done", f"{done.returncode}: {done.stderr[-2000:]}"


# A process of its own, as all that may crash: a state of None that torch.optim has saved, or lost.
LOADED = """
import sys, torch
from rst_fused import RST
base, name = sys.argv[1:]
def step(p, opt):
    p.grad = torch.ones(8)
    if opt.perturb():
        p.grad = torch.ones(8)
    opt.step()
for schedule in (0.0, 1.0):
    p = torch.nn.Parameter(torch.zeros(8))
    opt = RST([p], base, lr=0.1, schedule=schedule, **({"momentum": 0.9} if base == "sgd" else {}))
    step(p, opt)
    before, saved = p.detach().clone(), opt.state_dict()
    saved["state"][0][name] = None
    try:
        opt.load_state_dict(saved)
        step(p, opt)
    except (RuntimeError, TypeError, ValueError) as error:
        assert "parameter 0" in str(error) and torch.equal(p.detach(), before), error
    else:  # as torch has it: a buffer that begins again
        assert base == "sgd" and torch.allclose(p.detach(), before - 0.1), p
print("done")
"""


@pytest.mark.parametrize(
    ("base", "name"),
    [("sgd", "momentum_buffer"), ("adam", "exp_avg"), ("adam", "exp_avg_sq"), ("adamw", "step")],
)
def test_none_in_a_state_that_is_loaded(base: str, name: str) -> None:
    done = run_python("-c", LOADED, base, name)
    assert done.stdout.strip() == "done", f"{done.returncode}: {done.stderr[-2000:]}"
