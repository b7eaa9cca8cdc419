"""What machine, driver, versions and commit the numbers belong to.

Nothing here starts CUDA or loads rst_fused, which is not built yet when a run begins.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

import torch

from .. import record

PACKAGES = ("torch", "triton", "rst_fused", "pybind11", "ninja", "setuptools", "pytest", "pytest-xdist")
TOOLKITS = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where tools lie that are not on PATH
# Of nvidia-smi --query-gpu: its name there -> the name in the result file.
DEVICE_FIELDS = {"name": "name", "driver_version": "driver", "memory.total": "memory", "power.limit": "power_limit"}
CLOCK_FIELDS = {"clocks.sm": "sm", "clocks.max.sm": "sm_max", "clocks.mem": "memory", "temperature.gpu": "celsius"}
SECONDS = 20.0


def _output(*command: str) -> str | None:
    """What a command prints, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def parse_fields(line: str, names: list[str]) -> dict[str, str]:
    """One line of comma-separated values of nvidia-smi, without what it does not know."""
    values = [value.strip() for value in line.split(",")]
    return {name: value for name, value in zip(names, values, strict=False) if value and not value.startswith("[")}


def _query(fields: dict[str, str]) -> dict[str, str]:
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return parse_fields(text.splitlines()[0], list(fields.values())) if text else {}


def clocks() -> dict[str, str]:
    """Clocks and temperature of the GPU now; empty where nvidia-smi does not say."""
    return _query(CLOCK_FIELDS)


def building() -> dict[str, str]:
    """Variables of a build that is for the GPU at hand alone, if nvidia-smi says which, and must not go on without
    kernels for it."""
    return {"RST_FUSED_BUILD_EXTENSION": "1", "RST_FUSED_BUILD_CUDA": "1",
            **_query({"compute_cap": "TORCH_CUDA_ARCH_LIST"})}  # fmt: skip


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit lies."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *TOOLKITS]))


def nvcc_version() -> str | None:
    nvcc = tool("nvcc")
    text = _output(nvcc, "--version") if nvcc else None
    found = re.search(r"release \S+ V(\S+)|release ([^,\s]+)", text.replace(",", "")) if text else None
    return (found[1] or found[2]) if found else None


def collect(device: str, commit: str | None) -> dict[str, Any]:
    """The head of a result file. ``commit`` is taken where the folder is no git repository."""
    gpu = _query(DEVICE_FIELDS) if device == "cuda" else {}
    title = gpu.get("name", "a GPU without nvidia-smi") if device == "cuda" else f"{record.cpu_device()} (rehearsal)"
    found = record.environment(title, PACKAGES, build={})
    if found["commit"] == "unknown" and commit:
        found["commit"] = commit
    versions = {
        **found["versions"], "cuda": torch.version.cuda, "nvcc": nvcc_version(), "driver": gpu.get("driver"),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    }  # fmt: skip
    return {
        **found, "command": "gpu", "rehearsal": device == "cpu", "versions": versions, "gpu": gpu,
        "clocks": clocks() if device == "cuda" else {},
    }  # fmt: skip
