"""The optimizer on GPU kernels, without a GPU: every step as on the CPU, bit for bit, in three launches."""

from __future__ import annotations

import re
import warnings
from typing import Any

import gpu_simulator
import op_db
import pytest
import torch

from rst_fused import RST, _backends, ops
from rst_fused._backends import driver_problem, has_machine_code, has_ptx
from rst_fused.reference import join

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((5, 7), (300,), (2, 3, 4, 4), ())


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
    return params


def give_grads(params: list[torch.nn.Parameter], seed: int, missing: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        p.grad = None if i in missing else grad


def take_steps(opt: RST, params: list[torch.nn.Parameter], steps: int, missing: tuple[int, ...] = ()) -> None:
    for t in range(steps):
        give_grads(params, 2 * t)
        if opt.perturb():
            give_grads(params, 2 * t + 1, missing if t % 2 else ())
        opt.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "grst": {"momentum": 0.9, "nesterov": True, "gamma": "match"},
    "asam": {"adaptive": True, "eta": 0.01},
    "adamw": {"base": "adamw", "gamma": 2.0},
    "adam maximize": {"base": "adam", "maximize": True, "weight_decay": 0.1},
    "masters": {"momentum": 0.9, "master_weights": True},
    "remainders": {"base": "adamw", "master_weights": "remainder", "adaptive": True},
    "state": {"base": "adamw", "amsgrad": True, "state_dtype": BF16},
    "state beside masters": {"base": "lion", "gamma": 2.0, "master_weights": True, "state_dtype": BF16},
}


def in_full(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The weights that a remainder completes, of which it says little by itself; other state as it is."""
    return join(p.detach(), value) if value.dtype == torch.int16 else value


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("missing", [(), (1,)], ids=["all", "one missing"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_as_on_the_cpu(
    options: dict[str, Any], missing: tuple[int, ...], dtype: torch.dtype, simulator: gpu_simulator.Simulator
) -> None:
    results = []
    for backend in ("simulated", "cpu"):
        params = parameters(dtype)
        opt = RST(params, lr=0.05, rho=0.1, schedule=0.7, backend=backend, **options)
        take_steps(opt, params, 5, missing)
        results.append([*params, *(in_full(p, v) for p in params for v in opt.state[p].values())])
    assert opt.sam_steps in (3, 4)
    for ours, theirs in zip(*results, strict=True):
        # The norm is summed in another order, so e and what follows from it may differ in the last bits.
        tolerance = 2.0**-6 if ours.dtype == BF16 else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"base": "adamw"}, {"gamma": 2.0}])
def test_three_launches_per_sam_step_and_one_per_base_step(
    options: dict[str, Any], simulator: gpu_simulator.Simulator
) -> None:
    params = parameters(F32)
    opt = RST(params, lr=0.05, schedule=1.0, backend="simulated", **options)
    take_steps(opt, params, 1)
    simulator.launches.clear()
    take_steps(opt, params, 1)
    assert [name.split("_float32")[0] for name, *_ in simulator.launches][:2] == ["rst_grad_norm", "rst_perturb"]
    assert len(simulator.launches) == 3
    simulator.launches.clear()
    give_grads(params, 0)
    opt.perturb(False)
    opt.step()
    assert len(simulator.launches) == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_restore_is_bit_exact(dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    opt = RST(params, lr=0.05, backend="simulated")
    for t in range(2):
        give_grads(params, t)
        assert opt.perturb(True)
        assert not all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
        opt.restore()
        assert all(op_db.same_bits(p.detach(), w) for p, w in zip(params, before, strict=True))


def test_a_gradient_that_lies_otherwise(simulator: gpu_simulator.Simulator) -> None:
    """Kernels want tensors that lie alike: the ops copy what does not, and the plan steps aside."""
    results = []
    for backend in ("simulated", "cpu"):
        params = parameters(F32)
        opt = RST(params, lr=0.05, schedule=1.0, backend=backend)
        for t in range(3):
            for seed in (2 * t, 2 * t + 1):
                give_grads(params, seed)
                params[2].grad = params[2].grad.contiguous() if t == 1 else params[2].grad  # type: ignore[union-attr]
                if seed % 2 == 0:
                    assert opt.perturb()
            opt.step()
        results.append([p.detach() for p in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_failing_launch_brings_the_weights_back(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(F32)
    opt = RST(params, base="adam", lr=0.05, schedule=1.0, backend="simulated")
    take_steps(opt, params, 1)
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    assert opt.perturb()
    give_grads(params, 1)
    monkeypatch.setattr(simulator, "options", {"max_ins": 1})
    with pytest.raises(RuntimeError):
        opt.step()
    assert opt.state[params[0]]["step"] == 1
    monkeypatch.undo()
    opt.restore()
    assert all(op_db.same_bits(p.detach(), w) for p, w in zip(params, before, strict=True))


def test_gradients_that_always_lie_otherwise(simulator: gpu_simulator.Simulator) -> None:
    """Nothing that a plan has seen once makes it run on tensors that its kernels cannot."""
    results = []
    for backend in ("simulated", "cpu"):
        p = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        opt = RST([p], lr=0.05, rho=0.5, schedule=1.0, backend=backend)
        for t in range(4):
            for seed in (t, t):
                p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).t()
                if seed == t and not opt._step_state.perturbed:
                    assert opt.perturb()
                    if t == 1:  # a second pass that is taken back, and tried again
                        opt.restore()
                        p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).t()
                        assert opt.perturb()
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_launch_that_fails_halfway_through_the_perturbation(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launches before it have perturbed goes back; the rest has no backup and needs none."""
    params = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(60).bfloat16())]
    before = [p.detach().clone() for p in params]
    opt = RST(params, lr=0.05, schedule=1.0, backend="simulated")
    launch, moved = simulator.launch, []

    def failing(kernel: str, *args: Any) -> None:
        if kernel == "rst_perturb_bfloat16":
            moved.append(not torch.equal(params[0], before[0]))
            raise RuntimeError("out of memory")
        launch(kernel, *args)

    monkeypatch.setattr(simulator, "launch", failing)
    with gpu_simulator.simulated(simulator, monkeypatch):
        give_grads(params, 0)
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.perturb()
        assert moved == [True]
        assert all(op_db.same_bits(p.detach(), w) for p, w in zip(params, before, strict=True))


