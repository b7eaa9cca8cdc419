"""A program that changes tensors under an optimizer in one way after the other, and says what came of each.

    python tests/support/spoilt_memory.py KIND [FIRST [BACKEND]]

It prints "begin CASE" and "end CASE: what is wrong, or nothing" for the cases of a kind from number FIRST on, so that a
crash shows as a case without an end. All memory that kernels are given is followed by more, which must stay as it is.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from oracle_optimizer import bits
from paths import no_plans
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from rst_fused import RST

SIDE, FEWER, GUARD = 8, 16, 7.0
BACKEND = sys.argv[3] if len(sys.argv) > 3 else "cpu"
ANSWERS = (RuntimeError, TypeError, ValueError)
BASES: dict[str, dict[str, Any]] = {
    "plain": {"base": "sgd"},
    "sgd": {"base": "sgd", "momentum": 0.9},
    "mixed": {"base": "sgd", "momentum": 0.9, "gamma": 2.0},
    "adam": {"base": "adam"},
    "amsgrad": {"base": "adam", "amsgrad": True},
    # without a twin in torch.optim
    "lion": {"base": "lion"},
    "masters": {"base": "adamw", "master_weights": True},
}
TWINS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
# Before a base step, before a perturbation, and between the passes, followed by a step or by restore().
WHENS = ("base step", "perturb", "step", "restore")
BEFORE, PASSES, BETWEEN = WHENS[:2], WHENS[:3], WHENS[2:]


class Subject:
    """Two parameters with their optimizer, or that of torch, after three steps."""

    def __init__(self, base: str, torchs: bool = False) -> None:
        options = dict(BASES[base])
        self.base, self.torchs = base, torchs
        self.guarded: list[tuple[Tensor, int]] = []
        self.first_grads: list[Any] = []
        dtype = torch.bfloat16 if "master_weights" in options else torch.float32
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(SIDE, SIDE, generator=generator).to(dtype) for _ in range(2)]
        self.params = [nn.Parameter(self.guard(t)) for t in start]
        self.opt: Any
        if torchs:
            hyper = {name: value for name, value in options.items() if name in ("momentum", "amsgrad")}
            self.opt = TWINS[options["base"]](self.params, lr=0.1, **hyper)
        else:
            self.opt = RST(self.params, lr=0.1, rho=0.5, schedule=0.0, backend=BACKEND, **options)
        for t in range(3):
            self.step(t)
            for p in self.params if t == 0 else ():  # before a plan has seen it twice
                for name, value in self.opt.state[p].items():
                    if value.dim():
                        self.opt.state[p][name] = self.guard(value)

    def guard(self, t: Tensor) -> Tensor:
        """A copy, with guarded memory behind it."""
        whole = torch.full((5 * t.numel(),), GUARD, dtype=t.dtype)
        whole[: t.numel()] = t.detach().reshape(-1)
        self.guarded.append((whole, t.numel()))
        return whole[: t.numel()].view(t.shape)

    def cut(self, t: Tensor) -> Tensor:
        """The first few elements of a guarded tensor, at the same address; the rest is guarded from now on."""
        whole = next(whole for whole, _ in self.guarded if whole.data_ptr() == t.data_ptr())
        whole[FEWER:] = GUARD
        self.guarded.append((whole, FEWER))
        return whole[:FEWER]

    def guards_hold(self) -> bool:
        return all(bool((whole[count:] == GUARD).all()) for whole, count in self.guarded)

    def gradients(self, t: int, which: int = 0) -> None:
        for i, p in enumerate(self.params):
            p.grad = None
            if p.numel():
                generator = torch.Generator().manual_seed(4 * t + 2 * which + i)
                p.grad = self.guard(torch.randn(p.shape, generator=generator).to(p.dtype))

    def step(self, t: int) -> None:
        """A SAM step, or what torch makes of its gradients."""
        self.gradients(t)
        first = [p.grad for p in self.params]
        if self.torchs or self.opt.perturb(True):
            self.gradients(t, 1)
        if self.torchs:
            self.mix(first)
        self.opt.step()

    def mix(self, first: list[Any]) -> None:
        gamma = BASES[self.base].get("gamma", 1.0)
        for p, g in zip(self.params, first, strict=True):
            if gamma != 1.0 and p.grad is not None:
                p.grad = (1 - gamma) * g + gamma * p.grad

    def seen(self, i: int) -> Any:
        state = {k: bits([v]) if isinstance(v, Tensor) else v for k, v in self.opt.state[self.params[i]].items()}
        return bits([self.params[i]]), state, self.opt.steps


@dataclass
class Spoil:
    """Something done to what belongs to parameter 1."""

    name: str
    act: Callable[[Subject], Any]
    bases: tuple[str, ...] = ("sgd", "adam", "masters")
    whens: tuple[str, ...] = WHENS
    late: bool = False  # once the gradients of the pass are there
    answer: str = "either"  # as torch.optim, or refused; or only one of them: "served", "refused"


def play(subject: Subject, when: str, spoil: Spoil) -> Any:
    """Returns the weights of parameter 1 right after it was spoilt."""
    opt, t = subject.opt, 3

    def spoilt() -> Any:
        spoil.act(subject)
        return spoil.answer != "refused" and bits([subject.params[1]])

    if when in BEFORE:
        if not spoil.late:
            left = spoilt()
        subject.gradients(t)
        if spoil.late:
            left = spoilt()
        if when == "perturb":
            opt.perturb(True)
            subject.gradients(t, 1)
        opt.step()
        return left
    subject.gradients(t)
    subject.first_grads = [p.grad for p in subject.params]
    opt.perturb(True)
    if not spoil.late:
        left = spoilt()
    if when == "restore":
        opt.restore()
        return left
    subject.gradients(t, 1)
    if spoil.late:
        left = spoilt()
    opt.step()
    return left


def play_twin(twin: Subject, when: str, spoil: Spoil) -> None:
    """The same step with an optimizer of torch, which has no first pass: there gradients are mixed by hand."""
    if when in BEFORE and not spoil.late:
        spoil.act(twin)
    twin.gradients(3)
    twin.first_grads = [p.grad for p in twin.params]
    if when not in BEFORE and not spoil.late:
        spoil.act(twin)
    if when != "base step":
        twin.gradients(3, 1)
        twin.mix(twin.first_grads)
    if spoil.late and when != "perturb":
        spoil.act(twin)
    twin.opt.step()


def judge(base: str, when: str, spoil: Spoil) -> str:
    """What is wrong with the answer to a spoil; nothing if it is right."""
    subject = Subject(base)
    before, weights = subject.seen(0), bits(subject.params)
    try:
        left = play(subject, when, spoil)
    except ANSWERS as error:
        if not subject.guards_hold():
            return "refused, but memory outside of a tensor was written"
        if spoil.answer == "served":
            return f"refused: {error}"
        if re.search(r"parameter 1\b", str(error)) is None:
            return f"refused without naming parameter 1: {error}"
        with suppress(ANSWERS):
            subject.opt.restore()
        return "" if subject.seen(0) == before else f"refused, but parameter 0 was changed: {error}"
    except Exception as error:
        return f"{error!r} is no answer"
    if not subject.guards_hold():
        return "memory outside of a tensor was written"
    if when == "restore":
        if subject.seen(0) != before:
            return "parameter 0 was not restored"
        fine = spoil.answer == "refused" or bits(subject.params[1:])[0] in (weights[1], *left)
        return "" if fine else "other weights"
    if spoil.answer == "refused":
        return "taken"
    if base in ("masters", "lion"):
        return "" if all(bool(p.isfinite().all()) for p in subject.params) else "weights are not finite"
    twin = Subject(base, torchs=True)
    try:
        play_twin(twin, when, spoil)
    except Exception as error:
        return f"taken, but torch.optim refuses it: {error}"
    for i, (p, q) in enumerate(zip(subject.params, twin.params, strict=True)):
        if p.shape != q.shape or not torch.allclose(p, q, rtol=1e-5, atol=1e-5):
            return f"parameter {i} is not what it is with torch.optim"
        count, wanted = (s.opt.state[s.params[i]].get("step") for s in (subject, twin))
        if isinstance(wanted, Tensor) and float(count) != float(wanted):
            return f"the step count of parameter {i} is {count}, with torch.optim {wanted}"
    return ""


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def shorten(t: Tensor) -> None:
    t.untyped_storage().resize_(FEWER)


def replace_and(shrink: Callable[[Tensor], None], what: str) -> Callable[[Subject], None]:
    """Memory of its own first: what is guarded must stay readable."""

    def act(subject: Subject) -> None:
        p = subject.params[1]
        if what == "data":
            p.data = p.data.clone()
            shrink(p)
        elif what == "grad":
            p.grad = p.grad.clone()
            shrink(p.grad)
        elif what == "first_grad":
            subject.first_grads[1].set_(subject.first_grads[1].clone())
            shrink(subject.first_grads[1])
        else:
            subject.opt.state[p][what] = subject.opt.state[p][what].clone()
            shrink(subject.opt.state[p][what])

    return act


SHRUNK: dict[str, Callable[[Tensor], None]] = {"freed": free, "in a storage that ends before it": shorten}


def set_data(change: Callable[[Subject, Tensor], Tensor]) -> Callable[[Subject], None]:
    def act(subject: Subject) -> None:
        subject.params[1].data = change(subject, subject.params[1].data)

    return act


def set_state(name: str, change: Callable[[Subject, Any], Any]) -> Callable[[Subject], None]:
    """Puts what ``change`` returns into the state; nothing, if it has changed the tensor in place."""

    def act(subject: Subject) -> None:
        state = subject.opt.state[subject.params[1]]
        new = change(subject, state[name])
        if new is not IN_PLACE:
            state[name] = new

    return act


IN_PLACE = object()


def in_place(change: Callable[[Subject, Tensor], Any]) -> Callable[[Subject, Tensor], Any]:
    def act(subject: Subject, t: Tensor) -> Any:
        change(subject, t)
        return IN_PLACE

    return act


def set_grad(change: Callable[[Tensor], Any]) -> Callable[[Subject], None]:
    def act(subject: Subject) -> None:
        subject.params[1].grad = change(subject.params[1].grad)

    return act


def backup(change: Callable[[Subject, Tensor], Any]) -> Callable[[Subject], None]:
    """Whatever tensor keeps the weights, if Python knows it: all that has them bit for bit."""

    def act(subject: Subject) -> None:
        twin = Subject(subject.base)
        wanted = twin.params[1].detach()
        kept = [
            t for t in gc.get_objects()
            if type(t) is Tensor and t.shape == wanted.shape and t.dtype == wanted.dtype and torch.equal(t, wanted)
            and t.data_ptr() not in (wanted.data_ptr(), twin.params[1].data_ptr())
        ]  # fmt: skip
        for t in kept:
            change(subject, t)

    return act


STATE = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "amsgrad": ("max_exp_avg_sq",),
         "lion": ("exp_avg",), "masters": ("master", "exp_avg")}  # fmt: skip
STATE_CHANGES: list[tuple[str, Callable[[Subject, Any], Any], str]] = [
    ("resized", in_place(lambda s, t: t.resize_(FEWER)), "refused"),
    ("set to less of its memory", in_place(lambda s, t: t.set_(s.cut(t))), "refused"),
    ("larger", in_place(lambda s, t: t.resize_(2 * SIDE, SIDE)), "refused"),
    ("transposed", in_place(lambda s, t: t.t_()), "either"),
    ("None", lambda s, t: None, "either"),
    ("a number", lambda s, t: 3.0, "refused"),
    ("float64", lambda s, t: t.double(), "either"),
    ("of two tensors", lambda s, t: TwoTensor(t.clone(), t.clone()), "either"),
    ("on meta", lambda s, t: t.to("meta"), "refused"),
]
COUNTS: dict[str, tuple[Any, str]] = {
    "None": (None, "refused"), "an int": (7, "either"), "a float": (7.0, "either"), "a string": ("7", "refused"),
    "float64": (torch.tensor(7.0, dtype=torch.float64), "served"), "an int tensor": (torch.tensor(7), "either"),
    "one element": (torch.tensor([7.0]), "either"), "two elements": (torch.tensor([7.0, 7.0]), "refused"),
    "empty": (torch.empty(0), "refused"), "of two tensors": (TwoTensor(torch.tensor(7.0), torch.tensor(7.0)), "either"),
    "on meta": (torch.tensor(7.0, device="meta"), "refused"),
}  # fmt: skip
KINDS: dict[str, list[Spoil]] = {
    "parameter": [
        Spoil("smaller at the same address", set_data(Subject.cut), ("plain", "sgd", "adam", "masters")),
        Spoil("float64 in the same memory", set_data(lambda s, t: t.view(torch.float64)), ("plain", "sgd", "adam")),
        Spoil("empty", set_data(lambda s, t: torch.empty(0, dtype=t.dtype)), ("plain", "sgd", "adam")),
        Spoil("transposed", set_data(lambda s, t: t.t()), ("plain", "sgd", "adam"), BEFORE),
        Spoil("every second column", set_data(lambda s, t: t[:, ::2]), ("plain", "sgd", "adam")),
        *(Spoil(how, replace_and(shrink, "data"), ("plain", "sgd", "adam", "masters"), answer="refused")
          for how, shrink in SHRUNK.items()),
    ],
    "state": [
        *(Spoil(f"{name} {how}", set_state(name, change), (base,), answer=answer)
          for base, names in STATE.items() for name in names for how, change, answer in STATE_CHANGES
          if (name, how) != ("master", "transposed")),  # other weights, by the user's will
        *(Spoil(f"{name} {how}", replace_and(shrink, name), (base,), answer="refused")
          for base, names in STATE.items() for name in names for how, shrink in SHRUNK.items()),
    ],
    "step count": [
        Spoil(how, set_state("step", lambda s, t, new=new: new.clone() if isinstance(new, Tensor) else new), ("adam",),
              answer=answer)
        for how, (new, answer) in COUNTS.items()
    ],
    "gradient": [
        Spoil("resized", lambda s: s.params[1].grad.resize_(FEWER), whens=PASSES, late=True, answer="refused"),
        Spoil("set to less of its memory", lambda s: s.params[1].grad.set_(s.cut(s.params[1].grad)), whens=PASSES,
              late=True, answer="refused"),
        Spoil("transposed", set_grad(lambda g: g.t_()), whens=PASSES, late=True, answer="served"),
        Spoil("expanded", set_grad(lambda g: g[:1].expand(SIDE, SIDE)), whens=PASSES, late=True, answer="served"),
        Spoil("with gaps", set_grad(lambda g: torch.stack([g, g], -1)[..., 0]), whens=PASSES, late=True,
              answer="served"),
        *(Spoil(how, replace_and(shrink, "grad"), whens=PASSES, late=True, answer="refused")
          for how, shrink in SHRUNK.items()),
        Spoil("of two tensors", set_grad(lambda g: TwoTensor(g, g)), whens=PASSES, late=True),
        Spoil("of a collective", set_grad(AsyncCollectiveTensor), whens=PASSES, late=True, answer="served"),
    ],
    "first gradient": [
        Spoil("resized", lambda s: s.first_grads[1].resize_(FEWER), ("mixed",), BETWEEN, answer="refused"),
        Spoil("set to less of its memory", lambda s: s.first_grads[1].set_(s.cut(s.first_grads[1])), ("mixed",),
              BETWEEN, answer="refused"),
        Spoil("set to nothing", lambda s: s.first_grads[1].set_(torch.empty(0)), ("mixed",), BETWEEN,
              answer="refused"),
        Spoil("transposed", lambda s: s.first_grads[1].t_(), ("mixed",), BETWEEN, answer="served"),
        *(Spoil(how, replace_and(shrink, "first_grad"), ("mixed",), BETWEEN, answer="refused")
          for how, shrink in SHRUNK.items()),
    ],
    "kept weights": [
        Spoil("resized", backup(lambda s, t: t.resize_(FEWER)), ("plain", "sgd", "adam"), BETWEEN),
        *(Spoil(how, backup(lambda s, t, shrink=shrink: shrink(t)), ("plain", "sgd", "adam"), BETWEEN)
          for how, shrink in SHRUNK.items()),
    ],
}  # fmt: skip


def cases(kind: str) -> Iterator[tuple[str, bool, str, str, Spoil]]:
    for spoil in KINDS[kind]:
        for base in spoil.bases:
            for when in spoil.whens:
                for plans in (True, False):
                    name = f"{spoil.name}, {base}, {when}, {'plan' if plans else 'ops'}"
                    yield name, plans, base, when, spoil


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, first = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for number, (name, plans, base, when, spoil) in enumerate(cases(chosen)):
        if number >= first:
            print(f"begin {name}", flush=True)
            with nullcontext() if plans else no_plans():
                wrong = judge(base, when, spoil)
            print(f"end {name}: {wrong.splitlines()[0] if wrong else ''}", flush=True)
