"""torch.compile: both phases as full graphs, the numbers of eager, and no new graph as lr, rho and p change."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from oracle_optimizer import BACKENDS, bits
from torch import nn
from torch._inductor import compile_fx
from torch.optim import lr_scheduler

from rst_fused import RST
from rst_fused import schedule as S

SIZES = (130, 300, 97)
STEPS = 14
every_backend = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    """One compiling process: workers would outlive the tests, and the graphs are small. No traces in pytest's log."""
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


class Run:
    """The same steps, eager or compiled; ``graphs`` counts what has been compiled after each step."""

    def __init__(self, options: dict[str, Any], compiler: str | None, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in SIZES]
        self.opt = RST(self.params, **options)
        self.noise = torch.Generator().manual_seed(1)
        self.graphs: list[int] = []
        self.perturb: Callable[[bool], bool] = self.opt.perturb
        self.update: Callable[[], Any] = self.opt.step
        self.counter = None
        if compiler is not None:
            self.counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
            # functions of their own, as a method of the optimizer is compiled for all of its instances
            self.perturb = torch.compile(lambda fire: self.opt.perturb(fire), fullgraph=True, backend=self.counter)
            self.update = torch.compile(lambda: RST.step(self.opt), fullgraph=True, backend=self.counter)

    def gradients(self) -> None:
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.noise).to(p.dtype)

    def step(self) -> None:
        self.gradients()
        if self.perturb(self.opt.draw()):
            self.gradients()
        self.update()
        if self.counter is not None:
            self.graphs.append(self.counter.frame_count)


BASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"base": "adamw"},
    "lion": {"base": "lion"},
}


def changing(t: int) -> dict[str, float]:
    return {"lr": 0.1 * 0.9**t, "rho": 0.05 * 1.1**t}


LINEAR = S.linear(0.5, steps=STEPS)
# base, options, what changes in the group at step t (None: a scheduler moves lr)
VARYING: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Any]] | None]] = {
    "sgd, scheduler, match": ("sgd", {"gamma": "match"}, None),
    "sgd, scheduler, tensor lr": ("sgd", {"lr": torch.tensor(0.1)}, None),
    "adamw, scheduler": ("adamw", {}, None),
    "adamw, scheduler, tensor lr, match": ("adamw", {"lr": torch.tensor(0.1), "gamma": "match"}, None),
    "adamw, lr, rho and betas": ("adamw", {}, lambda t: {**changing(t), "betas": (0.9 * 0.99**t, 0.999)}),
    "adamw, lr and rho, amsgrad": ("adamw", {"amsgrad": True}, changing),
    "lion, lr, rho and betas": ("lion", {"gamma": "match"}, lambda t: {**changing(t), "betas": (0.9 * 0.99**t, 0.99)}),
    "sgd, lr, rho, momentum, p and gamma": (
        "sgd", {"schedule": LINEAR, "gamma": "match"}, lambda t: {**changing(t), "momentum": 0.9 * 0.99**t},
    ),
    "sgd, gamma now and then 1": ("sgd", {"gamma": lambda t: [1.0, 1.5][t % 2]}, changing),
}  # fmt: skip


@pytest.mark.parametrize("case, backend", [(c, b) for c in VARYING for b in BACKENDS if b == "cpu" or "adamw, lr" in c])
def test_same_bits_as_eager_and_no_graph_after_the_first_steps(case: str, backend: str) -> None:
    """One graph for each of perturb, base step and SAM step; each once more when Dynamo has learnt what varies.

    With a scheduler attached, opt.step is the scheduler's wrapper, which Dynamo refuses to trace for torch's own
    optimizers too: RST.step(opt) is what compiles as a full graph.
    """
    base, options, change = VARYING[case]
    results = []
    for compiler in (None, "aot_eager"):
        lr = options["lr"].clone() if "lr" in options else 0.1
        run = Run({**BASES[base], "backend": backend, **options, "lr": lr}, compiler)
        if change is None:
            scheduler = lr_scheduler.LambdaLR(run.opt, lambda t: 0.9**t)
        for t in range(STEPS):
            if change is not None:
                run.opt.param_groups[0].update(change(t))
            run.step()
            if change is None:
                scheduler.step()
        assert 3 <= run.opt.sam_steps <= STEPS - 3
        results.append((bits(run.params), run.opt.steps, run.opt.sam_steps, run.opt.last_grad_norm))
    assert results[0] == results[1]
    print("graphs after each step:", run.graphs)
    most = 9 if "now and then" in case else 6  # mixing and not mixing are two graphs
    assert run.graphs[9] <= most and run.graphs[-1] == run.graphs[9], run.graphs