def test_the_first_error_of_a_gpu_that_takes_no_more_work_is_the_one_that_is_raised(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(60).bfloat16())]
    opt = RST(params, lr=0.05, schedule=1.0, backend="simulated")
    launch, failed = simulator.launch, []

    def failing(kernel: str, *args: Any) -> None:
        if failed or kernel == "rst_perturb_bfloat16":
            failed.append(kernel)
            raise RuntimeError(f"error {len(failed)}")
        launch(kernel, *args)

    monkeypatch.setattr(simulator, "launch", failing)
    with gpu_simulator.simulated(simulator, monkeypatch):
        give_grads(params, 0)
        with pytest.raises(RuntimeError, match="(?s)error 1.*could not be brought back: .*error 2"):
            opt.perturb()
    assert failed == ["rst_perturb_bfloat16", "rst_restore_32_bits"]


@pytest.mark.parametrize("where", ["second pass", "step"])
def test_a_restore_that_fails_while_an_error_is_handled(
    where: str, simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told beside that error, which is the one that is raised; and restore() can be tried again."""
    params = parameters(F32)
    before = [p.detach().clone() for p in params]
    opt = RST(params, lr=0.05, schedule=1.0, backend="simulated")
    give_grads(params, 0)
    assert opt.perturb()
    give_grads(params, 1)
    launch = simulator.launch

    def failing(kernel: str, *args: Any) -> None:
        raise RuntimeError(f"no {kernel}")

    monkeypatch.setattr(simulator, "launch", failing)
    with gpu_simulator.simulated(simulator, monkeypatch):
        if where == "step":
            with pytest.raises(RuntimeError, match="no rst_sgd_step_float32") as caught:
                opt.step()
        else:
            with pytest.raises(ValueError, match="of the user") as caught, opt.second_pass():
                raise ValueError("of the user")
    (note,) = caught.value.__notes__
    assert note.startswith("the weights could not be brought back: ") and "no rst_restore_32_bits" in note
    monkeypatch.setattr(simulator, "launch", launch)
    with gpu_simulator.simulated(simulator, monkeypatch):
        opt.restore()
    assert all(op_db.same_bits(p.detach(), w) for p, w in zip(params, before, strict=True))


def test_launches_that_a_plan_keeps_follow_what_changes(simulator: gpu_simulator.Simulator) -> None:
    """Base steps, mixing, ASAM, other addresses, other layouts of gradients and a missing gradient, by turns."""
    results = []
    for backend in ("simulated", "cpu"):
        params = parameters(F32)
        opt = RST(params, base="adam", lr=0.05, schedule=1.0, gamma=2.0, backend=backend)
        seen = []
        for t in range(8):
            opt.adaptive = t in (3, 5)
            opt.gamma = 1.0 if t in (2, 6) else 2.0
            give_grads(params, 2 * t, (1,) if t == 4 else ())
            if t == 6:
                params[0].grad = params[0].grad.t().contiguous().t()  # type: ignore[union-attr]
            if t != 1:
                assert opt.perturb()
                seen += [p.detach().clone() for p in params]
                give_grads(params, 2 * t + 1, (1,) if t == 4 else ())
            opt.step()
            seen += [p.detach().clone() for p in params]
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # norms differ in their last digits


def test_a_model_that_moved_is_named() -> None:
    p = torch.nn.Parameter(torch.randn(5))
    opt = RST([p], lr=0.1)
    opt._devices[0].device = torch.device("meta")  # as if the parameter had been there
    p.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on cpu, but the optimizer was made for meta"):
        opt.step()


@pytest.mark.parametrize(
    ("architectures", "capability", "code", "ptx"),
    [
        ("8.0/9.0/10.0+PTX", (7, 5), False, False), ("8.0/9.0/10.0+PTX", (8, 0), True, False),
        ("8.0/9.0/10.0+PTX", (8, 9), True, False), ("8.0/9.0/10.0+PTX", (9, 0), True, False),
        ("8.0/9.0/10.0+PTX", (10, 3), True, True), ("8.0/9.0/10.0+PTX", (12, 0), False, True),
        ("8.9", (8, 6), False, False), ("9.0a", (9, 0), True, False), ("10.0a+PTX", (10, 3), False, False),
        ("10.0f", (10, 3), True, False), ("10.0f+PTX", (12, 0), False, False),
    ],
)  # fmt: skip
def test_which_gpus_the_code_is_for(architectures: str, capability: tuple[int, int], code: bool, ptx: bool) -> None:
    assert has_machine_code(architectures, capability) == code
    assert has_ptx(architectures, capability) == ptx


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        ("13.0", 13000, ""), ("13.1", 13000, ""), ("12.8", 13010, ""), ("13.0", 0, ""),
        ("13.0", 12080, r"supports CUDA up to 12\.8, but .* CUDA 13\.0: install a driver for CUDA 13 \(580 or newer\)"),
        ("12.4", 11080, r"up to 11\.8, .*525 or newer\), or build the extension with an nvcc of CUDA 11"),
    ],
)  # fmt: skip
def test_a_driver_that_is_too_old(built: str, driver: int, words: str) -> None:
    assert re.search(words, driver_problem(built, driver)) if words else driver_problem(built, driver) == ""


def test_auto_says_why_it_passes_over_the_fastest_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not where another one was asked for by name."""
    cuda = _backends.Backend("cuda", False, "the driver is old", ("cpu",), None, fix="the driver is old: get another")
    monkeypatch.setattr(_backends, "_BY_SPEED", (cuda, *(b for b in _backends._BY_SPEED if b.name == "cpu")))
    monkeypatch.setattr(_backends, "_said", set())
    device = torch.device("cpu")
    _backends.backend_for("cpu", device)
    with pytest.warns(RuntimeWarning, match="runs on its cpu backend: the driver is old: get another") as caught:
        assert [_backends.backend_for("auto", device).name for _ in range(2)] == ["cpu", "cpu"]
    assert len(caught) == 1


def test_a_gpu_without_machine_code_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _backends.Backend("cuda", True, "", ("cuda",), None, architectures="8.0/10.0+PTX")
    monkeypatch.setattr(_backends, "_BY_SPEED", (cuda,))
    monkeypatch.setattr(_backends, "_said", set())
    monkeypatch.setattr(_backends, "_CUDA", cuda)
    for capability, warned in (((8, 9), 0), ((10, 3), 0), ((12, 1), 1)):
        monkeypatch.setattr(_backends, "_capability", lambda device, found=capability: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert _backends.backend_for("auto", torch.device("cuda")) is cuda
        assert len(caught) == warned
    assert "compute capability 12.1" in str(caught[0].message) and "TORCH_CUDA_ARCH_LIST=12.1" in str(caught[0].message)


def test_a_gpu_without_any_code_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither machine code nor PTX, or PTX that is newer than the driver: another backend runs, and says why."""
    for architectures, ptx, capability in (
        ("8.0/9.0", True, (12, 0)), ("9.0+PTX", False, (12, 0)), ("9.0+PTX", True, (7, 5))
    ):  # fmt: skip
        cuda = _backends.Backend("cuda", True, "", ("cuda",), None, architectures=architectures, ptx=ptx)
        monkeypatch.setattr(_backends, "_CUDA", cuda)
        monkeypatch.setattr(_backends, "_BY_SPEED", (cuda, _backends._REFERENCE))
        monkeypatch.setattr(_backends, "_said", set())
        monkeypatch.setattr(_backends, "_capability", lambda device, found=capability: found)
        with pytest.warns(RuntimeWarning, match=f"built for {re.escape(architectures)}, and this GPU has compute"):
            assert _backends.backend_for("auto", torch.device("cuda")).name == "reference"


def test_no_warning_ends_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile cannot trace one."""
    cuda = _backends.Backend("cuda", False, "", ("cpu",), None, fix="get another driver")
    monkeypatch.setattr(_backends, "_BY_SPEED", (cuda, *_backends._BY_SPEED))
    monkeypatch.setattr(_backends, "_said", set())
    g = torch.ones(4)
    norm = torch.compile(lambda: ops.grad_norm([g]), fullgraph=True, backend="eager")
    assert norm()[0] == 2 and not _backends._said


@pytest.mark.parametrize("overflow", [0.0, 2.0])
def test_a_plan_takes_the_numbers_of_amp_from_the_gpu(overflow: float, simulator: gpu_simulator.Simulator) -> None:
    """Their addresses go to the kernels: a step is that without a scale (a power of two) bit for bit, or none."""
    results = []
    for scale in (1.0, 1024.0):
        params = parameters(F32)
        opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend="simulated")
        take_steps(opt, params, 2)
        before = [t.detach().clone() for p in params for t in (p, opt.state[p]["momentum_buffer"])]
        give_grads(params, 7)
        assert opt.perturb()
        give_grads(params, 8)
        for p in params:
            p.grad.mul_(scale)  # type: ignore[union-attr]
        numbers = [torch.tensor([scale]), torch.tensor([overflow])]
        row, there = [0.05, 0.9, 0.0, 0.0, 1.0], [t.data_ptr() for t in numbers]
        assert opt._plans._plan.update(row, True, False, 1.0, *there, 3, 1, opt._step_state.after_step())
        results.append([t.detach() for p in params for t in (p, opt.state[p]["momentum_buffer"])])
        same = [op_db.same_bits(a, b) for a, b in zip(results[-1], before, strict=True)]
        assert all(same) if overflow else not any(same)
    assert all(op_db.same_bits(a, b) for a, b in zip(*results, strict=True))
