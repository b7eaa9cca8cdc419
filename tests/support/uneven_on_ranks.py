"""What ranks run with local first passes, overflows, uneven data and failures: see tests/distributed."""

from __future__ import annotations

import os
import signal
import warnings
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import ddp_on_ranks as ddp
import torch
import torch.distributed as dist
from oracle_optimizer import bits
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rst_fused import RST, schedule
from rst_fused._step import agreement


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- m-sharpness ------------------------------------------------------------------------------------------------------
def local_first_passes(world: int, base: str, steps: int) -> list[Tensor]:
    """In one process: each rank's own perturbation, and the mean of the gradients there."""
    model = ddp.model_of()
    params = list(model.parameters())
    opt = ddp.optimizer(model, base)
    twin = ddp.optimizer(model, base)  # draws alike
    for t in range(steps):
        total = [torch.zeros_like(p) for p in params]
        twin._step_state.steps = t
        fires = twin.draw()
        for rank in range(world):
            before = [p.detach().clone() for p in params]
            if fires:
                first = torch.autograd.grad(ddp.loss_of(model, ddp.batch(t, rank)), params)
                norm = torch.stack([g.double().square().sum() for g in first]).sum().sqrt()
                with torch.no_grad():
                    for p, g in zip(params, first, strict=True):
                        p.add_((0.05 * g.double() / norm).float())
            found = torch.autograd.grad(ddp.loss_of(model, ddp.batch(t, rank)), params)
            for sum_, g, p, w in zip(total, found, params, before, strict=True):
                sum_ += g / world
                with torch.no_grad():
                    p.copy_(w)
        opt.schedule = 0.0
        for p, g in zip(params, total, strict=True):
            p.grad = g
        opt.step()
    return ddp.weights(model)


def count_reductions(wrapped: Any) -> dict[str, int]:
    counted = {"bytes": 0, "calls": 0}

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counted["calls"] += 1
        counted["bytes"] += bucket.buffer().numel() * bucket.buffer().element_size()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP reads no strings
    wrapped.register_comm_hook(None, hook)
    return counted


def m_sharpness(base: str, form: str, local: bool, wrapper: dict[str, Any], steps: int) -> tuple[Any, ...]:
    model = ddp.model_of(dist.get_rank())
    wrapped = DistributedDataParallel(model, **wrapper)
    p = schedule.warmup(schedule.constant(0.5), 1) if wrapper.get("static_graph") else 0.5
    opt = ddp.optimizer(model, base, m_sharpness=local, model=wrapped, schedule=p)
    counted = count_reductions(wrapped)
    for t in range(steps):
        ddp.passes(opt, form, lambda t=t: ddp.loss_of(wrapped, ddp.batch(t, dist.get_rank())).backward(), wrapped)
    size = 4 * sum(p.numel() for p in model.parameters())
    return ddp.weights(model), ddp.drift(model), counted["bytes"] / size, opt.steps, opt.sam_steps


def m_sharpness_refused() -> dict[str, str]:
    """What is said, by case; nothing may have changed."""
    said = {}
    wrapped = DistributedDataParallel(ddp.model_of())
    before = bits(ddp.weights(wrapped))

    def made(**options: Any) -> RST:
        return ddp.optimizer(wrapped, "sgd", **{"schedule": 1.0, "m_sharpness": True, **options})

    def backward() -> None:
        ddp.loss_of(wrapped, ddp.batch(0, dist.get_rank())).backward()

    def closure() -> None:
        wrapped.zero_grad()
        backward()

    said["number"] = error_of(lambda: made(gamma=2.0))
    said["match"] = error_of(lambda: made(gamma="match"))
    opt = made()
    said["set"] = error_of(lambda: setattr(opt, "gamma", 2.0))
    said["function"] = error_of(lambda: made(gamma=lambda t: 2.0, model=wrapped).step(closure))
    said["no model"] = error_of(lambda: made().step(closure))
    said["other model"] = error_of(lambda: made(model=wrapped.module).step(closure))

    def without_first_pass() -> None:
        closure()
        made().perturb()

    def fire(first: float, given: bool) -> None:
        opt = made(schedule=first)
        wrapped.zero_grad()
        with opt.first_pass(wrapped):
            backward()
        opt.perturb(fire=given)

    def without_perturb() -> None:
        opt = made()
        wrapped.zero_grad()
        with opt.first_pass(wrapped):
            backward()
        opt.step()

    def accumulating() -> None:
        closure()
        with made().first_pass(wrapped):
            backward()

    def static() -> None:
        again = DistributedDataParallel(wrapped.module, static_graph=True)
        made(model=again).step(lambda: ddp.loss_of(again, ddp.batch(0, 0)).backward())

    def sharded() -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        RST([nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))], m_sharpness=True)

    said["sharded"] = error_of(sharded)
    said["no first_pass"] = error_of(without_first_pass)
    said["fire=False"] = error_of(lambda: fire(1.0, False))
    said["fire=True"] = error_of(lambda: fire(0.0, True))
    said["no perturb"] = error_of(without_perturb)
    said["accumulating"] = error_of(accumulating)
    said["static"] = error_of(static)
    said["changed"] = "" if bits(ddp.weights(wrapped)) == before else "weights changed"
    return said


def no_sync_by_hand(gamma: float, base: str) -> tuple[str, bool, int, float]:
    """no_sync() around the first backward: the error, whether weights came back, and the drift after a right step."""
    model = ddp.model_of()
    wrapped = DistributedDataParallel(model)
    opt = ddp.optimizer(model, base, gamma=gamma, schedule=1.0)
    before = bits(ddp.weights(model))
    rank = dist.get_rank()

    def step(first: Any) -> None:
        opt.zero_grad()
        with first:
            ddp.loss_of(wrapped, ddp.batch(0, rank)).backward()
        opt.perturb()
        with opt.second_pass():
            ddp.loss_of(wrapped, ddp.batch(0, rank)).backward()
        opt.step()

    said = error_of(lambda: step(wrapped.no_sync()))
    back = bits(ddp.weights(model)) == before and not opt._step_state.perturbed and opt.steps == 0
    opt.schedule = 1.0
    step(nullcontext())
    return said, back, opt.steps, ddp.drift(model)


# --- uneven data ------------------------------------------------------------------------------------------------------
def uneven(
    batches: list[list[int]], base: str, gamma: float, form: str, timeout: float, local: bool = False
) -> tuple[Any, ...]:
    """Epochs in which rank r has batches[epoch][r] batches."""
    agreement.TIMEOUT = timeout
    rank = dist.get_rank()
    model = ddp.model_of(rank)
    wrapped = DistributedDataParallel(model)
    opt = ddp.optimizer(model, base, gamma=gamma, m_sharpness=local, model=wrapped)
    t = 0
    drifts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for numbers in batches:
            with Join([wrapped, opt]):  # type: ignore[list-item]
                for i in range(numbers[rank]):
                    ddp.passes(opt, form, lambda t=t + i: ddp.loss_of(wrapped, ddp.batch(t, rank)).backward(), wrapped)
            t += max(numbers)
            drifts.append(ddp.drift(model))
    said = [str(w.message) for w in caught if "rank" in str(w.message)]
    return ddp.weights(model), drifts, opt.steps, opt.sam_steps, said


def uneven_alone(batches: list[list[int]], base: str, gamma: float, form: str) -> list[Tensor]:
    """The same in one process. join() divides by all ranks, also where some have no data."""
    model = ddp.model_of()
    opt = ddp.optimizer(model, base, gamma=gamma)
    t = 0
    for numbers in batches:
        for i in range(max(numbers)):

            def backward(t: int = t + i, i: int = i, numbers: list[int] = numbers) -> None:
                for rank in range(len(numbers)):
                    if i < numbers[rank]:
                        (ddp.loss_of(model, ddp.batch(t, rank)) / len(numbers)).backward()

            ddp.passes(opt, form, backward)
        t += max(numbers)
    return ddp.weights(model)


# --- overflows and failures -------------------------------------------------------------------------------------------
def scaled(gamma: float, base: str, bad: tuple[int, int] | None, local: bool, steps: int) -> tuple[Any, ...]:
    """With a GradScaler; at step 5 the loss of rank 1 is inf in pass bad[1], if that is a SAM step."""
    rank = dist.get_rank()
    model = ddp.model_of(rank)
    wrapped = DistributedDataParallel(model)
    opt = ddp.optimizer(model, base, gamma=gamma, schedule=1.0, m_sharpness=local)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    before_after = []

    def backward(t: int, which: int) -> None:
        loss = ddp.loss_of(wrapped, ddp.batch(t, rank))
        scaler.scale(loss * float("inf") if bad == (t, which) and rank == 1 else loss).backward()

    for t in range(steps):
        before = bits(ddp.weights(model))
        opt.zero_grad()
        with opt.first_pass(wrapped):
            backward(t, 1)
        if opt.perturb():
            with opt.second_pass():
                backward(t, 2)
        scaler.step(opt)
        scaler.update()
        before_after.append(before != bits(ddp.weights(model)))
    return ddp.weights(model), ddp.drift(model), before_after, scaler.get_scale(), opt.steps


class Stop(Exception):
    pass


def failing(where: str, gamma: float, form: str) -> tuple[str, bool, int]:
    """Rank 1 fails at step 2, in pass 1, 2 or between them; what it says, and whether its weights are whole."""
    rank = dist.get_rank()
    model = ddp.model_of()
    group = dist.new_group(timeout=timedelta(seconds=3))  # so long the other rank waits for the one that failed
    wrapped = DistributedDataParallel(model, process_group=group)
    opt = ddp.optimizer(model, "sgd", gamma=gamma, schedule=1.0)
    before: list[bytes] = []

    def backward(t: int, which: int) -> None:
        if (t, rank) == (2, 1) and where == f"pass {which}":
            raise Stop("on purpose")
        ddp.loss_of(wrapped, ddp.batch(t, rank)).backward()

    def step(t: int) -> None:
        calls = iter((1, 2))

        def closure() -> None:
            opt.zero_grad()
            backward(t, next(calls))

        if form == "closure":
            opt.step(closure)
            return
        opt.zero_grad()
        backward(t, 1)
        if opt.perturb():
            with opt.second_pass():
                if (t, rank) == (2, 1) and where == "between":
                    raise Stop("on purpose")
                if (t, rank) == (2, 1) and where == "saving":
                    opt.state_dict()
                backward(t, 2)
        opt.step()

    for t in range(4):
        before = bits(ddp.weights(model))
        try:
            step(t)
        except Exception as error:
            return f"{type(error).__name__}: {error}", before == bits(ddp.weights(model)), opt.steps
    return "", True, opt.steps


def checkpointing(path: str, until: int, killed_at: int | None) -> tuple[Any, ...]:
    """Trains on from the last checkpoint, if there is one; rank 1 may be killed between the passes of a step."""
    rank = dist.get_rank()
    model = ddp.model_of(rank)
    wrapped = DistributedDataParallel(model)
    opt = ddp.optimizer(model, "adamw", gamma=1.5)
    file = f"{path}/checkpoint"
    if os.path.exists(file):
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    for t in range(opt.steps, until):
        opt.zero_grad()
        ddp.loss_of(wrapped, ddp.batch(t, rank)).backward()
        if opt.perturb():
            if rank == 1 and killed_at is not None and t >= killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            with opt.second_pass():
                ddp.loss_of(wrapped, ddp.batch(t, rank)).backward()
        opt.step()
        if rank == 0 and opt.steps % 10 == 0:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file + ".new")
            os.replace(file + ".new", file)
    return ddp.weights(model), opt.steps, ddp.drift(model)
