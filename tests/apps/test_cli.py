"""The command line's frame: finding subcommands, importing them lazily, and `rst-fused info`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

import rst_fused
from rst_fused import _backends, info_cli
from rst_fused.cli import COMMANDS, TRAIN_EXTRA, main


def run_without(packages: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`rst-fused ...` in a process in which importing any of `packages` raises ModuleNotFoundError."""
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(packages))
    code = f"import sys; {blocked}; from rst_fused.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_help_lists_every_command(capsys):
    assert exit_status("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name, capsys):
    assert exit_status(name, "--help") == 0
    assert f"usage: rst-fused {name}" in capsys.readouterr().out


def test_version(capsys):
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"rst_fused {rst_fused.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_missing_or_unknown_command_is_an_error(arguments, capsys):
    assert exit_status(*arguments) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info_json_states_the_facts(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == rst_fused.__version__
    assert facts["torch"] == str(torch.__version__)
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cuda"]["available"] == torch.cuda.is_available()
    assert facts["build"] == _backends.build_info()
    assert facts["simd"] == _backends.simd_level()
    assert facts["simd_from_memory"] == _backends.simd_level_from_memory()
    lines = [info_cli.simd_line({"simd": "avx512", "simd_from_memory": level}) for level in ("avx512", "avx2")]
    assert lines == ["avx512", "avx512; avx2 for fp32 and fp64 data larger than the caches"]
    assert facts["last_level_cache_bytes"] == _backends.cache_bytes()
    assert facts["non_temporal_threshold_bytes"] == _backends.non_temporal_threshold()
    shown = [(backend["name"], backend["available"]) for backend in facts["backends"]]
    assert shown == [(backend.name, backend.available) for backend in _backends.backends()]
    assert ("reference", True) in shown


def test_info_text_is_two_aligned_columns(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index(rst_fused.__version__)
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    stores = ["non-temporal stores"] if _backends.cache_bytes() is not None else []
    for name in ("rst_fused", "backend: reference", "SIMD", *stores, "torch", "CUDA", "threads", "Python"):
        assert any(line.startswith(name) for line in lines), name


@pytest.mark.parametrize(
    ("cuda", "line"),
    [
        ({"available": False, "version": None, "devices": []}, "built without CUDA"),
        ({"available": False, "version": "13.0", "devices": []}, "built with CUDA 13.0 but finds no device"),
        ({"available": True, "version": "13.0", "devices": ["H200", "H200"]}, "13.0: H200, H200"),
    ],
)
def test_cuda_line(cuda, line):
    assert line in info_cli.cuda_line(cuda)


def test_info_needs_no_extra():
    done = run_without(TRAIN_EXTRA | {"triton"}, "info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == rst_fused.__version__


def test_train_without_an_extra_says_what_to_install():
    done = run_without({"sklearn"}, "train", "--epochs", "1")
    assert done.returncode == 1
    assert "'sklearn' is not installed; pip install 'rst_fused[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_import_errors_are_not_hidden():
    done = run_without({"rst_fused.info_cli"}, "info")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "rst_fused.info_cli" in done.stderr
