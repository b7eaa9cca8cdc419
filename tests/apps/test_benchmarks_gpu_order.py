"""What the GPU benchmarks run, in which order and with which commands, and what files they leave."""

from __future__ import annotations

import argparse
import os
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import add_arguments, device_tests, environment, results, sanitizer
from benchmarks.gpu.order import FIRST, ON_REQUEST, planned
from benchmarks.gpu.stages import Stage


def order(folder: Path, *arguments: str) -> dict[str, Stage]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    stages = planned(parser.parse_args(["--out", str(folder), *arguments]), folder)
    return {stage.name: stage for stage in stages}


def test_the_order_of_the_stages(tmp_path: Path) -> None:
    """What tells whether the kernels are right comes first, then what each costs, then what they are worth."""
    first = order(tmp_path)
    assert tuple(first) == FIRST == (
        "ceilings", "build", "exercise", "memcheck", "kernels", "ncu", "sanitizer", "tests", "races", "end_to_end",
    )  # fmt: skip
    assert first["memcheck"].after_failure_of == "exercise"
    later = list(first)[list(first).index("kernels") :]
    assert all(first[name].needs == "exercise" for name in later)
    second = order(tmp_path, "--stage", *ON_REQUEST, "kernels")
    assert list(second) == ["kernels", "variants", "triton_tests", "tune", "more_races", "more_training"]


def test_the_first_stages_have_time_enough_and_the_last_some(tmp_path: Path) -> None:
    """If each takes as long as is expected of it; and were each to take all of its limit, some would be left."""
    expected = {"ceilings": 15, "build": 60, "exercise": 20, "kernels": 90, "ncu": 45, "sanitizer": 40, "tests": 120,
                "races": 90, "end_to_end": 45}  # fmt: skip
    left = 540.0
    for name, stage in order(tmp_path).items():
        if name in expected:
            assert stage.share * left >= expected[name], name
            left -= expected[name]
    left = 540.0
    for stage in order(tmp_path).values():
        left -= stage.share * left * (stage.name != "memcheck")
    assert left > 0


def test_a_build_without_gpu_kernels_fails(tmp_path: Path) -> None:
    assert order(tmp_path)["build"].environment["RST_FUSED_BUILD_CUDA"] == "1"
    assert order(tmp_path, "--device", "cpu")["build"].environment == {"RST_FUSED_BUILD_EXTENSION": "0"}


def test_backends_and_variants_are_passed_on(tmp_path: Path) -> None:
    def words(name: str, *arguments: str) -> str:
        return " ".join(order(tmp_path, "--stage", name, *arguments)[name].command)

    assert "--backend" not in words("kernels"), "the first that is available"
    assert words("more_races").endswith("--more --backend cuda triton")
    assert words("races", "--backend", "triton", "--no-compile").endswith("--backend triton --no-compile")
    assert words("variants", "--variant", "A=1 B=2", "A=2").endswith("--seconds {limit} --variant A=1 B=2 A=2")


@pytest.mark.parametrize("installed", [True, False])
def test_device_tests_run_in_parallel_where_they_can(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed and name == "xdist" else None)
    stages = order(tmp_path, "--stage", "tests", "triton_tests")
    for name, chosen in (("tests", "not triton and not reference"), ("triton_tests", "triton and not reference")):
        command = list(stages[name].command)
        assert command[command.index("-k") + 1] == chosen
        assert ("-n 8" in " ".join(command)) is installed
        assert f"--junitxml={tmp_path / name}.xml" in command


def test_results_are_packed_within_a_size(tmp_path: Path) -> None:
    """The largest files are left out, and named."""
    folder = tmp_path / "logs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.log").write_text("small\n")
    (folder / "b.log.draft").write_text("unfinished")
    (folder / "sub" / "c.bin").write_bytes(os.urandom(5000))
    (folder / "d.bin").write_bytes(os.urandom(9000))
    assert results.pack(folder, tmp_path / "logs.tar.gz") == []
    assert results.pack(folder, tmp_path / "small.tar.gz", most=7000) == ["d.bin: 9000 bytes"]
    names = {"logs": {"a.log", "sub/c.bin", "d.bin"}, "small": {"a.log", "sub/c.bin", "left-out.txt"}}
    for name, expected in names.items():
        path = tmp_path / f"{name}.tar.gz"
        with tarfile.open(path) as archive:
            assert set(archive.getnames()) == expected
            if name == "small":
                assert path.stat().st_size <= 7000
                assert archive.extractfile("left-out.txt").read() == b"d.bin: 9000 bytes\n"  # type: ignore[union-attr]


def test_junit_counts(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text('<testsuites><testsuite tests="7" failures="2" errors="1" skipped="3"/></testsuites>')
    assert device_tests.counts(path) == {"tests": 7, "failures": 2, "errors": 1, "skipped": 3}
    path.write_text("<testsuites><tests")
    assert device_tests.counts(path) == device_tests.counts(tmp_path / "missing.xml") == {}


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


def test_the_sanitizer_checks_our_kernels_alone() -> None:
    words = " ".join(sanitizer.command("/bin/compute-sanitizer", "racecheck"))
    assert words.startswith("/bin/compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name kns=rst_ ")
    assert words.endswith("-m benchmarks.gpu.exercise --device cuda --backend cuda")


def test_what_nvidia_smi_does_not_know_is_left_out() -> None:
    found = environment.parse_fields("NVIDIA H200, 580.159.04, [N/A]", ["name", "driver", "power"])
    assert found == {"name": "NVIDIA H200", "driver": "580.159.04"}
