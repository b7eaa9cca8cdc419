"""The command of the GPU benchmarks: stages survive each other, results are kept, and reports say what was reached."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.gpu import (
    gathered,
    goals,
    report,
    traffic,
)
from benchmarks.gpu.order import FIRST
from benchmarks.gpu.stages import FAILED, NOT_RUN, PASSED, TIMED_OUT, Stage, run_stages

pytestmark = pytest.mark.usefixtures("one_thread")


# --- stages ---------------------------------------------------------------------------------------------------------
def script(name: str, code: str, share: float = 0.5, **more: Any) -> Stage:
    return Stage(name, [sys.executable, "-c", code], share, **more)


def run(stages: list[Stage], folder: Path, budget: float = 60.0) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """The outcomes by name, and the statuses at every change."""
    seen = []
    outcomes = run_stages(
        stages, folder, time.monotonic() + budget, lambda now: seen.append([o["status"] for o in now]), grace=0.5
    )
    return {o["name"]: o for o in outcomes}, seen


def test_a_stage_that_fails_hides_no_other(tmp_path: Path) -> None:
    outcomes, seen = run([
        script("a", "print('from a')"), script("b", "print('from b'); raise SystemExit(3)"),
        Stage("c", ["/nowhere/to/be/found"], 0.5), script("d", "raise SystemExit(5)", accepted=(0, 5)),
        script("e", "raise SystemExit(5)", meanings={5: "nothing there"}),
    ], tmp_path)  # fmt: skip
    assert [o["status"] for o in outcomes.values()] == [PASSED, FAILED, FAILED, PASSED, FAILED]
    assert (outcomes["b"]["detail"], outcomes["e"]["detail"]) == ("exit status 3", "nothing there")
    assert "could not be started" in outcomes["c"]["detail"]
    assert [(tmp_path / f"{name}.log").read_text() for name in "ab"] == ["from a\n", "from b\n"]
    assert [now for now in seen if "running" not in now][0] == [PASSED], "the first outcome is told before the second"


def test_a_stage_that_hangs_is_ended_with_all_it_started_and_leaves_its_log(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    outcomes, _ = run([script("slow", code, 0.4), script("next", "print(1)", 1.0)], tmp_path, budget=7.0)
    assert (outcomes["slow"]["status"], outcomes["next"]["status"]) == (TIMED_OUT, PASSED)
    assert time.monotonic() - started < 10
    child = int((tmp_path / "slow.log").read_text())
    time.sleep(0.1)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z", "its child still runs"


def test_a_stage_that_hangs_may_end_by_itself(tmp_path: Path) -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "try:\n    print('here', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted')"
    )
    outcomes, _ = run([script("slow", code, 0.5)], tmp_path, budget=6.0)
    assert outcomes["slow"]["status"] == TIMED_OUT
    assert (tmp_path / "slow.log").read_text() == "here\ninterrupted\n"


def test_limits_are_shares_of_what_is_left(tmp_path: Path) -> None:
    print_limit = [sys.executable, "-c", "import sys; print(sys.argv[1])", "{limit}"]
    outcomes, _ = run([Stage("a", print_limit, 0.25), Stage("b", print_limit, 1.0)], tmp_path, budget=80.5)
    assert outcomes["a"]["limit_s"] == pytest.approx(20, abs=0.5)
    assert 75 < outcomes["b"]["limit_s"] <= 80, "what the first one did not need"
    assert int((tmp_path / "a.log").read_text()) == pytest.approx(20, abs=1)


def test_no_stage_starts_after_the_end(tmp_path: Path) -> None:
    outcomes, _ = run([script("a", "print(1)")], tmp_path, budget=1.0)
    assert (outcomes["a"]["status"], outcomes["a"]["detail"]) == (NOT_RUN, "no time was left")


def test_after_a_wrong_op_only_memcheck_runs(tmp_path: Path) -> None:
    def stages(exercise: str) -> list[Stage]:
        return [
            script("build", "raise SystemExit(1)"), script("exercise", exercise),
            script("memcheck", "print(1)", after_failure_of="exercise"),
            script("kernels", "print(1)", needs="exercise"),
        ]  # fmt: skip

    outcomes, seen = run(stages("raise SystemExit(1)"), tmp_path)
    assert [(o["name"], o["status"]) for o in outcomes.values()] == [
        ("build", FAILED), ("exercise", FAILED), ("memcheck", PASSED), ("kernels", NOT_RUN),
    ]  # fmt: skip
    assert outcomes["kernels"]["detail"] == "exercise did not pass"
    assert seen[-1] == [FAILED, FAILED, PASSED, NOT_RUN], "what was left out is told, too"
    outcomes, _ = run(stages("print(1)"), tmp_path)
    assert [(o["name"], o["status"]) for o in outcomes.values()] == [
        ("build", FAILED), ("exercise", PASSED), ("kernels", PASSED),
    ]  # fmt: skip


def unpacked(out: Path) -> Path:
    with tarfile.open(out / "logs.tar.gz") as archive:
        archive.extractall(out.parent / "logs", filter="data")
    return out.parent / "logs"


def test_results_are_there_while_later_stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage sees what the first one left."""
    out = tmp_path / "out"
    look = f"import pathlib; print(pathlib.Path({str(out)!r}, 'gpu.json').read_text())"
    found = json.dumps({"backends": ["x"], "notes": ["a finding"], "errors": []})

    def stages(args: argparse.Namespace, folder: Path) -> list[Stage]:
        part = str(folder / "kernels.json")
        leave = f"import pathlib; pathlib.Path({part!r}).write_text({found!r}); raise SystemExit(1)"
        return [script("kernels", leave), script("look", look)]

    monkeypatch.setattr("benchmarks.gpu.planned", stages)
    assert main(["gpu", "--device", "cpu", "--out", str(out)]) == 1, "a failed stage is an error"
    logs = unpacked(out)
    then = json.loads((logs / "look.log").read_text())
    assert [s["status"] for s in then["stages"]] == [FAILED, "running"]
    assert then["kernels"]["notes"] == ["a finding"]
    assert "a finding" in (out / "gpu.md").read_text()
    assert {path.name for path in logs.iterdir()} == {"kernels.json", "kernels.log", "look.log"}
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "logs.tar.gz"}, "few files come back"
    assert main(["gpu", "--device", "cpu", "--out", str(out)]) == 2, "results are append-only"
    assert main(["report", str(out / "gpu.json")]) == 0


