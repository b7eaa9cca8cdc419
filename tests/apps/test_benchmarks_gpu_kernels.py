"""What the GPU benchmarks say of single kernels: bytes, times, fractions, predictions, other builds, counters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cases import many
from benchmarks.gpu import ceilings, kernel_report, kernels, modes, ncu, one_step, predictions, race, stage, variants
from benchmarks.gpu.device import Rehearsal, launched
from benchmarks.gpu.kernels import Timed
from benchmarks.gpu.modes import BF16, FP32, MASTERS
from benchmarks.gpu.stages import ROOT, read_part, write_part
from benchmarks.gpu.streams import Streams
from benchmarks.gpu.traffic import kernel_bytes, part_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


# --- bytes and predictions ------------------------------------------------------------------------------------------
MODES = (FP32, BF16, MASTERS, modes.REMAINDERS, modes.ASAM, modes.GRST)


@pytest.mark.parametrize(
    ("kernel", "bytes_by_mode"),
    [("norm", [4, 2, 2, 2, 8, 4]), ("perturb", [16, 8, 8, 10, 16, 16]), ("sgd", [20, 10, 20, 18, 20, 24]),
     ("adamw", [28, 14, 28, 26, 28, 32])],
)  # fmt: skip
def test_bytes_that_a_kernel_must_move(kernel: str, bytes_by_mode: list[int]) -> None:
    assert [kernel_bytes(kernel, mode) for mode in MODES] == bytes_by_mode


def test_bytes_that_a_part_of_a_step_must_move() -> None:
    assert [part_bytes(part, "adamw", MASTERS) for part in ("perturb", "update", "base")] == [10, 28, 28]
    assert [part_bytes(part, "sgd", modes.GRST) for part in ("perturb", "update", "base")] == [20, 24, 20]


def test_predictions_are_for_the_device_at_hand() -> None:
    assert predictions.predicted("adamw", "bf16", "NVIDIA H100 80GB HBM3") == 0.82
    assert predictions.predicted("adamw", "bf16", "NVIDIA H200") == 0.68
    assert predictions.predicted("adamw", "bf16", "NVIDIA L4") is None
    assert predictions.predicted("adamw", "fp32, ASAM", "NVIDIA H200") is None
    assert predictions.predicted_part("perturb", "adamw", "bf16", "NVIDIA H200") == 0.86
    assert predictions.predicted_part("base", "sgd", "fp32", "NVIDIA H100") == 0.96


def test_everything_with_a_goal_was_predicted() -> None:
    wanted = {(kernel, mode.name) for kernel in ("norm", "perturb", "sgd", "adamw") for mode in modes.MAIN}
    assert wanted <= set(predictions.FRACTIONS)


# --- times ------------------------------------------------------------------------------------------------------------
def traced(*events: tuple[str, str, float]) -> dict[str, list[float]]:
    """What a trace with these events holds: category, name, microseconds."""
    return launched({
        "traceEvents": [
            {"cat": cat, "name": name, "ts": ts, "dur": dur} for ts, (cat, name, dur) in enumerate(events)
        ]
    })  # fmt: skip


def test_launches_of_a_call_are_added() -> None:
    """Two calls of a step with two launches of the norm, beside others."""
    norm, other = "rst_grad_norm_float32", "rst_perturb_float32"
    launches = traced(
        ("kernel", norm, 10), ("kernel", norm, 1), ("kernel", other, 50), ("gpu_memset", "Memset (Device)", 7),
        ("kernel", norm, 20), ("kernel", norm, 2), ("kernel", other, 60),
    )  # fmt: skip
    micro = [round(s * 1e6) for s in kernels.matching(launches, kernels.NAMES["norm"], 2)]
    assert micro == [11, 22]
    assert [round(s * 1e6) for s in kernels.matching(launches, kernels.NAMES["perturb"], 2)] == [50, 60]
    assert kernels.matching(launches, kernels.NAMES["sgd"], 2) == []
    both = traced(("kernel", "grad_norm_kernel", 10), ("kernel", "finish_kernel", 1))
    assert [round(s * 1e6) for s in kernels.matching(both, kernels.NAMES["norm"], 1)] == [11], "as Triton's norm"
    with pytest.raises(RuntimeError, match="4 launches in 3 calls"):
        kernels.matching(launches, kernels.NAMES["norm"], 3)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("norm", "rst_grad_norm_bfloat16"), ("perturb", "rst_perturb_bfloat16_master"),
        ("sgd", "rst_sgd_step_float32_mixing"), ("adamw", "rst_adam_step_bfloat16_master"),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(kernel: str, name: str) -> None:
    found = [key for key, pattern in kernels.NAMES.items() if kernels.matching({name: [1.0]}, pattern, 1)]
    assert found == [kernel]
    assert not kernels.matching({name: [1.0]}, kernels.READ, 1) and not kernels.matching({name: [1.0]}, kernels.COPY, 1)


def test_fractions_are_of_a_copy_and_of_a_read() -> None:
    """1000 elements in bf16: the copy moves 4 bytes of each in 8 s, the read 2 in 2 s."""
    times = {"norm": [4.0, 5.0, 1.0], "perturb": [32.0], "adamw": [35.0], "copy": [8.0, 8.0, 9.0], "read": [2.0]}
    found = kernels.rows(times, 2000, Timed(many(1, 1000), BF16, "adamw"), "NVIDIA H200")
    assert [(k["kernel"], k["bytes"], k["median_s"], k["best_s"]) for k in found] == [
        ("norm", 2000, 4.0, 1.0), ("perturb", 8000, 32.0, 32.0), ("adamw", 14000, 35.0, 35.0),
    ]  # fmt: skip
    assert [(k["of_copy"], k["of_read"], k["predicted"]) for k in found] == [
        (1.0, 0.5, 0.67), (0.5, None, 0.95), (0.8, None, 0.68),
    ]  # fmt: skip


class Tracing(Rehearsal):
    """A device on which a SAM step with SGD, a copy and a read launch kernels of known times."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def launches(self, call: Callable[[], object]) -> dict[str, list[float]]:
        self.steps.clear()
        call()
        if not self.steps:  # a copy, or a read
            return {"Memcpy DtoD (Device -> Device)": [2.0], "reduce_kernel<512>": [1.0], "spin_kernel": [99.0]}
        return {"rst_grad_norm_float32": [1.5], "rst_perturb_float32": [4.0], self.update: [5.0]}

    update = "rst_sgd_step_float32"


