"""Ways to hold the gradient of a parameter, or its memory, and gradients that depend on where the weights are."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle_optimizer import bits
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Seen = Callable[[], Tensor | None]  # what the holder sees; None: nothing any more
Way = Callable[[nn.Parameter, Tensor], Seen]  # gives the parameter this gradient, and holds that


class Subclass(Tensor):
    pass


def variable(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    g = p.grad
    return lambda: g


def held_in(make: Callable[[Tensor], Any], look: Callable[[Any], Any]) -> Way:
    """``make``: what is held, given p.grad."""

    def way(p: nn.Parameter, value: Tensor) -> Seen:
        p.grad = value.clone()
        held = make(p.grad)
        return lambda: look(held)

    return way


def lent_from(make: Callable[[Tensor], tuple[Tensor, Any]], look: Callable[[Any], Any]) -> Way:
    """``make``: a gradient in memory that is that of what is held."""

    def way(p: nn.Parameter, value: Tensor) -> Seen:
        p.grad, held = make(value.clone())
        return lambda: look(held)

    return way


def of_proxy(proxy: Any) -> Tensor | None:
    try:
        return proxy.detach()  # type: ignore[no-any-return]
    except ReferenceError:
        return None


def untyped_storage(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    held = p.grad.untyped_storage()
    return lambda: torch.empty(0, dtype=value.dtype).set_(held)


def weak_storage_in_cpp(p: nn.Parameter, value: Tensor) -> Seen:
    """As CUDA graphs of torch.compile have them."""
    p.grad = value.clone()
    held = StorageWeakRef(p.grad.untyped_storage())

    def look() -> Tensor | None:
        if held.expired():
            return None
        return torch.empty(0, dtype=value.dtype).set_(torch.UntypedStorage._new_with_weak_ptr(held.cdata))

    return look


def weak_storage(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    held = weakref.ref(p.grad.untyped_storage())

    def look() -> Tensor | None:
        storage = held()
        return None if storage is None else torch.empty(0, dtype=value.dtype).set_(storage)

    return look


def typed_storage(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    held = p.grad.storage()
    return lambda: torch.empty(0, dtype=value.dtype).set_(held)


def memory_view(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    held = memoryview(p.grad.numpy().reshape(-1))  # type: ignore[arg-type]
    return lambda: torch.frombuffer(bytearray(held), dtype=value.dtype)


def capsule(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    held = [torch.utils.dlpack.to_dlpack(p.grad)]

    def look() -> Tensor:
        if not isinstance(held[0], Tensor):
            held[0] = torch.utils.dlpack.from_dlpack(held[0])
        return held[0]

    return look


def buffer_of_bytes(p: nn.Parameter, value: Tensor) -> Seen:
    held = bytearray(value.numpy().tobytes())
    p.grad = torch.frombuffer(held, dtype=value.dtype).view(value.shape)
    return lambda: torch.frombuffer(bytearray(held), dtype=value.dtype)


def shared_memory(p: nn.Parameter, value: Tensor) -> Seen:
    """As another process has it, which the storage is sent to."""
    p.grad = value.clone().share_memory_()
    handle = p.grad.untyped_storage()._share_filename_cpu_()
    other = torch.UntypedStorage._new_shared_filename_cpu(*handle)
    return lambda: torch.empty(0, dtype=value.dtype).set_(other)


def second_parameter(p: nn.Parameter, value: Tensor) -> Seen:
    other = nn.Parameter(torch.zeros_like(p))
    p.grad = other.grad = value.clone()
    return lambda: other.grad


def flat_buffer(p: nn.Parameter, value: Tensor) -> Seen:
    held = torch.zeros(value.numel() + 2, dtype=value.dtype)
    held[1:-1] = value.reshape(-1)
    p.grad = held[1:-1].view(value.shape)
    return lambda: held


def in_a_graph(p: nn.Parameter, value: Tensor) -> Seen:
    """The graph of the gradient keeps it for its own backward pass."""
    p.grad = None
    (p * value.clone().requires_grad_()).sum().backward(create_graph=True)
    penalty = p.grad.square().sum()  # type: ignore[union-attr]
    return lambda: penalty.grad_fn.next_functions[0][0]._saved_self.detach()  # type: ignore[union-attr]


def saved_for_backward(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    x = torch.ones_like(value, requires_grad=True)
    product = (p.grad * x).sum()
    return lambda: torch.autograd.grad(product, x, retain_graph=True)[0]


def saved_tensor_hook(p: nn.Parameter, value: Tensor) -> Seen:
    held: list[Tensor] = []
    p.grad = value.clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.detach()) or t, lambda t: t):  # type: ignore
        (p.grad * torch.ones_like(value, requires_grad=True)).sum()
    return lambda: held[-1]


def subclass(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone().as_subclass(Subclass)
    g = p.grad
    return lambda: g


def hook_of(kind: str) -> Way:
    def way(p: nn.Parameter, value: Tensor) -> Seen:
        held: list[Tensor] = []
        p.grad = None
        if kind == "tensor":
            handle = p.register_hook(lambda g: held.append(g))
        else:
            handle = p.register_post_accumulate_grad_hook(lambda p: held.append(p.grad))  # type: ignore[arg-type]
        (p * value).sum().backward()
        handle.remove()
        return lambda: held[-1]

    return way


def micro_batches(p: nn.Parameter, value: Tensor) -> Seen:
    """Held since the first of them; the others are added to it."""
    p.grad = None
    (p * (value / 2)).sum().backward()
    g = p.grad
    (p * (value / 2)).sum().backward()
    return lambda: g


class Holder(threading.Thread):
    """Has a gradient in a variable of its own, and says what it sees there."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__(daemon=True)
        self.p: nn.Parameter | None = p
        self.questions: queue.Queue[bool] = queue.Queue()
        self.answers: queue.Queue[Tensor] = queue.Queue()
        self.start()
        self.answers.get()

    def run(self) -> None:
        assert self.p is not None
        g, self.p = self.p.grad, None
        assert g is not None
        self.answers.put(g.clone())
        while self.questions.get():
            self.answers.put(g.clone())

    def look(self) -> Tensor:
        self.questions.put(True)
        return self.answers.get()

    def __del__(self) -> None:
        self.questions.put(False)


