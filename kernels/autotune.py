"""Measures block sizes and warps on a device. Nothing here runs unless it is called."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import launch_config
from .adam_step import restore_adam_step_
from .checks import SIXTEEN_BIT, TRITON_DTYPE
from .launch_config import LaunchConfig
from .lion_step import restore_lion_step_
from .perturb import perturb_
from .restore import restore_
from .sgd_step import restore_sgd_step_

_TENSORS = 8
_NO_OPTIONS: Any = (None, None, None, (), ())  # of an update: neither AMP nor rounding
ELEMENTS = 1 << 26  # in total: enough to keep a large GPU busy for longer than the host needs for a launch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _seconds(call: Callable[[], None]) -> float:
    """The median time on the device, whose caches are cleared before each call."""
    return triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median") / 1e3


def _calls(device: torch.device, dtype: torch.dtype, elements: int, masters: bool) -> dict[str, Callable[[], None]]:
    """Kernel -> a call of the op that launches it, in its most common form."""
    state = torch.float32 if masters else dtype

    def tensors(kind: torch.dtype) -> list[Tensor]:
        return [torch.zeros(elements // _TENSORS, dtype=kind, device=device) for _ in range(_TENSORS)]

    def scalars(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    params, grads, buffers, squares = tensors(dtype), tensors(dtype), tensors(state), tensors(state)
    kept, backups = (tensors(state), []) if masters else ([], tensors(dtype))
    groups, rng = [_TENSORS], torch.tensor([1, 2], device=device)
    stats, rho, gamma, steps = scalars(1, 1, 0, 0, 0, 1), scalars(0.05), scalars(1), scalars(3)
    sgd, adam = scalars(0.1, 0.9, 0, 0.01, 1), scalars(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    lion = scalars(1e-4, 0.9, 0.99, 0.01, 1)
    return {
        "perturb_kernel": lambda: perturb_(
            params, grads, backups, kept, stats, rho, groups, False, 0.0, True, rng, 0, []
        ),
        "restore_kernel": lambda: restore_(params, backups, kept, [], [], gamma, groups),
        "sgd_step_kernel": lambda: restore_sgd_step_(
            params, grads, backups, [], buffers, kept, sgd, groups, False, False, *_NO_OPTIONS
        ),
        "adam_step_kernel": lambda: restore_adam_step_(
            params, grads, backups, [], buffers, squares, [], kept, adam, steps, groups, True, False, *_NO_OPTIONS
        ),
        "lion_step_kernel": lambda: restore_lion_step_(
            params, grads, backups, [], buffers, kept, lion, groups, False, *_NO_OPTIONS
        ),
    }  # fmt: skip


def _times(call: Callable[[], None]) -> dict[LaunchConfig, float]:
    """Seconds of each candidate, the fastest first. One that needs more than the device has is left out."""
    seconds: dict[LaunchConfig, float] = {}
    for candidate in launch_config.CANDIDATES:
        launch_config.forced[:] = [candidate]
        try:
            seconds[candidate] = _seconds(call)
        except OutOfResources:
            continue
        finally:
            launch_config.forced.clear()
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def autotune(
    device: torch.device | str = "cuda", dtypes: Sequence[torch.dtype] = DTYPES, elements: int = ELEMENTS
) -> dict[str, dict[LaunchConfig, float]]:
    """Times all candidates of block size and warps for perturbing, restoring and the updates; keeps the fastest ones.

    They are used from then on, by later processes on such a device too: they are saved in the folder that
    RST_FUSED_CACHE_DIR names, or else in ~/.cache/rst_fused ($XDG_CACHE_HOME/rst_fused). bfloat16 and float16 are also
    timed beside fp32 masters. Takes minutes, most of them to compile, and memory for 5 times ``elements``.

    Returns the seconds of the candidates for each kernel and dtypes, the fastest first. Results of an optimizer do not
    depend on the choice: the norm, whose order of summation would, is not tuned.
    """
    target = torch.device(device)
    if target.type == "cpu" or triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"device={str(device)!r}: there is nothing to tune where Triton does not compile for a GPU; expected a GPU "
            "such as 'cuda', and TRITON_INTERPRET not set"
        )
    unknown = [dtype for dtype in dtypes if dtype not in TRITON_DTYPE or dtype.is_complex]
    if unknown:
        raise ValueError(f"dtypes holds {unknown}: expected some of float32, float64, bfloat16 and float16")
    if elements < _TENSORS:
        raise ValueError(f"elements={elements}: expected at least {_TENSORS}, and enough to keep the device busy")
    target = torch.empty(0, device=target).device  # with its index
    made_for = launch_config.identity(target)
    launch_config.writable(made_for)
    found: dict[str, dict[LaunchConfig, float]] = {}
    for dtype in dtypes:
        for masters in (False, True) if dtype in SIXTEEN_BIT else (False,):
            state = torch.float32 if masters else dtype
            for kernel, call in _calls(target, dtype, elements, masters).items():
                found[launch_config.key_of(kernel, TRITON_DTYPE[dtype], TRITON_DTYPE[state])] = _times(call)
            del call  # and the tensors with it
    winners = {key: next(iter(times)) for key, times in found.items()}
    launch_config.read.cache_clear()  # another process may have added to the file since
    launch_config.write(made_for, {**launch_config.read(target), **winners})
    return found
