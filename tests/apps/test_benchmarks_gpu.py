"""The command of the GPU benchmarks: stages survive each other, results are kept, and reports say what was reached."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.gpu import add_arguments, counts, environment, gathered, goals, planned, race, report, sanitizer
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


def test_results_are_there_while_later_stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage sees what the first one left."""
    out = tmp_path / "out"
    look = f"import pathlib; print(pathlib.Path({str(out)!r}, 'gpu.json').read_text())"
    found = json.dumps({"backends": ["x"], "notes": ["a finding"], "errors": []})
    leave = f"import pathlib; pathlib.Path({str(out)!r}, 'kernels.json').write_text({found!r}); raise SystemExit(1)"
    monkeypatch.setattr("benchmarks.gpu.planned", lambda args, folder: [script("kernels", leave), script("look", look)])
    assert main(["gpu", "--device", "cpu", "--out", str(out)]) == 1, "a failed stage is an error"
    then = json.loads((out / "look.log").read_text())
    assert [s["status"] for s in then["stages"]] == [FAILED, "running"]
    assert then["kernels"]["notes"] == ["a finding"]
    assert "a finding" in (out / "gpu.md").read_text()
    assert main(["gpu", "--device", "cpu", "--out", str(out)]) == 2, "results are append-only"
    assert main(["report", str(out / "gpu.json")]) == 0


