"""Adds to pyproject.toml what it cannot say: where the packages lie, and the C++ extension.

The environment variable RST_FUSED_BUILD_EXTENSION decides about the extension:

    auto  (default) build it; where that cannot be done, print why and go on with a pure-Python package
    1     build it, and fail if that cannot be done
    0     do not build it
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import IO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

# pip runs this file in an environment without torch and pybind11 unless --no-build-isolation is given.
try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None

FLAG = "RST_FUSED_BUILD_EXTENSION"
OLDEST_TORCH = (2, 11)
TARGET_VERSION = "0x020b000000000000"  # torch 2.11: one byte each for major, minor and patch, then zeros
COMPILE_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",  # a*b+c must round the same in every SIMD level
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
ERROR_LINES = 15


def build_mode() -> str:
    mode = os.environ.get(FLAG, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{FLAG}={mode!r} is not understood: use auto, 0 (never build) or 1 (build or fail)")
    return mode


def obstacle() -> str | None:
    """Why compiling is not even worth a try here; None if it is."""
    if MISSING is not None:
        return (
            f"{MISSING.name or MISSING} cannot be imported where the package is built. To build the "
            f"extension, pip install torch pybind11 ninja, then install with --no-build-isolation"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old for the extension, which needs 2.11 or newer"
    if not os.path.exists("csrc/module.cpp"):
        return "the C++ sources (csrc/) are missing from this copy"
    return None


def warn_pure_python(reason: str) -> None:
    print(
        f"\nrst_fused: WARNING: built WITHOUT the C++ extension, as pure Python, which is much slower.\n"
        f"Reason: {reason}\n({FLAG}=1 makes this an error, {FLAG}=0 is silent.)\n",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def captured_output() -> Iterator[IO[bytes]]:
    """Collect what this process and its compilers write to stdout and stderr, and replay it at the end."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            log.seek(0)
            shutil.copyfileobj(log, sys.stdout.buffer)
            sys.stdout.flush()


def last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-ERROR_LINES:])


def extension_modules() -> list[Extension]:
    host_sources = sorted(glob("csrc/host*.cpp"))
    torch_sources = sorted(set(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")) - set(host_sources))
    host_sources.append("csrc/cpu/table.cpp")  # both lay out chunk tables
    # Others' headers come in as system headers, which keeps their warnings away. For py_limited_api
    # BuildExtension itself defines Py_LIMITED_API.
    return [
        Extension(
            "rst_fused._C",
            torch_sources,
            include_dirs=[os.path.abspath("csrc")],
            extra_compile_args=[
                *COMPILE_FLAGS,
                f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
                *(f"-isystem{path}" for path in cpp_extension.include_paths()),
            ],
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            language="c++",
            py_limited_api=True,
        ),
        Extension(
            "rst_fused._host",
            host_sources,
            include_dirs=[os.path.abspath("csrc")],
            extra_compile_args=[*COMPILE_FLAGS, f"-isystem{pybind11.get_include()}"],
            language="c++",
        ),
    ]


def build_or_degrade() -> type:
    """The build_ext command for auto mode: a failed compilation leaves a pure-Python package."""

    class BuildOrDegrade(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            failure = None
            with captured_output() as log:
                try:
                    super().build_extensions()
                except Exception as error:  # whatever the compiler, ninja or distutils may raise
                    failure = f"the extension did not compile: {error}\n{last_lines(log)}"
            if failure is not None:
                warn_pure_python(failure)
                self.drop_extensions()

        def drop_extensions(self) -> None:
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            self.distribution.ext_modules = []
            # bdist_wheel decided on a platform wheel before the compilation was tried.
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True

    return BuildOrDegrade


def build_with_warning(reason: str) -> type:
    """The build_py command for auto mode without an extension: unlike this file, it runs only once."""

    class BuildWithWarning(build_py):
        def run(self) -> None:
            warn_pure_python(reason)
            super().run()

    return BuildWithWarning


def extension_arguments() -> dict:
    mode = build_mode()
    if mode == "0":
        return {}
    reason = obstacle()
    if reason is None:
        command = cpp_extension.BuildExtension if mode == "1" else build_or_degrade()
        return {"ext_modules": extension_modules(), "cmdclass": {"build_ext": command}}
    if mode == "1":
        raise SystemExit(f"{FLAG}=1, but the extension cannot be built: {reason}")
    return {"cmdclass": {"build_py": build_with_warning(reason)}}


# kernels/ lies at the top of the repository but is only ever installed as rst_fused.kernels.
kernel_packages = ["rst_fused.kernels", *(f"rst_fused.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["rst_fused", "rst_fused.*"]), *kernel_packages],
    package_dir={"rst_fused.kernels": "kernels"},
    package_data={"rst_fused": ["py.typed"]},
    **extension_arguments(),
)
