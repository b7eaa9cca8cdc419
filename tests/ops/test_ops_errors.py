"""Wrong arguments: an exception that names the argument, before anything is changed.

A row of ERRORS: what is wrong, the ops it concerns, the change that makes a right sample wrong, and the message.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS, OPS, Sample
from torch import Tensor

from rst_fused import _backends, ops
from rst_fused._schemas import SCHEMAS

on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
ALL = tuple(OPS)
SGD, ADAM, LION = ((f"{rule}_step_", f"restore_{rule}_step_") for rule in ("sgd", "adam", "lion"))
STEPS = (*SGD, *ADAM, *LION)
RESTORING_STEPS = tuple(op for op in STEPS if op.startswith("restore_"))
RESTORING = ("restore_", *RESTORING_STEPS)
WITH_PARAMS = tuple(op for op in OPS if "params" in OPS[op].lists)
WITH_GRADS = tuple(op for op in OPS if "grads" in OPS[op].lists)
WITH_GROUPS = tuple(op for op in OPS if "group_sizes" in OPS[op].arguments)

FINISH = ("finish_norm",)

Change = Callable[[Sample], Any]


class Wrong(NamedTuple):
    name: str
    ops: tuple[str, ...]
    change: Change
    match: str
    error: type[Exception] = ValueError
    lists: tuple[str, ...] = ()  # besides those the op has
    dtype: str = "float32"


def replace(name: str, new: Callable[[Tensor], Tensor], i: int = 1) -> Change:
    """Another tensor in place of the list's number ``i``."""

    def change(sample: Sample) -> None:
        sample.lists[name][i] = new(sample.lists[name][i])

    return change


def shorten(name: str) -> Change:
    return lambda sample: sample.lists[name].pop()


def remove(name: str) -> Change:
    """None instead of the list."""

    def change(sample: Sample) -> None:
        del sample.lists[name]
        sample.options[name] = None

    return change


def bare(name: str) -> Change:
    """One tensor instead of the list."""

    def change(sample: Sample) -> None:
        sample.options[name] = sample.lists.pop(name)[0]

    return change


def iterator(name: str) -> Change:
    """What can be read only once, as Module.parameters() gives it."""

    def change(sample: Sample) -> None:
        sample.options[name] = iter(sample.lists.pop(name))

    return change


def option(**options: Any) -> Change:
    return lambda sample: sample.options.update(options)


def turned(t: Tensor) -> Tensor:
    return torch.zeros(t.shape[::-1], dtype=t.dtype, device=t.device)


def sparse(t: Tensor) -> Tensor:
    return t.to_sparse()


def elsewhere(t: Tensor) -> Tensor:
    return t.to("meta")


def narrower(t: Tensor) -> Tensor:
    return t.to(torch.float16 if t.dtype == torch.float32 else torch.float32)


def sharing(one: str, other: str) -> Change:
    """The first tensor of one list and the second of the other have an element in common."""

    def change(sample: Sample) -> None:
        first, second = sample.lists[one][0], sample.lists[other][1]
        memory = torch.ones(first.numel() + second.numel() - 1, dtype=first.dtype, device=first.device)
        sample.lists[one][0] = memory[: first.numel()].view(first.shape)
        sample.lists[other][1] = memory[first.numel() - 1 :].view(second.shape)

    return change


def _companion(name: str, of: tuple[str, ...], dtype: str = "float32") -> list[Wrong]:
    """All that can be wrong with a list of tensors."""
    with_it = (name,) if name in ("first_grads", "momentum_buffers", "max_exp_avg_sqs", "masters") else ()
    with_it += ("grads",) if name == "first_grads" and of == ("restore_",) else ()
    rows = {
        "short": (shorten(name), f"{name} has 1 tensors, expected 2"),
        "shape": (replace(name, turned), rf"{name}\[1\] is \(5, 7\).*expected.*\(7, 5\).*\[1\]"),
        "dtype": (replace(name, narrower), rf"{name}\[1\] is .*float.*expected.*float"),
        "device": (replace(name, elsewhere), rf"{name}\[1\] is .* on meta, expected"),
        "sparse": (replace(name, sparse), rf"{name}\[1\] is .*sparse.*expected.*strided"),
    }
    return [Wrong(f"{name}_{what}", of, *row, lists=with_it, dtype=dtype) for what, row in rows.items()]


