"""How many scalars a program processes at a time, and with how many warps: a built-in table, overridden by what
``rst_fused.kernels.autotune`` once measured on such a device and saved to a file.

What a kernel computes for an element depends on neither, so its results do not. The order in which the norm is summed
does, so the norm has a fixed configuration.
"""

import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

FORMAT = 1
FOLDER_VARIABLE = "RST_FUSED_CACHE_DIR"


@dataclass(frozen=True)
class LaunchConfig:
    per_thread: int  # scalars per thread in a whole block
    warps: int

    def block(self, lanes: int) -> int:
        """Scalars of a whole block, where a warp has so many threads."""
        return lanes * self.warps * self.per_thread

    def tail(self, lanes: int) -> int:
        """Scalars of a masked block: one per thread."""
        return lanes * self.warps


BUILT_IN = LaunchConfig(8, 4)  # 16-byte accesses of 16-bit numbers
# float32 stored beside 16-bit numbers: with 8 scalars per thread, 16-byte stores would leave gaps, which Triton would
# close by exchanging data between threads. With 4 there is nothing to exchange.
WIDE_STATE = LaunchConfig(4, 4)
CANDIDATES = tuple(LaunchConfig(per_thread, warps) for per_thread in (4, 8, 16) for warps in (2, 4, 8))
TUNED = ("perturb_kernel", "restore_kernel", "sgd_step_kernel", "adam_step_kernel", "lion_step_kernel")

Winners = dict[str, LaunchConfig]  # by kernel and dtypes
forced: list[LaunchConfig] = []  # the candidate that is being timed


@cache
def lanes_of(device: torch.device) -> int:
    """Threads of a warp: 64 on some GPUs of AMD, 32 elsewhere."""
    if device.type == "cpu":  # Triton's interpreter
        return 32
    with torch.get_device_module(device).device(device):
        return int(triton.runtime.driver.active.get_current_target().warp_size)


def key_of(kernel: str, dtype: Any, state: Any) -> str:
    """With ``dtype`` and ``state`` as Triton names them: "sgd_step_kernel bf16 fp32"."""
    return f"{kernel} {dtype} {state}"


def config_for(kernel: str, device: torch.device, dtype: Any, state: Any, wide_state: bool) -> LaunchConfig:
    built_in = WIDE_STATE if wide_state else BUILT_IN
    if kernel not in TUNED:
        return built_in
    if forced:
        return forced[0]
    winners = read(device)
    return winners.get(key_of(kernel, dtype, state), built_in) if winners else built_in


# --- the file -------------------------------------------------------------------------------------------------------
def identity(device: torch.device) -> dict[str, str]:
    """What the winners are valid for."""
    module = torch.get_device_module(device)
    with module.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return {
        "device": module.get_device_name(device), "target": f"{target.backend}:{target.arch}",
        "triton": triton.__version__,
    }  # fmt: skip


def path_of(made_for: dict[str, str]) -> Path:
    """Raises RuntimeError if no folder is named and there is no home directory."""
    named = os.environ.get(FOLDER_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "rst_fused"
    return folder / ("triton-" + re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(made_for.values())) + ".json")


def _parsed(text: str, made_for: dict[str, str]) -> Winners:
    """Raises ValueError if the text is not such a file."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    for name, here in made_for.items():
        if data.get(name) != here:
            raise ValueError(f"it was made for {name} {data.get(name)!r}, and this is {here!r}")
    winners = {}
    for key, entry in data["sizes"].items():
        winners[key] = LaunchConfig(entry["per_thread"], entry["warps"])
        if winners[key] not in CANDIDATES:
            raise ValueError(f"{key} has {entry}, which autotune never chooses")
    return winners


@cache
def read(device: torch.device) -> Winners:
    """The winners in the file for this device; none without it. An unusable file is ignored with a warning."""
    if device.type == "cpu":
        return {}
    made_for = identity(device)
    try:
        path = path_of(made_for)
        return _parsed(path.read_text(encoding="utf-8"), made_for)
    except (FileNotFoundError, RuntimeError):  # no home directory: then there is no file either
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, and built-in block sizes are used ({type(error).__name__}: {error}): remove it, or "
            "call rst_fused.kernels.autotune() again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def writable(made_for: dict[str, str]) -> Path:
    """The path of the file. Raises RuntimeError unless its folder takes files."""
    try:
        path = path_of(made_for)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=path.parent).cleanup()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"autotune has nowhere to keep its results ({error}): set {FOLDER_VARIABLE} to a folder that can be written"
        ) from error
    return path


def write(made_for: dict[str, str], winners: Winners) -> None:
    """Atomically, so that no process ever reads half a file."""
    data = {"format": FORMAT, **made_for, "sizes": {key: asdict(winner) for key, winner in sorted(winners.items())}}
    path = writable(made_for)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")  # with the permissions of any new file
        os.replace(whole, path)
    read.cache_clear()
