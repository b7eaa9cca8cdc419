"""A pytest plugin that runs Triton kernels in Triton's interpreter, on CPU tensors: `pytest -p interpreted`.

It must be loaded before triton, and fixes two problems of Triton 3.6: its interpreter truncates to bfloat16 where
hardware rounds to nearest, and has tensors as loop bounds, which NumPy 2.4 no longer accepts as numbers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_cast = interpreter.InterpreterBuilder.cast_impl
_patch = interpreter._patch_lang_tensor
_patch_all = interpreter._patch_lang
_scopes: dict[frozenset[str], Any] = {}


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def cast(self: Any, source: Any, to: Any) -> Any:
    of, scalar = source.dtype.scalar, to.scalar
    if (of, scalar) == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bfloat16(source.data), scalar)
    if (of, scalar) == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), scalar)
    return _cast(self, source, to)


def patch(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch_once(function: Any) -> Any:
    """Once per launch and module: the interpreter patches again for every function that a kernel calls, which takes
    longer than everything else."""
    modules = frozenset(m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core)
    if modules not in _scopes:
        scope = _scopes[modules] = _patch_all(function)
        restore = scope.restore

        def leave() -> None:  # only the kernel's own scope is ever restored
            restore()
            _scopes.clear()

        scope.restore = leave
    return _scopes[modules]


interpreter.InterpreterBuilder.cast_impl = cast
interpreter._patch_lang_tensor = patch
interpreter._patch_lang = patch_once

import op_db  # noqa: E402

from rst_fused.kernels import launch_config  # noqa: E402

# NumPy is fast on few large blocks; a whole chunk still takes two of them, and so does a tail.
launch_config.BUILT_IN = launch_config.LaunchConfig(2, 64)
launch_config.WIDE_STATE = launch_config.LaunchConfig(1, 64)
op_db.SIZES = (0, 1, 3, 15, 16, 17, 1023, 4097, 8191, 8192, 8193, 16401)
