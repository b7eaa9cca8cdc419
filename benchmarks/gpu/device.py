"""The two devices that measurements run on: a GPU, where calls return early, and the CPU, to rehearse them."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# What the profiler calls the work that is launched on a GPU.
LAUNCHED = ("kernel", "gpu_memcpy", "gpu_memset")
SPIN_HZ = 2e9  # about the clock of a busy GPU: how many cycles to hold it for a second
LONGEST_HOLD = 0.05


class Device(ABC):
    """Where the tensors lie and how time is measured there."""

    name: str  # of the torch device
    backends: tuple[str, ...]  # those of rst_fused to measure, the most important first

    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def mark(self) -> Any:
        """A point in the device's time, after all that was launched before."""

    @abstractmethod
    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks; needs ``synchronize`` after the later one."""

    @abstractmethod
    def hold(self, seconds: float) -> None:
        """Keeps the device busy for so long, so that what is launched meanwhile runs without gaps afterwards."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of ``call``; calling it replays."""

    @abstractmethod
    def profiled(self) -> tuple[torch.profiler.ProfilerActivity, ...]: ...

    def clear(self) -> None:
        """Waits, and gives memory back that nothing holds any more."""
        self.synchronize()
        gc.collect()

    def launches(self, call: Callable[[], object]) -> dict[str, list[float]]:
        """What ``call`` launches on the device: name -> the seconds of each launch, in order."""
        with torch.profiler.profile(activities=self.profiled()) as profile:
            call()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            return launched(json.loads(path.read_text()))


class Gpu(Device):
    """The current CUDA device."""

    name, backends = "cuda", ("cuda", "triton")

    def title(self) -> str:
        return torch.cuda.get_device_name()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, LONGEST_HOLD) * SPIN_HZ))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def profiled(self) -> tuple[torch.profiler.ProfilerActivity, ...]:
        return (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)

    def clear(self) -> None:
        super().clear()
        torch.cuda.empty_cache()


class Rehearsal(Device):
    """The CPU. Nothing is launched on a device here, and a captured graph is the call itself."""

    name, backends = "cpu", ("cpu", "reference")

    def title(self) -> str:
        return "CPU"

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, start: Any, end: Any) -> float:
        return end - start

    def hold(self, seconds: float) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def profiled(self) -> tuple[torch.profiler.ProfilerActivity, ...]:
        return (torch.profiler.ProfilerActivity.CPU,)


def device_of(name: str) -> Device:
    """The device called "cuda" or "cpu"; RuntimeError where there is no GPU."""
    if name == "cpu":
        return Rehearsal()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device here; --device cpu rehearses without one")
    return Gpu()


def launched(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    """Kernels, copies and fills in a Chrome trace of torch.profiler: name -> the seconds of each, in order."""
    found: dict[str, list[float]] = {}
    events = [event for event in trace["traceEvents"] if event.get("cat") in LAUNCHED]
    for event in sorted(events, key=lambda event: event["ts"]):  # microseconds, as dur
        found.setdefault(event["name"], []).append(event["dur"] * 1e-6)
    return found


def available_backends(device: Device, wanted: list[str] | None = None) -> tuple[list[str], list[str]]:
    """Names of the backends of rst_fused that can be measured on ``device``, and why others cannot."""
    from rst_fused._backends import backends

    known = {backend.name: backend for backend in backends()}
    names, notes = [], []
    for name in device.backends if wanted is None else wanted:
        backend = known.get(name)
        if backend is None:
            notes.append(f"backend {name} was left out: this version has none")
        elif not backend.available:
            notes.append(f"backend {name} was left out: {backend.reason}")
        elif not backend.supports(torch.device(device.name)):
            notes.append(f"backend {name} was left out: it does not run on {device.name}")
        else:
            names.append(name)
    return names, notes
