"""release_gradients=True when something fails: what was updated stays, all else goes back to its weights, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interrupts import Interrupt
from optimizer_cases import REFUSED_WITHIN_A_STEP, RefusedCall
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST
from rst_fused._step import release

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (0,), (33,), (7, 2)]
PROBLEM = Problem(SHAPES, 8)
MOST = 120  # stops per run
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "adam-mixed": {"base": "adam", "gamma": 2.0},
    "masters": {"base": "adamw", "master_weights": True, "dtype": torch.bfloat16},
    "remainders": {"momentum": 0.9, "master_weights": "remainder", "dtype": torch.bfloat16},
    "flags": {"momentum": 0.9, "dampening": 0.5},
}


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(release, "BUCKET", 60)
    yield 60


def make(mode: str, backend: str = "auto", **more: Any) -> tuple[list[nn.Parameter], RST]:
    options = {"schedule": 1.0, "rho": 0.5, "release_gradients": True, **MODES[mode], **more}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    return params, RST(params, backend=backend, **options)


def train(params: list[nn.Parameter], opt: RST, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        opt.step(lambda t=t: PROBLEM.backward(params, t))
        opt.zero_grad()


def each(params: list[nn.Parameter], opt: RST) -> list[Any]:
    """Weights and state by parameter."""
    return [(bits([p]), {k: bits([v]) for k, v in sorted(opt.state.get(p, {}).items())}) for p in params]


class Failing(torch.autograd.Function):
    error: type[BaseException] = ArithmeticError

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise Failing.error("in the middle of backward")


def fail(params: list[nn.Parameter], t: int, left_out: int = 2) -> None:
    """A backward that comes to an end before it comes to the first parameters: autograd begins with what was last."""
    for p in params:
        p.grad = None
    total = torch.zeros((), dtype=params[0].dtype)
    for i, (p, b) in enumerate(zip(params, PROBLEM.noise[t], strict=True)):
        total = total + (1.5 * p.square() + 0.5 * torch.cos(2 * p) - torch.tensor(b).to(p.dtype) * p).sum()
        if i == left_out - 1:
            total = Failing.apply(total)
    total.backward()


def check(params: list[nn.Parameter], opt: RST, before: list[Any], after: list[Any]) -> int:
    """Every parameter is as before the step or as after it; how many as after it."""
    now = each(params, opt)
    for i, (b, n, a) in enumerate(zip(before, now, after, strict=True)):
        assert n == a or n[0] == b[0] and n[1] == b[1], i
    return sum(n != b for b, n in zip(before, now, strict=True))


# --- exceptions -------------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize(("mode", "error"), [*((m, ArithmeticError) for m in MODES), ("sgd", KeyboardInterrupt)])
@pytest.mark.parametrize(
    "form", ["closure", "second_pass", "restore", "step", "base closure", "base restore", "base step"]
)
def test_exception_in_the_middle_of_a_backward(
    error: type[BaseException], form: str, mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    sam = "base" not in form
    params, opt = make(mode, backend)
    others, twin = make(mode, backend, release_gradients=False)
    for ps, o in ((params, opt), (others, twin)):
        train(ps, o, 2)
        o.schedule = float(sam)
    before = each(params, opt)
    train(others, twin, 1, 2)
    calls: list[int] = []

    def closure() -> None:
        calls.append(0)
        (PROBLEM.backward if sam and len(calls) == 1 else fail)(params, 2)

    with pytest.raises(error) as caught:
        if form.endswith("closure"):
            opt.step(closure)
        else:
            if sam:
                PROBLEM.backward(params, 2)
                assert opt.perturb()
            if form == "second_pass":
                with opt.second_pass():
                    fail(params, 2)
            else:
                fail(params, 2)
    if form.endswith("restore"):
        opt.restore()
    elif form.endswith("step"):
        words = r"(?s)step\(\) after a backward that ended with an exception.*zero_grad"
        with pytest.raises(RuntimeError, match=words) as caught:
            opt.step()
    if not form.endswith("restore"):
        assert "2 of 5 parameters had been updated by this step" in "".join(caught.value.__notes__)
        assert len(caught.value.__notes__) == 1
    updated = check(params, opt, before, each(others, twin))
    assert updated == 2 and each(params, opt)[3] != before[3] and each(params, opt)[4] != before[4]
    state = opt._step_state
    assert not (state.perturbed or state.saved or state.first_grads or state.waiting or state.released)
    assert (opt.steps, opt.sam_steps) == (2, 2)
    # It goes on from there, like one that never failed and has these weights and this state.
    fresh, clone = copy.deepcopy((params, opt))
    for ps, o in ((params, opt), (fresh, clone)):
        o.zero_grad()
        o.schedule = 1.0
        train(ps, o, 2, 2)
    assert each(params, opt) == each(fresh, clone) and opt.steps == clone.steps == 4


def test_the_same_draw_is_taken_again() -> None:
    params, opt = make("sgd", schedule=0.5)
    others, twin = make("sgd", schedule=0.5)
    drawn: list[list[bool]] = [[], []]
    for t in range(6):
        for i, (ps, o) in enumerate(((params, opt), (others, twin))):
            if i == 0:
                with pytest.raises(ArithmeticError):
                    opt.step(lambda t=t: fail(params, t))
                opt.zero_grad()
            drawn[i].append(o.draw())
            train(ps, o, 1, t)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2 and opt.steps == 6


@every_backend
@pytest.mark.parametrize("sam", [False, True])
def test_an_op_that_fails_changes_nothing(sam: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, opt = make("adam-mixed", backend)
    train(params, opt, 1)
    opt.schedule = float(sam)
    before = each(params, opt)

    def broken(*args: Any) -> None:
        raise ArithmeticError

    monkeypatch.setattr(type(opt.rule), "call", lambda *args: (broken, ()))
    with pytest.raises(ArithmeticError):
        train(params, opt, 1, 1)
    assert each(params, opt) == before and opt.steps == 1 and not opt._step_state.perturbed


@every_backend
@pytest.mark.parametrize("which", ["released", "left"])
def test_gradient_that_does_not_fit(which: str, backend: str) -> None:
    """A sparse one: refused within the backward, or by step() where it had not been asked for."""
    table = nn.Embedding(40, 2, sparse=True)
    if which == "left":
        table = nn.Embedding(3, 2, sparse=True)
    opt = RST(table.parameters(), schedule=0.0, backend=backend, release_gradients=True)
    before = bits([table.weight])
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 0 has layout torch.sparse_coo"):
        table(torch.tensor([1])).sum().backward()
        assert which == "left"
        opt.step()
    opt.restore()
    assert bits([table.weight]) == before and opt.steps == 0


CASES = {"sgd": "sgd", "adam-mixed": "adam-mixed", "masters": "masters", "flags": "flags", "base step": "adam-mixed"}
FORMS = [(case, "closure") for case in CASES] + [("sgd", "two phases"), ("base step", "two phases")]


def second_step(params: list[nn.Parameter], opt: RST, form: str, stop: int) -> tuple[int, bool]:
    """How many lines ran, and whether the step came to its end."""
    interrupt = Interrupt(stop)
    try:
        with interrupt:
            if form == "closure":
                opt.step(lambda: PROBLEM.backward(params, 1))
            else:
                PROBLEM.backward(params, 1)
                if opt.perturb():
                    PROBLEM.backward(params, 1)
                opt.step()
    except KeyboardInterrupt:
        opt.restore()  # in two phases the caller's part
        return interrupt.lines, False
    return interrupt.lines, True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "form"), FORMS)
def test_interrupt_at_every_line(case: str, form: str, backend: str) -> None:
    """Each parameter has all of its update, state and counter included, or nothing of it."""

    def started() -> tuple[list[nn.Parameter], RST]:
        params, opt = make(CASES[case], backend)
        train(params, opt, 1)
        opt.schedule = float(case != "base step")
        return params, opt

    params, opt = started()
    before = each(params, opt)
    count, ended = second_step(params, opt, form, 0)
    assert ended and count > 50
    after, found = each(params, opt), set()
    most = check(params, opt, before, after)
    for stop in [*range(1, count, 1 + count // MOST), count]:
        params, opt = started()
        _, ended = second_step(params, opt, form, stop)
        assert not ended, stop
        found.add(check(params, opt, before, after))
        state = opt._step_state
        assert not (state.perturbed or state.saved or state.waiting or state.released), stop
        assert opt.steps == 1 or check(params, opt, before, after) == most, stop
        opt.zero_grad()
        train(params, opt, 1, 2)
        assert all(p.isfinite().all() for p in params), stop
    assert {0, most} < found  # none of them, all, and some


# --- what is refused --------------------------------------------------------------------------------------------------
def test_several_gradients_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the remedy, whether its update has run or waits, and within accumulate_gradients() too."""
    for size in (1, 2**20):
        monkeypatch.setattr(release, "BUCKET", size)
        for sam in (False, True):
            for late in (False, True):
                params, opt = make("sgd", schedule=float(sam))
                before = bits(params)
                named = list(zip("abcde", params, strict=True))
                opt.param_groups[0]["param_names"] = [name for name, _ in named]
                if sam:
                    PROBLEM.backward(params, 0)
                    opt.perturb()
                params[3].sum().backward()
                with pytest.raises(RuntimeError, match=r"parameter 3 of group 0 \(d\) has another.*accumulate_grad"):
                    if late:
                        with opt.accumulate_gradients():
                            params[3].sum().backward()
                    else:
                        params[3].sum().backward()
                assert opt._releases.keeping == 0
                opt.restore()
                assert [a == b for a, b in zip(bits(params), before, strict=True)].count(False) == (size == 1)
                assert opt.steps == 0


