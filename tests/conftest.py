"""Fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import gpu_simulator
import paths
import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and waking them on a busy machine is slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> gpu_simulator.Simulator:
    """All GPU kernels, translated to PTX."""
    return gpu_simulator.Simulator(gpu_simulator.compile_ptx(tmp_path_factory.mktemp("ptx")))


@pytest.fixture
def simulator(kernels: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu_simulator.Simulator]:
    """Backend "simulated", for the time of a test."""
    with gpu_simulator.simulated(kernels, monkeypatch):
        yield kernels


@pytest.fixture
def served_by(executor: str) -> Iterator[str]:
    """The backend of one of paths.EXECUTORS. Launch plans are off in its test where that says so."""
    name, _, how = executor.partition(" ")
    with paths.no_plans() if how == "ops" else nullcontext():
        yield name
