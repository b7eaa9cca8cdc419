"""Weights in bfloat16 and remainders on a GPU, without one: bit for bit what the CPU makes of them, and what master
copies become. See gpu_simulator."""

from __future__ import annotations

from typing import Any

import gpu_simulator
import op_db
import pytest
import torch
from gpu_simulator import aligned, tensors
from torch import Tensor

from rst_fused import ops
from rst_fused._op_arguments import ops_for
from rst_fused.reference import join, split

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F32, F64, BF16, I16 = torch.float32, torch.float64, torch.bfloat16, torch.int16
SIZES = (1100, 7)
RNG = (3, 2**40 + 4)
STATS = [2.0, 0.5, 0, 0, 0, 4.0]
Lists = dict[str, list[Tensor]]

# A tie, with either sign; the next exponent is reached, infinity too; zeros, the smallest numbers, and none at all.
SPECIAL = [
    0x3F808000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x3FFF8000, 0x3FFFFFFF, 0xBFFFFFFF, 0x7F7FFFFF, 0xFF7F8000, 0,
    0x80000000, 1, 0x80000001, 0x8000, 0x80008000, 0x007FFFFF, 0x00800000, 0x7F800000, 0xFF800000, 0x7FC00000,
    0x7F800001, 0xFFFFFFFF,
]  # fmt: skip


def special() -> Tensor:
    """The numbers of SPECIAL, and bits at random."""
    bits = torch.tensor(SPECIAL, dtype=torch.int64)
    random = torch.randint(0, 2**32, (2022,), generator=torch.Generator().manual_seed(5))
    bits = torch.cat([bits, random])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(F32)