ERRORS = [
    *_companion("grads", ("perturb_", *STEPS)),
    *_companion("backups", ("perturb_", *RESTORING)),
    *_companion("first_grads", RESTORING_STEPS),
    *_companion("first_grads", ("restore_",)),
    *_companion("momentum_buffers", SGD),
    *_companion("exp_avgs", (*ADAM, *LION)),
    *_companion("exp_avg_sqs", ADAM),
    *_companion("max_exp_avg_sqs", ADAM),
    *_companion("masters", ("perturb_", "restore_", *STEPS), "bfloat16"),
    Wrong("integers", WITH_GRADS, replace("grads", lambda t: t.long()), r"\[1\] is .*int64"),
    Wrong("integer_params", WITH_PARAMS, replace("params", lambda t: t.long()), r"params\[1\] is .*torch.int64"),
    Wrong("sparse_params", WITH_PARAMS, replace("params", sparse), r"params\[1\] is .*sparse"),
    Wrong("sparse_grads", ("grad_norm",), replace("grads", sparse), r"grads\[1\] is .*sparse"),
    Wrong("masters_beside_float32", ("perturb_", "restore_", *STEPS), option(), "masters go with bfloat16 and float16",
          lists=("masters",)),
    Wrong("no_backups", ("perturb_", "restore_"), remove("backups"), "backups=None"),
    Wrong("no_buffers", SGD, option(momentum=0.9), "momentum_buffers=None with momentum=0.9"),
    Wrong("no_buffers_by_group", SGD, option(momentum=[0.0, 0.9], group_sizes=[1, 1]), "momentum_buffers=None"),
    Wrong("no_exp_avgs", (*ADAM, *LION), remove("exp_avgs"), "exp_avgs=None"),
    Wrong("no_exp_avg_sqs", ADAM, remove("exp_avg_sqs"), "exp_avg_sqs=None"),
    Wrong("adaptive_without_params", ("grad_norm",), option(adaptive=True), "params=None with adaptive=True"),
    Wrong("mixing_without_grads", ("restore_",), remove("grads"), "grads=None with first_grads",
          lists=("grads", "first_grads")),
    Wrong("groups_too_few", WITH_GROUPS, option(group_sizes=[1]), r"group_sizes=\[1\].* 2, one per parameter"),
    Wrong("groups_negative", WITH_GROUPS, option(group_sizes=[3, -1]), r"group_sizes=\[3, -1\]: expected counts >= 0"),
    *(
        Wrong(f"{name}_by_group", of, option(**{name: [2.0] * 3, "group_sizes": [1, 1]}), f"{name}=.* has 3 values")
        for name, of in (
            ("rho", ("perturb_",)), ("gamma", RESTORING), ("lr", STEPS), ("weight_decay", STEPS), ("dampening", SGD),
            ("beta1", (*ADAM, *LION)), ("beta2", (*ADAM, *LION)), ("eps", ADAM), ("step", ADAM),
        )
    ),
    *(
        Wrong(f"{name}_{value}", ("perturb_",), option(**{name: value}), f"{name}={value}: expected an integer")
        for name in ("seed", "step") for value in (-1, 2**63, 0.5, True)
    ),
    *(
        Wrong(f"shared_{one}_{other}", of, sharing(one, other), rf"{one}\[0\] and {other}\[1\] share memory",
              lists=() if other == "params" else (other,))
        for one, other, of in (
            ("params", "params", WITH_PARAMS), ("params", "backups", ("perturb_",)),
            ("params", "momentum_buffers", SGD), ("momentum_buffers", "momentum_buffers", SGD),
            ("params", "exp_avgs", (*ADAM, *LION)), ("exp_avgs", "exp_avg_sqs", ADAM),
            ("exp_avg_sqs", "max_exp_avg_sqs", ADAM),
        )
    ),
    Wrong("shared_grads", ("restore_",), sharing("params", "grads"), r"params\[0\] and grads\[1\] share memory",
          lists=("grads", "first_grads")),
    Wrong("iterator_params", WITH_PARAMS, iterator("params"), "params is a list_iterator: expected a list", TypeError),
    Wrong("iterator_grads", WITH_GRADS, iterator("grads"), "grads is a list_iterator: expected a list", TypeError),
    Wrong("no_params", WITH_PARAMS, remove("params"), "params=None: expected one tensor per parameter"),
    Wrong("no_grads", WITH_GRADS, remove("grads"), "grads=None: expected one tensor per parameter"),
    Wrong("none", WITH_GRADS, replace("grads", lambda t: None), r"grads\[1\] is NoneType: expected a ten", TypeError),
    Wrong("number", WITH_PARAMS, replace("params", lambda t: 3.0), r"params\[1\] is float: expected a ten", TypeError),
    *(
        Wrong(f"{name}_{what}", of, option(**{name: value}), match, error)
        for name, of in (
            ("rho", ("perturb_",)), ("gamma", RESTORING), ("lr", STEPS), ("weight_decay", STEPS), ("momentum", SGD),
            ("dampening", SGD), ("beta1", (*ADAM, *LION)), ("beta2", (*ADAM, *LION)), ("eps", ADAM), ("step", ADAM),
        )
        for what, value, match, error in (
            ("nan", math.nan, f"{name}=nan: expected a finite number", ValueError),
            ("word", "a", f"{name}='a': expected a number, got str", TypeError),
            ("pair", torch.ones(2), rf"{name} is a tensor of shape \(2,\): expected a number", ValueError),
        )
    ),
    Wrong("step_from_0", ADAM, option(step=0), "step=0: expected a finite number >= 1"),
    Wrong("eta", ("grad_norm", "perturb_"), option(eta=-1.0), r"eta=-1\.0: expected a finite number >= 0"),
    Wrong("nesterov", SGD, option(nesterov=True), "nesterov=True without momentum: expected momentum > 0"),
    *(
        Wrong(f"bare_{name}", of, bare(name), f"{name} is a (Tensor|Parameter): expected a l", TypeError, lists=more)
        for name, of, more in (
            ("params", WITH_PARAMS, ()), ("grads", WITH_GRADS, ()), ("backups", ("perturb_", *RESTORING), ()),
            ("exp_avgs", (*ADAM, *LION), ()), ("momentum_buffers", SGD, ("momentum_buffers",)),
            ("max_exp_avg_sqs", ADAM, ("max_exp_avg_sqs",)),
            ("masters", ("perturb_", "restore_", *STEPS), ("masters",)),
            ("first_grads", RESTORING, ("grads", "first_grads")),
        )
    ),
    Wrong("squares_float32", FINISH, option(squares=torch.zeros(2)), r"squares is \(2,\) torch.float32: expected"),
    Wrong("squares_gaps", FINISH, option(squares=torch.zeros(4).double()[::2]), r"squares is \(2,\) torch.float64"),
    Wrong("squares_table", FINISH, option(squares=torch.zeros(1, 1).double()), r"squares is \(1, 1\) torch.float64"),
    Wrong("squares_list", FINISH, option(squares=[1.0]), "squares is list: expected a tensor", TypeError),
    Wrong("stats_elsewhere", FINISH, option(stats=torch.zeros(6, device="meta")), "stats is on meta, expected cpu"),
    *(
        Wrong(f"shards_{what}", ("perturb_",), option(shards=value), match, error)
        for what, value, match, error in (
            ("few", [(0, 0, 0)], "shards=.*expected .offset, run, stride. for each of 2 parameters", ValueError),
            ("short", [(0, 0), (0, 0)], "shards=.*expected .offset, run, stride. for each of 2", ValueError),
            ("negative", [(0, 0, 0), (0, -1, 0)], r"shards\[1\]=-1: expected an integer", ValueError),
            ("fraction", [(0.5, 0, 0), (0, 0, 0)], r"shards\[0\]=0.5: expected an integer", ValueError),
        )
    ),
    Wrong("backend", ALL, option(), r"backend='gpu': expected 'auto' or one of \['cuda', 'cpu', 'triton', 'reference'"),
    Wrong("stats_short", ("grad_norm", "perturb_", *FINISH), option(stats=torch.zeros(5, dtype=torch.float64)), "stats",
          RuntimeError),
    Wrong("stats_float32", ("grad_norm", "perturb_", *FINISH), option(stats=torch.zeros(6)), "stats", RuntimeError),
    Wrong("found_inf_integer", STEPS, option(found_inf=torch.zeros(1, dtype=torch.int64)), "found_inf", RuntimeError),
    Wrong("grad_scale_float64", STEPS, option(grad_scale=torch.ones(1).double()), "grad_scale", RuntimeError),
]  # fmt: skip
# Numbers that live in tensors are checked where memory is at stake, by compiled kernels; torch reads any dtype.
COMPILED_ONLY = ("stats_short", "stats_float32", "found_inf_integer", "grad_scale_float64")
CASES = [
    pytest.param(op, wrong, *backend.values, id=f"{op}-{wrong.name}-{name}", marks=backend.marks)
    for wrong in ERRORS for op in wrong.ops for backend, name in zip(BACKENDS, BACKEND_IDS, strict=True)
    if backend.values[0] != "reference" or wrong.name not in COMPILED_ONLY
]  # fmt: skip


