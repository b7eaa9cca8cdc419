"""How kernels are started, so that what began is finished whatever interrupts.

Python may raise KeyboardInterrupt between any two of its instructions, but never within one C call. Triton calls a hook
in the very C call that starts a kernel: it notes that the kernel was started.
"""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# Without fusion, a * b + c rounds twice unless the formula says fma.
OPTIONS = {"enable_fp_fusion": False}
_RUN = operator.methodcaller("__call__")


class Launcher:
    """One variant of a kernel on one device.

    It keeps what Triton compiled, and the constants that a launch has to repeat. Triton's own lookup takes several
    times as long, since it inspects every argument; here the constants alone decide, see .multi_tensor_apply.kernel.
    """

    def __init__(self, function: Any, device: torch.device, constants: dict[str, Any], warps: int) -> None:
        self.function, self.device, self.constants, self.warps = function, device, constants, warps
        self._binary: CompiledKernel | None = None
        self._fixed = tuple(constants[name] for name in function.arg_names if name in constants)

    def start(self, programs: int, args: Sequence[Any], note: Callable[[Any], None]) -> None:
        """Calls ``note`` once the kernel is started; not at all if it cannot be."""
        with torch.accelerator.device_index(self.device.index):  # None on the CPU: nothing to switch
            if self._binary is None:
                options = {**self.constants, **OPTIONS, "num_warps": self.warps}
                self._binary = self.function.warmup(*args, grid=(programs,), **options)  # compiles, and starts nothing
                if self._binary is None:  # Triton's interpreter has no binaries
                    run = partial(self.function[(programs,)], *args, **options)
                    deque(map(_RUN, (run, partial(note, None))), maxlen=0)
                    return
            self._start_binary(self._binary, programs, (*args, *self._fixed), note)

    @staticmethod
    def _start_binary(
        binary: CompiledKernel, programs: int, args: tuple[Any, ...], note: Callable[[Any], None]
    ) -> None:
        active, grid = driver.active, (programs, 1, 1)
        stream = active.get_current_stream(active.get_current_device())
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        metadata = None
        if _listens(enter) or _listens(leave):
            metadata, mine = binary.launch_metadata(grid, stream, *args), note

            def note(data: Any) -> None:
                mine(data)
                if _listens(leave):
                    leave(data)

        binary.run(
            *grid, stream, binary.function, binary.packed_metadata, metadata, enter if _listens(enter) else None, note,
            *args,
        )  # fmt: skip


def _listens(hook: Any) -> bool:
    """Whether a profiler does: Triton keeps a chain of hooks, empty without one."""
    return bool(getattr(hook, "calls", hook))


class Launch:
    """A kernel that is ready to be started, once. ``keeping``: what must not be freed before."""

    def __init__(
        self, start: Callable[..., None], programs: int, args: Sequence[Any], keeping: Any = None
    ) -> None:
        self._start, self._programs, self._args, self._keeping = start, programs, args, keeping
        self.started: list[Any] = []

    def __call__(self) -> None:
        self._start(self._programs, self._args, self.started.append)


def run_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Runs launches and other calls, in their order; all of them or none, whatever interrupts.

    All calls but the launches must be single C calls. One that fails ends it there.
    """
    queue = iter(calls)
    try:
        deque(map(_RUN, queue), maxlen=0)
    except BaseException as error:
        left = list(queue)
        begun = any(call.started for call in calls if isinstance(call, Launch))
        if begun and not isinstance(error, Exception):
            last = calls[len(calls) - len(left) - 1]
            if isinstance(last, Launch) and not last.started:
                left.insert(0, last)
            deque(map(_RUN, left), maxlen=0)
        raise