def test_a_perturbation_in_the_middle_of_a_base_step() -> None:
    params, opt = make("sgd", schedule=0.0)
    others, twin = make("sgd", schedule=0.0)
    for ps in (params, others):
        PROBLEM.backward(ps, 0)
    with pytest.raises(RuntimeError, match=r"perturb\(fire=True\).*accumulate_gradients"):
        opt.perturb(fire=True)
    assert not opt.perturb() and not twin.perturb()
    opt.step()
    twin.step()
    assert each(params, opt) == each(others, twin) and opt.sam_steps == 0


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "clipping": ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 with release_gradients=True.*expected None"),
    "m_sharpness": ({"m_sharpness": True}, "release_gradients=True with m_sharpness=True"),
    "no flag": ({"release_gradients": "yes"}, "release_gradients"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments(what: str) -> None:
    given, words = ARGUMENTS[what]
    params = PROBLEM.parameters(torch.float32)
    with pytest.raises((ValueError, TypeError), match=words):
        RST(params, **{"release_gradients": True, **given})
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_other_refusals_of_arguments() -> None:
    params, opt = make("sgd")
    with pytest.raises(ValueError, match=r"(?s)max_grad_norm=2.0 with release_gradients=True"):
        opt.max_grad_norm = 2.0
    opt.max_grad_norm = None
    with pytest.raises(ValueError, match=r"an optimizer as base \(SGD\).*'sgd', 'adam', 'adamw' and 'lion'"):
        RST(base=torch.optim.SGD(PROBLEM.parameters(torch.float32)), release_gradients=True)
    with pytest.raises(TypeError, match="release_gradients"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "release_gradients": False})


