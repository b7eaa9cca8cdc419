"""DistributedDataParallel: every set-up trains as one process on the whole batch, and replicas stay equal."""

from __future__ import annotations

from typing import Any

import ddp_on_ranks as ddp
import pytest
import ranks
import torch.distributed as dist
from paths import needs_plans

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.usefixtures("one_thread"),
]
MOST = 2e-7  # difference of weights from those of one process, after 60 steps in float32
FORMS = ("closure", "phases")


def check(world: int, cases: list[tuple[Any, ...]]) -> None:
    """cases: base, form, options of RST, options of DDP, and what both trainings take besides."""
    results = ranks.run(world, ddp.train_all, cases, seconds=240)
    for i, (base, form, options, _, more) in enumerate(cases):
        right, draws = ddp.alone(world, base, form, options, **more)
        assert any(draws) and not all(draws)
        for weights, drawn, drift in (result[i] for result in results):
            assert drawn == draws and drift == 0.0, cases[i]
            assert ddp.difference(weights, right) <= MOST, cases[i]


SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "one bucket each": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-5},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_as_one_process(setup: str) -> None:
    more = {"unused": setup == "unused parameters"}
    check(2, [("sgd", form, {"gamma": gamma}, SETUPS[setup], more) for gamma in (1.0, 1.5) for form in FORMS])


@pytest.mark.parametrize("views", [False, True])
def test_other_bases_and_backends(views: bool) -> None:
    wrapper = {"gradient_as_bucket_view": views}
    cases = [(base, "closure", {"gamma": "match"}, wrapper, {}) for base in ("adamw", "instance")]
    check(2, [*cases, ("sgd", "closure", {"gamma": 1.5, "backend": "reference"}, wrapper, {})])


def test_on_four_ranks() -> None:
    options = {"gamma": 1.5, "adaptive": True}
    wrapper = {"gradient_as_bucket_view": True}
    check(4, [(base, form, options, wrapper, {}) for base, form in zip(("sgd", "adamw"), FORMS, strict=True)])


def test_micro_batches_in_no_sync() -> None:
    wrappers = [{"gradient_as_bucket_view": views} for views in (False, True)]
    check(2, [("sgd", form, {"gamma": 1.5}, wrapper, {"micros": 3}) for wrapper in wrappers for form in FORMS])


@needs_plans
@pytest.mark.parametrize("base", ["sgd", "instance"])
@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_first_gradients_are_copied_where_a_bucket_holds_them(executor: str, base: str) -> None:
    """And nowhere else: 4 bytes per parameter only there."""
    for views in (False, True):
        for count, first, later in ranks.run(2, ddp.first_gradients, base, views, executor, seconds=60):
            assert count == 6 and first == later == (6 if views else 0)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled(whole: bool) -> None:
    """The model alone, or perturb and step too: nothing is compiled after the first 20 steps."""
    for views, gamma in ((False, 1.0), (True, 1.5)):
        right, _ = ddp.alone(2, "sgd", "phases", {"gamma": gamma})
        for weights, drift, early, late in ranks.run(2, ddp.compiled_steps, views, gamma, whole, seconds=240):
            assert drift == 0.0 and early == late > 0
            assert ddp.difference(weights, right) <= MOST
