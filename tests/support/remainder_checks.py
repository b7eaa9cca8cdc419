"""The Triton kernels with remainders: bfloat16 parameters that an int16 completes to float32.

Whatever they compute is what they compute beside float32 copies of the same weights, bit for bit, split; and, from
PTX, what the CPU kernels compute. Collected by test_triton_interpreter and test_triton_ptx, in processes where a plugin
runs the kernels on CPU tensors.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import op_db
import pytest
import torch
from torch import Tensor

from rst_fused import ops
from rst_fused.reference import join, split

pytestmark = pytest.mark.usefixtures("one_thread")
# Whether there is the extension; Triton's interpreter rounds twice where the CPU kernels and a GPU round once.
COMPARED = "cpu" in op_db.BACKEND_IDS and "executed_ptx" in sys.modules
SHAPES = ((40,), (0,), (8192 + 300,), (6, 5))
# Of weights: NaN of two kinds, infinities, zeros, what is between two bfloat16 and next to it, and numbers whose
# rounding carries into the exponent, in which the largest one becomes infinite.
SPECIAL = (
    0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x3F808000, 0xBF808000, 0x3F807FFF,
    0x3F808001, 0x3FFFFFFF, 0x3FFF8000, 0xBFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001, 0x0000FFFF, 0x007FFFFF,
)  # fmt: skip


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    special = torch.tensor(SPECIAL, dtype=torch.int64).to(torch.int32).view(torch.float32)
    made[0][: len(SPECIAL)] = made[2][-len(SPECIAL) :] = special
    return made


def gradients(seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


class Both(NamedTuple):
    """The same weights, with what completes the parameters, and as copies."""

    params: list[Tensor]
    remainders: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def made(cls) -> Both:
        params, remainders = (list(halves) for halves in zip(*map(split, weights()), strict=True))
        return cls(params, remainders, list(map(join, params, remainders)))


def copied(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(op_db.same_bits, a, b))


def same_numbers(a: list[Tensor], b: list[Tensor]) -> bool:
    """Likewise, but for the kinds of NaN, which processors choose."""
    quiet = [[t.where(t == t, 0) if t.is_floating_point() else t for t in tensors] for tensors in (a, b)]
    return same(*quiet) and all(torch.equal(x != x, y != y) for x, y in zip(a, b, strict=True))


def test_what_is_completed_has_all_bits() -> None:
    """But for the kinds of a NaN."""
    for w, copy in zip(weights(), Both.made().copies, strict=True):
        assert op_db.same_bits(torch.where(w.isnan(), torch.nan, w), copy)


@pytest.mark.parametrize("mixed", [False, True], ids=["remainders", "all kinds of masters"])
def test_norm(mixed: bool) -> None:
    """Of ASAM. A parameter without a master stands for it."""
    given, g = Both.made(), gradients(2)
    params, masters = [p.nan_to_num(0, 1, -1) for p in given.params], copied(given.remainders)
    copies = list(map(join, params, masters))
    if mixed:
        masters[0], params[3], g[3] = copies[0], copies[3], g[3].float()
        masters[3] = params[3]
        params[0] = torch.full_like(params[0], torch.nan)  # nobody reads it
    stats = torch.zeros(6, dtype=torch.float64)
    torch.ops.rst_fused_triton.grad_norm(stats, g, params, masters, True, 0.01)  # the ops take one kind of masters
    expected = ops.grad_norm([x.float() for x in g], copies, adaptive=True, eta=0.01, backend="reference")
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("zero", [False, True], ids=["", "without a norm"])
@pytest.mark.parametrize("own", [False, True], ids=["backup", "backup in the gradient"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb(adaptive: bool, stochastic: bool, own: bool, zero: bool) -> None:
    given, g = Both.made(), gradients(2)
    params, remainders, grads = copied(given.params), copied(given.remainders), copied(g)
    backups = grads if own else [torch.full_like(p, 7.0) for p in params]
    stats = torch.tensor([1.0, 0.0 if zero else 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {
        "rho": 0.01, "adaptive": adaptive, "eta": 0.01 if adaptive else 0.0, "stochastic_rounding": stochastic,
        "seed": 5, "step": 9, "first_index": 3,
    }  # fmt: skip
    ops.perturb_(params, grads, backups, stats, masters=remainders, **options, backend="triton")
    assert same(backups, given.params) and same(remainders, given.remainders)
    assert own or same(grads, g)
    expected = copied(given.params)
    ops.perturb_(expected, g, None, stats, masters=given.copies, **options, backend="triton")
    assert same(params, expected) and same(params, given.params) == zero
    if COMPARED:
        on_cpu = copied(given.params)
        ops.perturb_(on_cpu, g, copied(g), stats, masters=remainders, **options, backend="cpu")
        assert same_numbers(params, on_cpu)
    ops.restore_(params, backups, masters=remainders, backend="triton")
    assert same(params, given.params) and same(remainders, given.remainders)


ADAM: dict[str, Any] = {"lr": 0.01, "step": 5, "weight_decay": 0.1}
UPDATES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sgd": ("sgd", (), {"lr": 0.01}),
    "sgd-momentum": ("sgd", ("momentum_buffers",), {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": ("adam", ("exp_avgs", "exp_avg_sqs"), {**ADAM, "decoupled": True}),
    "amsgrad": ("adam", ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), {**ADAM, "maximize": True}),
    "lion": ("lion", ("exp_avgs",), {"lr": 0.01, "weight_decay": 0.1}),
}  # fmt: skip
OPTIONS = {
    "": {},
    "mixed": {"gamma": 0.5},
    "rounded state": {"rng": (7, 3), "indices": [4, 5, 6, 9]},
    "overflow": {"found_inf": torch.tensor(1.0), "grad_scale": torch.tensor(8.0)},
    "without a perturbation": {},
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("base", UPDATES)
def test_update(base: str, how: str) -> None:
    rule, names, numbers = UPDATES[base]
    options = {**numbers, **OPTIONS[how]}
    if how == "mixed":
        options["first_grads"] = gradients(4)
    given, grads = Both.made(), gradients(3)
    wide = [torch.bfloat16 if "rng" in options and i == 0 else torch.float32 for i in range(len(names))]
    state = {name: [t.abs() for t in gradients(5 + i, wide[i], 0.1)] for i, name in enumerate(names)}
    results: list[tuple[list[Tensor], list[Tensor], list[list[Tensor]]]] = []
    for backend in ("triton", "triton with copies", *(["cpu"] if COMPARED else [])):
        masters = given.copies if "copies" in backend else given.remainders
        params, kept, states = copied(given.params), copied(masters), {k: copied(v) for k, v in state.items()}
        first = [states.pop(name) for name in names if name in ("momentum_buffers", "exp_avgs", "exp_avg_sqs")]
        args: list[Any] = [params, grads]
        op = f"{rule}_step_"
        if how != "without a perturbation":
            op = f"restore_{op}"
            args.append(None if "copies" in backend else copied(params))
            for p in params:
                p.fill_(torch.nan)  # the perturbed weights do not matter
        getattr(ops, op)(*args, *first, **states, masters=kept, **options, backend=backend.split()[0])
        results.append((params, kept, [*first, *states.values()]))
    (params, remainders, states_beside), (_, copies, states_of_copies), *on_cpu = results
    b, r = (list(halves) for halves in zip(*map(split, copies), strict=True))
    assert same(params, b) and same(remainders, r)
    assert all(map(same, states_beside, states_of_copies))
    assert same(params, given.params) == (how == "overflow")
    for params_there, remainders_there, states_there in on_cpu:
        assert same_numbers(params, params_there) and same(remainders, remainders_there)
        assert all(map(same_numbers, states_beside, states_there))


@pytest.mark.parametrize("columns", [(0, 91), (91, 250)])
def test_shards_are_rounded_as_slices_of_the_whole(columns: tuple[int, int]) -> None:
    """The weights by perturb_, and a first state by an update."""
    a, b = columns
    w, g, m = (torch.randn((40, 250), generator=torch.Generator().manual_seed(i)) for i in range(3))
    stats, found = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64), []
    for piece, shard in ((slice(None), None), (slice(a, b), [(a, b - a, 250)])):
        halves = split(w[:, piece].contiguous())
        (p, r), grad, buffer = halves, g[:, piece].bfloat16(), m[:, piece].bfloat16()
        backup = torch.empty_like(p)
        options: dict[str, Any] = {"masters": [r], "shards": shard, "backend": "triton"}
        ops.perturb_([p], [grad], [backup], stats, rho=0.5, seed=5, step=9, **options)
        perturbed = p.clone()
        ops.restore_sgd_step_([p], [grad], [backup], [buffer], lr=0.5, momentum=0.9, rng=(7, 3), **options)
        found.append([perturbed, p, r, buffer])
    assert same([t[:, a:b] for t in found[0]], found[1])


def test_layouts_that_differ() -> None:
    """Backups, remainders and parameters with strides of their own: copies go through, and back."""
    w = torch.randn(30, 20)
    (b, r), g = split(w), torch.randn(30, 20).bfloat16()
    params, remainders, backups = [b.t().contiguous().t()], [torch.stack([r, r], -1)[..., 0]], [torch.zeros_like(b)]
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
    ops.perturb_(params, [g], backups, stats, rho=0.5, masters=remainders, backend="triton")
    assert op_db.same_bits(backups[0], b) and op_db.same_bits(remainders[0], r)
    ops.restore_sgd_step_(params, [g], backups, lr=0.5, masters=remainders, backend="triton")
    expected = torch.addcmul(w.double(), g.double(), torch.tensor(-0.5, dtype=torch.float64)).float()
    assert op_db.same_bits(join(params[0].contiguous(), remainders[0].contiguous()), expected)


@pytest.mark.parametrize(
    ("dtype", "complaint"),
    [(torch.float16, "int16 masters, which are remainders, go with bfloat16 parameters, but parameter 0 has dtype"),
     (torch.float32, "masters go with bfloat16 and float16 parameters, but parameter 0 has dtype torch.float32")],
)  # fmt: skip
def test_of_other_parameters(dtype: torch.dtype, complaint: str) -> None:
    p, r = [torch.ones(3, dtype=dtype)], [torch.zeros(3, dtype=torch.int16)]
    stats, hyper = torch.zeros(6, dtype=torch.float64), torch.zeros((1, 5), dtype=torch.float64)
    triton = torch.ops.rst_fused_triton
    with pytest.raises(RuntimeError, match=complaint):
        triton.grad_norm(stats, p, p, r, True, 0.0)
    with pytest.raises(RuntimeError, match=complaint):
        triton.perturb_(p, p, p, r, stats, torch.ones(1).double(), [1], False, 0.0, False, torch.zeros(2).long(), 0, [])
    with pytest.raises(RuntimeError, match=complaint):
        triton.restore_sgd_step_(p, p, p, [], [], r, hyper, [1], False, False, None, None, None, [], [])


@pytest.mark.parametrize("master", [torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("what", ["perturb", "update", "restore"])
def test_masters_that_kernels_would_take_for_others_are_refused(what: str, master: torch.dtype) -> None:
    """By the raw ops: of parameters that are as wide there are none."""
    raw, p, g = torch.ops.rst_fused_triton, torch.ones(9), torch.ones(9)
    masters, one = [torch.ones(9).to(master)], torch.ones(1, dtype=torch.float64)
    stats, rng = torch.ones(6, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="masters.*go with|expected"):
        if what == "perturb":
            raw.perturb_([p], [g], [], masters, stats, one, [1], False, 0.0, True, rng, 0, [])
        elif what == "restore":
            raw.restore_([p], [], masters, [], [], one, [1])
        else:
            hyper = torch.ones(1, 5, dtype=torch.float64)
            raw.restore_sgd_step_([p], [g], [], [], [], masters, hyper, [1], False, False, None, None, None, [], [])
    assert p.eq(1).all()
