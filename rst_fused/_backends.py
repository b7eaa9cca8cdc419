"""The one place where an implementation is chosen.

A backend is a set of ops with the signatures of rst_fused._schemas. ``cuda`` and ``cpu`` are the compiled C++
extension; ``triton`` serves GPUs and needs nothing compiled in advance; ``reference`` is plain torch and runs anywhere
torch does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rst_fused import reference
from rst_fused._schemas import NAMESPACE, OPAQUE_NAMESPACE, SCHEMAS, TRITON_NAMESPACE, implement

_BUILD_HINT = "with torch and a C++17 compiler, run in its source folder: pip install --no-build-isolation ."
_SIMD_VARIABLE = "RST_FUSED_SIMD"
_THRESHOLD_VARIABLE = "RST_FUSED_NON_TEMPORAL_THRESHOLD"


@dataclass(frozen=True)
class Backend:
    """One implementation of all ops.

    ``device_types`` are the devices it runs on (None: any), ``reason`` says why it is available or what is missing.
    """

    name: str
    available: bool
    reason: str
    device_types: tuple[str, ...] | None
    ops: Any
    plans: str = ""  # which kernels a launch plan runs, "cpu", "gpu" or "triton"; none: every step goes through the ops
    architectures: str = ""  # for which GPUs there is code, "8.0/9.0/10.0+PTX"; none: for all
    ptx: bool = True  # whether the driver takes PTX of this build
    fix: str = ""  # for "auto" to say where it has to pass over this backend: how it would become available

    def supports(self, device: torch.device) -> bool:
        return (self.device_types is None or device.type in self.device_types) and self.has_code_for(device)

    def has_code_for(self, device: torch.device) -> bool:
        """Machine code, or PTX of which the driver makes some."""
        if not self.architectures:
            return True
        capability = _capability(device)
        return has_machine_code(self.architectures, capability) or (
            self.ptx and has_ptx(self.architectures, capability)
        )


_capabilities: dict[torch.device, tuple[int, int]] = {}  # a dict, into which torch.compile can look


def _capability(device: torch.device) -> tuple[int, int]:
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


def has_machine_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether there is some that a GPU runs: of its generation and not newer, and with an "a" for it alone."""
    for entry in architectures.split("/"):
        number = entry.partition("+")[0]
        at = _version(number)
        if at == capability or (at[0] == capability[0] and at[1] <= capability[1] and not number.endswith("a")):
            return True
    return False