def halves(w: list[Tensor]) -> Lists:
    """Weights as parameters and masters."""
    parts = [split(t) for t in w]
    return {"params": [b for b, _ in parts], "masters": [r for _, r in parts]}


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payload of a NaN, which the hardware chooses."""
    if a.dtype.is_floating_point:
        a, b = (torch.where(t.isnan(), torch.nan, t) for t in (a, b))
    return op_db.same_bits(a, b)


def check_alike(*results: Lists) -> None:
    for name in results[0]:
        for i, tensors_ in enumerate(zip(*(lists[name] for lists in results), strict=True)):
            assert all(same(tensors_[0], t) for t in tensors_[1:]), f"{name}[{i}]"


# --- grad_norm and perturb_ -----------------------------------------------------------------------------------------
def test_the_norm_of_asam_reads_remainders(simulator: gpu_simulator.Simulator) -> None:
    """In one call beside parameters that stand for themselves, as a plan makes it."""
    lists = halves([100 * t for t in tensors(17_000, 7, seed=1)])
    plain = [*tensors(300, dtype=BF16, seed=2), *tensors(300, seed=3)]
    params, masters = [*lists["params"], *plain], [*lists["masters"], *plain]
    grads = [g.to(p.dtype) for g, p in zip(tensors(17_000, 7, 300, 300, seed=4), params, strict=True)]
    norms = []
    for backend in ("simulated", "reference"):
        norms.append(torch.zeros(6, dtype=F64))
        ops_for(backend, grads).grad_norm(norms[-1], grads, params, masters, True, 0.01)
    torch.testing.assert_close(*norms, rtol=2 * gpu_simulator.NORM_ERROR, atol=0)
    # Without the remainders it is another one.
    ops_for("reference", grads).grad_norm(norms[1], grads, params, params, True, 0.01)
    assert abs(norms[0][0] / norms[1][0] - 1) > 4 * gpu_simulator.NORM_ERROR


def perturbed(backend: str, w: list[Tensor], in_gradient: bool = False, stats: Any = STATS, **options: Any) -> Lists:
    lists = halves(w)
    lists["grads"] = tensors(*(t.numel() for t in w), dtype=BF16, seed=9)
    lists["backups"] = lists["grads"] if in_gradient else [torch.empty_like(t) for t in lists["grads"]]
    ops.perturb_(**lists, stats=torch.tensor(stats, dtype=F64), rho=0.1, backend=backend, **options)
    return lists


@pytest.mark.parametrize("in_gradient", [False, True], ids=["backup", "in the gradient"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb(adaptive: bool, stochastic: bool, in_gradient: bool, simulator: gpu_simulator.Simulator) -> None:
    w = [*tensors(*SIZES, seed=1), special()]
    options: dict[str, Any] = {
        "adaptive": adaptive, "eta": 0.01, "stochastic_rounding": stochastic, "seed": 3, "step": 5, "first_index": 2
    }  # fmt: skip
    found = perturbed("simulated", w, in_gradient, **options)
    check_alike(found, perturbed("cpu", w, in_gradient, **options))
    check_alike(halves(w), {"params": found["backups"], "masters": found["masters"]})
    # The remainders count: w + e, rounded, is not what the parameters alone would give.
    without = perturbed("cpu", [b.float() for b in halves(w)["params"]], **options)
    assert not same(found["params"][0], without["params"][0])
    expected = "rst_perturb_bfloat16" + "_adaptive" * adaptive + "_remainder"
    assert [kernel for kernel, *_ in simulator.launches] == [expected]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shard", [(4, 0, 0), (5, 0, 0), (2**32 - 500, 0, 0), (0, 35, 71)])
def test_shards_are_rounded_as_on_the_cpu(
    shard: tuple[int, int, int], adaptive: bool, simulator: gpu_simulator.Simulator
) -> None:
    w = tensors(*SIZES, seed=1)
    options: dict[str, Any] = {"shards": [shard] * 2, "adaptive": adaptive}
    check_alike(perturbed("simulated", w, **options), perturbed("cpu", w, **options))
    assert simulator.launches[-1][0].endswith("_remainder_shard")


def test_without_a_direction_there_is_only_the_backup(simulator: gpu_simulator.Simulator) -> None:
    w = [special()]
    found = perturbed("simulated", w, stats=[torch.inf, 0, 1, 1, 0, torch.inf])
    check_alike(halves(w), {"params": found["backups"], "masters": found["masters"]})
    check_alike(halves(w), {"params": found["params"], "masters": found["masters"]})


# --- updates --------------------------------------------------------------------------------------------------------
RULES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sgd": ((), {"weight_decay": 0.05}),
    "momentum": (("momentum_buffers",), {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    "adam": (("exp_avgs", "exp_avg_sqs"), {"step": 3, "weight_decay": 0.05, "decoupled": True}),
    "amsgrad": (("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), {"step": 3}),
    "lion": (("exp_avgs",), {"weight_decay": 0.05}),
}
OPS = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "amsgrad": "adam", "lion": "lion"}


def update_lists(rule: str, w: list[Tensor], mixing: bool, rounding: bool, copies: bool = False) -> Lists:
    """With weights in backups, or in copies."""
    lists = halves(w)
    if copies:
        lists = {"params": lists["params"], "masters": [t.clone() for t in w]}
    else:
        lists["backups"] = [t.clone() for t in lists["params"]]
    for p in lists["params"]:
        p.fill_(torch.nan)  # perturbed: they must not matter
    sizes = [t.numel() for t in w]
    lists["grads"] = tensors(*sizes, dtype=BF16, seed=2)
    if mixing:
        lists["first_grads"] = tensors(*sizes, dtype=BF16, seed=3)
    for k, name in enumerate(RULES[rule][0]):
        lists[name] = [t.abs() for t in tensors(*sizes, dtype=BF16 if rounding and k == 0 else F32, seed=4 + k)]
    return lists


def updated(backend: str, rule: str, lists: Lists, **options: Any) -> Lists:
    lists = {name: [t.clone() for t in ts] for name, ts in lists.items()}
    given = {"backups": None, **lists, **RULES[rule][1], "lr": 0.01, "gamma": 1.7, **options}
    getattr(ops, f"restore_{OPS[rule]}_step_")(**given, backend=backend)
    return lists


@pytest.mark.parametrize("mixing", [False, True], ids=["", "mixing"])
@pytest.mark.parametrize(("rule", "rounding"), [(r, on) for r in RULES for on in (False, True)[: 1 + (r != "sgd")]])
def test_update(rule: str, rounding: bool, mixing: bool, simulator: gpu_simulator.Simulator) -> None:
    w = tensors(*SIZES, seed=1)
    options: dict[str, Any] = {"rng": RNG} if rounding else {}
    given = update_lists(rule, w, mixing, rounding)
    ours = updated("simulated", rule, given, **options)
    ((kernel, *_),) = simulator.launches
    assert "remainder" in kernel and gpu_simulator.rounds(kernel) == rounding and kernel.endswith("_mixing") == mixing
    check_alike(ours, updated("cpu", rule, given, **options))
    check_alike({name: given[name] for name in ("backups", "grads")}, ours)
    # What a master copy would be, and all else beside it.
    copied = updated("simulated", rule, update_lists(rule, w, mixing, rounding, copies=True), **options)
    kept = zip(ours["params"], ours["masters"], strict=True)
    check_alike({**ours, "masters": [join(b, r) for b, r in kept]}, {**ours, "masters": copied["masters"]})
    check_alike({name: ours[name] for name in RULES[rule][0]}, copied)
    assert not any(same(before, after) for before, after in zip(given["masters"], ours["masters"], strict=True))


@pytest.mark.parametrize("rule", ["sgd", "lion"])
def test_numbers_at_the_ends(rule: str, simulator: gpu_simulator.Simulator) -> None:
    """Where a step leaves the weights as they are, their halves stay; a NaN stays one, without a remainder."""
    w = [special()]
    lists = update_lists(rule, w, False, False)
    for name in ("grads", *RULES[rule][0]):
        lists[name][0].zero_()
    found = updated("simulated", rule, lists, weight_decay=0.0)
    check_alike(found, updated("reference", rule, lists, weight_decay=0.0))
    if rule == "lion":  # SGD makes a NaN of an infinity: 0 * inf decays it
        check_alike(halves(w), found)
    assert not found["masters"][0][w[0].isnan()].any() and w[0].isnan().any()
    # Ties go away from zero.
    assert found["params"][0].float()[:2].tolist() == [1 + 2**-7, -1 - 2**-7]
    assert found["masters"][0][:2].tolist() == [-(2**15)] * 2


def test_a_nan_of_any_bits_is_quiet_and_has_no_remainder(simulator: gpu_simulator.Simulator) -> None:
    """That of GPUs has all bits set, which rounding would turn into -0."""
    lists = update_lists("lion", [torch.zeros(9)], False, False)
    lists["backups"] = [torch.tensor([0x7FC1, 0x7FFF, -1] * 3, dtype=I16).view(BF16)]
    lists["masters"] = [torch.tensor([-1, 5, -7] * 3, dtype=I16)]
    found = updated("simulated", "lion", lists)
    assert op_db.bits(found["params"][0]).tolist() == [0x7FC0] * 9 and not found["masters"][0].any()


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_step_from_the_parameters_themselves(rule: str, simulator: gpu_simulator.Simulator) -> None:
    """Without backups: in steps without a perturbation."""
    lists = update_lists(rule, tensors(*SIZES, seed=1), False, False)
    lists["params"] = lists.pop("backups")
    check_alike(updated("simulated", rule, lists), updated("cpu", rule, lists))


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize(("rule", "rounding"), [("momentum", False), ("adam", True)])
def test_amp(
    rule: str, rounding: bool, found_inf: float, kernels: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by the kernel. With an overflow the parameter comes back, and nothing else changes."""
    given = update_lists(rule, tensors(*SIZES, seed=1), True, rounding)
    options: dict[str, Any] = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(found_inf), "rng": RNG}
    with gpu_simulator.simulated(kernels, monkeypatch, True):
        ours = updated("simulated", rule, given, **options)
    check_alike(ours, updated("cpu", rule, given, **options))
    if found_inf:
        check_alike({**given, "params": given["backups"]}, ours)
    else:
        assert not same(ours["masters"][0], given["masters"][0])


