"""release_gradients=True on a rank: training of sharded models, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import BATCH, batches, make_model, sharded_model, steps_of, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rst_fused import RST
from rst_fused._step import release


def trained(how: str, options: dict[str, Any], bucket: int, released: bool) -> dict[str, Any]:
    """Some steps; ``flushed``: how many updates ran within backwards."""
    release.BUCKET = bucket
    model, mine = sharded_model(how)
    opt = RST(model.parameters(), release_gradients=released, **options)
    flushed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        flush = release._flush
        patch.setattr(release, "_flush", lambda opt, params: (flushed.append(len(params)), flush(opt, params)))
        steps_of(opt, model, batches(5), mine)
    state = [{k: whole(v) for k, v in sorted(opt.state[p].items())} for p in model.parameters() if p in opt.state]
    return {
        "weights": [whole(p) for p in model.parameters()], "state": state, "sam_steps": opt.sam_steps,
        "norm": opt.last_grad_norm, "flushed": len(flushed),
    }  # fmt: skip


def both(how: str, options: dict[str, Any], bucket: int) -> list[dict[str, Any]]:
    return [trained(how, options, bucket, released) for released in (False, True)]


def micro_batches(released: bool) -> list[torch.Tensor]:
    """FSDP2 without reduction for all but the last: then no gradient is complete, and nothing to be told."""
    release.BUCKET = 1
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), base="adamw", schedule=0.5, release_gradients=released)

    def backward(data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for i, (x, y) in enumerate(data):
            model.set_requires_gradient_sync(i == len(data) - 1)
            (model(mine(x)) - mine(y)).square().mean().backward()

    for t in range(3):
        data = batches(8)[2 * t : 2 * t + 2]
        opt.zero_grad()
        backward(data)
        if opt.perturb():
            backward(data)
        opt.step()
    return [whole(p) for p in model.parameters()]


def replicated(process_group: Any) -> tuple[str, bool]:
    """DistributedDataParallel: the message, and whether the weights are as before."""
    model = DistributedDataParallel(make_model())
    opt = RST(model.parameters(), schedule=0.0, release_gradients=True, process_group=process_group)
    before = [p.detach().clone() for p in model.parameters()]
    words = ""
    try:
        model(torch.ones(BATCH, 9)).sum().backward()
    except RuntimeError as error:
        words = str(error)
    opt.restore()
    return words, all(map(torch.equal, before, model.parameters()))


def one_rank_fails() -> tuple[int, bool, int]:
    """An exception in the second pass on all ranks, after the last layer: how many parameters were updated, whether the
    others are back, and how many steps count after one more."""
    release.BUCKET = 1
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), base="adamw", schedule=1.0, release_gradients=True)
    before = [whole(p) for p in model.parameters()]

    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError

    x, y = batches(1)[0]
    (model(mine(x)) - mine(y)).square().mean().backward()
    assert opt.perturb()
    hidden = model[1](model[0](mine(x)))
    hidden.register_hook(fail)
    try:
        with opt.second_pass():
            out = model[4](model[3](model[2](hidden)))
            (out - mine(y)).square().mean().backward()
    except ArithmeticError:
        pass
    changed = [not torch.equal(b, whole(p)) for b, p in zip(before, model.parameters(), strict=True)]
    return sum(changed), not opt._step_state.perturbed and not any(changed[:2]), opt.steps


def mixes_gradients_of_its_own() -> tuple[str, bool, bool, int, list[torch.Tensor]]:
    """Replicated parameters whose gradients are those of each rank alone: what the second backward said, whether
    anything changed by then, whether the weights came back, and the steps and weights after one more step, in which all
    ranks have the same gradients."""
    release.BUCKET = 1
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(n), mesh, [Replicate()])) for n in (4, 3)]
    opt = RST(params, lr=0.1, momentum=0.9, schedule=1.0, gamma=2.0, release_gradients=True)

    def backward(scale: float) -> None:
        torch.stack([(scale * p.to_local().square()).sum() for p in params]).sum().backward()

    before = [whole(p) for p in params]
    backward(1.0 + dist.get_rank())
    opt.perturb()
    moved, words = [whole(p) for p in params], ""
    try:
        backward(1.0 + dist.get_rank())
    except RuntimeError as error:
        words = str(error)
    unchanged = all(map(torch.equal, moved, map(whole, params))) and not any(map(opt.state.get, params))
    opt.restore()
    back = all(map(torch.equal, before, map(whole, params)))
    opt.zero_grad()
    backward(1.0)
    opt.perturb()
    backward(1.0)
    opt.step()
    return words, unchanged, back, opt.steps, [p.detach().to_local().clone() for p in params]


def alone(options: dict[str, Any]) -> Any:
    """An optimizer of this process alone, with plain parameters, where others exist."""
    results = []
    for released in (False, True):
        torch.manual_seed(dist.get_rank())
        model = nn.Linear(3, 2)
        opt = RST(model.parameters(), process_group=None, release_gradients=released, **options)
        for t in range(3):
            opt.step(lambda t=t, model=model: model(torch.full((2, 3), float(t))).square().sum().backward())
            opt.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    return all(map(torch.equal, *results))
