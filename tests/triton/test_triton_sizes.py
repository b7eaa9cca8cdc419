"""Launch configurations of the Triton kernels: the table, the file of what was measured, and how autotune chooses.
Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton_processes import MISSING, recorder

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
META = torch.device("meta")  # stands for a GPU
HERE = {"device": "NVIDIA H200", "target": "cuda:90", "triton": "3.6.0"}
FILE = "triton-NVIDIA-H200-cuda-90-3.6.0.json"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The modules, on a machine with an H200 and nothing measured yet; and its file."""
    found = SimpleNamespace(folder=tmp_path / "cache", file=tmp_path / "cache" / FILE)
    for name in ("launch_config", "autotune", "launch_groups", "update"):
        setattr(found, name, importlib.import_module(f"rst_fused.kernels.{name}"))
    monkeypatch.setenv("RST_FUSED_CACHE_DIR", str(found.folder))
    monkeypatch.setattr(found.launch_config, "identity", lambda device: dict(HERE))
    found.launch_config.read.cache_clear()
    yield found
    found.launch_config.read.cache_clear()


def chosen(kernels: Any, kernel: str, dtype: str = "fp32", state: str = "fp32", wide: bool = False) -> tuple[int, int]:
    found = kernels.launch_config.config_for(kernel, META, dtype, state, wide)
    return found.per_thread, found.warps


def leave(kernels: Any, **changes: Any) -> None:
    """A file of an earlier run."""
    entry = {"per_thread": 16, "warps": 2}
    kernels.folder.mkdir(exist_ok=True)
    data = {"format": 1, **HERE, "sizes": {"sgd_step_kernel fp32 fp32": entry}, **changes}
    kernels.file.write_text(json.dumps(data), encoding="utf-8")


# --- the table ------------------------------------------------------------------------------------------------------
def test_built_in_sizes_where_nothing_was_measured(kernels: Any) -> None:
    assert chosen(kernels, "sgd_step_kernel") == (8, 4)
    assert chosen(kernels, "sgd_step_kernel", "bf16", "fp32", wide=True) == (4, 4)
    assert not kernels.folder.exists(), "reading creates no folder"
    assert {kernels.launch_config.BUILT_IN, kernels.launch_config.WIDE_STATE} <= set(kernels.launch_config.CANDIDATES)


def test_measured_sizes_are_used_for_their_kernel_and_dtypes(kernels: Any) -> None:
    entry = {"per_thread": 16, "warps": 2}
    leave(kernels, sizes={"sgd_step_kernel fp32 fp32": entry, "grad_norm_kernel fp32 fp32": entry})
    assert chosen(kernels, "sgd_step_kernel") == (16, 2)
    assert chosen(kernels, "sgd_step_kernel", "bf16", "fp32", wide=True) == (4, 4)
    assert chosen(kernels, "adam_step_kernel") == (8, 4)
    assert chosen(kernels, "grad_norm_kernel") == (8, 4), "the order of its sum depends on them"