def right_sample(op: str, lists: tuple[str, ...] = (), dtype: str = "float32", device: str = "cpu") -> Sample:
    sample = op_db.build(OPS[op], op_db.Spec("right", "small", lists), dtype, device)
    for tensors in sample.lists.values():
        del tensors[2:], tensors[0]
        tensors.insert(0, torch.ones(3, dtype=tensors[0].dtype, device=device))
    return sample


@pytest.mark.parametrize(("op", "wrong", "backend", "device"), CASES)
def test_wrong_argument(op: str, wrong: Wrong, backend: str, device: str) -> None:
    sample = right_sample(op, wrong.lists, wrong.dtype, device)
    wrong.change(sample)
    tensors = [t for ts in sample.lists.values() for t in ts if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if t.layout == torch.strided and t.device.type != "meta"]
    before = [t.clone() for t in tensors]
    with pytest.raises(wrong.error, match=wrong.match):
        sample.run(op, "gpu" if wrong.name == "backend" else backend)
    assert all(torch.equal(t.nan_to_num(), old.nan_to_num()) for t, old in zip(tensors, before, strict=True))


@on_backends
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in WITH_PARAMS for name in OPS[op].written if name in OPS[op].lists]
)
def test_right_sample_and_expanded_outputs(op: str, name: str, backend: str, device: str) -> None:
    """The samples that the rows above spoil are right; and what is written must not overlap itself."""
    right_sample(op, device=device).run(op, backend)
    sample = right_sample(op, device=device)
    replace(name, lambda t: t[:1].expand(t.shape))(sample)
    before = sample.copied()
    with pytest.raises(RuntimeError, match="overlap|more than one element|share memory"):
        sample.run(op, backend)
    if backend != "reference":
        for kept, tensors in before.lists.items():
            assert all(op_db.same_bits(t, old) for t, old in zip(sample.lists[kept], tensors, strict=True))


