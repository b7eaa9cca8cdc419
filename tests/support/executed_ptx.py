"""A pytest plugin that executes the PTX of the Triton kernels on CPU tensors: `pytest -p executed_ptx`.

The interpreter of PTX is ptxsim.py in the folder that the environment variable RST_FUSED_PTXSIM names. It stops at
every access outside the tensors of a call, at misaligned ones, and at instructions it does not know.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # lets the backend take CPU tensors
import op_db  # noqa: E402

from rst_fused import _backends  # noqa: E402, F401

del os.environ["TRITON_INTERPRET"]  # kernels are compiled, not interpreted

import triton  # noqa: E402
import triton_offline  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from rst_fused.kernels import launch_groups, launcher  # noqa: E402

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, os.environ["RST_FUSED_PTXSIM"])

from ptxsim import Module  # type: ignore[import-not-found]  # noqa: E402

TARGET = GPUTarget("cuda", int(os.environ.get("RST_FUSED_PTX_ARCHITECTURE", "90")), 32)
launches: list[dict[str, Any]] = []  # what each launch did, for tests that count bytes
Memory = list[tuple[Tensor, bool]]  # tensors, and whether they may be written
_prepared: Memory = []  # of the launch group at hand
_memory: dict[int, Memory] = {}  # by the address of a table
_prepare, _table_of = launch_groups._prepare, launch_groups.table_of


def flat(t: Tensor) -> Tensor:
    """The memory of a dense tensor."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.as_strided((t.numel(),), (1,))


def prepare(operands: Sequence[Any], group: Any) -> Any:
    used, back = _prepare(operands, group)
    by_address: dict[int, tuple[Tensor, bool]] = {}
    for operand, tensors in zip(operands, used, strict=True):
        for t in tensors:
            if t.numel():
                written = operand.written or by_address.get(t.data_ptr(), (t, False))[1]
                by_address[t.data_ptr()] = (flat(t), written)
    _prepared[:] = by_address.values()
    return used, back


def table_of(group: Any, used: Sequence[Sequence[Tensor]]) -> Tensor:
    """A plan prepares nothing: its kernels may write wherever they may read."""
    table = _table_of(group, used)
    _memory[table.data_ptr()] = list(_prepared) or [(flat(t), True) for tensors in used for t in tensors if t.numel()]
    _prepared.clear()
    return table


class Driver:
    """The part of a driver that Triton needs to tell what a launch would compile."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


triton.runtime.driver.set_active(Driver())


@functools.cache
def binder(kernel: Any) -> Any:
    return kernel.create_binder()[-1]


def check_specialization(kernel: Any, args: Sequence[Any], constants: dict[str, Any], warps: int) -> None:
    """A launch with these arguments would use the binary that is executed here: it specializes on none of them."""
    _, specialization, _ = binder(kernel)(*args, **constants, **launcher.OPTIONS, num_warps=warps)
    given = [name for name in kernel.arg_names if name not in constants]
    found = [what for what in specialization if what[0] != "constexpr"]
    assert found == [(triton_offline.ARGUMENTS[name], None) for name in given], dict(zip(given, found, strict=True))


@functools.cache
def module(kernel: Any, constants: tuple[tuple[str, Any], ...], warps: int) -> tuple[Any, int]:
    binary = triton_offline.compiled(kernel, dict(constants), TARGET, warps)
    loaded = Module(binary.asm["ptx"])
    assert not loaded.unsupported(), loaded.unsupported()
    return loaded, binary.metadata.shared


def starter(kernel: Any, device: torch.device, constants: dict[str, Any], warps: int) -> Callable[..., None]:
    """In the place of Triton's launcher."""

    def start(programs: int, args: Sequence[Any], note: Callable[[Any], None]) -> None:
        check_specialization(kernel, args, constants, warps)
        loaded, shared = module(kernel, tuple(sorted(constants.items())), warps)
        (name,) = loaded.names()
        parameters = len(loaded.info(name)["params"])
        summing = kernel.__name__ in ("grad_norm_kernel", "finish_kernel", "finish_norm_kernel")
        writable = ("partials", "stats") if summing else ()
        own = [
            (arg, label in writable)
            for label, arg in zip(kernel.arg_names, args, strict=False) if isinstance(arg, Tensor)
        ]  # fmt: skip
        statistics = loaded.launch(
            name, programs, 32 * warps, [*args, *[None] * (parameters - len(args))],
            bufs=[*_memory.get(args[0].data_ptr(), []), *own], dyn=shared, check=2,
        )  # fmt: skip
        assert not statistics["reports"], statistics["reports"]
        launches.append({"kernel": name, "threads": 32 * warps, **statistics})
        note(None)

    return start


launch_groups._prepare, launch_groups.table_of = prepare, table_of
launch_groups.starter = starter
# Around blocks, tails and chunks.
op_db.SIZES = (0, 1, 3, 127, 128, 129, 1023, 1024, 1025, 8191, 8192, 8193, 17000)