def test_the_tuning_stage_has_nothing_to_do_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tune", "--device", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    data = json.loads(out.read_text())
    assert data["errors"] == [] and data["notes"][-1] == "tune: there is nothing to tune on the CPU"


# --- the report -----------------------------------------------------------------------------------------------------
def result(rehearsal: bool = True, **parts: Any) -> dict[str, Any]:
    """A result file with nothing measured but ``parts``."""
    head = {**record.environment("NVIDIA H200", build={}), "command": "gpu", "rehearsal": rehearsal}
    return {**head, "gpu": {}, "clocks": {}, "stages": [], **parts}


CASE = {"case": "gpt2", "title": "GPT-2 small", "mode": "fp32", "base": "sgd", "tensors": 148}
PART = {"backends": ["cuda"], "notes": [], "errors": [], "build": {"CUDA": "13.0 9.0"}}


def timed(fraction: float, elements: int = goals.LARGE, mode: str = "fp32") -> dict[str, Any]:
    """What the kernels stage finds: the norm by what it reads, which is more than it is by a copy."""
    kernels = [
        {"kernel": kernel, "bytes": 10**6, "median_s": 2e-3, "best_s": 1e-6, "of_copy": by_copy, "of_read": by_read,
         "predicted": predicted}
        for kernel, by_copy, by_read, predicted in (("norm", 0.5, fraction, 0.67), ("sgd", fraction, None, None))
    ]  # fmt: skip
    one = {**CASE, "elements": elements, "mode": mode, "who": "cuda", "kernels": kernels}
    return {**PART, "kernels": [one]}