def test_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by step(), which is where it is seen; what was released before is updated."""
    monkeypatch.setattr(release, "BUCKET", 150)
    params, opt = make("adam-mixed")
    train(params, opt, 1)
    before = bits(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    PROBLEM.backward(params, 1)
    opt.perturb()
    for p in params:
        p.grad = None
    scaler.scale(sum(p.square().sum() for p in params)).backward()
    with pytest.raises(RuntimeError, match="release_gradients=True with a GradScaler.*bfloat16") as caught:
        scaler.step(opt)
    assert "of 5 parameters had been updated" in caught.value.__notes__[0]
    assert "found_inf" not in vars(opt) and not opt._step_state.perturbed and opt.steps == 1
    assert [a == b for a, b in zip(bits(params), before, strict=True)] == [True, True, True, False, False]
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    opt.zero_grad()
    PROBLEM.backward(params, 1)
    opt.perturb()
    PROBLEM.backward(params, 1)
    disabled.step(opt)
    assert opt.steps == 2


IN_BETWEEN: dict[str, RefusedCall] = {**REFUSED_WITHIN_A_STEP, "replayed": lambda opt, ps: opt.replayed(False)}


@pytest.mark.parametrize("what", IN_BETWEEN)
def test_what_is_refused_between_a_backward_and_its_step(what: str) -> None:
    """Some parameters have taken a step that is not counted."""
    params, opt = make("adam-mixed", schedule=0.0)
    others, twin = make("adam-mixed", schedule=0.0)
    for ps in (params, others):
        PROBLEM.backward(ps, 0)
    with pytest.raises(RuntimeError, match=rf"{what.split('(')[0]}.* in the middle of a step.*restore\(\)"):
        IN_BETWEEN[what](opt, params)
    for o in (opt, twin):
        o.perturb()
        o.step()
    assert each(params, opt) == each(others, twin)
    opt.state_dict()


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params, opt = make("sgd")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    opt._on_gpu = True
    with pytest.raises(RuntimeError, match="release_gradients=True in the capture of a CUDA graph"):
        PROBLEM.backward(params, 0)


def test_compiled_perturb_and_step_run_outside_of_the_graph() -> None:
    params, opt = make("sgd", schedule=0.5)
    others, twin = make("sgd", schedule=0.5)

    def step(params: list[nn.Parameter], opt: RST, t: int, perturb: Any, update: Any) -> None:
        PROBLEM.backward(params, t)
        if perturb():
            PROBLEM.backward(params, t)
        update()

    perturb, update = (torch.compile(f, backend="eager") for f in (opt.perturb, opt.step))
    for t in range(4):
        step(params, opt, t, perturb, update)
        step(others, twin, t, twin.perturb, twin.step)
    assert each(params, opt) == each(others, twin) and 0 < opt.sam_steps < 4
    PROBLEM.backward(params, 4)
    for call, words in ((lambda: opt.perturb(fire=False), "perturb"), (lambda: opt.step(), "step")):
        with pytest.raises(Exception, match=rf"(?s){words}\(\) under torch.compile.*release_gradients=True"):
            torch.compile(call, backend="eager", fullgraph=True)()
