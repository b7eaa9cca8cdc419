"""Ranks that would take different steps are told so, by name, before anything changes; nobody hangs without a word."""

from __future__ import annotations

import math
import re
from pathlib import Path

import agreement_on_ranks as workers
import pytest
import ranks
import torch
import torch.distributed as dist

from rst_fused import RST, SAM

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.usefixtures("one_thread"),
]
WORDS = {
    "seed": "seed is 0 on rank 0, 7 on rank 1", "steps": "steps is 0 on rank 0, 5 on rank 1",
    "schedule": r"schedule is 'constant\(p=0.5\)' on rank 0, 'linear\(p=0.5, steps=9\)' on rank 1",
    "p": r"p\(t\) is 0.5 on rank 0, 0.25 on rank 1", "function": r"p\(t\) is 0.5 on rank 0, 0.25 on rank 1",
    "gamma": "gamma is '1.0' on rank 0, '2.0' on rank 1", "match": "gamma is '1.0' on rank 0, 'match",
    "gamma function": r"gamma\(t\) is 2.0 on rank 0, 3.0 on rank 1", "adaptive": "adaptive is False on rank 0, True",
    "eta": "eta is 0.0 on rank 0, 0.5 on rank 1", "base": "base is 'sgd' on rank 0, 'adamw' on rank 1",
    "lr": r"param_groups\[0\]\['lr'\] is 0.1 on rank 0, 0.2", "rho": r"\['rho'\] is 0.05 on rank 0, 0.5",
    "momentum": r"'momentum'\] is 0.0 on rank 0, 0.5", "rounding": "stochastic_rounding is True on rank 0, False",
    "state": "state_dtype is 'None' on rank 0, 'torch.bfloat16' on rank 1",
    "groups": "number of parameter groups is 1 on rank 0, 2", "parameters": "number of parameters is 2 on rank 0, 3",
}  # fmt: skip


def test_what_differs_is_named_on_every_rank() -> None:
    for found in ranks.run(2, workers.all_differing, [*WORDS], [1], seconds=60):
        for how, (said, unchanged, afterwards) in found.items():
            assert re.search(WORDS[how], said), said
            assert said.startswith("rank 1 and rank 0, the first of the process group, do not agree: ")
            assert "same arguments and state_dict" in said and "process_group" in said
            assert unchanged and afterwards == ""


def test_all_ranks_that_differ_are_named() -> None:
    for said, unchanged, afterwards in ranks.run(5, workers.differing, "seed", [1, 3, 4], seconds=60):
        assert said.startswith(
            "ranks 1, 3, 4 and rank 0, the first of the process group, do not agree: seed is 0 on rank 0"
        )
        assert unchanged and afterwards == ""


def test_nothing_is_said_where_all_agree() -> None:
    for found in ranks.run(3, workers.all_differing, ["function", "match"], [], seconds=30):
        assert [said for said, _, _ in found.values()] == ["", ""]


LATER = {
    "seed": "seed is 0 on rank 0, 9 on rank 1", "lr": r"\['lr'\] is 0.1 on rank 0, 0.3 on rank 1",
    "schedule": r"p\(t\) is 0.5 on rank 0, 0.75 on rank 1", "gamma": r"gamma\(t\) is 1.0 on rank 0, 1.5 on rank 1",
}  # fmt: skip


def test_a_later_difference_is_found_within_two_windows() -> None:
    cases = [(what, at, at + 203) for what in LATER for at in (1, 177)]
    first, last = ranks.run(2, workers.all_later, cases, seconds=100)
    assert first == [[]] * len(cases)
    for (what, at, _), (step, said) in zip(cases, last, strict=True):
        assert at < step <= at + 200
        assert "rank 1 and rank 0" in said and f"It came about after step {0 if at == 1 else 100}." in said
        assert re.search(LATER[what], said), said


def test_ranks_take_turns_to_look() -> None:
    *others, last = ranks.run(4, workers.later, "seed", 10, 120, seconds=60)
    assert others == [[], [], []] and last[0] == 105  # 100 + 2 + 3


def test_a_rank_that_takes_no_step() -> None:
    """It is named after the timeout, and the others go on."""
    found = ranks.run(3, workers.without_one, 6.0, False, False, seconds=60)
    assert [len(one["warnings"]) for one in found] == [1, 0, 0] and all(one["error"] == "" for one in found)
    assert found[0]["warnings"][0].startswith("rank 2 took no step with this optimizer within 6 s of rank 0")
    assert "join()" in found[0]["warnings"][0]
    assert found[0]["steps"] == found[1]["steps"] == 103 and 6 < found[0]["seconds"] < 30


