"""What the Triton backend reuses from one call to the next, and which changes it must notice. No kernel runs here."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_processes import MISSING, recorder

if MISSING is None:
    from triton.compiler import CompiledKernel
else:
    CompiledKernel = object
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HYPER = torch.tensor([[0.1, 0.9, 0.0, 0.01, 1.0]], dtype=torch.float64)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules, the requested launches, and how often lists were checked; nothing is remembered from before."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # CPU tensors are taken
    found = SimpleNamespace(launches=[], checked=0)
    for name in ("launch_groups", "device_cache", "multi_tensor_apply", "sgd_step"):
        setattr(found, name, importlib.import_module(f"rst_fused.kernels.{name}"))
    check_lists = found.launch_groups.check_lists

    def counted(*args: Any) -> None:
        found.checked += 1
        check_lists(*args)

    monkeypatch.setattr(found.launch_groups, "starter", recorder(found.launches))
    monkeypatch.setattr(found.launch_groups, "check_lists", counted)
    for module, names in ((found.launch_groups, ["_validated"]), (found.device_cache, ["_tables", "_scalars"])):
        for name in names:
            monkeypatch.setattr(module, name, type(getattr(module, name))())
    return found


Lists = dict[str, list[Tensor]]


def lists(repeat: int = 1) -> Lists:
    def tensors() -> list[Tensor]:
        return [torch.randn(shape) for shape in ((4, 6), (8,)) * repeat]

    return {"params": tensors(), "grads": tensors(), "buffers": tensors()}


def step(kernels: Any, given: Lists) -> list[list[int]]:
    """The record of each tensor in the table that the launch was given."""
    params, grads, buffers = given["params"], given["grads"], given["buffers"]
    args = (params, grads, [], [], buffers, [], HYPER, [len(params)], False, False, None, None, None, [], [])
    kernels.sgd_step.restore_sgd_step_(*args)
    _, _, _, (table, tensors, *_), *_ = kernels.launches[-1]
    width = kernels.multi_tensor_apply.HEADER.value + (5 if buffers else 4)  # addresses of one tensor
    return table[: tensors * width].view(tensors, width).tolist()


def addresses(given: Lists) -> list[list[int]]:
    return [
        [p.data_ptr(), p.data_ptr(), g.data_ptr(), 0, b.data_ptr()]
        for p, g, b in zip(given["params"], given["grads"], given["buffers"], strict=True)
    ]


def test_other_tensors_of_the_same_kind_are_not_checked_again_but_always_found(kernels: Any) -> None:
    held = [lists() for _ in range(3)]
    for given in (*held, *held):
        records = step(kernels, given)
        assert [r[5:] for r in records] == addresses(given)
        assert [r[:5] for r in records] == [[24, 24, 0, 0, 0], [8, 8, 0, 1, 1]]
    assert kernels.checked == 1 and len(kernels.device_cache._tables) == 3


def test_a_tensor_that_moved_is_noticed(kernels: Any) -> None:
    given = lists()
    step(kernels, given)
    given["grads"][1].data = torch.zeros(8)  # the same Python object
    assert [r[5:] for r in step(kernels, given)] == addresses(given)


def test_calls_that_take_turns_are_all_remembered(kernels: Any) -> None:
    """For example those of two models, or of steps in which some gradients are missing."""
    few, many = lists(), lists(3)
    for given in (few, many) * 3:
        assert [r[5:] for r in step(kernels, given)] == addresses(given)
    assert kernels.checked == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda g: g.double(), r"grads\[0\] is torch.strided of dtype torch.float64 on cpu"),
        (lambda g: g.to("meta"), r"grads\[0\] is torch.strided of dtype torch.float32 on meta"),
        (lambda g: g.to_sparse(), r"grads\[0\] is torch.sparse_coo"),
        (lambda g: g.view(6, 4), r"grads\[0\] does not have the shape of the parameter"),
        (lambda g: g.flatten(), r"grads\[0\] does not have the shape of the parameter"),
        (lambda g: g[:2], r"grads\[0\] does not have the shape of the parameter"),
    ],
    ids=["dtype", "device", "layout", "shape", "dimensions", "numel"],
)
def test_what_does_not_fit_is_refused_at_any_call(
    kernels: Any, change: Callable[[Tensor], Tensor], complaint: str
) -> None:
    given = lists()
    step(kernels, given)
    given["grads"][0] = change(given["grads"][0])
    with pytest.raises(RuntimeError, match=complaint):
        step(kernels, given)


def test_lists_of_another_length_are_noticed_at_any_call(kernels: Any) -> None:
    given = lists()
    buffers = given["buffers"]
    step(kernels, given)
    given["buffers"] = []
    without = [record[:-1] for record in addresses({**given, "buffers": buffers})]
    assert [r[5:] for r in step(kernels, given)] == without, "no buffers"
    given["buffers"] = buffers[:1]
    with pytest.raises(RuntimeError, match="buffers has 1 entries, expected 2"):
        step(kernels, given)


def test_written_tensors_with_shared_elements_are_refused_at_any_call(kernels: Any) -> None:
    given = lists()
    step(kernels, given)
    given["buffers"][0] = torch.randn(4, 1).expand(4, 6)
    with pytest.raises(RuntimeError, match=r"buffers\[0\] is written, but several of its elements share memory"):
        step(kernels, given)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.copy_(g.clone()).as_strided_((4, 6), (1, 4)),  # the same object at the same address
        lambda g: torch._neg_view(g),
        lambda g: torch.randn(4, 12)[:, ::2],
    ],
    ids=["strides", "neg", "gaps"],
)
def test_tensors_of_another_layout_pass_through_copies_at_any_call(
    kernels: Any, change: Callable[[Tensor], Tensor]
) -> None:
    given = lists()
    plain = addresses(given)
    assert [r[5:] for r in step(kernels, given)] == plain
    given["grads"][0] = change(given["grads"][0])
    first, second = [r[5:] for r in step(kernels, given)]
    assert first[2] != given["grads"][0].data_ptr() and second == plain[1]
    assert [first[i] for i in (0, 1, 3, 4)] == [plain[0][i] for i in (0, 1, 3, 4)]


def test_conjugate_views_pass_through_copies_at_any_call(kernels: Any) -> None:
    given = {name: [torch.randn(5, dtype=torch.complex64) for _ in range(2)] for name in lists()}
    assert [r[5:] for r in step(kernels, given)] == addresses(given)
    given["grads"][0] = given["grads"][0].conj()
    assert step(kernels, given)[0][7] != given["grads"][0].data_ptr()


def test_nothing_keeps_tensors_alive(kernels: Any) -> None:
    given = lists()
    step(kernels, given)
    watched = [weakref.ref(t) for tensors in given.values() for t in tensors]
    given.clear()
    gc.collect()
    assert [w() for w in watched] == [None] * 6


def test_without_the_comparison_of_torch_every_call_is_checked(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.launch_groups, "TensorGuards", None)
    given = lists()
    for _ in range(3):
        assert [r[5:] for r in step(kernels, given)] == addresses(given)
    assert kernels.checked == 3


def test_the_default_device_of_torch_does_not_matter(kernels: Any) -> None:
    """torch.set_default_device("cuda") must not create on a GPU what has to be sent there."""
    given = lists()
    with torch.device("meta"):
        assert [r[5:] for r in step(kernels, given)] == addresses(given)
    _, _, _, args, *_ = kernels.launches[-1]
    assert {x.device.type for x in args if isinstance(x, Tensor)} == {"cpu"}


# --- scalars --------------------------------------------------------------------------------------------------------
def test_the_same_scalars_are_sent_once(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, sent, meta = kernels.device_cache, [], torch.device("meta")
    monkeypatch.setattr(cache, "_upload", lambda host, device: sent.append(host) or host.to(device))
    monkeypatch.setattr(cache, "stream_of", lambda _: 0)
    rho, rng = torch.tensor([0.5], dtype=torch.float64), torch.tensor([3, 1])
    first = cache.on_device(meta, rho, rng)
    again = cache.on_device(meta, rho.clone(), rng.clone())
    assert len(sent) == 1 and all(a is b for a, b in zip(first, again, strict=True))
    rho[0] = 0.25  # the same tensor, another number
    cache.on_device(meta, rho, rng)
    for other in (0.0, -0.0):  # equal as numbers, not as bits
        cache.on_device(meta, torch.tensor([other], dtype=torch.float64), rng)
    cache.on_device(meta, rho)
    assert len(sent) == 5
    monkeypatch.setattr(cache, "stream_of", lambda _: 1)  # would not wait for a copy on another stream
    cache.on_device(meta, rho)
    assert len(sent) == 6
    for k in range(cache._MOST_KEPT + 5):
        cache.on_device(meta, torch.tensor([k]))
    assert len(cache._scalars) == cache._MOST_KEPT


# --- launches -------------------------------------------------------------------------------------------------------
class Binary(CompiledKernel):
    """As Triton makes them, but for what is on a GPU."""

    def __init__(self, starts: list[Any]) -> None:
        self.module, self.function, self.packed_metadata = object(), 11, (4, 1, 0)
        self.name, self.src = "a_kernel", None

        def run(*args: Any) -> None:
            starts.append(args)
            args[8](args[6])  # the hook that follows a launch, within the C call

        self._run = run


class Function:
    __name__ = "a_kernel"
    arg_names = ("table", "count", "T", "BLOCK")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.starts: list[Any] = []

    def warmup(self, *args: Any, **constants: Any) -> Binary:
        self.asked.append((args, constants))
        return Binary(self.starts)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on a GPU whose current stream is 7; and the driver of Triton sees it too."""
    found = importlib.import_module("rst_fused.kernels.launcher")
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(type(found.driver), "active", active)
    return found