@pytest.mark.parametrize("lanes", [32, 64])
def test_a_launch_has_the_measured_sizes(kernels: Any, monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """As many scalars per thread, however many threads a warp has."""
    launches: list[Any] = []
    monkeypatch.setattr(kernels.launch_groups, "lanes_of", lambda device: lanes)
    monkeypatch.setattr(kernels.launch_groups, "starter", recorder(launches))
    leave(kernels)
    group = kernels.launch_groups.LaunchGroup(META, torch.float32, torch.float32, [0], (20000,), (0,), (0,), True)
    for name in ("sgd_step_kernel", "grad_norm_kernel"):
        work = kernels.launch_groups.Work(group, torch.empty(0), [], [])
        (launch,) = kernels.launch_groups.launches(SimpleNamespace(__name__=name), work)
        launch()
    sizes = [(32 * lanes, 2 * lanes, 2), (32 * lanes, 4 * lanes, 4)]
    assert [(a[4]["BLOCK"], a[4]["TAIL"], a[5]) for a in launches] == sizes
    assert [a[2] for a in launches] == [3, 3], "programs: one per chunk of 8192"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "it is not of format 1"),
        ({"device": "NVIDIA A100"}, "it was made for device 'NVIDIA A100', and this is 'NVIDIA H200'"),
        ({"target": "cuda:80"}, "it was made for target 'cuda:80'"),
        ({"triton": "3.5.0"}, "it was made for triton '3.5.0', and this is '3.6.0'"),
        ({"sizes": {"x": {"per_thread": 3, "warps": 4}}}, "x has .*, which autotune never chooses"),
        ({"sizes": {"x": {"warps": 4}}}, "KeyError: 'per_thread'"),
        ({"sizes": {"x": 4}}, "TypeError"),
        ({"sizes": None}, "AttributeError"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_a_warning(kernels: Any, changes: dict[str, Any], why: str) -> None:
    leave(kernels, **changes)
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(kernels.file))} is ignored, .*{why}"):
        assert chosen(kernels, "sgd_step_kernel") == (8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(kernels, "sgd_step_kernel") == (8, 4), "it is said once"


def test_a_file_that_cannot_be_read_is_ignored_with_a_warning(kernels: Any) -> None:
    leave(kernels)
    kernels.file.write_text("{", encoding="utf-8")
    with pytest.warns(RuntimeWarning, match=f"{FILE} is ignored"):
        assert chosen(kernels, "sgd_step_kernel") == (8, 4)
    kernels.launch_config.read.cache_clear()
    kernels.file.unlink()
    kernels.file.mkdir()
    with pytest.warns(RuntimeWarning, match=f"{FILE} is ignored"):
        assert chosen(kernels, "sgd_step_kernel") == (8, 4)


def test_where_the_file_is_stored(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path_of = kernels.launch_config.path_of
    assert path_of(HERE) == kernels.file
    monkeypatch.delenv("RST_FUSED_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert path_of(HERE) == Path("/xdg/rst_fused") / FILE
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert path_of(HERE) == Path("/home/someone/.cache/rst_fused") / FILE


# --- autotune -------------------------------------------------------------------------------------------------------
def test_the_fastest_is_kept_and_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    too_large = kernels.autotune.OutOfResources(2, 1, "shared memory")

    def seconds(call: Any) -> float:
        (candidate,) = kernels.launch_config.forced
        timed.append(candidate)
        if candidate.warps == 8:
            raise too_large
        return 1.0 if (candidate.per_thread, candidate.warps) == (16, 4) else 2.0 + len(timed)

    monkeypatch.setattr(kernels.autotune, "_seconds", seconds)
    leave(kernels, sizes={"sgd_step_kernel fp64 fp64": {"per_thread": 4, "warps": 2}})
    found = kernels.autotune.autotune("meta", [torch.float32, torch.bfloat16], elements=64)
    assert kernels.launch_config.forced == []
    dtypes = ("fp32 fp32", "bf16 bf16", "bf16 fp32")
    assert set(found) == {f"{kernel} {pair}" for kernel in kernels.launch_config.TUNED for pair in dtypes}
    assert timed == list(kernels.launch_config.CANDIDATES) * len(found)
    for times in found.values():
        assert len(times) == 6 and list(times.values()) == sorted(times.values())
    assert chosen(kernels, "perturb_kernel", "bf16", "fp32") == (16, 4), "in this process"
    kernels.launch_config.read.cache_clear()
    assert chosen(kernels, "perturb_kernel", "bf16", "fp32") == (16, 4), "and in the next"
    assert chosen(kernels, "sgd_step_kernel", "fp64", "fp64") == (4, 2), "what was measured before stays"
    data = json.loads(kernels.file.read_text(encoding="utf-8"))
    assert {name: data[name] for name in ("format", *HERE)} == {"format": 1, **HERE}
    assert data["sizes"]["adam_step_kernel fp32 fp32"] == {"per_thread": 16, "warps": 4}
    assert [path.name for path in kernels.folder.iterdir()] == [FILE]


def test_what_another_process_measured_meanwhile_stays(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.autotune, "_seconds", lambda call: 1.0)
    assert chosen(kernels, "sgd_step_kernel", "fp64", "fp64") == (8, 4), "this process found no file"
    leave(kernels, sizes={"sgd_step_kernel fp64 fp64": {"per_thread": 4, "warps": 2}})
    kernels.autotune.autotune("meta", [torch.float32], elements=64)
    assert chosen(kernels, "sgd_step_kernel", "fp64", "fp64") == (4, 2)


@pytest.mark.parametrize(
    ("dtype", "masters"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_what_is_timed_is_the_kernel_it_is_kept_for(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masters: bool
) -> None:
    launches: list[Any] = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # CPU tensors are taken
    monkeypatch.setattr(kernels.launch_groups, "starter", recorder(launches))
    state = torch.float32 if masters else dtype
    candidate = kernels.launch_config.LaunchConfig(16, 2)
    calls = kernels.autotune._calls(torch.device("cpu"), dtype, 80000, masters)
    assert tuple(calls) == kernels.launch_config.TUNED
    for kernel, call in calls.items():
        launches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(kernels.launch_config, "forced", [candidate])
            call()
        ((function, _, programs, _, constants, warps),) = launches
        is_update = function.__name__ == "update_kernel"
        name = kernels.update.kernel_name(constants) if is_update else function.__name__
        assert (name, programs) == (kernel, 16), "8 tensors of 10000 in chunks of 8192"
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        assert (str(constants["T"]), str(constants["STATE"])) == (names[dtype], names[state])
        assert (constants["BLOCK"], constants["TAIL"], warps) == (candidate.block(32), candidate.tail(32), 2)


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"device": "cpu"}, RuntimeError, "device='cpu': there is nothing to tune where Triton does not compile"),
        ({"dtypes": [torch.complex64]}, ValueError, r"dtypes holds \[torch.complex64\]: expected some of float32"),
        ({"dtypes": [torch.int32]}, ValueError, r"dtypes holds \[torch.int32\]"),
        ({"elements": 7}, ValueError, "elements=7: expected at least 8"),
    ],
)
def test_wrong_arguments(kernels: Any, arguments: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        kernels.autotune.autotune(**{"device": "meta", **arguments})


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_timed(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.autotune, "_seconds", lambda call: pytest.fail("was timed"))
    kernels.folder.write_text("a file", encoding="utf-8")
    message = "autotune has nowhere to keep its results .*: set RST_FUSED_CACHE_DIR to a folder that can be written"
    with pytest.raises(RuntimeError, match=message):
        kernels.autotune.autotune("meta", elements=64)
    kernels.folder.unlink()

    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kernels.launch_config.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(RuntimeError, match="Permission denied"):
        kernels.autotune.autotune("meta", elements=64)