def raced(**more: Any) -> dict[str, Any]:
    """What the races stage finds: one race, host time and launches that just meet their goals."""
    one = {**CASE, "elements": goals.LARGE, **more}
    fractions = [
        {"who": "cuda", "what": what, "bytes": 1, "fraction": 0.5, "best": 0.5, "predicted": None}
        for what in traffic.PARTS
    ]
    ratio = {"who": "cuda", "against": "usual", "step": 3.0, "device": 2.5}
    return {
        **PART,
        "races": [{**one, "results": [{"who": "cuda", "what": "perturb", "median_s": 2e-3, "best_s": 1e-6}],
                   "fractions": fractions, "ratios": [ratio], "agreement": [], "standard": "foreach",
                   "copy_bytes_per_s": 4e12, "clocks": {}}],
        "launches": [{**one, "who": "cuda", "total": 3, "of": {"norm<float>(float*)": 3}}],
        "host": [{"who": "cuda", "tensors": 150, "median_s": 60e-6, "best_s": 50e-6}],
    }  # fmt: skip


def judged(data: dict[str, Any]) -> dict[str, bool | None]:
    return {v.what.split(":")[0]: v.met for v in goals.verdicts(data)}


def test_goals_are_judged_on_a_gpu() -> None:
    met = judged(result(False, kernels=timed(0.9), races=raced()))
    assert met == {
        "norm / read bandwidth": True, "sgd / copy bandwidth": True, "launches per SAM step": True,
        "SAM step, time of usual / time of ours": True, "host time per SAM step": True,
    }  # fmt: skip
    missed = judged(result(False, kernels=timed(0.89)))
    assert missed == {"norm / read bandwidth": False, "sgd / copy bandwidth": False}
    assert judged(result(False, kernels=timed(0.9, goals.LARGE - 1))) == {}, "small models are cached"
    assert judged(result(False, kernels=timed(0.9, mode="fp32, ASAM"))) == {}, "no goal was set"
    text = report.markdown(result(False, kernels=timed(0.89), races=raced()))
    assert text.startswith("# GPU benchmarks: NVIDIA H200\n")
    rows = {line.split(":")[0].strip("| "): [c.strip() for c in line.split("|")[2:7]] for line in text.splitlines()}
    assert rows["norm / read bandwidth"] == ["cuda", "0.890", "0.67 of a copy", ">= 0.90", "NO"]
    assert rows["sgd / copy bandwidth"] == ["cuda", "0.890", "", ">= 0.90", "NO"]
    assert "3 x norm" in text and "2.00 ms (1.0 us)" in text and "4000.0 GB/s" in text


def test_what_later_stages_find_is_in_the_same_tables() -> None:
    other = raced(title="ResNet-50")
    data = result(False, races=raced(), more_races=other)
    assert [v.what.split(": ")[1] for v in goals.verdicts(data) if v.what.startswith("launches")] == [
        "GPT-2 small, fp32, sgd", "ResNet-50, fp32, sgd",
    ]  # fmt: skip
    assert "## ResNet-50, fp32, sgd" in report.markdown(data)


@pytest.mark.parametrize(
    ("who", "tensors", "build", "most"),
    [
        ("cuda", 148, "13.0 9.0", 3), ("cuda", 400, "13.0 9.0", 3), ("cuda", 1000, "13.0 9.0", 9),
        ("cuda", 148, "12.8 9.0", 12), ("triton", 1000, "not built", 3), ("reference", 10, "13.0 9.0", None),
    ],
)  # fmt: skip
def test_launches_are_judged_by_what_one_can_carry(who: str, tensors: int, build: str, most: int | None) -> None:
    assert goals.most_launches(who, tensors, {"CUDA": build}) == most
    part = raced(tensors=tensors)
    part["build"], part["launches"][0]["who"] = {"CUDA": build}, who
    for total in (most or 0, (most or 0) + 1):
        part["launches"][0]["total"] = total
        met = judged(result(False, races=part)).get("launches per SAM step")
        assert met is (None if most is None else total <= most)


