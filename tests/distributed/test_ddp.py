"""DistributedDataParallel: every set-up trains as one process on the whole batch, and replicas stay equal."""

from __future__ import annotations

from typing import Any

import ddp_on_ranks as ddp
import pytest
import ranks
import torch.distributed as dist

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.usefixtures("one_thread"),
]
MOST = 2e-7  # difference of weights from those of one process, after 60 steps in float32


def check(world: int, base: str, form: str, options: dict[str, Any], wrapper: dict[str, Any], **more: Any) -> None:
    results = ranks.run(world, ddp.train, base, form, options, wrapper, **more)
    more.pop("compiled", None)
    right, draws = ddp.alone(world, base, form, options, **more)
    assert any(draws) and not all(draws)
    for weights, drawn, drift in results:
        assert drawn == draws and drift == 0.0
        assert ddp.difference(weights, right) <= MOST


SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "one bucket each": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-5},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
}


@pytest.mark.parametrize("form", ["closure", "phases"])
@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("setup", SETUPS)
def test_as_one_process(setup: str, gamma: float, form: str) -> None:
    check(2, "sgd", form, {"gamma": gamma}, SETUPS[setup], unused=setup == "unused parameters")


@pytest.mark.parametrize("base", ["adamw", "instance"])
@pytest.mark.parametrize("views", [False, True])
def test_other_bases(views: bool, base: str) -> None:
    check(2, base, "closure", {"gamma": "match"}, {"gradient_as_bucket_view": views})


@pytest.mark.parametrize("form", ["closure", "phases"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_on_four_ranks(base: str, form: str) -> None:
    check(4, base, form, {"gamma": 1.5, "adaptive": True}, {"gradient_as_bucket_view": True})


@pytest.mark.parametrize("form", ["closure", "phases"])
@pytest.mark.parametrize("views", [False, True])
def test_micro_batches_in_no_sync(views: bool, form: str) -> None:
    check(2, "sgd", form, {"gamma": 1.5}, {"gradient_as_bucket_view": views}, micros=3)


def test_reference_backend_and_masters() -> None:
    check(2, "sgd", "closure", {"gamma": 1.5, "backend": "reference"}, {"gradient_as_bucket_view": True})
