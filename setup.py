"""Adds to pyproject.toml what it cannot say: where the packages lie, and the C++ extension.

The environment variable RST_FUSED_BUILD_EXTENSION decides about the extension:

    auto  (default) build it; where that cannot be done, print why and go on with a pure-Python package
    1     build it, and fail if that cannot be done
    0     do not build it

RST_FUSED_BUILD_CUDA does the same for its GPU kernels, which need nvcc but no GPU and no torch with CUDA. They are
built for TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX", say), or for sm_80, sm_90, sm_100, sm_120 and later. For measuring,
RST_FUSED_CUDA_DEFINES ("RST_CUDA_CHUNK=32768 RST_CUDA_ADAM_BLOCKS=1", say) replaces numbers of csrc/cuda/.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
CUDA_FLAG = "RST_FUSED_BUILD_CUDA"
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
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",  # as -ffp-contract=off
    "--Werror=all-warnings",
    "-Xptxas=-v,-warn-spills",  # with the line above, a kernel that spills does not build
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc",
]
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0+PTX 12.0+PTX"  # PTX of 10.0 for 11.0, which code of 12.0 does not serve
BEFORE_BLACKWELL = "8.0 9.0+PTX"  # for an nvcc that does not know more
ERROR_LINES = 15


def build_mode(flag: str = FLAG) -> str:
    mode = os.environ.get(flag, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{flag}={mode!r} is not understood: use auto, 0 (never build) or 1 (build or fail)")
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
    if not os.path.exists("csrc/torch/module.cpp"):
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


class Cuda:
    """The GPU kernels: compiled by nvcc, linked into the extension with the static runtime, which loads anywhere."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        if found is None:
            raise RuntimeError(f"{nvcc} --version does not say which release it is:\n{text}")
        self.version = (int(found[1]), int(found[2]))
        # nvcc knows where the rest of its toolkit lies.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
        self.include = [path for path in re.findall(r'INCLUDES=.*?"-I([^"]+)"', dry) if os.path.isdir(path)]
        self.libraries = [path for path in re.findall(r'"-L([^"]+)"', dry) if not path.endswith("stubs")]

    @property
    def architectures(self) -> list[str]:
        """As in TORCH_CUDA_ARCH_LIST: 8.0 is code for sm_80, 9.0+PTX code for sm_90 and PTX for later ones."""
        default = DEFAULT_ARCHITECTURES if self.version >= (12, 8) else BEFORE_BLACKWELL
        return re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", default).strip())

    @property
    def defines(self) -> list[str]:
        argument_bytes = 32764 if self.version >= (13, 0) else 4096
        more = os.environ.get("RST_FUSED_CUDA_DEFINES", "").split()
        return [f"-D{define}" for define in (f"RST_CUDA_ARGUMENT_BYTES={argument_bytes}", *more)]

    @property
    def facts(self) -> list[str]:
        names = "/".join(self.architectures)
        return [f"-DRST_CUDA_VERSION={self.version[0]}.{self.version[1]}", f"-DRST_CUDA_ARCHITECTURES={names}"]

    def code_flags(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            if not re.fullmatch(r"\d+[af]?", number):
                raise RuntimeError(f"TORCH_CUDA_ARCH_LIST holds {architecture!r}: expected entries like 9.0 or 9.0+PTX")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def objects(self, folder: str) -> list[str]:
        """Compiles what has changed since the last time."""
        os.makedirs(folder, exist_ok=True)
        headers = [path for folder in ("math", "core", "cuda") for path in Path("csrc", folder).rglob("*.*h")]
        newest_header = max(path.stat().st_mtime for path in headers)
        flags = [*NVCC_FLAGS, *self.defines, *self.code_flags()]
        key = f"{zlib.crc32(' '.join(flags).encode()):08x}"

        def compiled(source: str) -> str:
            target = os.path.join(folder, f"{Path(source).stem}.{key}.o")
            if os.path.exists(target) and os.path.getmtime(target) > max(newest_header, os.path.getmtime(source)):
                return target
            # One of the sources holds most of the kernels: its architectures are compiled side by side.
            command = [self.nvcc, *flags, f"--threads={os.cpu_count()}", "-c", source, "-o", target]
            print(" ".join(command), flush=True)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
            Path(target).with_suffix(".txt").write_text(done.stderr)  # registers and stack of every kernel
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compiled, sorted(glob("csrc/cuda/*.cu"))))


def cuda() -> Cuda | None:
    mode = build_mode(CUDA_FLAG)
    beside = str(Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc"))
    nvcc = None if mode == "0" else shutil.which("nvcc") or shutil.which(beside)
    if nvcc is None and mode == "1":
        raise SystemExit(f"{CUDA_FLAG}=1, but nvcc is not on PATH and CUDA_HOME names no toolkit")
    if nvcc is None:
        return None
    toolkit, of_torch = Cuda(nvcc), torch.version.cuda
    if of_torch is not None and int(of_torch.split(".")[0]) < toolkit.version[0]:
        print(
            f"\nrst_fused: WARNING: {nvcc} is of CUDA {'.'.join(map(str, toolkit.version))} and torch of CUDA "
            f"{of_torch}: the GPU kernels will need a newer driver than torch does.\n",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return toolkit


def add_cuda(extension: Extension, toolkit: Cuda) -> None:
    extension.extra_objects = toolkit.objects(os.path.join("build", "cuda"))
    extension.sources += ["csrc/torch/ops_cuda.cpp", *glob("csrc/cuda/*.cpp")]
    extension.extra_compile_args += [*toolkit.defines, *toolkit.facts, *(f"-isystem{path}" for path in toolkit.include)]
    extension.library_dirs += toolkit.libraries
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]


def with_cuda(command: type) -> type:
    """The build_ext command with the GPU kernels; in auto mode one that goes on without them where nvcc fails."""

    class BuildWithCuda(command):
        def build_extensions(self) -> None:
            try:
                toolkit = cuda()
                if toolkit is not None:
                    add_cuda(self.extensions[0], toolkit)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                if build_mode(CUDA_FLAG) == "1":
                    raise SystemExit(f"{CUDA_FLAG}=1, but the GPU kernels cannot be built: {error}") from error
                print(f"\nrst_fused: WARNING: built WITHOUT GPU kernels.\nReason: {error}\n", file=sys.stderr)
            super().build_extensions()

    return BuildWithCuda


def extension_modules() -> list[Extension]:
    core_sources = sorted(glob("csrc/core/*.cpp"))  # in both modules, which both make chunk tables
    torch_sources = sorted(set(glob("csrc/cpu/*.cpp") + glob("csrc/torch/*.cpp")) - {"csrc/torch/ops_cuda.cpp"})
    plan_sources = sorted(glob("csrc/plan/*.cpp"))
    # Others' headers come in as system headers, which keeps their warnings away. For py_limited_api
    # BuildExtension itself defines Py_LIMITED_API.
    return [
        Extension(
            "rst_fused._C",
            [*torch_sources, *core_sources],
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
            "rst_fused._plan_ext",
            [*plan_sources, *core_sources],
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
        return {"ext_modules": extension_modules(), "cmdclass": {"build_ext": with_cuda(command)}}
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
