"""opt.memory(): bytes by kind, to the byte, in every state of a step; and that asking changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import every_backend, every_mode, everything, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
ELEMENTS = 5 + 12 + 33  # of optimizer_cases.PROBLEM, whose third parameter has none


def _give_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def _step(params: list[nn.Parameter], opt: RST) -> None:
    _give_gradients(params)
    opt.perturb()
    _give_gradients(params)
    opt.step()
    opt.zero_grad()


def _nonzero(report: Any) -> dict[str, int]:
    return {name: size for name, size in report._rows().items() if size}


def _without_backups(report: Any) -> dict[str, int]:
    return {name: size for name, size in _nonzero(report).items() if name != "backups"}


@every_backend
def test_before_the_first_step_there_are_weights_and_gradients(backend: str) -> None:
    params, opt = make("sgd", backend)
    assert _nonzero(opt.memory()) == {"weights": 4 * ELEMENTS} and opt.memory().total == 4 * ELEMENTS
    params[1].grad = torch.ones(3, 4)
    assert opt.memory().gradients == 4 * 12 and opt.memory().total == 4 * (ELEMENTS + 12)
    assert (opt.memory().elements, opt.memory().parameters, opt.memory().backed_up) == (ELEMENTS, 4, 0)
    assert opt.memory().state == {}


STATES: dict[str, tuple[dict[str, int], int]] = {
    # state by name, and bytes of the weights
    "sgd": ({"momentum_buffer": 4}, 4),
    "amsgrad": ({"exp_avg": 4, "exp_avg_sq": 4, "max_exp_avg_sq": 4}, 4),
    "lion-mixed": ({"exp_avg": 4}, 4),
    "masters": ({"exp_avg": 4, "exp_avg_sq": 4, "masters": 4}, 2),
    "remainders": ({"momentum_buffer": 4, "masters": 2}, 2),
    "instance": ({"momentum_buffer": 4}, 4),
}


@every_backend
@pytest.mark.parametrize("mode", STATES)
def test_state_of_the_base_by_name(mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    _step(params, opt)
    each, weights = STATES[mode]
    expected = {"weights": weights * ELEMENTS, **{name: size * ELEMENTS for name, size in each.items()}}
    if mode in ("amsgrad", "masters"):
        expected["step"] = 4  # a counter that all parameters share, counted once
    report = opt.memory()
    assert _without_backups(report) == expected
    assert report.masters == expected.get("masters", 0)
    kept = opt._step_state.backups
    assert report.backups == sum(b.numel() * b.element_size() for b in kept.values())
    assert report.backed_up == len(kept) and f"backups={len(kept)} of 4" in repr(opt)


@every_backend
@every_mode
def test_asking_changes_nothing(mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    others, twin = make(mode, backend)
    for _ in range(2):
        for those, one in ((params, opt), (others, twin)):
            _give_gradients(those)
            one.perturb()
        between = opt.memory()
        assert opt.memory() == between
        for those, one in ((params, opt), (others, twin)):
            _give_gradients(those)
            one.step()
        opt.memory()
        assert everything(params, opt) == everything(others, twin)


@every_backend
@pytest.mark.parametrize("mode", ["sgd", "adam-mixed", "masters", "remainders"])
def test_between_the_passes(mode: str, backend: str) -> None:
    """The weights are kept once, in a backup, a master or the gradients' memory; G-RST has the first gradients, too."""
    params, opt = make(mode, backend)
    for _ in range(3):  # the third time a launch plan holds the first gradients
        _step(params, opt)
    _give_gradients(params)
    before = opt.memory()
    opt.perturb()
    after = opt.memory()
    assert after.gradients == 0
    weights = {"masters": 0, "remainders": 2}.get(mode, 4) * ELEMENTS
    assert after.backups + after.weights_in_gradients == weights
    assert after.first_gradients == (4 * ELEMENTS if mode == "adam-mixed" else 0)
    assert (after.weights, after.state, after.masters) == (before.weights, before.state, before.masters)
    opt.restore()
    assert (opt.memory().weights_in_gradients, opt.memory().first_gradients) == (0, 0)


@every_backend
def test_weights_in_memory_that_is_neither_a_backup_nor_a_master(backend: str) -> None:
    params, opt = make("sgd", backend)
    state = opt._step_state
    state.backups = {params[0]: torch.zeros(5)}
    state.saved = {params[0]: state.backups[params[0]], params[1]: torch.zeros(3, 4)}
    report = opt.memory()
    assert (report.backups, report.weights_in_gradients, report.backed_up) == (4 * 5, 4 * 12, 1)
    state.saved = {}


@every_backend
def test_memory_that_is_shared_counts_once(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    opt = RST([p, q], backend=backend)
    both = torch.ones(12)
    p.grad, q.grad = both[:6], both[6:]
    assert opt.memory().gradients == 4 * 12
    q.grad = both[:6]
    assert opt.memory().gradients == 4 * 6


def test_a_gradient_that_no_step_takes_is_counted_too() -> None:
    p = nn.Parameter(torch.ones(6, 2))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 2), (6, 2), check_invariants=True)
    assert RST([p]).memory().gradients == 8 * 2 + 4 * 4


def test_lists_in_the_state_of_an_instance() -> None:
    p = nn.Parameter(torch.ones(6))
    base = torch.optim.SGD([p], lr=0.1)
    base.state[p].update(old_dirs=[torch.ones(6), torch.ones(6)], n_iter=3, d=None)
    opt = RST(base=base)
    assert opt.memory().state == {"old_dirs": 2 * 4 * 6}


def test_a_lazy_copy_stays_lazy() -> None:
    p = nn.Parameter(torch.ones(6))
    opt = RST([p])
    p.grad = torch._lazy_clone(torch.ones(6))
    assert opt.memory().gradients == 4 * 6
    assert torch._C._is_cow_tensor(p.grad)


def test_of_a_dtensor_the_part_on_this_rank(tmp_path: Path) -> None:
    """Of a mesh of two ranks, of which this is one: a step would need the other, and what is counted does not."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)]))
        opt = RST([p], momentum=0.9)
        p.grad = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)])
        opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
        report = opt.memory()
        assert p.numel() == 24 and report.elements == 12
        assert _nonzero(report) == {"weights": 48, "gradients": 48, "momentum_buffer": 48}
    finally:
        dist.destroy_process_group()


def test_a_table_in_bytes_and_bytes_per_element() -> None:
    p = nn.Parameter(torch.ones(1000, 10))
    opt = RST([p], momentum=0.9, schedule=1.0)
    _step([p], opt)
    rows = {line[:28].strip(): line[28:].split() for line in str(opt.memory()).splitlines()}
    assert rows["weights"] == ["40,000", "4.00"] and rows["momentum_buffer"] == ["40,000", "4.00"]
    assert rows["gradients"] == ["0", "0.00"]
    assert rows["total"] == [f"{opt.memory().total:,}", f"{opt.memory().total / 10_000:.2f}"]
    assert str(opt.memory()).endswith(f"backups of their own: {opt.memory().backed_up} of 1 parameters")
    assert repr(opt.memory()) == str(opt.memory())


def test_a_table_of_no_elements() -> None:
    opt = RST([nn.Parameter(torch.ones(0))])
    assert opt.memory().total == 0 and "per element of 0" in str(opt.memory())


def test_the_script_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(script, "docs/memory.md", "exec"), {})
    assert "exp_avg " in capsys.readouterr().out
