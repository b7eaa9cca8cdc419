"""m-sharpness: every rank perturbs by its own gradient, which saves an all-reduce; what would drift is refused."""

from __future__ import annotations

import re
from typing import Any

import ddp_on_ranks as ddp
import pytest
import ranks
import torch.distributed as dist
import uneven_on_ranks as workers

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.usefixtures("one_thread"),
]
MOST = 2e-7


@pytest.mark.parametrize("form", ["closure", "phases"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_perturbs_by_the_gradient_of_each_rank(base: str, form: str) -> None:
    right = workers.local_first_passes(2, base, ddp.STEPS)
    for weights, drift, reductions, steps, sam_steps in ranks.run(
        2, workers.m_sharpness, base, form, True, {}, ddp.STEPS
    ):
        assert drift == 0.0 and ddp.difference(weights, right) <= MOST
        assert reductions == steps == ddp.STEPS and 10 < sam_steps < 50  # one all-reduce of all bytes for each step


@pytest.mark.parametrize("wrapper", [{"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_other_wrappers(wrapper: dict[str, Any]) -> None:
    """static_graph: where the first step is a base step."""
    for _, drift, reductions, steps, _ in ranks.run(2, workers.m_sharpness, "sgd", "closure", True, wrapper, 20):
        assert drift == 0.0 and reductions == steps == 20


def test_without_it_a_sam_step_reduces_twice() -> None:
    for form in ("closure", "phases"):
        for _, drift, reductions, steps, sam_steps in ranks.run(2, workers.m_sharpness, "sgd", form, False, {}, 20):
            assert drift == 0.0 and reductions == steps + sam_steps


REFUSED = {
    "number": "ValueError: gamma=2.0 with m_sharpness=True: expected gamma=1",
    "match": "ValueError: gamma='match' with m_sharpness=True: expected gamma=1",
    "set": "ValueError: gamma=2.0 with m_sharpness=True", "function": r"ValueError: gamma\(0\)=2.0 with m_sharpness",
    "no model": "TypeError: m_sharpness=True needs the model as DistributedDataParallel, none was given",
    "other model": "TypeError: m_sharpness=True needs the model as DistributedDataParallel, given a Sequential",
    "no first_pass": "RuntimeError: .* the first backward ran with its all-reduce",
    "fire=False": "RuntimeError: the gradients are those of this rank", "no perturb": "RuntimeError: the gradients are",
    "fire=True": "RuntimeError: .* the first backward ran with its all-reduce",
    "accumulating": r"RuntimeError: first_pass\(\) with gradients that are there already: call opt.zero_grad\(\)",
    "sharded": "ValueError: m_sharpness=True with parameters that are DTensors",
    "static": "RuntimeError: .*static_graph=True.*warmup", "changed": "^$",
}  # fmt: skip


def test_what_is_refused() -> None:
    for said in ranks.run(2, workers.m_sharpness_refused, seconds=60):
        assert said.keys() == REFUSED.keys()
        for name, words in REFUSED.items():
            assert re.search(words, said[name]), (name, said[name])


@pytest.mark.parametrize("base", ["sgd", "instance"])
def test_no_sync_by_hand_where_gradients_are_mixed(base: str) -> None:
    """The replicas would drift apart: refused before the update, and the weights come back; a right step works."""
    for said, back, steps, drift in ranks.run(3, workers.no_sync_by_hand, 1.5, base, seconds=60):
        assert said.startswith(
            "RuntimeError: ranks 1, 2 and rank 0, the first of the process group, do not agree: ||g1|| is"
        )
        assert "no_sync()" in said and "m_sharpness=True" in said
        assert back and steps == 1 and drift == 0.0


def test_no_sync_by_hand_without_mixing() -> None:
    for said, _, steps, drift in ranks.run(2, workers.no_sync_by_hand, 1.0, "sgd", seconds=60):
        assert said == "" and steps == 2 and drift == 0.0
