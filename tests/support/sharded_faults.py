"""What went wrong once with sharded parameters, or would without a line that looks as if it could be left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import batches, fsdp, make_model, weights, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rst_fused import RST
from rst_fused._step import shards


def _mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def _parameter(value: Tensor, mesh: Any, placement: Any) -> Any:
    return nn.Parameter(distribute_tensor(value, mesh, [placement]))


def _partial(value: float, mesh: Any) -> DTensor:
    """Adds up to ``value``; each rank has another part."""
    return DTensor.from_local(torch.full((4,), value * (dist.get_rank() + 1) / 3), mesh, [Partial()])


def partial_gradients(compiled: bool, placement: str) -> list[Tensor]:
    mesh = _mesh()
    p = _parameter(torch.ones(4), mesh, Replicate() if placement == "replicate" else Shard(0))
    opt = RST([p], lr=0.5, schedule=1.0, rho=1.0)
    perturb, step = opt.perturb, opt.step
    if compiled:
        perturb = torch.compile(lambda fire: opt.perturb(fire), fullgraph=True)
        step = torch.compile(lambda: opt.step(), fullgraph=True)
    p.grad = _partial(3.0, mesh)
    perturb(opt.draw())
    moved = whole(p).clone()
    p.grad = _partial(6.0, mesh)
    step()
    return [moved, whole(p), torch.tensor(opt.last_grad_norm)]


def partial_gradients_on_two_paths() -> list[list[float]]:
    """One rank takes another executor than the other: both add up the same gradients at the same time."""
    mesh = _mesh()
    params = [_parameter(torch.zeros(4), mesh, Replicate()) for _ in range(4)]
    opt = RST(params, "adamw", lr=0.1, schedule=0.0)

    def attach(*present: int) -> None:
        for i, p in enumerate(params):
            p.grad = _partial(10.0**i, mesh) if i in present else None

    for present in ((0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)):  # two rows: step counts differ
        attach(*present)
        opt.draw()
        opt.step()
    attach(0, 1, 2)
    if dist.get_rank() == 0:
        params[3].grad = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
    opt.draw()
    opt.step()
    return [[] if p.grad is None else p.grad.to_local().tolist() for p in params[:3]]


def groups_added_while_gathered() -> list[tuple[float, float]]:
    """Losses of both passes."""
    model = fsdp(make_model())
    model.set_reshard_after_backward(False)
    opt = RST(model.parameters(), lr=0.01, schedule=1.0, rho=1.0)
    losses = []
    for t, (x, y) in enumerate(batches(3)):
        opt.zero_grad()
        first = (model(x) - y).square().mean()
        first.backward()
        if t == 0:
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        opt.perturb()
        with opt.second_pass():
            second = (model(x) - y).square().mean()
            second.backward()
        opt.step()
        losses.append((float(first), float(second)))
    return losses


def parameters_replaced_while_gathered(p: float) -> list[bool]:
    """Whether the forwards that follow a perturbation, and an update, see the weights that these have made."""
    model = make_model()
    opt = RST(model.parameters(), lr=0.5, schedule=p, rho=1.0)
    fsdp(model)
    opt.param_groups[0]["params"] = list(model.parameters())  # as a wrapper does that shards both
    model.set_reshard_after_backward(False)
    x, y = batches(1)[0]
    seen = []

    def forward_and_backward() -> Tensor:
        opt.zero_grad()
        out = model(x)
        (out - y).square().mean().backward()
        return out.detach()

    def sees_the_weights() -> bool:
        found = model(x).detach()
        model.reshard()
        return torch.equal(found, model(x))

    for _ in range(2):
        before = forward_and_backward()
        if opt.perturb():
            seen.append(sees_the_weights() and not torch.equal(before, model(x)))
            forward_and_backward()
        opt.step()
        seen.append(sees_the_weights() and not torch.equal(before, model(x)))
    return seen


def layouts_that_change() -> list[float]:
    """The norm before and after a parameter became replicated."""
    mesh = _mesh()
    p = _parameter(torch.ones(4), mesh, Shard(0))
    opt = RST([p], lr=0.5, schedule=1.0)
    norms = []
    for _ in range(2):
        p.grad = distribute_tensor(torch.ones(4), mesh, p.placements)
        opt.perturb()
        norms.append(opt.last_grad_norm)
        opt.restore()
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().redistribute(mesh, [Replicate()])))
    return norms


def momentum_of_zeros_on_one_rank() -> Tensor:
    """Loaded at step 0: it is momentum all the same."""
    mesh = _mesh()
    p = _parameter(torch.ones(4), mesh, Shard(0))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    opt = RST([p], schedule=0.0, **options)
    loaded = torch.optim.SGD([p], **options).state_dict()
    loaded["state"] = {0: {"momentum_buffer": distribute_tensor(torch.tensor([1.0, 1.0, 0.0, 0.0]), mesh, [Shard(0)])}}
    opt.load_state_dict(loaded)
    p.grad = torch.ones_like(p)
    opt.perturb()
    opt.step()
    return whole(p)


def step_counts_that_become_equal() -> list[Tensor]:
    """A plan whose norm is served and whose perturbation is not: no second norm, and no error."""
    mesh = _mesh()
    p, q = (_parameter(torch.ones(4), mesh, Shard(0)) for _ in range(2))
    opt = RST([p, q], "adamw", lr=0.1, schedule=1.0)
    for t in range(5):
        for phase in (opt.perturb, opt.step):
            for r in (p,) if t == 0 else (p, q):
                r.grad = torch.ones_like(r)
            phase()
        opt.zero_grad()
        if t == 2:
            opt.state[q]["step"].fill_(float(opt.state[p]["step"]))
    return [whole(p), whole(q)]


def first_step_without_gradients(rank: int) -> int:
    """At lr 0, with zeros on the other rank: a request for state, on both."""
    p = _parameter(torch.ones(4), _mesh(), Shard(0))
    opt = RST([p], lr=0.0, momentum=0.9)
    if dist.get_rank() != rank:
        p.grad = torch.zeros_like(p)
    opt.step()
    return opt.steps


def state_of_an_instance() -> list[Tensor]:
    """Of parameters of both kinds, which stay where they are."""
    p, q = _parameter(torch.ones(4), _mesh(), Shard(0)), nn.Parameter(torch.ones(3))
    opt = RST(base=torch.optim.SGD([p, q], lr=0.0, momentum=0.9))
    for r in (p, q):
        r.grad = torch.zeros_like(r)
    opt.step()
    assert opt.steps == 0 and len(opt.state) == 2
    return [whole(p), whole(q)]


def gradient_on_another_mesh() -> str:
    p = _parameter(torch.ones(4), _mesh(), Shard(0))
    opt = RST([p], lr=0.1, schedule=1.0)
    p.grad = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)])
    with pytest.raises(RuntimeError) as caught:
        opt.perturb()
    return str(caught.value)


def lent_gradients(interrupted: int) -> dict[str, Any]:
    """Whether a local tensor keeps a gradient after each phase; the number of a call that is interrupted, or 0."""
    model = fsdp(make_model())
    opt = RST(model.parameters(), lr=0.1, momentum=0.9, schedule=1.0)
    keeps, calls, before = [], 0, weights(model)
    set_grads = shards._set_grads

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == interrupted:
            raise KeyboardInterrupt
        set_grads(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_set_grads", counted)
        for t in range(3):
            for phase in (opt.perturb, opt.step):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                if phase == opt.perturb:
                    before = weights(model)
                try:
                    phase()
                except KeyboardInterrupt:
                    keeps.append(any(p._local_tensor.grad is not None for p in model.parameters()))
                    return {"keeps": keeps, "same": all(map(torch.equal, before, weights(model))), "step": t}
                keeps.append(any(p._local_tensor.grad is not None for p in model.parameters()))
    return {"keeps": keeps, "same": False, "step": 3}


def replaced_local_tensors() -> list[Tensor]:
    """Of a parameter and of its momentum, between steps: the plan is made anew."""
    mesh = _mesh()
    p = _parameter(torch.ones(4), mesh, Shard(0))
    opt = RST([p], lr=0.1, momentum=0.9, schedule=1.0)
    seen = []
    for t in range(5):
        if t == 3:
            p._local_tensor = p._local_tensor.clone()
        if t == 4:
            momentum = opt.state[p]["momentum_buffer"]
            momentum._local_tensor = momentum._local_tensor.clone()
        for phase in (opt.perturb, opt.step):
            p.grad = distribute_tensor(torch.full((4,), 1.0), mesh, [Shard(0)])
            phase()
        seen.append(whole(p))
    return seen