def test_the_kernels_of_a_step_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Tracing()
    part = stage.Part(device, tmp_path / "part.json", ["reference"])
    monkeypatch.setattr(race, "sam_step", lambda competitor, *both: device.steps.append(competitor.name))
    timed = Timed(many(4, 25), FP32, "sgd")
    kernels.measure_all(part, [timed], (2, 1))
    (found,) = read_part(part.out)["kernels"]
    assert [(k["kernel"], k["bytes"], k["of_copy"], k["of_read"]) for k in found["kernels"]] == [
        ("norm", 400, pytest.approx(2 / 3), pytest.approx(2 / 3)), ("perturb", 1600, 1.0, None),
        ("sgd", 2000, 1.0, None),
    ]  # fmt: skip
    assert (found["copy_bytes_per_s"], found["read_bytes_per_s"]) == (400.0, 400.0)
    assert (found["who"], found["mode"], found["tensors"]) == ("reference", "fp32", 4)
    assert part.status() == 0
    device.update = "renamed"
    kernels.measure_all(part, [timed], (2, 1))
    assert part.status() == 1 and "['sgd'] launched no kernel of that name" in part.data["errors"][0]


def test_where_nothing_is_launched_nothing_is_timed(tmp_path: Path) -> None:
    part = stage.Part(Rehearsal(), tmp_path / "part.json", ["reference"])
    kernels.measure_all(part, [Timed(many(2, 9), MASTERS, "adamw")], (1, 1))
    (found,) = read_part(part.out)["kernels"]
    assert (found["kernels"], part.data["errors"]) == ([], [])


