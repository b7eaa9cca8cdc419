"""Weights in gradients where ranks share the work: DDP's buckets are views that it keeps, FSDP2's gradients are not."""

from __future__ import annotations

import gradient_memory_on_ranks
import pytest
import ranks
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


@pytest.mark.parametrize("as_views", [False, True])
def test_ddp(as_views: bool) -> None:
    own = ranks.run(2, gradient_memory_on_ranks.ddp, as_views, False)
    held = ranks.run(2, gradient_memory_on_ranks.ddp, as_views, True)
    assert [weights for _, weights in own] == [weights for _, weights in held] and own[0][1] == own[1][1]
    assert [counts for counts, _ in held] == [[6] * 4] * 2
    assert [counts for counts, _ in own] == [[6 if as_views else 0] * 4] * 2


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
def test_fsdp2(plans: bool) -> None:
    """The gradients of a module are cut from one storage, which nobody else has."""
    own = ranks.run(2, gradient_memory_on_ranks.fsdp, False, plans)
    held = ranks.run(2, gradient_memory_on_ranks.fsdp, True, plans)
    assert [weights for _, weights in own] == [weights for _, weights in held] and own[0][1] == own[1][1]
    assert [counts for counts, _ in held] == [[6] * 4] * 2
    assert [counts for counts, _ in own] == [[0] * 4] * 2