def test_triton_is_asked_for_a_binary_once(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launches go to the binary, with all constants in the order of the kernel's arguments."""
    launch_groups = importlib.import_module("rst_fused.kernels.launch_groups")
    monkeypatch.setattr(launch_groups, "_launchers", {})
    cpu, function, noted = torch.device("cpu"), Function(), []

    def start(programs: int, block: int, warps: int = 4) -> None:
        constants = {"BLOCK": block, "T": "fp32"}
        launch_groups.starter(function, cpu, constants, warps)(programs, ("table", 7), noted.append)

    for programs in (3, 4):
        start(programs, 64)
    options = {"BLOCK": 64, "T": "fp32", "num_warps": 4, **launcher.OPTIONS}
    assert function.asked == [(("table", 7), {"grid": (3,), **options})]
    assert [(s[:3], s[9:]) for s in function.starts] == [((n, 1, 1), ("table", 7, "fp32", 64)) for n in (3, 4)]
    start(3, 32)
    start(3, 32, warps=8)
    assert len(function.asked) == 3, "other constants or warps are another binary"
    assert len(noted) == len(function.starts) == 4


def test_a_binary_is_started_as_triton_starts_it(launcher: Any) -> None:
    """With its arguments, on the current stream; only the hooks differ."""
    theirs: list[Any] = []
    Binary(theirs)[(3, 1, 1)]("table", 7, "fp32", 64)
    function, noted = Function(), []
    launcher.Launcher(function, torch.device("cpu"), {"BLOCK": 64, "T": "fp32"}, 4).start(3, ("table", 7), noted.append)
    (a,), (b,) = theirs, function.starts
    assert a[:6] == b[:6] == (3, 1, 1, 7, 11, (4, 1, 0)) and a[9:] == b[9:] == ("table", 7, "fp32", 64)
    assert len(noted) == 1


def test_profilers_hear_of_launches(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    runtime = launcher.knobs.runtime
    monkeypatch.setattr(runtime.launch_enter_hook, "calls", [lambda data: heard.append(f"enter {data.get()['name']}")])
    monkeypatch.setattr(runtime.launch_exit_hook, "calls", [lambda data: heard.append(f"exit {data.get()['name']}")])
    function = Function()
    start = launcher.Launcher(function, torch.device("cpu"), {"BLOCK": 64, "T": "fp32"}, 4).start
    start(3, ("table", 7), lambda data: heard.append("noted"))
    (args,) = function.starts
    args[7](args[6])  # which a launch calls first
    assert heard == ["noted", "exit a_kernel", "enter a_kernel"]


# --- what was begun -------------------------------------------------------------------------------------------------
def interrupted(launcher: Any, at: int, when: str, error: type[BaseException]) -> list[str]:
    """What ran of three launches, each with a call after it, when the one with number ``at`` was interrupted."""
    ran: list[str] = []

    def start(programs: int, args: Any, note: Callable[[Any], None]) -> None:
        fails = programs == at and f"tried {at}" not in tried
        tried.append(f"tried {programs}")
        if fails and when == "before":
            raise error
        ran.append(f"launch {programs}")
        note(None)
        if fails and when == "after":
            raise error

    tried: list[str] = []
    calls: list[Callable[[], Any]] = []
    for n in range(3):
        calls += [launcher.Launch(start, n, ()), partial(ran.append, f"after {n}")]
    with pytest.raises(error):
        launcher.run_all(calls)
    return ran


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_began_is_finished(launcher: Any, at: int, when: str) -> None:
    everything = [f"{what} {n}" for n in range(3) for what in ("launch", "after")]
    ran = interrupted(launcher, at, when, KeyboardInterrupt)
    assert ran == ([] if (at, when) == (0, "before") else everything)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_launch_that_fails_ends_a_call(launcher: Any, at: int) -> None:
    everything = [f"{what} {n}" for n in range(at) for what in ("launch", "after")]
    assert interrupted(launcher, at, "before", RuntimeError) == everything


def test_the_default_dtype_of_torch_does_not_matter(kernels: Any) -> None:
    """Without AMP, its stand-ins have the dtypes of what AMP passes: one binary serves both."""
    path = importlib.import_module("rst_fused.kernels.update").__file__
    spec = importlib.util.spec_from_file_location("rst_fused.kernels.loaded_again", path)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        spec.loader.exec_module(again)
        assert [t.dtype for t in again.scaling("sgd_step_", None, None)] == [torch.float32] * 2
    finally:
        torch.set_default_dtype(default)