def test_tuning_is_a_stage_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """It changes what later processes do."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def names(*arguments: str) -> list[str]:
        return [s.name for s in planned(parser.parse_args(["--out", str(tmp_path), *arguments]), tmp_path)]

    assert names() == ["build", "tests", "sanitizer", "kernels", "end_to_end"]
    assert names("--stage", "kernels", "tune") == ["tune", "kernels"], "what is measured then uses what it found"


def test_the_tuning_stage_has_nothing_to_do_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tune", "--device", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    data = json.loads(out.read_text())
    assert data["errors"] == [] and data["notes"][-1] == "tune: there is nothing to tune on the CPU"


def test_junit_counts(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text('<testsuites><testsuite tests="7" failures="2" errors="1" skipped="3"/></testsuites>')
    assert counts(path) == {"tests": 7, "failures": 2, "errors": 1, "skipped": 3}
    path.write_text("<testsuites><tests")
    assert counts(path) == counts(tmp_path / "missing.xml") == {}


# --- tools ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "code", "status", "summary"),
    [
        ("x\n========= ERROR SUMMARY: 0 errors\n", 0, "passed", "ERROR SUMMARY: 0 errors"),
        ("========= ERROR SUMMARY: 3 errors\n", sanitizer.FOUND, "found errors", "ERROR SUMMARY: 3 errors"),
        ("=== RACECHECK SUMMARY: 1 hazard displayed (1 error)", 9, "found errors",
         "RACECHECK SUMMARY: 1 hazard displayed (1 error)"),
        ("7 ops: 2 calls are wrong\n\n", 1, "failed", "7 ops: 2 calls are wrong"),
        ("", 1, "failed", "exit status 1"),
    ],
)  # fmt: skip
def test_the_sanitizers_verdict(text: str, code: int, status: str, summary: str) -> None:
    assert sanitizer.read_log(text, code) == {"status": status, "summary": summary}


def test_what_nvidia_smi_does_not_know_is_left_out() -> None:
    found = environment.parse_fields("NVIDIA H200, 580.159.04, [N/A]", ["name", "driver", "power"])
    assert found == {"name": "NVIDIA H200", "driver": "580.159.04"}


# --- the report -----------------------------------------------------------------------------------------------------
def result(rehearsal: bool = True, **parts: Any) -> dict[str, Any]:
    """A result file with nothing measured but ``parts``."""
    head = {**record.environment("NVIDIA H200", build={}), "command": "gpu", "rehearsal": rehearsal}
    return {**head, "gpu": {}, "clocks": {}, "stages": [], **parts}


def measured(fraction: float, elements: int = goals.LARGE) -> dict[str, Any]:
    """What the kernels stage finds: one race, host time and launches that just meet their goals."""
    one = {"case": "gpt2", "title": "GPT-2 small", "dtype": "fp32", "base": "sgd", "tensors": 1, "elements": elements}
    fractions = [
        {"who": "cuda", "what": what, "bytes": 1, "fraction": fraction, "best": fraction} for what in race.PARTS
    ]
    ratio = {"who": "cuda", "against": "usual", "step": 3.0, "device": 2.5}
    return {
        "backends": ["cuda"], "notes": [], "errors": [],
        "races": [{**one, "results": [{"who": "cuda", "what": "perturb", "median_s": 2e-3, "best_s": 1e-6}],
                   "fractions": fractions, "ratios": [ratio], "agreement": [], "copy_bytes_per_s": 4e12,
                   "clocks": {}}],
        "launches": [{**one, "who": "cuda", "total": 4, "of": {"norm<float>(float*)": 4}}],
        "host": [{"who": "cuda", "tensors": 150, "median_s": 60e-6, "best_s": 50e-6}],
    }  # fmt: skip


def judged(data: dict[str, Any]) -> dict[str, bool | None]:
    return {v.what.split(":")[0]: v.met for v in goals.verdicts(data)}


def test_goals_are_judged_on_a_gpu() -> None:
    met = judged(result(False, kernels=measured(0.9)))
    assert met == {
        "perturb / copy bandwidth": True, "update / copy bandwidth": True, "launches per SAM step": False,
        "SAM step, time of usual / time of ours": True, "host time per SAM step": True,
    }  # fmt: skip
    assert judged(result(False, kernels=measured(0.89)))["update / copy bandwidth"] is False
    assert "update / copy bandwidth" not in judged(result(False, kernels=measured(0.9, goals.LARGE - 1)))
    text = report.markdown(result(False, kernels=measured(0.89)))
    assert text.startswith("# GPU benchmarks: NVIDIA H200\n")
    row = next(line for line in text.splitlines() if line.startswith("| update / copy"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["cuda", "0.89", ">= 0.90", "NO"]
    assert "4 x norm" in text and "2.00 ms (1.0 us)" in text and "4000.0 GB/s" in text


def test_the_device_is_the_one_that_torch_ran_on(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "NVIDIA H100"}))
    outcomes = [{"name": name} for name in ("build", "sanitizer", "kernels")]
    assert gathered(result(False), tmp_path, outcomes)["device"] == "NVIDIA H100"
    assert gathered(result(False), tmp_path, outcomes[:2])["device"] == "NVIDIA H200"


def test_a_training_step_within_its_overhead() -> None:
    results = [{"who": f"RST({p:g})", "overhead": o, "p": p} for p, o in ((0.0, 0.010), (1.0, 0.011))]
    training = {"model": "m", "base": "sgd", "backend": "cuda", "results": results}
    found = goals.verdicts(result(False, end_to_end={"trainings": [training]}))
    assert [v.met for v in found] == [True, False]


def test_a_rehearsal_says_so_and_judges_nothing() -> None:
    data = result(True, kernels=measured(0.1, elements=10))
    assert set(judged(data).values()) == {None}
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
    text = report.overview(result(kernels=part, stages=[outcome], tests={"failures": 2}, sanitizer=found))
    for words in ("kernels: gpt2: out of memory", "TIMED OUT", "2 failures", "ERROR SUMMARY: 2 errors", "none"):
        assert words in text


@pytest.mark.slow
def test_the_whole_command_rehearses_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpu", "--device", "cpu", "--no-compile", "--out", str(tmp_path), "--budget", "300"]
    assert main([*arguments, "--stage", "build", "sanitizer", "kernels", "end_to_end"]) == 0, capsys.readouterr().out
    data = record.read(tmp_path / "gpu.json")
    assert [s["status"] for s in data["stages"]] == [PASSED] * 4
    assert os.path.getsize(tmp_path / "kernels.log") > 0
    assert data["sanitizer"]["memcheck"]["status"] == "not available"
    assert data["kernels"]["races"] and data["end_to_end"]["trainings"]
    text = (tmp_path / "gpu.md").read_text()
    assert "fraction of the copy bandwidth" in text and "CUDA graphs" in text and "(1 + p) passes + base" in text
