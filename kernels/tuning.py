"""Measures block sizes and warps on a device. Nothing here runs unless it is asked to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import sizes
from .adam_step import restore_adam_step_
from .checks import SIXTEEN_BIT, TRITON_DTYPE
from .perturb import perturb_
from .restore import restore_
from .sgd_step import restore_sgd_step_
from .sizes import Sizes

_TENSORS = 8
ELEMENTS = 1 << 26  # in all: enough to keep a large GPU busy for longer than the host takes to launch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _seconds(call: Callable[[], None]) -> float:
    """The median on the device, with its caches cleared before each call."""
    return triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median") / 1e3


def _calls(device: torch.device, dtype: torch.dtype, elements: int, masters: bool) -> dict[str, Callable[[], None]]:
    """Kernel -> a call of the op that launches it, in its most frequent form."""
    state = torch.float32 if masters else dtype

    def tensors(kind: torch.dtype) -> list[Tensor]:
        return [torch.zeros(elements // _TENSORS, dtype=kind, device=device) for _ in range(_TENSORS)]

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    params, grads, buffers, squares = tensors(dtype), tensors(dtype), tensors(state), tensors(state)
    kept, backups = (tensors(state), []) if masters else ([], tensors(dtype))
    groups, rng = [_TENSORS], torch.tensor([1, 2], device=device)
    stats, rho, gamma, steps = numbers(1, 1, 0, 0, 0), numbers(0.05), numbers(1), numbers(3)
    sgd, adam = numbers(0.1, 0.9, 0, 0.01, 1), numbers(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    return {
        "perturb_kernel": lambda: perturb_(
            params, grads, backups, kept, stats, rho, groups, False, 0.0, True, rng, 0
        ),
        "restore_kernel": lambda: restore_(params, backups, kept, [], [], gamma, groups),
        "sgd_step_kernel": lambda: restore_sgd_step_(
            params, grads, backups, [], buffers, kept, sgd, groups, False, False, None, None
        ),
        "adam_step_kernel": lambda: restore_adam_step_(
            params, grads, backups, [], buffers, squares, kept, adam, steps, groups, True, False, None, None
        ),
    }  # fmt: skip


@contextmanager
def _forced(candidate: Sizes) -> Iterator[None]:
    sizes.forced[:] = [candidate]
    try:
        yield
    finally:
        sizes.forced.clear()


def _times(call: Callable[[], None]) -> dict[Sizes, float]:
    """Seconds of each candidate, the fastest first. One that needs more than the device has takes no part."""
    seconds: dict[Sizes, float] = {}
    for candidate in sizes.CANDIDATES:
        with _forced(candidate):
            try:
                seconds[candidate] = _seconds(call)
            except OutOfResources:
                continue
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def autotune(
    device: torch.device | str = "cuda", dtypes: Sequence[torch.dtype] = DTYPES, elements: int = ELEMENTS
) -> dict[str, dict[Sizes, float]]:
    """Times all candidates of block size and warps for perturbing, restoring and both updates; keeps the fastest ones.

    They are used from now on, also by later processes on such a device: they go to a file in the folder that
    RST_FUSED_CACHE_DIR names, or else in ~/.cache/rst_fused ($XDG_CACHE_HOME/rst_fused). bfloat16 and float16 are timed
    beside fp32 masters, too. Takes minutes, most of them to compile, and 5 tensors of the ``elements``.

    Returns the seconds of the candidates for each kernel and dtypes, the fastest first. Results of an optimizer do not
    depend on them: the norm, whose order of summation would, is left as it is.
    """
    there = torch.device(device)
    if there.type == "cpu" or triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"device={str(device)!r}: there is nothing to tune where Triton does not compile for a GPU; expected a GPU "
            "such as 'cuda', and TRITON_INTERPRET not set"
        )
    unknown = [dtype for dtype in dtypes if dtype not in TRITON_DTYPE or dtype.is_complex]
    if unknown:
        raise ValueError(f"dtypes holds {unknown}: expected some of float32, float64, bfloat16 and float16")
    if elements < _TENSORS:
        raise ValueError(f"elements={elements}: expected at least {_TENSORS}, and enough to keep the device busy")
    there = torch.empty(0, device=there).device  # with its index
    made_for = sizes.identity(there)
    path = sizes.writable(made_for)
    found: dict[str, dict[Sizes, float]] = {}
    for dtype in dtypes:
        for masters in (False, True) if dtype in SIXTEEN_BIT else (False,):
            state = torch.float32 if masters else dtype
            for kernel, call in _calls(there, dtype, elements, masters).items():
                found[sizes.key_of(kernel, TRITON_DTYPE[dtype], TRITON_DTYPE[state])] = _times(call)
            del call  # and with it the tensors
    winners = {**sizes.read(there), **{key: next(iter(times)) for key, times in found.items()}}
    sizes.write(path, made_for, winners)
    sizes.use(there, winners)
    return found
