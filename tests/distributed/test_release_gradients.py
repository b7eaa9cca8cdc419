"""release_gradients=True on several ranks: FSDP2 and tensor parallelism give the bits of a run without it."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import release_on_ranks
import torch

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"base": "adamw", "schedule": 0.5, "rho": 0.3},
    "g-rst": {"momentum": 0.9, "lr": 0.03, "schedule": 0.5, "gamma": "match"},
}


@pytest.mark.parametrize("how, size, options, bucket", [
    ("fsdp", 2, "adamw", 1), ("fsdp", 2, "g-rst", 300), ("fsdp, mixed", 2, "adamw", 300),
    ("fsdp, kept after backward", 2, "g-rst", 1), ("tp, all replicated", 2, "adamw", 1), ("hsdp", 4, "adamw", 1),
])  # fmt: skip
def test_same_bits(how: str, size: int, options: str, bucket: int) -> None:
    for a, b in ranks.run(size, release_on_ranks.both, how, OPTIONS[options], bucket):
        assert a["flushed"] == 0 < b["flushed"]
        assert a["norm"] == b["norm"] and a["sam_steps"] == b["sam_steps"] and 0 < a["sam_steps"] < 5
        assert all(map(torch.equal, a["weights"], b["weights"]))
        for x, y in zip(a["state"], b["state"], strict=True):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_micro_batches() -> None:
    without, released = (ranks.run(2, release_on_ranks.micro_batches, flag) for flag in (False, True))
    for a, b in zip(without, released, strict=True):
        assert all(map(torch.equal, a, b))


def test_data_parallel_is_refused() -> None:
    for words, same in ranks.run(2, release_on_ranks.replicated, "auto"):
        assert "release_gradients=True with plain parameters on several ranks" in words and "fully_shard" in words
        assert same


def test_an_exception_in_the_second_pass() -> None:
    for updated, back, steps in ranks.run(2, release_on_ranks.one_rank_fails):
        assert 0 < updated <= 4 and back and steps == 0


def test_an_optimizer_of_one_process() -> None:
    assert all(ranks.run(2, release_on_ranks.alone, {"base": "adamw", "schedule": 0.5}))


def test_first_gradients_of_each_rank_alone_are_not_mixed() -> None:
    """Nothing is updated before the ranks have compared their norms, which step() would only do afterwards."""
    results = ranks.run(2, release_on_ranks.mixes_gradients_of_its_own, seconds=60)
    for words, unchanged, back, steps, weights in results:
        assert "rank 1 and rank 0" in words and "||g1|| is" in words and "With gamma != 1" in words
        assert unchanged and back and steps == 1
        assert all(map(torch.equal, weights, results[0][-1]))
