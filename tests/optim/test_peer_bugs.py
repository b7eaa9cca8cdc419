"""What other SAM optimizers get wrong, one test each. Those with a file of their own are listed at the end."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.optim.optimizer as torch_optimizer
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4), (33,)], 20)


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return PROBLEM.parameters(dtype)


# --- gradients ------------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_grad_none_in_pass_two_only(gamma: float, backend: str) -> None:
    """The parameter must not stay perturbed."""
    params = params_of()
    opt = SAM(params, lr=0.1, rho=1.0, backend=backend)
    opt.gamma = gamma
    before = bits(params)
    PROBLEM.backward(params, 0)
    opt.perturb()
    assert bits(params)[0] != before[0]
    PROBLEM.backward(params, 0)
    params[0].grad = None
    opt.step()
    assert bits(params)[0] == before[0] and bits(params)[1] != before[1]


@every_backend
@pytest.mark.parametrize("base", ["sgd", "adamw", "instance"])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_grad_first_appearing_in_pass_two(gamma: float, base: str, backend: str) -> None:
    """No KeyError: it was not perturbed, and is updated with its one gradient."""
    params = params_of()
    if base == "instance":
        opt = RST(base=torch.optim.SGD(params, lr=0.1), schedule=1.0, gamma=gamma, backend=backend)
    else:
        opt = RST(params, base=base, lr=0.1, schedule=1.0, gamma=gamma, backend=backend)
    before = params[0].detach().clone()
    PROBLEM.backward(params, 0)
    params[0].grad = None
    opt.perturb()
    assert torch.equal(params[0], before)
    PROBLEM.backward(params, 0)
    gradient = params[0].grad.clone()
    opt.step()
    if base != "adamw":
        torch.testing.assert_close(params[0].detach(), before - 0.1 * gradient)
    assert not torch.equal(params[0], before)


@every_backend
@pytest.mark.parametrize("base", ["sgd", "adam", "instance"])
def test_all_gradients_none_and_zero_size_parameters(base: str, backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(4, 0, 2))]
    kwargs: dict[str, Any] = {"schedule": 1.0, "gamma": 2.0, "backend": backend}
    opt = RST(base=torch.optim.SGD(params), **kwargs) if base == "instance" else RST(params, base, **kwargs)
    before = bits(params)
    for _ in range(2):
        assert opt.perturb()
        opt.step()
    assert bits(params) == before and opt.steps == 2 and opt.last_grad_norm == 0.0
    for phase in (opt.perturb, opt.step):
        for p in params:
            p.grad = torch.ones_like(p)
        phase()
    assert bits(params) != before and opt.last_grad_norm == pytest.approx(math.sqrt(3))


@every_backend
def test_one_parameter_in_many_without_gradient(backend: str) -> None:
    """Lists of parameters and of gradients must not slip against each other."""
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(400)]
    opt = SAM(params, lr=1.0, rho=20.0, backend=backend)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i - 100.0)
    params[123].grad = None
    norm = math.sqrt(2 * sum((i - 100.0) ** 2 for i in range(400) if i != 123))
    opt.perturb()
    for i, p in enumerate(params):
        moved = 0.0 if i == 123 else 20.0 * (i - 100.0) / norm
        torch.testing.assert_close(p.detach(), torch.full((2,), i + moved))
    opt.restore()
    assert all(torch.equal(p, torch.full((2,), float(i))) for i, p in enumerate(params))


# --- sixteen bits ---------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("size", [1e-7, 1e-3, 300.0, 6e4])
def test_fp16_norms_neither_underflow_nor_overflow(size: float, backend: str) -> None:
    """Squares of 1e-7 are 0 in float16, those of 300 are inf, and an eps of 1e-12 is 0: none of that may matter."""
    p = nn.Parameter(torch.zeros(1024, dtype=torch.float16))
    opt = SAM([p], rho=1.0, stochastic_rounding=False, backend=backend)
    p.grad = torch.full_like(p, size)
    wanted = 32 * float(p.grad[0])
    opt.perturb()
    assert opt.last_grad_norm == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(p.detach(), torch.full_like(p, 1 / 32))
    opt.restore()
    p.grad = torch.zeros_like(p)
    opt.perturb()
    assert not p.any()  # 0 / (0 + eps) with an eps of 0 would be NaN


@every_backend
@pytest.mark.parametrize("masters", [False, True])
def test_bf16_perturbation_is_unbiased(masters: bool, backend: str) -> None:
    """e is far below the spacing of bfloat16: rounding to nearest loses nearly all of it, stochastic rounding none."""
    n = 200_000
    torch.manual_seed(0)
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        opt = SAM([p], rho=0.5, backend=backend, stochastic_rounding=stochastic, master_weights=masters)
        p.grad = torch.ones_like(p)
        opt.perturb()
        e = 0.5 / math.sqrt(n)  # 0.0011, a seventh of the spacing above 1
        moved[stochastic] = (p.detach().double() - 1).mean().item() / e
        opt.restore()
        assert torch.equal(p.detach(), torch.ones(n, dtype=torch.bfloat16))
    spread = math.sqrt(2**-7 / e / n)  # of the mean of n draws, as a share of e
    assert moved[False] == 0.0
    assert abs(moved[True] - 1) < 5 * spread


@every_backend
def test_stochastic_rounding_is_a_function_of_seed_and_step(backend: str) -> None:
    def perturbed(seed: int, steps: int) -> list[bytes]:
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        opt = SAM([p], lr=0.0, rho=0.1, seed=seed, backend=backend)
        for _ in range(steps + 1):
            opt.restore()
            p.grad = torch.ones_like(p)
            opt.perturb()
            seen = bits([p])
            p.grad = torch.zeros_like(p)
            opt.step()
        return seen

    assert perturbed(0, 3) == perturbed(0, 3)
    assert len({perturbed(s, t)[0] for s in (0, 1) for t in (0, 1, 2)}) == 6


def test_fused_torch_sgd_in_bf16_is_no_oracle() -> None:
    """torch 2.13 on the CPU leaves whole vectors of 16 elements as they were: why no test here compares with it."""
    theirs, ours = (nn.Parameter(torch.ones(32, dtype=torch.bfloat16)) for _ in range(2))
    for p, opt in ((theirs, torch.optim.SGD([theirs], lr=0.5, fused=True)), (ours, RST([ours], lr=0.5, schedule=0.0))):
        p.grad = torch.ones_like(p)
        opt.step()
    if torch.__version__.startswith("2.13"):
        assert torch.equal(theirs.detach(), torch.ones_like(theirs))
    assert torch.equal(ours.detach(), torch.full_like(ours, 0.5))


# --- restoring ------------------------------------------------------------------------------------------------------
@every_backend
def test_restoring_does_not_drift(backend: str) -> None:
    """Subtracting e again moves half of the weights within a thousand steps; a backup moves none."""
    params = [nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))]
    opt = SAM(params, lr=0.0, rho=0.05, backend=backend)
    before = bits(params)
    noise = torch.Generator().manual_seed(1)
    for _ in range(200):
        for phase in (opt.perturb, opt.step):
            params[0].grad = torch.randn(1000, generator=noise)
            phase()
    assert bits(params) == before


@every_backend
def test_restoring_keeps_the_storage(backend: str) -> None:
    """In place: views of a flat buffer, as DDP and FSDP have, see all of it."""
    flat = torch.zeros(20)
    params = [nn.Parameter(flat[:8].view(2, 4)), nn.Parameter(flat[8:20])]
    addresses = [p.data_ptr() for p in params]
    opt = SAM(params, lr=0.5, rho=1.0, backend=backend)
    for phase in (opt.perturb, opt.step):
        for p in params:
            p.grad = torch.ones_like(p)
        phase()
        assert [p.data_ptr() for p in params] == addresses
        assert flat.any() and torch.equal(flat[8:], params[1].detach())
    assert torch.equal(flat, torch.full((20,), -0.5))


@every_backend
@pytest.mark.parametrize("phase", ["perturb", "restore", "step"])
def test_autograd_notices_that_the_weights_changed(phase: str, backend: str) -> None:
    """Kernels do not bump version counters by themselves; a graph made before must not be used after."""
    params = params_of()
    opt = SAM(params, lr=0.1, backend=backend)
    PROBLEM.backward(params, 0)
    if phase != "perturb":
        opt.perturb()
        PROBLEM.backward(params, 0)
    loss = sum(p.square().sum() for p in params)
    {"perturb": opt.perturb, "restore": opt.restore, "step": opt.step}[phase]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- torch's machinery ----------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("base", ["sgd", "adamw", "instance"])
def test_init_optim_state_and_distributed_checkpoint(base: str, backend: str) -> None:
    """torch makes the state of an optimizer with step(closure=None), zero gradients and lr 0: no draw, no perturbation,
    and what is loaded into it afterwards, draws included, is the saved run."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make() -> tuple[nn.Module, RST]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        more: dict[str, Any] = {"schedule": 0.5, "seed": 5, "rho": 0.2, "backend": backend}
        if base == "instance":
            return model, RST(base=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **more)
        return model, RST(model.parameters(), base=base, lr=0.1, **more)

    x = torch.randn(16, 4)

    def closure(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    model, opt = make()
    before = bits(list(model.parameters()))
    get_optimizer_state_dict(model, opt)
    assert bits(list(model.parameters())) == before and opt.sam_steps == 0
    model, opt = make()
    for _ in range(6):
        opt.step(lambda: closure(model))
    assert 0 < opt.sam_steps < 6
    opt.zero_grad()
    saved = get_optimizer_state_dict(model, opt)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, copy.deepcopy(saved))  # torch loads tensors by reference
    assert (resumed.steps, resumed.sam_steps) == (opt.steps, opt.sam_steps)
    assert resumed.param_groups[0]["lr"] == 0.1
    for _ in range(6):
        opt.step(lambda: closure(model))
        resumed.step(lambda: closure(other))
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