def test_tensors_without_addresses_are_not_taken_for_one() -> None:
    """Meta tensors, and those that torch.func wraps."""
    meta = [[torch.ones(3, device="meta")] for _ in range(3)]
    stats = torch.zeros(6, dtype=torch.float64, device="meta")
    ops.perturb_(*meta, stats, rho=0.1, backend="reference")

    def step(w: Tensor, g: Tensor) -> Tensor:
        w = w.clone()
        ops.sgd_step_([w], [g], lr=0.5, backend="reference")
        return w

    w, g = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    assert torch.equal(torch.func.vmap(step)(w, g), w - 0.5 * g)


def test_unavailable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, a missing backend is an error that says how to get it; "auto" falls back and says so once."""
    missing = _backends.Backend("cpu", False, "the C++ extension is not built: pip install ...", ("cpu",), None)
    monkeypatch.setattr(_backends, "_CPU", missing)
    monkeypatch.setattr(_backends, "_BY_SPEED", (missing, _backends._REFERENCE))
    monkeypatch.setattr(_backends, "_said", set())
    with pytest.raises(RuntimeError, match="backend='cpu' was asked for but the C.. extension is not built: pip"):
        ops.grad_norm([torch.ones(2)], backend="cpu")
    with pytest.warns(RuntimeWarning, match="reference backend") as caught:
        assert ops.grad_norm([torch.ones(4)])[0] == 2
        assert ops.grad_norm([torch.ones(9)])[0] == 3
    assert len(caught) == 1


def test_calls_without_tensors() -> None:
    """A backend for GPUs has nothing to refuse then; an unknown or missing one is an error all the same."""
    triton = next(b for b in _backends.backends() if b.name == "triton")
    if triton.available:
        assert ops.grad_norm([], backend="triton").tolist() == [0] * 6
        ops.sgd_step_([], [], lr=0.1, backend="triton")
    with pytest.raises(ValueError, match="backend='gpu': expected 'auto' or one of"):
        ops.grad_norm([], backend="gpu")


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="the extension is not built")
def test_cpu_backend_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="backend='cpu' runs on .*meta"):
        ops.grad_norm([torch.ones(2, device="meta")], backend="cpu")


# --- the registered ops themselves ----------------------------------------------------------------------------------
W, H, B = (lambda: [torch.ones(3), torch.ones(2)]), torch.bfloat16, (lambda: [torch.ones(3), torch.ones(3)])
D5, D6, D1, STATS = (torch.zeros(n, dtype=torch.float64) for n in (5, 6, 1, 6))
RNG = torch.zeros(2, dtype=torch.int64)
RANDOM: tuple[Any, ...] = (True, RNG, 0, [])  # the last arguments of perturb_
NO_RNG: tuple[Any, ...] = (None, [], [])
AMP: tuple[Any, ...] = (None, None, *NO_RNG)
RESTORE: tuple[Any, ...] = (W(), W(), [], [])  # neither backups nor first gradients
RAW: list[tuple[str, tuple[Any, ...], str]] = [
    ("grad_norm", (STATS[:3], W(), [], [], False, 0.0), "stats has 3 elements"),
    ("grad_norm", (STATS.float(), W(), [], [], False, 0.0), "stats must be a contiguous tensor of dtype"),
    ("grad_norm", (torch.zeros(8, dtype=torch.float64)[::2], W(), [], [], False, 0.0), "stats must be a contiguous"),
    ("grad_norm", (STATS, W(), [], [], True, 0.0), "params has 0 entries, expected 2"),
    ("grad_norm", (STATS, W(), B(), [], True, 0.0), r"params\[1\] does not have the shape"),
    ("grad_norm", (STATS, [torch.ones(3, dtype=torch.int32)], [], [], False, 0.0), "has dtype"),
    ("perturb_", (W(), W()[:1], W(), [], STATS, D1, [2], False, 0.0, *RANDOM), "grads has 1 entries, expected 2"),
    ("perturb_", (W(), W(), [], [], STATS, D1, [2], False, 0.0, *RANDOM), "backups has 0 entries"),
    ("perturb_", (W(), B(), W(), [], STATS, D1, [2], False, 0.0, *RANDOM), r"grads\[1\] does not have the shape"),
    ("perturb_", (W(), W(), W(), [], STATS, D1, [1, 1], False, 0.0, *RANDOM), "rho has 1 elements, expected at"),
    ("perturb_", (W(), W(), W(), [], STATS, D1, [3], False, 0.0, *RANDOM), "group_sizes sum to 3"),
    ("perturb_", (W(), W(), W(), [], STATS, D5, [3, -1], False, 0.0, *RANDOM), "group_sizes holds -1"),
    ("perturb_", (W(), W(), W(), [], STATS, D1, [2], False, 0.0, True, RNG[:1], 0, []), "rng has 1 elements"),
    ("perturb_", (W(), W(), [], W(), STATS, D1, [2], False, 0.0, *RANDOM), "masters go with bfloat16 and float16"),
    ("perturb_", (W(), W(), W(), [], STATS[:5], D1, [2], False, 0.0, *RANDOM), "stats has 5 elements"),
    ("perturb_", (W(), W(), W(), [], STATS, D1, [2], False, 0.0, True, RNG, 0, [0] * 5), "shards has 5 numbers, expec"),
    ("perturb_", (W(), W(), W(), [], STATS, D1, [2], False, 0.0, True, RNG, 0, [0, 1, -1] * 2), "shards has 6 numbers"),
    ("finish_norm", (STATS[:5], D1), "stats has 5 elements"),
    ("finish_norm", (STATS, D1.float()), "squares must be a contiguous tensor of dtype"),
    ("finish_norm", (STATS, D6[::2]), "squares must be a contiguous tensor of dtype"),
    ("finish_norm", (STATS, D6.view(2, 3)), "squares has 2 dimensions, expected 1"),
    ("restore_", (W(), W()[:1], [], [], [], D1, [2]), "backups has 1 entries"),
    ("restore_", (W(), B(), [], [], [], D1, [2]), r"backups\[1\] does not have the shape"),
    ("restore_", (W(), W(), [], [], W(), D1, [2]), "grads has 0 entries"),
    ("restore_", (W(), W(), [], W(), W(), D1[:0], [2]), "gamma has 0 elements"),
    ("restore_", (W(), [t.double() for t in W()], [], [], [], D1, [2]), r"backups\[0\] has dtype"),
    ("restore_sgd_step_", (W(), W(), B(), [], [], [], D5, [2], False, False, *AMP), r"backups\[1\] does not have"),
    ("restore_sgd_step_", (W(), W(), [], B(), [], [], D5, [2], False, False, *AMP), r"first_grads\[1\] does not have"),
    ("restore_sgd_step_", (W(), W(), [], [], B(), [], D5, [2], False, False, *AMP), r"momentum_buffers\[1\] does not"),
    ("restore_sgd_step_", (W(), W(), [], [], [], [], D5[:4], [2], False, False, *AMP), "hyper has 4 elements"),
    ("restore_sgd_step_", (W(), W(), [], [], [], [], D5, [2], False, False, D1, None, *NO_RNG), "grad_scale must be"),
    ("restore_sgd_step_", (W(), W(), [], [], [], [], D5, [2], False, False, None, D1, *NO_RNG), "found_inf must be"),
    ("restore_sgd_step_", (*RESTORE, [], [], D5.float(), [2], False, False, *AMP), "hyper must be"),
    ("restore_adam_step_", (*RESTORE, [], W(), [], [], D6, D1, [2], False, False, *AMP), "exp_avgs has 0 entries"),
    ("restore_adam_step_", (*RESTORE, W(), B(), [], [], D6, D1, [2], False, False, *AMP), r"exp_avg_sqs\[1\] does"),
    ("restore_adam_step_", (*RESTORE, W(), W(), B(), [], D6, D1, [2], False, False, *AMP), r"max_exp_avg_sqs\[1\] d"),
    ("restore_adam_step_", (*RESTORE, W(), W(), [], [], D6, D1[:0], [2], False, False, *AMP), "steps has 0 elements"),
    ("restore_adam_step_", (*RESTORE, W(), W(), [], [], D5, D1, [2], False, False, *AMP),
     "hyper has 5 elements, expected at"),
    ("restore_lion_step_", (*RESTORE, [], [], D5, [2], False, *AMP), "exp_avgs has 0 entries"),
    ("restore_lion_step_", (*RESTORE, B(), [], D5, [2], False, *AMP), r"exp_avgs\[1\] does not have the shape"),
    ("restore_lion_step_", (*RESTORE, W(), [], D5[:4], [2], False, *AMP), "hyper has 4 elements, expected at"),
    ("restore_lion_step_", (*RESTORE, W(), [], D5, [2], False, D1, None, *NO_RNG), "grad_scale must be"),
]


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="no compiled kernels that could run out of bounds")
@pytest.mark.parametrize(("op", "args", "match"), RAW, ids=[f"{op}-{match[:24]}" for op, _, match in RAW])
def test_registered_ops_guard_memory(op: str, args: tuple[Any, ...], match: str) -> None:
    """torch.ops.rst_fused is open to anyone: whatever would be read or written out of bounds raises."""
    lists = [t for a in args if isinstance(a, list) for t in a if isinstance(t, Tensor)]
    before = [t.clone() for t in lists]
    with pytest.raises(RuntimeError, match=f"rst_fused::{op}: .*{match}"):
        getattr(torch.ops.rst_fused, op)(*args)
    assert all(torch.equal(t, old) for t, old in zip(lists, before, strict=True))


def test_raw_calls_cover_every_op() -> None:
    assert {op for op, _, _ in RAW} == set(SCHEMAS)