def test_each_backend_has_a_goal_for_host_time() -> None:
    part = raced()
    part["host"] = [{"who": who, "tensors": 150, "median_s": 90e-6, "best_s": 50e-6} for who in ("cuda", "triton", "x")]
    found = [(v.who, v.goal, v.met) for v in goals.verdicts(result(False, races=part)) if v.what.startswith("host")]
    assert found == [("cuda", "<= 60 us", False), ("triton", "<= 100 us", True)]


def test_the_device_is_the_one_that_torch_ran_on(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "NVIDIA H100"}))
    outcomes = [{"name": name} for name in ("build", "tests", "kernels")]
    assert gathered(result(False), tmp_path, outcomes)["device"] == "NVIDIA H100"
    assert gathered(result(False), tmp_path, outcomes[:2])["device"] == "NVIDIA H200"


def test_a_training_step_within_its_overhead() -> None:
    results = [{"who": f"RST({p:g})", "overhead": o, "p": p} for p, o in ((0.0, 0.010), (1.0, 0.011))]
    training = {"model": "m", "base": "sgd", "backend": "cuda", "results": results}
    found = goals.verdicts(result(False, end_to_end={"trainings": [training]}))
    assert [v.met for v in found] == [True, False]


def test_a_rehearsal_says_so_and_judges_nothing() -> None:
    data = result(True, kernels=timed(0.1, elements=10), races=raced())
    assert len(judged(data)) == 5 and set(judged(data).values()) == {None}
    text = report.markdown(data)
    assert "Rehearsal on the CPU" in text.splitlines()[0] and "no goal is judged" in text.splitlines()[0]
    assert "not judged" in text and "NO |" not in text


def test_the_fastest_block_sizes_are_listed() -> None:
    times = [{"per_thread": p, "warps": w, "seconds": 1e-3 * p} for p, w in ((4, 2), (8, 4), (16, 2), (16, 8))]
    part = {"backends": [], "notes": ["a note"], "errors": ["an error"]}
    text = report.markdown(result(tune={**part, "sizes": [{"what": "x bf16 fp32", "times": times}]}))
    assert "| x bf16 fp32" in text and "4 x 2: 4.00 ms, 8 x 4: 8.00 ms, 16 x 2: 16.00 ms |" in text
    assert "* a note" in text and "tune: an error" in text


def test_errors_and_stages_are_in_the_overview() -> None:
    part = {"backends": [], "notes": [], "errors": ["gpt2: out of memory"]}
    outcome = {"name": "kernels", "status": TIMED_OUT, "seconds": 3.0, "limit_s": 3.0, "detail": "stopped", "log": "x"}
    found = {"memcheck": {"status": "found errors", "summary": "ERROR SUMMARY: 2 errors"}}
    wrong = {**part, "errors": ["cuda: lion_step_, bf16"]}
    text = report.overview(
        result(kernels=part, exercise=wrong, stages=[outcome], triton_tests={"failures": 2}, memcheck=found)
    )
    for words in ("kernels: gpt2: out of memory", "exercise: cuda: lion_step_, bf16", "TIMED OUT", "none",
                  "triton_tests: 2 failures", "ERROR SUMMARY: 2 errors"):  # fmt: skip
        assert words in text


@pytest.mark.slow
def test_the_whole_command_rehearses_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["gpu", "--device", "cpu", "--no-compile", "--out", str(out), "--budget", "300", "--stage"]
    stages = [name for name in FIRST if name not in ("tests", "memcheck")]
    assert main([*arguments, *stages]) == 0, capsys.readouterr().out
    data = record.read(out / "gpu.json")
    assert {s["name"]: s["status"] for s in data["stages"]} == dict.fromkeys(stages, PASSED)
    assert os.path.getsize(unpacked(out) / "kernels.log") > 0
    assert data["sanitizer"]["memcheck"]["status"] == "not available"
    assert data["kernels"]["kernels"] and data["races"]["races"] and data["end_to_end"]["trainings"]
    text = (out / "gpu.md").read_text()
    assert "fraction of the copy bandwidth" in text and "CUDA graphs" in text and "(1 + p) passes + base" in text
    assert "read: sum" in text and "no counters were read" in text