# --- restore_, layouts, launches ------------------------------------------------------------------------------------
def test_restore_is_a_copy(simulator: gpu_simulator.Simulator) -> None:
    b, r = split(special())
    p, kept = torch.zeros_like(b), r.clone()
    ops.restore_([p], [b], masters=[r], backend="simulated")
    assert op_db.same_bits(p, b) and op_db.same_bits(r, kept)
    assert [kernel for kernel, *_ in simulator.launches] == ["rst_restore_16_bits"]


PERTURB, ADAM = ("params", "grads", "backups", "masters"), ("exp_avgs", "exp_avg_sqs")


@pytest.mark.parametrize(
    ("op", "shifted"),
    [("norm", name) for name in ("grads", "params", "masters")] + [("perturb", name) for name in PERTURB]
    + [("adam", name) for name in (*PERTURB, *ADAM)] + [("rounding", name) for name in ("masters", "exp_avgs")],
)  # fmt: skip
def test_a_misaligned_operand(op: str, shifted: str, simulator: gpu_simulator.Simulator) -> None:
    """As views of buckets lie: the same results, and all others 16 bytes at a time."""
    n = 4096 + 9
    b, r = split(tensors(n, seed=1)[0])
    g, m, v = tensors(n, seed=2)[0], tensors(n, seed=3)[0], tensors(n, seed=4)[0].abs()
    values = {"params": b, "grads": g, "backups": b, "masters": r, "exp_avgs": m, "exp_avg_sqs": v}
    for offset in (1, 2):
        results = []
        for backend in ("simulated", "cpu"):
            lists: Lists = {}
            for name, value in values.items():
                at = offset if name == shifted else 0
                first = BF16 if op == "rounding" else F32
                dtype = {"masters": I16, "exp_avgs": first, "exp_avg_sqs": F32}.get(name, BF16)
                lists[name] = [aligned(n + at, dtype)[at:].copy_(value)]
            stats = torch.tensor(STATS, dtype=F64)
            some = {name: lists[name] for name in PERTURB}
            if op == "norm":
                del some["backups"]
                stats = ops.grad_norm(**some, adaptive=True, backend=backend)
            elif op == "perturb":
                ops.perturb_(**some, stats=stats, rho=0.1, backend=backend)
            else:
                ops.restore_adam_step_(**lists, step=2, rng=RNG, backend=backend)
            results.append(lists | {"stats": [stats]})
        torch.testing.assert_close(*(lists.pop("stats")[0] for lists in results), rtol=1e-6, atol=0)
        check_alike(*results)
        if op == "perturb":
            wide = 2 * (n // 8) * (3 - (shifted in ("params", "grads", "masters")))
            assert 2 * simulator.launches[-1][3]["ld_width"][16] == wide


def test_layouts_that_differ(simulator: gpu_simulator.Simulator) -> None:
    results = []
    for backend in ("simulated", "cpu"):
        b, r = split(tensors(12 * 40, seed=1)[0].view(12, 40))
        p, g = torch.zeros_like(b), tensors(12 * 40, dtype=BF16, seed=2)[0].view(40, 12).t()
        m, r = torch.ones(40, 12).t(), r.t().contiguous().t()
        ops.restore_lion_step_([p], [g], [b], [m], masters=[r], lr=0.01, backend=backend)
        results.append({"all": [p, g, b, m, r]})
    check_alike(*results)


def test_more_tensors_than_a_launch_takes(simulator: gpu_simulator.Simulator) -> None:
    n = 400
    given = update_lists("adam", tensors(*[5] * n, seed=1), False, False)
    check_alike(updated("simulated", "adam", given), updated("cpu", "adam", given))
    assert len(simulator.launches) == -(-n // gpu_simulator.capacity(simulator.launches[0][0])) == 2


def test_a_launch_that_fails_halfway_through_the_perturbation(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launch before it has perturbed goes back, from the backups."""
    n = gpu_simulator.capacity("rst_perturb_bfloat16_remainder") + 1
    lists = halves(tensors(*[5] * n, seed=1))
    before = {name: [t.clone() for t in ts] for name, ts in lists.items()}
    launch, moved = simulator.launch, []

    def failing(kernel: str, *args: Any) -> None:
        moved.append((kernel, not same(lists["params"][0], before["params"][0])))
        if len(moved) == 2:
            raise RuntimeError("out of memory")
        launch(kernel, *args)

    monkeypatch.setattr(simulator, "launch", failing)
    grads = tensors(*[5] * n, dtype=BF16, seed=2)
    stats = torch.tensor(STATS, dtype=F64)
    with gpu_simulator.simulated(simulator, monkeypatch), pytest.raises(RuntimeError, match="out of memory"):
        ops.perturb_(**lists, grads=grads, backups=grads, stats=stats, rho=0.5, backend="simulated")
    kernel = "rst_perturb_bfloat16_remainder"
    assert moved == [(kernel, False), (kernel, True), ("rst_restore_16_bits", True)]
    check_alike(before, lists)
