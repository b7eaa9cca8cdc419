"""The ways that a step can take through the package, and what must not depend on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import pytest
from oracle_optimizer import BACKENDS, bits
from torch import Tensor

from rst_fused import RST
from rst_fused._step.plan import PlanCache

needs_plans = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
# Every backend, and the compiled one twice: with launch plans, and with them switched off.
EXECUTORS = [name for b in BACKENDS for name in (("cpu plan", "cpu ops") if b == "cpu" else (b,))]
every_executor = pytest.mark.parametrize("executor", EXECUTORS)


@contextmanager
def no_plans() -> Iterator[None]:
    """Inside, every optimizer works through the registered ops, also on what a plan has perturbed."""
    with pytest.MonkeyPatch.context() as patch:
        for phase in ("perturb", "update", "restore", "renew"):
            patch.setattr(PlanCache, phase, lambda *args, **options: False)
        yield


def has_plan(opt: RST) -> bool:
    """Whether its last step went through a launch plan."""
    return opt._plans._plan is not None


def is_perturbed(opt: RST) -> bool:
    try:
        opt.state_dict()
    except RuntimeError as error:
        assert "while the weights are perturbed" in str(error)
        return True
    return False


def observed(params: Sequence[Tensor], opt: RST) -> dict[str, Any]:
    """All that a user can see of an optimizer, exactly."""
    state = [{k: (v.dtype, v.stride(), bits([v])) for k, v in sorted(opt.state.get(p, {}).items())} for p in params]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return {
        "weights": bits(params), "state": state, "groups": groups, "steps": opt.steps, "sam_steps": opt.sam_steps,
        "non_finite": opt.non_finite_norms, "perturbed": is_perturbed(opt),
    }  # fmt: skip


def covering(factors: dict[str, Sequence[Any]], together: int) -> list[dict[str, Any]]:
    """Few combinations, in which values of as many factors as ``together`` says meet in every way.

    Greedy, and the same ones in every run.
    """
    names, among_equals = list(factors), random.Random(0)
    missing: dict[frozenset[tuple[str, int]], None] = {}
    for chosen in combinations(names, together):
        for values in product(*(range(len(factors[name])) for name in chosen)):
            missing[frozenset(zip(chosen, values, strict=True))] = None
    rows = []
    while missing:
        row = dict(sorted(next(iter(missing))))
        for name in (n for n in names if n not in row):
            others = list(combinations(row.items(), together - 1))
            met = [sum(frozenset({(name, i), *o}) in missing for o in others) for i in range(len(factors[name]))]
            row[name] = among_equals.choice([i for i, count in enumerate(met) if count == max(met)])
        for group in combinations(row.items(), together):
            missing.pop(frozenset(group), None)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows
