"""step(closure) where gradients exist before: those are zeroed by most closures, and added to by some."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import ranks
import torch
from oracle_optimizer import bits
from paths import observed

from rst_fused import RST
from rst_fused._step import earlier_gradients


def make(schedule: float = 1.0, **options) -> tuple[torch.nn.Module, RST]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    return model, RST(model.parameters(), lr=0.1, momentum=0.9, schedule=schedule, model=model, **options)


def loss_of(model: torch.nn.Module, seed: int) -> torch.Tensor:
    return model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean()


def grads_of(model: torch.nn.Module) -> list[bytes]:
    return bits([p.grad for p in model.parameters()])


@pytest.mark.parametrize("base", ["sgd", "instance"])
def test_a_sam_step_on_top_of_earlier_gradients_is_refused_before_anything_changes(base):
    model, opt = make()
    if base == "instance":
        opt = RST(None, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), schedule=1.0)
    for seed in range(3):
        loss_of(model, seed).backward()

    def closure():
        loss = loss_of(model, 3)
        loss.backward()
        return loss

    before = observed(list(model.parameters()), opt)
    with pytest.raises(RuntimeError, match="adds to gradients that were there before.*all micro-batches.*integrations"):
        opt.step(closure)
    assert observed(list(model.parameters()), opt) == before
    other, _ = make()
    for seed in range(4):
        loss_of(other, seed).backward()
    assert grads_of(model) == grads_of(other)
    for p in model.parameters():
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    opt.perturb(fire=False)  # the way on: a base step with these gradients
    opt.step()
    assert (opt.steps, opt.sam_steps) == (1, 0)


def test_base_steps_may_accumulate():
    model, opt = make(schedule=0.0)
    other, reference = make(schedule=0.0)
    for _ in range(2):
        loss_of(model, 0).backward()
        opt.step(lambda: loss_of(model, 1).backward())
        opt.zero_grad()
        for seed in (0, 1):
            loss_of(other, seed).backward()
        reference.perturb()
        reference.step()
        reference.zero_grad()
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


def zero_to_none(model, opt):
    opt.zero_grad()
    loss_of(model, 1).backward()


def zero_in_place(model, opt):
    opt.zero_grad(set_to_none=False)
    loss_of(model, 1).backward()


def zero_one_by_one(model, opt):
    for p in model.parameters():
        p.grad.zero_() if p.grad is not None else None
    loss_of(model, 1).backward()


def zero_late(model, opt):
    loss = loss_of(model, 1)
    opt.zero_grad()
    loss.backward()


def several(model, opt):
    opt.zero_grad()
    for seed in range(3):
        loss_of(model, seed).backward()


def assigned(model, opt):
    grads = torch.autograd.grad(loss_of(model, 1), list(model.parameters()))
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g


def written(model, opt):
    grads = torch.autograd.grad(loss_of(model, 1), list(model.parameters()))
    for p, g in zip(model.parameters(), grads, strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(g)


def of_the_last_layer(model, opt):
    opt.zero_grad()
    model[2](torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize(
    "closure",
    [zero_to_none, zero_in_place, zero_one_by_one, zero_late, several, assigned, written, of_the_last_layer],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_closure_that_starts_anew_is_fine(closure, compiled):
    model, opt = make()
    if compiled:
        if closure is of_the_last_layer:
            pytest.skip("a compiled model has no layers to call")
        model = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        opt.step(lambda: closure(model, opt))
    assert (opt.steps, opt.sam_steps) == (3, 3)


def added_by_hand(model):
    for p, g in zip(model.parameters(), torch.autograd.grad(loss_of(model, 1), list(model.parameters())), strict=True):
        p.grad = g if p.grad is None else p.grad + g


def without_backward(model):
    pass


def of_other_parameters(model):
    model[2](torch.ones(2, 3)).sum().backward()


def twice(model):
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()


def of_second_order(model):
    loss_of(model, 1).backward(create_graph=True)


@pytest.mark.parametrize(
    ("closure", "seen"),
    [
        (without_backward, True),
        (of_other_parameters, True),
        (twice, True),
        (of_second_order, True),
        (added_by_hand, False),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_counts_as_adding(closure, seen):
    """What is added by an assignment looks like a new gradient."""
    model, opt = make()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="adds to gradients") if seen else nullcontext():
        opt.step(lambda: closure(model))


def test_a_closure_that_fails_leaves_no_hook():
    model, opt = make()
    loss_of(model, 0).backward()
    node = torch.autograd.graph.get_gradient_edge(next(model.parameters())).node

    def closure():
        raise KeyError("not today")

    with pytest.raises(KeyError):
        opt.step(closure)
    called = []
    node.register_prehook(lambda grads: called.append(len(called)))
    loss_of(model, 1).backward()
    assert called == [0] and opt.steps == 0


def test_a_compiled_model_is_not_compiled_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model, opt = make(schedule=0.5)
    compiled = torch.compile(model, backend=counter)
    for _ in range(6):
        opt.step(lambda: zero_to_none(compiled, opt))
    assert counter.frame_count == 1


def test_a_covered_closure_may_add():
    model, opt = make()
    loss_of(model, 0).backward()
    runs = []

    def closure():
        for seed in (0, 1) if runs else (1,):
            loss_of(model, seed).backward()
        runs.append(seed)

    with earlier_gradients.covered(opt):
        opt.step(closure)
    other, reference = make()
    for backward in ("first", "second"):
        for seed in (0, 1):
            loss_of(other, seed).backward()
        if backward == "first":
            assert reference.perturb()
    reference.step()
    assert runs == [1, 1] and bits(list(model.parameters())) == bits(list(other.parameters()))
    with pytest.raises(RuntimeError, match="adds to gradients"):
        opt.step(closure)


def _of_sharded_gradients() -> dict[str, bool]:
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))
    fully_shard(model)

    def watched(zero, backward=True) -> bool:
        p = next(model.parameters())
        watch = earlier_gradients.Watch(p, p.grad)
        zero()
        if backward:
            model(torch.ones(4, 3)).sum().backward()
        return watch.stop()

    model(torch.ones(4, 3)).sum().backward()
    return {
        "added": watched(lambda: None),
        "unchanged": watched(lambda: None, backward=False),
        "zeroed": watched(model.zero_grad),
        "zeroed in place": watched(lambda: model.zero_grad(set_to_none=False)),
    }


def test_sharded_gradients():
    """FSDP adds to them itself, past the node of the parameter, and without a change of version."""
    expected = {"added": True, "unchanged": True, "zeroed": False, "zeroed in place": False}
    assert ranks.run(2, _of_sharded_gradients) == [expected] * 2