def test_the_kernels_of_both_sizes_and_all_modes_are_timed() -> None:
    sizes = kernels.full_size()
    for mode in modes.MAIN:
        timed = {(t.case.name, t.base) for t in sizes if t.mode == mode}
        assert timed == {(case, base) for case in ("gpt2", "1e9") for base in ("sgd", "adamw")}
    assert {(t.mode, t.base) for t in sizes} >= set(modes.SPECIAL)
    assert {(t.mode, t.base) for t in kernels.brief_size()} == {(mode, "adamw") for mode in modes.MAIN}


# --- ceilings ---------------------------------------------------------------------------------------------------------
def test_a_copy_moves_twice_what_a_read_does() -> None:
    found = ceilings.bandwidths({"copy": [2.0, 4.0, 8.0], "read: sum": [1.0, 2.0, 3.0]}, 100)
    assert [(b["what"], b["bytes"], b["median"], b["best"]) for b in found] == [
        ("copy", 200, 50.0, 100.0), ("read: sum", 100, 50.0, 100.0),
    ]  # fmt: skip


def test_streams_are_copied_and_read_whole() -> None:
    streams = Streams(30, Rehearsal())
    assert streams.size == 32 == 4 * streams.source.numel()
    streams.copy()
    assert streams.target is not None and torch.equal(streams.target, streams.source)
    reads = streams.reads()
    assert torch.equal(reads["sum"](), streams.source.sum())  # type: ignore[arg-type]
    assert torch.equal(reads["max"](), streams.source.max())  # type: ignore[arg-type]
    assert torch.equal(reads["norm"](), streams.source.norm())  # type: ignore[arg-type]


def test_the_fastest_read_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "race", lambda *_: {"read": {"sum": [3.0, 9.0], "max": [4.0, 4.0], "norm": [5.0, 5.0]}})
    streams = Streams(8, Rehearsal())
    assert ceilings.fastest_read(Rehearsal(), streams)() == streams.source.max()


# --- other builds -----------------------------------------------------------------------------------------------------
def test_a_variant_is_built_and_timed_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands, their folders and their environment, with the programs left out."""
    ran: list[tuple[str, Path, str | None]] = []

    def run(words: list[str], cwd: Path, env: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
        defines = env.get("RST_FUSED_CUDA_DEFINES")
        if "setup.py" in words:
            assert (cwd / "setup.py").exists() and (cwd / "csrc" / "cuda").is_dir() and not list(cwd.rglob("*.so"))
            assert (env["RST_FUSED_BUILD_CUDA"], env["RST_FUSED_BUILD_EXTENSION"]) == ("1", "1")
            ran.append(("build", cwd, defines))
            return subprocess.CompletedProcess(words, 1 if defines == "B=2" else 0)
        ran.append(("time", cwd, defines))
        assert words[1:3] == ["-m", "benchmarks.gpu.kernels"] and "--brief" in words
        seconds = 2.0 if cwd == ROOT else 1.0
        timed = {"mode": "bf16", "kernels": [{"kernel": "norm", "median_s": seconds}]}
        write_part(Path(words[words.index("--out") + 1]), {"package": str(cwd), "kernels": [timed]})
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(variants.environment, "_query", lambda fields: {})
    data = variants.measure(["A=1 C=3", "B=2"], tmp_path / "variants.json", 60.0)
    builds = {defines: folder for what, folder, defines in ran if what == "build"}
    assert set(builds) == {"A=1 C=3", "B=2"} and len(set(builds.values())) == 2
    assert [(folder, defines) for what, folder, defines in ran if what == "time"] == [
        (ROOT, None), (builds["A=1 C=3"], None), (ROOT, None),
    ]  # fmt: skip
    assert data["notes"] == ["B=2: not built (exit status 1, variants-1.log)"] and data["errors"] == []
    assert read_part(tmp_path / "variants.json") == data
    (row,) = data["kernels"]
    assert row["seconds"] == {"default": 2.0, "A=1 C=3": 1.0, "default again": 2.0}
    assert row["ratios"] == {"default": 1.0, "A=1 C=3": 0.5, "default again": 1.0}
    text = kernel_report.markdown({"variants": data})
    assert "| norm, bf16" in text and "1000.00 ms (0.50)" in text and "default again" in text


def test_a_variant_that_times_another_build_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        if "--out" in words:
            write_part(Path(words[words.index("--out") + 1]), {"package": str(ROOT), "kernels": []})
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(variants.environment, "_query", lambda fields: {})
    with pytest.raises(RuntimeError, match="loaded from"):
        variants.measure(["A=1"], tmp_path / "variants.json", 60.0)


def test_a_rehearsal_compiles_no_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "variants.json"
    monkeypatch.setattr(sys, "argv", ["variants", "--device", "cpu", "--out", str(out), "--seconds", "9"])
    assert variants.main() == 0
    assert read_part(out)["notes"] == ["variants: nothing is compiled in a rehearsal"]


def test_a_part_says_which_extension_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python files and extension may come from two places, where one of them is installed."""
    part = stage.Part(Rehearsal(), tmp_path / "part.json", [])
    assert (part.data["package"], part.backends) == (str(ROOT), [])
    elsewhere = SimpleNamespace(__file__=str(tmp_path / "rst_fused" / "_plan_ext.so"))
    monkeypatch.setattr("rst_fused._backends.plan_extension", lambda: elsewhere)
    assert stage.package()["package"] == str(tmp_path)


