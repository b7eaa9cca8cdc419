"""What the measuring stages share: their command line, and a part file that is written as they go."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .device import Device, available_backends, device_of
from .stages import write_part

ERROR_LETTERS = 300


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", choices=("cuda", "cpu"), required=True)
    result.add_argument("--out", type=Path, required=True, help="JSON file, written after each measurement")
    result.add_argument("--backend", nargs="+", default=None, help="default: the first that is available")
    return result


def described(error: BaseException) -> str:
    """The error and, where it came up while another was handled (as a broken graph capture does), the first one."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    words = f"{type(error).__name__}: {str(error)[:ERROR_LETTERS]}"
    return words if first is error else f"{words} (after {described(first)})"


def package() -> dict[str, Any]:
    """Where rst_fused, or its extension if it has one, is loaded from, and how it was built."""
    from rst_fused import _backends

    loaded: Any = _backends.plan_extension() or _backends
    return {"package": str(Path(loaded.__file__).parents[1]), "build": _backends.build_info()}


class Part:
    """The findings of one stage. Each ``attempt`` that fails is noted, and the next one runs all the same."""

    def __init__(self, device: Device, out: Path, backends: list[str] | None) -> None:
        self.device, self.out = device, out
        self.backends, notes = available_backends(device, backends)
        self.data: dict[str, Any] = {
            "device": device.title(), "backends": self.backends, "notes": notes, "errors": [], **package(),
        }  # fmt: skip
        self.save()

    def keep(self, backends: list[str]) -> None:
        """Measures these and no others."""
        self.backends = self.data["backends"] = backends
        self.save()

    def save(self) -> None:
        write_part(self.out, self.data)

    def note(self, words: str) -> None:
        self.data["notes"].append(words)

    def error(self, words: str) -> None:
        print(f"ERROR: {words}", file=sys.stderr, flush=True)
        self.data["errors"].append(words)

    def add(self, key: str, value: Any) -> None:
        """Appends to a list of results and saves."""
        self.data.setdefault(key, []).append(value)
        self.save()

    def attempt(self, what: str, call: Callable[[], object]) -> bool:
        """Whether ``call`` went through; what it raises is noted. Only a device that no longer answers ends the
        stage."""
        print(what, flush=True)
        failed = False
        try:
            call()
        except Exception as error:
            traceback.print_exc()
            self.error(f"{what}: {described(error)}")
            failed = True
        try:
            # Not inside the handler above: the error's traceback holds the memory of what failed.
            self.device.clear()
        except RuntimeError as error:
            self.error(f"the device no longer answers, so nothing more was run: {str(error)[:ERROR_LETTERS]}")
            raise SystemExit(1) from error
        finally:
            self.save()
        return not failed

    def status(self) -> int:
        return 1 if self.data["errors"] else 0


def start_profiler(part: Part) -> None:
    """The first profile of a process starts the profiler, and is dropped."""
    device = part.device
    part.attempt("a first profile", lambda: device.launches(lambda: torch.ones(8, device=device.name).add_(1)))


def start(args: argparse.Namespace, backends: bool = True) -> Part:
    """The part of a stage, without ``backends`` where it needs none; exits with a message where the device is missing.

    Unless the command names backends, the most important one that is available is measured.
    """
    try:
        device = device_of(args.device)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    if args.device == "cpu":
        torch.set_num_threads(1)  # threads that wake up for such small tensors are all that would be seen
    part = Part(device, args.out, args.backend if backends else [])
    if args.backend is None:
        part.keep(part.backends[:1])
    return part
