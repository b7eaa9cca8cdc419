"""docs/finetuning.md: its script as it stands, on ranks and alone, what it costs, and what is said about clipping."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import finetuning_on_ranks as finetuning
import pytest
import ranks
import torch
import torch.distributed as dist
from ddp_on_ranks import difference

from rst_fused import RST
from rst_fused.schedule import draw

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

RANKS = 2
STEPS = 6
MICROS = 32  # on each rank
# eps: with the usual one AdamW makes a step of size lr of the rounding of a gradient near 0, as that of a key's bias.
COMMON = (
    "--dtype", "fp32", "--eps", "1e-4", "--schedule", "linear", "--cost", "1.5", "--steps", str(STEPS), "--warmup", "2",
    "--every", "100", "--micro-batches",
)  # fmt: skip
# Sums of 64 gradients in another order: an error of 2^-24 in each, which eps keeps from growing.
TOLERANCE = 1e-6
WHOLE, FEW = (*COMMON, str(RANKS * MICROS)), (*COMMON, "8")
RUNS = {
    "ddp": (*WHOLE, "--wrap", "ddp"),
    "fsdp": (*WHOLE, "--wrap", "fsdp", "--form", "phases"),
    "ddp, gamma": (*FEW, "--wrap", "ddp", "--form", "phases", "--gamma", "1.5"),
    "fsdp, gamma": (*FEW, "--wrap", "fsdp", "--gamma", "1.5"),
    "fsdp, zero 3": (*FEW, "--wrap", "fsdp", "--zero", "3", "--gamma", "1.5"),
}


@functools.cache
def on_ranks() -> dict[str, list[dict[str, Any]]]:
    """By run, the results of each rank."""
    results = ranks.run(RANKS, finetuning.run_all, *RUNS.values(), seconds=100)
    return {name: [of_rank[i] for of_rank in results] for i, name in enumerate(RUNS)}


@functools.cache
def alone() -> dict[bool, dict[str, Any]]:
    """On one process; by whether it is a run with gamma."""
    (results,) = ranks.run(1, finetuning.run_all, RUNS["ddp"], RUNS["ddp, gamma"], seconds=100)
    return dict(zip((False, True), results, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_one_process(name: str) -> None:
    expected = alone()["--gamma" in RUNS[name]]
    draws = [draw(0, t, p) for t, p in enumerate(expected["p"])]
    assert any(draws) and not all(draws)
    for result in on_ranks()[name]:
        assert result["steps"] == STEPS and result["kinds"] == draws and result["sam_steps"] == sum(draws)
        assert difference(result["weights"], expected["weights"]) <= TOLERANCE
        assert result["held_out"] == pytest.approx(expected["held_out"], rel=1e-6)
        assert result["rates"] == expected["rates"] and result["rates"][0] < result["rates"][1] > result["rates"][-1]
        first = on_ranks()[name][0]
        assert result["drift"] == 0.0 and difference(result["weights"], first["weights"]) == 0.0
        assert result["norm"] == first["norm"] and result["held_out"] == first["held_out"]


@pytest.mark.parametrize("name", RUNS)
def test_collectives(name: str) -> None:
    """In calls and bytes, as the table of the page has them."""
    groups, micros = 3, 8 // RANKS  # two blocks, and what is in none; the run in which micro-batches count has few
    for result in on_ranks()[name]:
        size = result["whole"]
        for sam, counted in zip(result["kinds"], result["collectives"], strict=True):
            passes = 2 if sam else 1
            counted = {kind: sizes for kind, sizes in counted.items() if kind != "broadcast_"}  # DDP's buckets, once
            calls = {kind: len(sizes) for kind, sizes in counted.items()}
            nbytes = {kind: sum(sizes) for kind, sizes in counted.items()}
            if "ddp" in name:
                assert calls == {"all-reduce": 1 + passes} and nbytes == {"all-reduce": 8 + passes * size}
                continue
            norms = 8 * (1 + sam)
            assert calls["all-reduce"] == 2 + sam and nbytes["all-reduce"] == 8 + norms
            times = micros if "zero 3" in name else 1
            gathers = 2 * times if "zero 3" in name else 1
            assert calls["reduce-scatter"] == passes * times * groups
            assert nbytes["reduce-scatter"] == passes * times * size
            assert calls["all-gather"] == passes * gathers * groups
            assert nbytes["all-gather"] == passes * gathers * size


@pytest.mark.parametrize("name", RUNS)
def test_the_backup_is_as_large_as_the_part_of_a_rank(name: str) -> None:
    kept = [sum(result["kept"][:1]) for result in on_ranks()[name]]
    assert kept == [result["local"] for result in on_ranks()[name]]
    assert sum(kept) == on_ranks()[name][0]["whole"] * (RANKS if "ddp" in name else 1)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_resumes_in_the_middle(wrap: str, tmp_path: Path) -> None:
    """In bf16, to the same bits, and by the other wrapper with the same draws."""
    common = (
        "--dtype", "bf16", "--steps", "8", "--schedule", "constant", "--cost", "1.5", "--micro-batches", "8",
        "--every", "4", "--warmup", "2", "--gamma", "1.5", "--eps", "1e-4",
    )  # fmt: skip
    other = "fsdp" if wrap == "ddp" else "ddp"
    resume = (*common, "--resume", "--every", "100", "--checkpoints", str(tmp_path / "b"))
    results = ranks.run(
        RANKS,
        finetuning.run_all,
        (*common, "--wrap", wrap, "--checkpoints", str(tmp_path / "a")),
        (*common, "--wrap", wrap, "--checkpoints", str(tmp_path / "b"), "--stop-at", "4"),
        (*resume, "--wrap", wrap),
        (*resume, "--wrap", other),
        seconds=100,
    )
    (alone,) = ranks.run(1, finetuning.run_all, (*resume, "--wrap", wrap), seconds=100)
    for whole, half, resumed, by_other in results:
        assert half["steps"] == 4 and whole["steps"] == resumed["steps"] == 8
        assert any(whole["kinds"][:4]) and any(whole["kinds"][4:]) and not all(whole["kinds"][4:])
        assert resumed["kinds"] == whole["kinds"][4:] and resumed["rates"] == whole["rates"][4:]
        for what in ("weights", "state"):
            assert difference(resumed[what], whole[what]) == 0.0
        assert (resumed["sam_steps"], resumed["held_out"]) == (whole["sam_steps"], whole["held_out"])
        for later in (by_other, alone[0]):
            assert later["kinds"] == resumed["kinds"] and later["sam_steps"] == resumed["sam_steps"]
            assert difference(later["weights"], whole["weights"]) <= 1e-4  # bf16: rounded at other places
    if wrap == "fsdp":
        counted = results[0][0]["collectives"][0]
        assert sum(counted["all-gather"]) == results[0][0]["whole"] // 2  # bf16
        assert sum(counted["reduce-scatter"]) == results[0][0]["whole"]  # fp32


def test_late_schedules_take_the_cost_that_was_asked_for() -> None:
    """With the script's own settings, but few micro-batches."""
    arguments = ("--micro-batches", "2", "--every", "100", "--steps", "8")
    (results,) = ranks.run(1, finetuning.run_all, arguments, seconds=120)
    assert results[0]["kinds"] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_first_pass_that_fsdp_has_not_reduced_is_refused(mixed: bool, replaced: bool) -> None:
    for said, moved, perturbed in ranks.run(RANKS, finetuning.unreduced, mixed, replaced, seconds=60):
        assert "set_requires_gradient_sync(False)" in said and moved == 0.0 and perturbed