@every_backend
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_step_behind_a_scheduler_without_fullgraph(tensor_lr: bool, backend: str) -> None:
    """The usual call, opt.step() with a scheduler attached: a graph break, and still no graph per value of lr."""
    run = Run({"lr": torch.tensor(0.1) if tensor_lr else 0.1, "schedule": 0.0, "backend": backend}, "aot_eager")
    scheduler = lr_scheduler.LambdaLR(run.opt, lambda t: 0.9**t)
    run.update = torch.compile(lambda: run.opt.step(), backend=run.counter)
    for _ in range(6):
        run.step()
        scheduler.step()
    assert run.graphs[-1] == run.graphs[2] <= 2, run.graphs


@every_backend
@pytest.mark.parametrize("base, gamma", [("sgd", 1.0), ("adamw", "match"), ("lion", 1.0)])
def test_inductor_gives_the_numbers_of_eager(base: str, gamma: Any, backend: str) -> None:
    """Bit for bit, as the ops are the same: opaque to Inductor, which would reorder those of plain torch."""
    results = []
    for compiler in (None, "inductor"):
        run = Run({**BASES[base], "lr": 0.1, "gamma": gamma, "backend": backend}, compiler)
        for _ in range(6):
            run.step()
        results.append(run)
    eager, compiled = results
    assert eager.opt.sam_steps == compiled.opt.sam_steps == 2
    assert bits(eager.params) == bits(compiled.params)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("base, gamma", [("sgd", 2.0), ("adamw", 1.0), ("lion", 2.0)])
def test_graphs_hold_one_op_each_and_no_copy_of_a_parameter(base: str, gamma: float) -> None:
    """What Inductor generates: the ops on the parameters themselves, nothing that reads or writes them besides."""
    run = Run({**BASES[base], "lr": 0.1, "gamma": gamma, "backend": "cpu"}, "inductor")
    codes = []

    def compiled(fire: bool) -> str:
        run.gradients()
        _, (code,) = torch._inductor.utils.run_and_get_code(run.perturb, fire) if fire else (None, [""])
        run.gradients()
        _, (update,) = torch._inductor.utils.run_and_get_code(run.update)
        run.opt._step_state.count()
        return code + update

    codes = [compiled(False), compiled(True)]
    op = f"restore_{base.removesuffix('w')}_step_"
    wanted = [[op], ["grad_norm", "perturb_", op]]
    for code, ops in zip(codes, wanted, strict=True):
        calls = [line.split("rst_fused.")[1].split(".")[0] for line in code.splitlines()
                 if "torch.ops.rst_fused." in line and "(" in line]  # fmt: skip
        assert calls == ops
        for line in code.splitlines():  # a clone or a copy would need a buffer of a parameter's size
            assert not re.search(rf"empty_strided.*\(({'|'.join(map(str, SIZES))}),", line), line
        assert "copy_(" not in code and "clone" not in code
    graphs = [[n.target for n in g.graph.nodes if n.op == "call_function"] for g in run.counter.graphs]
    names = [getattr(t, "__name__", str(t)) for g in graphs for t in g]
    assert not [n for n in names if "clone" in n or "copy" in n]


@every_backend
@pytest.mark.parametrize("base, gamma", [("sgd", 1.0), ("adamw", 2.0), ("lion", 1.0)])
def test_all_that_a_graph_writes_stays_where_it_is(base: str, gamma: float, backend: str) -> None:
    """Inductor makes a CUDA graph (mode="reduce-overhead") of nothing that writes an input which may move."""
    written = []

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        compiled = compile_fx.compile_fx_inner(graph, inputs, **options)
        written.append((set(compiled.mutated_input_idxs), set(options["static_input_idxs"])))
        return compiled

    run = Run({**BASES[base], "lr": 0.1, "gamma": gamma, "backend": backend}, None)
    how: dict[str, Any] = {
        "backend": lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner), "fullgraph": True,
    }  # fmt: skip
    run.perturb = torch.compile(lambda fire: run.opt.perturb(fire), **how)
    run.update = torch.compile(lambda: RST.step(run.opt), **how)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # a graph found there does not come by `inner`
        for _ in range(4):
            run.step()
    assert 0 < run.opt.sam_steps < 4
    assert len(written) >= 3 and all(mutated and mutated <= static for mutated, static in written), written