# --- Nsight Compute ---------------------------------------------------------------------------------------------------
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
RAW = f'''==PROF== Disconnected
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","{STALL.format("barrier")}",\
"gpu__time_duration.sum","{STALL.format("long_scoreboard")}","{STALL.format("wait")}","{STALL.format("membar")}","other"
"","","%","inst","us","inst","inst","inst",""
"0","rst_grad_norm_bfloat16","81.5","0.5","1,234.5","12.25","3","nan","x"
"1","rst_adam_step_bfloat16","60","0","99","1","2","3","y"
'''


def test_counters_are_read_with_the_worst_stalls() -> None:
    assert ncu.read_raw(RAW) == [
        {"kernel": "rst_grad_norm_bfloat16", "DRAM": "81.5 %", "time": "1,234.5 us",
         "stalls": {"long_scoreboard": 12.25, "wait": 3.0, "barrier": 0.5}},
        {"kernel": "rst_adam_step_bfloat16", "DRAM": "60 %", "time": "99 us",
         "stalls": {"membar": 3.0, "wait": 2.0, "long_scoreboard": 1.0}},
    ]  # fmt: skip
    assert ncu.read_raw("==ERROR== nothing\n") == []
    text = kernel_report.markdown({"ncu": {"launches": ncu.read_raw(RAW)}})
    assert "rst_adam_step_bfloat16" in text and "long_scoreboard 12.2, wait 3.0" in text


@pytest.mark.parametrize(
    ("output", "code", "notes", "errors"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "ERR_NVGPUCTRPERM", ""),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 0, "LibraryNotLoaded", ""),
        ("Segmentation fault", 139, "", "exit status 139"),
        ("no kernels were profiled", 0, "", "found nothing"),
    ],
)
def test_a_machine_without_counters_is_no_error(
    output: str, code: int, notes: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ncu, "run", lambda words: subprocess.CompletedProcess(words, code, stdout=output))
    data = ncu.measure("/bin/ncu", tmp_path / "x.ncu-rep")
    assert bool(data["notes"]) is bool(notes) and notes in " ".join(data["notes"])
    assert bool(data["errors"]) is bool(errors) and errors in " ".join(data["errors"])
    assert ncu.measure(None, tmp_path / "x.ncu-rep")["notes"] == ["no counters were read: ncu was not found"]


def test_what_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(ncu.profiling("/bin/ncu", tmp_path / "x.ncu-rep"))
    assert words.startswith("/bin/ncu --clock-control none --set full -k regex:rst_ -c 8 ")
    assert words.endswith("-m benchmarks.gpu.one_step --device cuda")
    monkeypatch.setattr(sys, "argv", ["one_step", "--device", "cpu"])
    monkeypatch.setattr(race, "sam_step", lambda competitor, grads: steps.append((competitor.name, grads[0].dtype)))
    steps: list[Any] = []
    assert one_step.main() == 0
    assert steps == [("ours", torch.bfloat16)] * 3