# --- clip_grad_norm_ by hand ------------------------------------------------------------------------------------------
C = 0.01


def passes(clip: str, gamma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one SAM step of SGD with lr 1, clipped in these passes: what it applied, e, g1 and g2 as autograd has them."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(40))
    x, y = torch.randn(16, 40), torch.randn(16)
    opt = RST([w], lr=1.0, schedule=1.0, gamma=gamma, rho=0.1)
    before, grads = w.detach().clone(), []
    for number in ("first", "second"):
        (x @ w - y).square().mean().backward()
        grads.append(w.grad.clone())
        if number in clip:
            torch.nn.utils.clip_grad_norm_([w], C)
        if number == "first":
            opt.perturb()
            e = w.detach() - before
    opt.step()
    return before - w.detach(), e, grads[0], grads[1]


def clipped(g: torch.Tensor) -> torch.Tensor:
    assert g.norm() > C
    return g * (C / (g.norm() + 1e-6))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("clip", ["", "first", "second", "first and second"])
def test_what_is_applied(clip: str, gamma: float) -> None:
    applied, e, g1, g2 = passes(clip, gamma)
    assert near(e, 0.1 * g1 / g1.norm())  # whether clipped or not
    one = clipped(g1) if "first" in clip else g1
    two = clipped(g2) if "second" in clip else g2
    assert near(applied, (1 - gamma) * one + gamma * two)
    if clip == "first and second":
        assert applied.norm() <= (abs(1 - gamma) + gamma) * C * 1.001


@pytest.mark.parametrize("after", ["first", "second"])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_with_a_scaler(after: str, gamma: float) -> None:
    """unscale_ after the second pass is right with gamma = 1; after the first, the second gradient stays scaled."""
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = RST([w], lr=1.0, schedule=1.0, gamma=gamma, rho=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in ("first", "second"):
        scaler.scale(w.sum()).backward()
        if number == after:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_([w], 100.0)
        if number == "first":
            opt.perturb()
    if gamma != 1.0:
        with pytest.raises(RuntimeError, match="unscale_.*gamma != 1"):
            scaler.step(opt)
        return
    scaler.step(opt)
    assert w.tolist() == ([2.0, 3.0] if after == "second" else [-5.0, -4.0])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1.6e-7), (torch.bfloat16, 9e-3)])
def test_restoring_by_subtraction_drifts_and_a_backup_does_not(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    w = torch.nn.Parameter((torch.randn(10000) * 0.02).to(dtype))
    before, by_hand = w.detach().clone(), w.detach().clone()
    opt = RST([w], lr=0.0, schedule=1.0)
    for _ in range(1000):
        g = torch.randn(w.shape)
        e = (0.05 * g / g.norm()).to(dtype)
        by_hand.add_(e).sub_(e)
        w.grad = g.to(dtype)
        opt.perturb()
        w.grad = g.to(dtype)
        opt.step()
    assert torch.equal(w.detach(), before)
    assert float((by_hand != before).float().mean()) == pytest.approx(0.62, abs=0.03)
    assert float((by_hand - before).double().norm() / before.double().norm()) == pytest.approx(error, rel=0.2)
