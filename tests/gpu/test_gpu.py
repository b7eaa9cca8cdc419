"""What only a GPU can show: graphs, streams, large sums, and the optimizer on the device. Skipped where there is none.

The op table runs on the device in test_ops.py and its neighbours, for every backend that serves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_db
import pytest
import torch
from torch import nn

from rst_fused import RST, ops
from rst_fused._backends import backends

ON_GPU = [b.name for b in backends() if b.available and b.device_types is not None and "cuda" in b.device_types]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(not ON_GPU, reason="no GPU backend was built"),
]
every_backend = pytest.mark.parametrize("backend", ON_GPU or ["none"])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = ((64, 33), (1000,), (3, 8, 5, 5), (1,), (40_001,))


def parameters(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def gradients(params: list[nn.Parameter], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


def attach(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def take_steps(opt: RST, params: list[nn.Parameter], steps: int) -> None:
    for t in range(steps):
        attach(params, gradients(params, 2 * t))
        if opt.perturb():
            attach(params, gradients(params, 2 * t + 1))
        opt.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "grst": {"momentum": 0.9, "gamma": "match"},
    "adamw": {"base": "adamw", "gamma": 2.0},
    "asam": {"adaptive": True, "eta": 0.01},
}


@every_backend
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_optimizer_as_on_the_cpu(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    results = []
    for device, name in (("cuda", backend), ("cpu", "auto")):
        params = parameters(dtype, device)
        take_steps(RST(params, lr=0.02, rho=0.1, schedule=0.6, backend=name, **options), params, 8)
        results.append([p.detach().cpu() for p in params])
    # Sums of the norm in another order; a rounding of 16-bit formats where fp32 results straddle a boundary.
    tolerance = {F64: 1e-12, F32: 1e-5, F16: 2.0**-9, BF16: 2.0**-6}[dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_that_are_views_of_a_bucket(dtype: torch.dtype, base: str, backend: str) -> None:
    """As DDP packs them, one behind another: bit for bit what gradients with memory of their own give."""
    results = []
    for in_bucket in (False, True):
        params = parameters(dtype, "cuda")
        opt = RST(params, lr=0.02, rho=0.1, schedule=1.0, base=base, backend=backend)
        bucket = torch.empty(1 + sum(p.numel() for p in params), dtype=dtype, device="cuda")
        for t in range(6):
            grads, at = gradients(params, t), 1
            for p, g in zip(params, grads, strict=True):
                view = bucket[at : at + g.numel()].view(g.shape)
                p.grad = view.copy_(g) if in_bucket else g
                at += g.numel()
            if t % 2 == 0:
                assert opt.perturb()
            else:
                opt.step()
        results.append([p.detach().clone() for p in params])
    assert all(op_db.same_bits(a, b) for a, b in zip(*results, strict=True))


@every_backend
def test_150_parameter_groups(backend: str) -> None:
    """More than one launch has room for; each with numbers of its own."""
    results = []
    for device, name in (("cuda", backend), ("cpu", "auto")):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(50, generator=generator).to(device)) for _ in range(150)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1), "rho": 0.01 * (i + 1)} for i, p in enumerate(params)]
        opt = RST(groups, base="adamw", schedule=1.0, backend=name)
        take_steps(opt, params, 3)
        results.append([p.detach().cpu() for p in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_gpu_backend_is_chosen_by_itself() -> None:
    opt = RST(parameters(F32, "cuda"), lr=0.1)
    assert opt.backend.name == ON_GPU[0] and ON_GPU[0] in repr(opt)


@every_backend
def test_norm_of_a_hundred_million_elements(backend: str) -> None:
    g = [torch.randn(10**8, device="cuda") * 1e-3, torch.randn(12_345, device="cuda")]
    exact = sum((t.double() ** 2).sum() for t in g).sqrt().item()  # type: ignore[union-attr]
    first = ops.grad_norm(g, backend=backend)
    assert first[0].item() == pytest.approx(exact, rel=1e-6)
    assert all(op_db.same_bits(first, ops.grad_norm(g, backend=backend)) for _ in range(3))


@every_backend
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_updates_within_two_ulp_of_the_cpu_kernels(dtype: torch.dtype, backend: str) -> None:
    results = []
    for device, name in (("cuda", backend), ("cpu", "auto")):
        p, g, g2 = (gradients(parameters(dtype, device), seed) for seed in range(3))  # type: ignore[arg-type]
        backups, m = [t.clone() for t in p], [torch.zeros_like(t) for t in p]
        stats = torch.tensor([2.0, 0.5, 0, 0, 0, 4.0], dtype=F64, device=device)
        ops.perturb_(p, g, backups, stats, rho=0.1, seed=1, step=2, backend=name)
        moved = [t.clone() for t in p]
        ops.restore_sgd_step_(
            p, g2, backups, m, lr=0.1, momentum=0.9, weight_decay=0.01, gamma=1.5, first_grads=g, backend=name
        )
        results.append([t.cpu() for t in (*moved, *p, *m)])
    ulp = torch.finfo(dtype).eps
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * ulp, atol=2 * ulp)


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_waits_for_the_gpu(dtype: torch.dtype, backend: str) -> None:
    params = parameters(dtype, "cuda")
    opt = RST(params, lr=0.1, momentum=0.9, schedule=0.5, backend=backend)
    take_steps(opt, params, 4)
    grads = [gradients(params, seed) for seed in range(8)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(4):
            attach(params, grads[2 * t])
            if opt.perturb():
                attach(params, grads[2 * t + 1])
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
def test_runs_on_the_current_stream(backend: str) -> None:
    params = parameters(F32, "cuda")
    opt = RST(params, lr=0.1, schedule=1.0, backend=backend)
    take_steps(opt, params, 2)
    before = params[1].detach().clone()
    grads = gradients(params, 1)
    assert torch.equal(before, before)  # its kernel is loaded now, which may wait for all streams
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        attach(params, grads)
        opt.perturb(False)
        opt.step()
    assert torch.equal(params[1], before), "the update did not wait behind the sleep of its stream"
    torch.cuda.synchronize()
    assert not torch.equal(params[1], before)


@pytest.mark.parametrize("options", [{"base": "sgd", "momentum": 0.9}, {"base": "adamw", "gamma": 2.0}], ids=str)
def test_parameters_on_the_cpu_and_on_a_gpu(options: dict[str, Any]) -> None:
    """One optimizer over both against one over the same parameters on the CPU."""
    runs = []
    for devices in (("cpu", "cuda"), ("cpu", "cpu")):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(1001, dtype=torch.float64).to(d)) for d in devices]
        opt = RST(params, lr=0.1, rho=0.5, schedule=1.0, **options)
        for step in range(5):
            for scale in (1.0, 0.5):
                for p in params:
                    p.grad = (scale * p + step).detach()
                if scale == 1.0:
                    opt.perturb()
            opt.step()
        runs.append([p.detach().cpu() for p in params])
        for p in params:
            p.grad = torch.ones_like(p)
        opt.perturb()
        opt.restore()
        assert all(torch.equal(p.detach().cpu(), w) for p, w in zip(params, runs[-1], strict=True))
        if devices[1] == "cuda":
            assert [place.backend.name for place in opt._devices] == ["cpu", ON_GPU[0]]
    for here, there in zip(*runs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)  # the order of the norm's sum differs


@every_backend
@pytest.mark.parametrize("options", [OPTIONS["sgd"], {"gamma": 2.0}, {"base": "adamw"}], ids=["sgd", "grst", "adamw"])
def test_grad_scaler(options: dict[str, Any], backend: str) -> None:
    """A scaled run is the unscaled one bit for bit (the scale is a power of two); an overflow only restores."""
    scaled, plain = parameters(F32, "cuda"), parameters(F32, "cuda")
    opt, twin = (RST(ps, lr=0.05, schedule=1.0, backend=backend, **options) for ps in (scaled, plain))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=10**6)
    scaler.scale(torch.ones((), device="cuda"))
    for t in range(4):
        factor = math.inf if t == 2 else scaler.get_scale()
        before = [p.detach().clone() for p in scaled]
        attach(scaled, [g * scaler.get_scale() for g in gradients(scaled, 2 * t)])
        opt.perturb()
        attach(scaled, [g * factor for g in gradients(scaled, 2 * t + 1)])
        scaler.step(opt)
        scaler.update()
        if t == 2:
            assert all(torch.equal(p, w) for p, w in zip(scaled, before, strict=True))
            continue
        attach(plain, gradients(plain, 2 * t))
        twin.perturb()
        attach(plain, gradients(plain, 2 * t + 1))
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(scaled, plain, strict=True))


# --- CUDA graphs ----------------------------------------------------------------------------------------------------
def captured(opt: RST, loss: Callable[[], torch.Tensor], sam: bool) -> torch.cuda.CUDAGraph:
    """A graph of one whole step: forward and backward once or twice, perturbation and update."""
    graph = torch.cuda.CUDAGraph()
    opt.zero_grad()
    with torch.cuda.graph(graph):
        loss().backward()
        if opt.perturb(fire=sam):
            loss().backward()
        opt.step()
        opt.zero_grad()
    return graph


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"base": "adamw", "capturable": True}, {"gamma": 2.0}, {"schedule": 1.0},
     {"momentum": 0.9, "state_dtype": BF16}],
    ids=["sgd", "adamw", "grst", "sam", "state"],
)
def test_replayed_graphs_are_the_eager_steps(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to("cuda", dtype)
        x = torch.randn(16, 32, device="cuda", dtype=dtype)
        opt = RST(model.parameters(), **{"lr": 0.05, "schedule": 0.5, "seed": 3, "backend": backend, **options})

        def loss(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            return model(x).square().mean()

        def step(fire: bool | None = None, opt: RST = opt, loss: Callable[[], torch.Tensor] = loss) -> None:
            opt.zero_grad()
            loss().backward()
            if opt.perturb(fire):
                loss().backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for fire in (False, True, True):
                step(fire)
        torch.cuda.current_stream().wait_stream(side)
        if graphs:
            by_draw = {sam: captured(opt, loss, sam) for sam in (False, True)}
        for _ in range(10):
            if graphs:
                sam = opt.draw()
                by_draw[sam].replay()
                opt.replayed(sam)
            else:
                step()
        assert opt.steps == 13
        results.append([*(p.detach() for p in model.parameters()), torch.tensor([opt.sam_steps])])
    for eager, replayed in zip(*results, strict=True):
        assert op_db.same_bits(eager, replayed)


def test_examples_of_the_page_on_gpus() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, namespace)
    opt = namespace["opt"]
    assert opt.steps == 103 and 2 < opt.sam_steps < 103


@every_backend
def test_adam_in_a_graph_must_be_capturable(backend: str) -> None:
    params = parameters(F32, "cuda")
    opt = RST(params, base="adam", backend=backend)
    take_steps(opt, params, 1)
    attach(params, gradients(params, 0))
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()


@every_backend
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_the_eager_steps(mode: str, backend: str) -> None:
    results: list[list[torch.Tensor]] = []
    for compiled in (False, True):
        results.append([])
        torch._dynamo.reset()
        params = parameters(F32, "cuda")
        opt = RST(params, lr=0.05, momentum=0.9, schedule=0.5, backend=backend)
        perturb, update = opt.perturb, opt.step
        if compiled:
            perturb = torch.compile(lambda fire, opt=opt: opt.perturb(fire), fullgraph=True, mode=mode)
            update = torch.compile(lambda opt=opt: RST.step(opt), fullgraph=True, mode=mode)
        for t in range(6):
            attach(params, gradients(params, 2 * t))
            if perturb(opt.draw()):
                results[-1] += [p.detach().clone() for p in params]
                attach(params, gradients(params, 2 * t + 1))
            update()
        results[-1] += [p.detach().clone() for p in params]
    for eager, other in zip(*results, strict=True):
        assert op_db.same_bits(eager, other)