def thread(p: nn.Parameter, value: Tensor) -> Seen:
    p.grad = value.clone()
    holder = Holder(p)
    return lambda: holder.look()


def same(held: Any) -> Any:
    return held


WAYS: dict[str, Way] = {
    "variable": variable, "list": held_in(lambda g: [g], lambda h: h[0]),
    "dict": held_in(lambda g: {0: g}, lambda h: h[0]),
    "weakref": held_in(weakref.ref, lambda h: h()), "proxy": held_in(weakref.proxy, of_proxy),
    "weak dictionary": held_in(lambda g: weakref.WeakValueDictionary({0: g}), lambda h: h.get(0)),
    "detach": held_in(Tensor.detach, same), "view": held_in(lambda g: g.view(-1), same),
    "narrow": held_in(lambda g: g.view(-1).narrow(0, 1, 2), same), "reshape": held_in(lambda g: g.reshape(-1), same),
    "data": held_in(lambda g: g.data, same), "view of bytes": held_in(lambda g: g.view(torch.uint8), same),
    "untyped storage": untyped_storage, "storage": typed_storage, "weak storage": weak_storage,
    "weak storage in C++": weak_storage_in_cpp,
    "numpy": held_in(Tensor.numpy, torch.from_numpy), "memoryview": memory_view, "capsule": capsule,
    "from_dlpack": held_in(torch.from_dlpack, same),
    "second parameter": second_parameter, "flat buffer": flat_buffer, "graph": in_a_graph,
    "saved for backward": saved_for_backward, "saved tensor hook": saved_tensor_hook, "thread": thread,
    "subclass": subclass, "tensor hook": hook_of("tensor"), "accumulation hook": hook_of("accumulation"),
    "micro-batches": micro_batches,
    "from numpy": lent_from(lambda g: (torch.from_numpy(h := g.numpy().copy()), h), lambda h: torch.tensor(h)),
    "from bytes": buffer_of_bytes,
    "lent by dlpack": lent_from(lambda g: (torch.from_dlpack(g), g), same),
    "lazy clone": lent_from(lambda g: (torch._lazy_clone(g), g), same), "shared memory": shared_memory,
}  # fmt: skip
# Whose holder sees nothing once p.grad lets go of the gradient, as it always did.
WEAK = ("weakref", "proxy", "weak dictionary", "weak storage", "weak storage in C++")
# The gradient is, or becomes where it is written to, a copy of what is held.
APART = ("lazy clone", "tensor hook")


def value_for(p: nn.Parameter, t: int, which: int, i: int) -> Tensor:
    """A gradient that depends on where the weights are, so that a wrong one there shows."""
    generator = torch.Generator().manual_seed(1000 * t + 10 * i + which)
    return p.detach().clone() / 2 + torch.randn(p.shape, generator=generator, dtype=p.dtype)


def give(p: nn.Parameter, value: Tensor) -> None:
    p.grad = value


def shown(seen: list[Seen]) -> list[list[bytes] | None]:
    return [None if (x := look()) is None else bits([x]) for look in seen]


@contextmanager
def unchanged(seen: list[Seen], weak: bool) -> Iterator[None]:
    """What is held has the same bits before and after; what is held weakly may be gone."""
    before = shown(seen)
    yield
    after = shown(seen)
    assert all(b == a or (weak and a is None) for b, a in zip(before, after, strict=True))