def has_ptx(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether there is PTX that a driver can make machine code of: for a GPU that is not older."""
    entries = [entry.partition("+") for entry in architectures.split("/")]
    return any(ptx and number[-1].isdigit() and _version(number) <= capability for number, _, ptx in entries)


def _version(number: str) -> tuple[int, int]:
    major, minor = number.rstrip("af").split(".")
    return int(major), int(minor)


def driver_problem(built_with: str, driver: int) -> str:
    """What is wrong with a driver that supports CUDA up to ``driver`` (1000 * major + 10 * minor; 0: there is none) for
    kernels built with CUDA ``built_with``; empty if nothing is. Within a major version every driver runs machine
    code."""
    major = int(built_with.split(".")[0])
    if not 0 < driver < 1000 * major:
        return ""
    least = {12: " (525 or newer)", 13: " (580 or newer)"}.get(major, "")
    return (
        f"the NVIDIA driver supports CUDA up to {driver // 1000}.{driver % 1000 // 10}, but the extension was built "
        f"with CUDA {built_with}: install a driver for CUDA {major}{least}, or build the extension with an nvcc of "
        f"CUDA {driver // 1000}"
    )


_plan_ext: Any = None
_import_error = ""
try:
    # By name, for an error that says what is missing; `from rst_fused import _C` would blame a circular import.
    _core = importlib.import_module("rst_fused._C").core
    _plan_ext = importlib.import_module("rst_fused._plan_ext")
    _plan_ext.connect(_core)
except ImportError as error:
    _import_error = str(error)
_NOT_BUILT = f"the C++ extension is not built ({_import_error}): {_BUILD_HINT}"


def _select_simd() -> None:
    wanted = os.environ.get(_SIMD_VARIABLE)
    if wanted and not _plan_ext.select_simd(wanted):
        raise ValueError(
            f"{_SIMD_VARIABLE}={wanted!r}: expected auto or one of {_plan_ext.simd_levels()}, the levels this processor"
            " can run"
        )


def _set_non_temporal_threshold() -> None:
    wanted = os.environ.get(_THRESHOLD_VARIABLE)
    if not wanted:
        return
    if not wanted.isascii() or not wanted.isdigit() or len(wanted) > 19 or int(wanted) >= 2**63:
        raise ValueError(
            f"{_THRESHOLD_VARIABLE}={wanted!r}: expected a number of bytes below 2**63, such as {16 << 20}"
        )
    _plan_ext.set_non_temporal_threshold(int(wanted))


if _plan_ext is not None:
    _select_simd()
    _set_non_temporal_threshold()


def _ops(namespace: str) -> Any:
    return SimpleNamespace(**{name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS})


def _opaque(namespace: str, name: str, eager: Callable[..., None]) -> Any:
    """A Python function as an op of its own to torch.compile.

    Traced into, its in-place operations would be reordered: Inductor (2.13) writes a backup after its parameter moved.
    """
    implement(namespace, name, eager)
    op = getattr(getattr(torch.ops, namespace), name).default

    @wraps(eager)
    def call(*args: Any) -> None:
        (op if torch.compiler.is_compiling() else eager)(*args)

    return call


def _find_kernels() -> None:
    """In a checkout that is not installed, rst_fused.kernels lies beside the package."""
    package, checkout = sys.modules["rst_fused"], Path(__file__).parents[1]
    if (checkout / "kernels" / "sam_math.py").is_file() and (checkout / "csrc").is_dir():
        package.__path__.append(str(checkout))


def _in_kernels(name: str) -> Callable[..., None]:
    """Triton takes a second to import: that happens at the first call."""

    def call(*args: Any) -> None:
        getattr(importlib.import_module("rst_fused.kernels"), name)(*args)

    return call


def _triton() -> Backend:
    _find_kernels()
    # Triton's interpreter, for tests, works on CPU tensors.
    devices = ("cuda", "xpu", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "Triton is not installed: pip install triton", devices, None)
    ops = SimpleNamespace(**{name: _opaque(TRITON_NAMESPACE, name, _in_kernels(name)) for name in SCHEMAS})
    return Backend("triton", True, f"Triton {importlib.metadata.version('triton')}", devices, ops, "triton")


def _cpu() -> Backend:
    if _plan_ext is None:
        return Backend("cpu", False, _NOT_BUILT, ("cpu",), None)
    lacks = "" if _plan_ext.can_plan() else ", without launch plans: torch lacks what they look up"
    return Backend("cpu", True, "compiled C++ extension" + lacks, ("cpu",), _ops(NAMESPACE), "cpu")


_REFERENCE = Backend(
    "reference", True, "plain torch", None,
    SimpleNamespace(**{name: _opaque(OPAQUE_NAMESPACE, name, getattr(reference, name)) for name in SCHEMAS}),
)  # fmt: skip


def _cuda() -> Backend:
    missing = ""
    if _plan_ext is None:
        missing = _NOT_BUILT
    elif _plan_ext.build_info()["CUDA"] == "not built":
        missing = "the extension was built without CUDA: put nvcc on PATH, set RST_FUSED_BUILD_CUDA=1 and install again"
    elif torch.version.cuda is None:
        missing = "this torch was built without CUDA"
    elif not _plan_ext.has_stream_api():
        missing = "this torch cannot be asked for its current CUDA stream (aoti_torch_get_current_cuda_stream)"
    if missing:
        return Backend("cuda", False, missing, ("cuda",), None)
    built = _plan_ext.build_info()["CUDA"]
    if problem := driver_problem(built.split()[0], _plan_ext.driver_version()):
        return Backend("cuda", False, problem, ("cuda",), None, fix=problem)
    major, minor = (int(part) for part in built.split()[0].split("."))
    takes_ptx = not 0 < _plan_ext.driver_version() < 1000 * major + 10 * minor
    return Backend(
        "cuda", True, f"CUDA {built}", ("cuda",), _ops(NAMESPACE), "gpu", built.split()[-1], takes_ptx
    )  # fmt: skip


_CUDA, _CPU = _cuda(), _cpu()
_TRITON = _triton()
_BY_SPEED = (_CUDA, _CPU, _TRITON, _REFERENCE)
_said: set[str] = set()


def backends() -> list[Backend]:
    """All backends this version knows, the fastest first."""
    return list(_BY_SPEED)


def backend_named(name: str) -> Backend:
    """Raises ValueError for an unknown name, RuntimeError if the backend is not available."""
    found = next((b for b in _BY_SPEED if b.name == name), None)
    if found is None:
        raise ValueError(f"backend={name!r}: expected 'auto' or one of {[b.name for b in _BY_SPEED]}")
    if not found.available:
        raise RuntimeError(f"backend={name!r} was asked for but {found.reason}")
    return found


def backend_for(requested: str, device: torch.device) -> Backend:
    """The backend to use on ``device``: the one requested, or for "auto" the fastest that is available there.

    Raises as backend_named does, and ValueError for a device that the backend does not support.
    """
    if requested == "auto":
        fastest = next(b for b in _BY_SPEED if b.available and b.supports(device))
        _warn_of_slower(fastest, device)
        _warn_of_compilation(fastest, device)
        return fastest
    found = backend_named(requested)
    if not found.supports(device):
        built = f", built for {found.architectures}," if found.architectures else ""
        raise ValueError(
            f"backend={requested!r}{built} runs on {found.device_types}, but a parameter is on {device}; "
            "use backend='auto'"
        )
    _warn_of_compilation(found, device)
    return found


def _warn_of_slower(chosen: Backend, device: torch.device) -> None:
    """Of a faster backend that is missing, where that was hardly meant."""
    if torch.compiler.is_compiling():
        return
    if _CUDA.available and device.type == "cuda" and not _CUDA.has_code_for(device):
        number = ".".join(map(str, _capability(device)))
        _warn_once(
            f"rst_fused runs on its {chosen.name} backend: its CUDA kernels were built for {_CUDA.architectures}, and "
            f"this GPU has compute capability {number}. Install rst_fused again with TORCH_CUDA_ARCH_LIST={number}"
        )
    faster = next((b for b in _BY_SPEED if b is not _REFERENCE and b.supports(device)), chosen)
    if faster is chosen:
        return
    if chosen is _REFERENCE:
        _warn_once(f"rst_fused runs on its reference backend (plain torch): {faster.reason}")
    elif faster.fix:
        _warn_once(f"rst_fused runs on its {chosen.name} backend: {faster.fix}")


def _warn_of_compilation(chosen: Backend, device: torch.device) -> None:
    """Where the driver has to make machine code."""
    if torch.compiler.is_compiling() or not chosen.architectures:
        return
    if not has_machine_code(chosen.architectures, _capability(device)):
        number = ".".join(map(str, _capability(device)))
        _warn_once(
            f"rst_fused has no machine code for this GPU, of compute capability {number}: the driver compiles each "
            "kernel when it is first used, which takes seconds and cannot be done while a CUDA graph is captured. "
            f"Install rst_fused again with TORCH_CUDA_ARCH_LIST={number}"
        )


def _warn_once(words: str) -> None:
    if words not in _said:
        _said.add(words)
        warnings.warn(words, RuntimeWarning, stacklevel=4)


def bump_versions(*lists: Sequence[torch.Tensor]) -> None:
    """Tells autograd that these tensors changed: the compiled ops cannot."""
    if not torch.compiler.is_compiling():
        for tensors in lists:
            torch.autograd.graph.increment_version(tensors)


def plan_extension() -> Any:
    """The torch-free helper module, or None where the extension is not built."""
    return _plan_ext


def new_plan(kind: str, **facts: Any) -> Any:
    """A launch plan (csrc/plan/plan.h) of the kernels that Backend.plans names; None if none serves these tensors."""
    if kind == "triton":
        return importlib.import_module("rst_fused.kernels.plan").Plan.of(matcher=_matcher(**facts), **facts)
    return _plan_ext.Plan(gpu=kind == "gpu", **facts)


def _matcher(**facts: Any) -> Any:
    """A plan in C++ for what a plan in Python compares; None where there is none, which takes longer."""
    if _plan_ext is None or not _plan_ext.can_plan():
        return None
    try:
        return _plan_ext.Plan(gpu=True, **facts)
    except ValueError:  # tensors that it does not know, as those of other makers' GPUs
        return None


def can_plan(kind: str) -> bool:
    """Whether there may be plans of such kernels."""
    return kind == "triton" or (kind != "" and _plan_ext is not None and bool(_plan_ext.can_plan()))


def knows_references(kind: str) -> bool:
    """Whether plans of such kernels can tell that nobody else refers to a gradient."""
    return kind not in ("cpu", "gpu") or bool(_plan_ext.knows_references())


def may_be_seen_weakly(t: torch.Tensor) -> bool:
    """Whether C++ may have weak references to a tensor or its storage, which Python cannot count: CUDA graphs of
    torch.compile do."""
    if _plan_ext is not None and _plan_ext.knows_references():
        return bool(_plan_ext.has_weak_references(t))
    return t.is_cuda and "torch._inductor.cudagraph_trees" in sys.modules


def build_info() -> dict[str, str]:
    """How the extension was built; empty where it is not."""
    return {} if _plan_ext is None else dict(_plan_ext.build_info())


def cache_bytes() -> int | None:
    """Bytes of the last-level cache; None without the extension."""
    return None if _plan_ext is None else int(_plan_ext.cache_bytes())


def non_temporal_threshold() -> int | None:
    """About how many bytes of data a CPU kernel on all threads may touch before it writes past the caches what it
    does not read; None without the extension.

    By default half of the last-level cache, or two times the second-level caches of the threads if that is more, and
    never more than the last-level cache; half of it does not count where over 16 MiB of it are listed for each CPU that
    shares it, a sign that others do, too. The environment variable RST_FUSED_NON_TEMPORAL_THRESHOLD is another number,
    0 for all data. It changes time alone, not a bit of the results.
    """
    return None if _plan_ext is None else int(_plan_ext.non_temporal_threshold(torch.get_num_threads()))


def simd_level() -> str:
    """The SIMD level of the CPU kernels in use: plain, avx2 or avx512; "none" without the extension."""
    return "none" if _plan_ext is None else str(_plan_ext.simd_level())


def simd_level_from_memory() -> str:
    """That of fp32 and fp64 data larger than the caches: another one on Zen 4, unless RST_FUSED_SIMD names one."""
    return "none" if _plan_ext is None else str(_plan_ext.simd_level_from_memory())