@pytest.mark.parametrize("differs", [False, True])
def test_a_rank_that_comes_late_is_compared_too(differs: bool) -> None:
    """By itself when it comes, and by the first rank at its next look."""
    first, second, last = ranks.run(3, workers.without_one, 0.5, True, differs, seconds=60)
    assert second["error"] == ""
    for one in (first, last):
        assert ("rank 2 and rank 0" in one["error"] and "seed is 0 on rank 0, 7 on rank 2" in one["error"]) == differs


def test_the_first_rank_takes_no_step() -> None:
    first, *others = ranks.run(3, workers.first_one_missing, 0.5, seconds=60)
    assert first == ([], 0)
    for warned, steps in others:
        assert len(warned) == 1 and warned[0].startswith("rank 0 took no step") and steps == 3


def test_an_optimizer_that_one_rank_alone_has() -> None:
    """It is compared with another one: an error that says what to write, and what it says is right."""
    for said in ranks.run(2, workers.only_on_rank_0, "auto", seconds=30):
        assert "the number of parameters is 3 on rank 0, 2 on rank 1" in said and "None for this process alone" in said
    assert ranks.run(2, workers.only_on_rank_0, "none", seconds=30) == ["", ""]


def test_groups_of_ranks() -> None:
    for rank, (right, wrong) in enumerate(ranks.run(4, workers.in_subgroups, seconds=60)):
        assert right == ""
        a = rank // 2 * 2
        assert wrong.startswith(
            f"rank {a + 1} and rank {a}, the first of the process group, do not agree: seed is {a} on"
        )


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_process_groups_one_after_another(kind: str, tmp_path: Path) -> None:
    for first, second, third in ranks.run(2, workers.started_again, kind, str(tmp_path), seconds=60):
        assert first == third == "" and "seed is 0 on rank 0, 1 on rank 1" in second


def test_loading_is_compared() -> None:
    assert ranks.run(2, workers.loading, "same", 5.0, seconds=60) == [("", [])] * 2
    for said, _ in ranks.run(2, workers.loading, "another", 5.0, seconds=60):
        assert "steps is 5 on rank 0, 4 on rank 1" in said
    (_, warned), (_, others) = ranks.run(2, workers.loading, "one", 0.5, seconds=60)
    assert len(warned) == 1 and "rank 1 took no step" in warned[0] and "state_dict" in warned[0] and others == []


def test_old_keys_are_deleted() -> None:
    for first, most in ranks.run(3, workers.keys_in_store, 720, seconds=100):
        assert most <= first + 5


def test_copies() -> None:
    for given, auto, said in ranks.run(2, workers.copies, seconds=60):
        assert given == "None" and auto == "'auto'" and said == ""


def test_sam_takes_the_arguments() -> None:
    opt = SAM(workers.params_of(), torch.optim.SGD, lr=0.1, process_group=None, m_sharpness=True)
    assert opt.process_group is None and opt.m_sharpness and opt.rule is not None
    with pytest.raises(TypeError, match="a parameter group sets .*'process_group'"):
        SAM([{"params": workers.params_of(), "process_group": None}])


def test_alone_nothing_is_compared() -> None:
    opt = RST(workers.params_of(), **workers.OPTIONS)
    workers.step(opt)
    assert opt._step_state.check_at == math.inf and opt._step_state.agreement is None


@pytest.mark.parametrize("given", ["world", 3, -100, torch.device("cpu")])
def test_what_is_no_group(given: object) -> None:
    with pytest.raises(TypeError, match=r"process_group=.*: expected 'auto', None or a torch.distributed.ProcessGroup"):
        RST(workers.params_of(), process_group=given)


def test_ranks_that_nothing_keeps_together() -> None:
    """One is 350 steps ahead: it is compared when the other has come there, or says that it was not."""
    first, second = ranks.run(2, workers.out_of_step, 20.0, seconds=60)
    assert first[:2] == ([], "") and second[:2] == ([], "") and second[2] == 100
    _, (warned, said, _) = ranks.run(2, workers.out_of_step, 0.0, seconds=60)
    assert said == "" and warned and warned[0].startswith("rank 0 has not said where it stands since step 0")