@every_backend
def test_several_groups_and_masters(backend: str) -> None:
    """Groups with other flags are other calls in the same graph; masters take the place of backups."""
    results = []
    for compiler in (None, "aot_eager"):
        torch._dynamo.reset()
        run = Run({"lr": 0.1, "backend": backend, "master_weights": True}, compiler, torch.bfloat16)
        more = [nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(5, dtype=torch.float16))]
        run.opt.add_param_group({"params": more, "momentum": 0.9, "lr": 0.01})
        run.params += more
        for _ in range(8):
            run.step()
        results.append((bits(run.params), bits([v for p in run.params for v in run.opt.state[p].values()])))
    assert results[0] == results[1]
    assert run.graphs[-1] == run.graphs[5] <= 6


@every_backend
def test_eager_and_compiled_steps_mix_and_save(backend: str) -> None:
    """One optimizer, compiled from the fifth step on: counters, draws and state are common to both."""
    eager = Run({**BASES["adamw"], "lr": 0.1, "backend": backend}, None)
    mixed = Run({**BASES["adamw"], "lr": 0.1, "backend": backend}, "aot_eager")
    compiled = mixed.perturb, mixed.update
    for t in range(10):
        mixed.perturb, mixed.update = compiled if t >= 4 else (mixed.opt.perturb, mixed.opt.step)
        for run in (eager, mixed):
            run.step()
        assert bits(eager.params) == bits(mixed.params)
        assert (mixed.opt.steps, mixed.opt.sam_steps) == (eager.opt.steps, eager.opt.sam_steps)
    assert mixed.opt.cost == eager.opt.cost and mixed.opt.last_grad_norm == eager.opt.last_grad_norm
    state, twin = mixed.opt.state_dict(), eager.opt.state_dict()
    assert state["param_groups"] == twin["param_groups"]
    for key, values in twin["state"].items():
        assert bits(list(state["state"][key].values())) == bits(list(values.values()))


@every_backend
def test_misuse_under_compile(backend: str) -> None:
    run = Run({"lr": 0.1, "backend": backend}, None)
    run.gradients()
    with pytest.raises(Exception, match="pass fire=opt.draw"):
        torch.compile(lambda: run.opt.perturb(), fullgraph=True, backend="eager")()
    step = torch.compile(lambda: run.opt.step(), fullgraph=True, backend="eager")
    run.opt.draw()
    step()
    with pytest.raises(Exception, match="no closure, and opt.draw.. outside before every step"):
        step()


@every_backend
def test_restore_after_a_compiled_perturbation(backend: str) -> None:
    run = Run({"lr": 0.1, "rho": 0.5, "backend": backend}, "aot_eager")
    for gamma in (1.0, 2.0):
        run.opt.gamma = gamma
        before = bits(run.params)
        run.gradients()
        run.opt.draw()
        assert run.perturb(True) and bits(run.params) != before
        assert all(p.grad is None for p in run.params)
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            run.opt.state_dict()
        run.opt.restore()
        assert bits(run.params) == before
        run.step()
        assert bits(run.params) != before


@every_backend
def test_whole_step_with_a_compiled_model(backend: str) -> None:
    """Model and optimizer compiled, against both eager: the backward is the same, so the bits are too."""
    results = []
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
    for compiler in (None, "aot_eager"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        opt = RST(model.parameters(), lr=0.05, momentum=0.9, gamma=1.5, model=model, backend=backend)
        forward: Any = model
        perturb, update = opt.perturb, opt.step
        if compiler:
            forward = torch.compile(model, backend=compiler, fullgraph=True)
            perturb = torch.compile(lambda fire, opt=opt: opt.perturb(fire), backend=compiler, fullgraph=True)
            update = torch.compile(lambda opt=opt: opt.step(), backend=compiler, fullgraph=True)
        for _ in range(6):
            opt.zero_grad()
            forward(x).square().mean().backward()
            if perturb(opt.draw()):
                with opt.second_pass():
                    forward(x).square().mean().backward()
            update()
        results.append((bits(list(model.parameters())), int(model[1].num_batches_tracked), opt.sam_steps))
    assert results[0] == results[1]
    assert results[0][1] == 6 and results[0][2] > 1