@every_backend
def test_state_of_the_base_is_saved(backend: str) -> None:
    """Most wrappers lose it; and draws resume, too. Every step of a run: test_resume.py."""
    params = params_of()
    opt = RST(params, base="adamw", schedule=0.5, backend=backend)
    for t in range(3):
        opt.step(lambda t=t: PROBLEM.backward(params, t))
    saved = opt.state_dict()
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq", "step"}
    assert saved["param_groups"][0]["rst_steps"] == 3
    twin = RST(params_of(), base="adamw", schedule=0.5, backend=backend)
    twin.load_state_dict(saved)
    assert [twin.steps, twin.sam_steps] == [opt.steps, opt.sam_steps] and twin.draw() == opt.draw()


def test_schedulers_and_hooks_see_one_optimizer_and_one_step() -> None:
    """Global hooks too, as profilers and loggers register them; more in test_optimizer_api.py."""
    params = params_of()
    opt = SAM(params, lr=0.1)
    calls: list[Any] = []
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(o))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
            for t in range(3):
                opt.step(lambda t=t: PROBLEM.backward(params, t))
                scheduler.step()
    finally:
        handle.remove()
    assert calls == [opt] * 3


@every_backend
def test_batch_norm_statistics_and_count_come_from_the_first_pass(backend: str) -> None:
    """More in test_batch_norm.py."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = torch.randn(16, 4)
    opt = SAM(model.parameters(), lr=0.0, rho=2.0, model=model, backend=backend)

    def closure() -> None:
        opt.zero_grad()
        model(x).pow(3).sum().backward()

    opt.step(closure)
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean(0))


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.usefixtures("group_of_one")
@every_backend
@pytest.mark.parametrize("form", ["closure", "second_pass"])
def test_no_sync_on_the_first_iteration_of_a_static_graph(form: str, backend: str) -> None:
    """An internal assertion of torch, said in the words of the user; what it advises works."""
    inner = nn.Linear(4, 3)
    x = torch.randn(16, 4)
    opt = SAM(inner.parameters(), lr=0.1, backend=backend)
    before = bits([*inner.parameters()])

    def closure() -> None:
        opt.zero_grad()
        model(x).square().sum().backward()

    def step() -> None:  # the first backward through the wrapper is that of pass one, or of pass two
        if form == "closure":
            opt.step(closure)
            return
        for p in inner.parameters():
            p.grad = torch.ones_like(p)
        opt.perturb()
        with opt.second_pass():
            closure()
        opt.step()

    model = nn.parallel.DistributedDataParallel(inner, static_graph=True)
    with model.no_sync(), pytest.raises(RuntimeError, match=r"static_graph=True.*no_sync\(\).*wrap the model again"):
        step()
    assert bits([*inner.parameters()]) == before and opt.steps == 0
    model = nn.parallel.DistributedDataParallel(inner, static_graph=True)
    step()
    with model.no_sync():
        step()
    assert bits([*inner.parameters()]) != before and opt.steps == 2


# Elsewhere: GradScaler and positional closures (test_amp.py), op(x.clone(), x) in traced code (test_compile.py),
# complex ASAM (test_optimizer.py).
