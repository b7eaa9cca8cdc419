"""The training command on two processes: the numbers of one, and what goes wrong is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rst_fused import cli

pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import ranks  # noqa: E402
import training_on_ranks as on_ranks  # noqa: E402
from cifar_folder import write_folder  # noqa: E402

from rst_fused.train import data, processes, runner  # noqa: E402
from rst_fused.train.config import Config  # noqa: E402

METHODS = ("base", "sam", "rst", "g-rst")
# 29 images are not the same number on both processes. The draws of RST and G-RST give steps of both kinds.
QUICK = [
    "--subset", "60", "--batch-size", "29", "--epochs", "3", "--threads", "1", "--seeds", "1", "--label-noise", "0.3",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(*command, folder):
    """What torchrun does with two processes: exit status, stdout, stderr."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "Agg"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# --- the command under torchrun --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(["train", *QUICK, "--output", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


# Runs the command, then says whether a process group is left.
SCRIPT = """
import sys
import torch.distributed as dist
from rst_fused import cli
status = cli.main(["train", *sys.argv[1:]])
sys.exit(3 if dist.is_initialized() else status)
"""


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_two_processes_give_the_results_of_one(shard, alone, tmp_path):
    if shard == "ddp":
        command = ["-m", "rst_fused", "train"]
    else:
        (tmp_path / "script.py").write_text(SCRIPT)
        command = [tmp_path / "script.py"]
    status, out, err = launch(*command, *QUICK, "--shard", shard, "--output", "out", folder=tmp_path)
    assert status == 0, err
    assert out.count(f"rho 0.1, 2 processes ({shard})") == 1 and out.count("wrote ") == 1
    assert [err.count(f"[{i}/4] label noise 0.3") for i in range(1, 5)] == [1, 1, 1, 1]
    assert "Warning" not in err and "it/s" not in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["accuracy.png", "results.json"]

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["config"]["shard"], found["config"]["processes"]) == (shard, 2)
    assert found["schedule"] == alone["schedule"] and len(found["runs"]) == len(alone["runs"]) == 4
    for run, expected in zip(found["runs"], alone["runs"], strict=True):
        for name in ("label_noise", "method", "seed", "diverged", "cost", "test_accuracy"):
            assert run[name] == expected[name], name
        assert run["train_losses"] == pytest.approx(expected["train_losses"], rel=1e-6)
        assert run["loss_rise"] == pytest.approx(expected["loss_rise"], rel=2e-5)
        assert run["top_eigenvalue"] == pytest.approx(expected["top_eigenvalue"], rel=2e-5)
    assert {1.0, 2.0} < {run["cost"] for run in found["runs"]}
    for row, expected in zip(found["table"], alone["table"], strict=True):
        assert [row[k] for k in ("label", "accuracy", "cost")] == [expected[k] for k in ("label", "accuracy", "cost")]


# Runs the command, then says which threads of gloo are left.
THREADS = """
import sys
from pathlib import Path
from rst_fused import cli
status = cli.main(["train", *sys.argv[1:]])
threads = [name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())]
sys.exit(f"left: {threads}" if threads else status)
"""


def test_no_thread_of_a_process_group_outlives_it(tmp_path):
    # It may abort the process at its end. DTensor remembers meshes, and with them their group: so not with fsdp.
    (tmp_path / "script.py").write_text(THREADS)
    command = ["script.py", *QUICK, "--methods", "g-rst", "--shard", "ddp", "--output", "out"]
    status, _, err = launch(*command, folder=tmp_path)
    assert status == 0, err


FAILING = """
import os, sys
from rst_fused import cli
from rst_fused.train import runner
if os.environ["RANK"] == "1":
    def no_memory(*args):
        raise MemoryError("the second process is out of memory")
    runner.batches = no_memory
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_an_exception_on_one_process_ends_all_with_its_message(tmp_path):
    (tmp_path / "script.py").write_text(FAILING)
    command = [tmp_path / "script.py", *QUICK, "--methods", "base", "--shard", "ddp", "--output", "out"]
    status, out, err = launch(*command, folder=tmp_path)
    assert status != 0 and "wrote" not in out
    assert "MemoryError: the second process is out of memory" in err.partition("Root Cause")[2]
    assert list((tmp_path / "out").iterdir()) == []


# --- its parts, on ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_weights_and_statistics_are_those_of_one_process(shard):
    compare(on_ranks.trained(*QUICK), ranks.run(2, on_ranks.trained, *QUICK, "--shard", shard), 2e-6)


@pytest.mark.parametrize(("shard", "size"), [("ddp", 3), ("fsdp", 2)])
def test_so_are_those_of_a_resnet_on_augmented_images(shard, size, tmp_path):
    # In float64: random images in float32 make much of a rounding, where it decides what a ReLU lets through.
    options = ["--data", str(write_folder(tmp_path)), "--model", "resnet8", "--batch-size", "16", "--epochs", "1"]
    expected = on_ranks.trained(*options, double=True)
    compare(expected, ranks.run(size, on_ranks.trained, *options, "--shard", shard, double=True), 1e-10)


def compare(expected, results, tolerance):
    for found in results:
        assert found.keys() == expected.keys() == set(METHODS)
        for method, (state, losses) in found.items():
            wanted, wanted_losses = expected[method]
            assert losses == pytest.approx(wanted_losses, rel=tolerance)
            torch.testing.assert_close(
                state, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, method=method: f"{method}: {m}"
            )


def test_the_first_process_alone_shows_progress_and_all_end_a_diverged_run():
    options = [*QUICK, "--methods", "rst", "--lr", "1e30", "--shard", "ddp"]
    (runs, shown), (others, hidden) = ranks.run(2, on_ranks.compared, *options)
    assert [run.diverged for run in runs] == [True] and others == []
    assert "3/3" in shown and ": diverged" in shown and hidden == ""


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(dtype, tracking):
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(7, 3, 4, 4, generator=generator) * 2 + 5).to(dtype)
    targets = torch.randn(7, 3, 4, 4, generator=generator)
    output, grad, weight, bias, *tracked = on_ranks.normalised(images, targets, tracking)
    first, second = ranks.run(2, on_ranks.normalised, images, targets, tracking)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), output, **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), grad, **close)
    torch.testing.assert_close(first[2] + second[2], weight, **close)
    torch.testing.assert_close(first[3] + second[3], bias, **close)
    for mine, theirs, wanted in zip(first[4:], second[4:], tracked, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["--subset", "5000"], ["--subset", "5000"], "--subset must lie in 1..1000"),
        ([], ["--data", "/nowhere"], "--data /nowhere: no data_batch_1"),
        (["--output", "/dev/null/x"], [], "/dev/null"),
        (["--batch-size", "1"], ["--batch-size", "1"], "--batch-size 1 is less than the 2 processes"),
    ],
)
def test_what_is_wrong_on_any_process_is_said_by_the_first_and_ends_all(first, second, message, tmp_path):
    options = {0: first, 1: second}
    common = ["--shard", "ddp", "--output", str(tmp_path / "out")]
    results = ranks.run(2, on_ranks.planned, {rank: [*common, *given] for rank, given in options.items()})
    assert [taken for taken, _ in results] == [False, False]
    (_, said), (_, quiet) = results
    assert said.startswith("rst-fused train: ") and message in said and said.count("\n") == 1 and quiet == ""


# --- what is refused at the start ------------------------------------------------------------------------


def test_shard_without_torchrun_says_how_to_launch(monkeypatch, capsys):
    for name in processes.SET_BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", "--shard", "fsdp"]) == 2
    err = capsys.readouterr().err
    assert "--shard fsdp: RANK, LOCAL_RANK, WORLD_SIZE" in err
    assert "torchrun --nproc-per-node N -m rst_fused train --shard fsdp" in err


def test_torchrun_without_shard_is_refused(monkeypatch, capsys):
    for name in processes.SET_BY_TORCHRUN:
        monkeypatch.setenv(name, "2")
    assert cli.main(["train"]) == 2
    out, err = capsys.readouterr()
    assert "no --shard, but WORLD_SIZE is 2" in err and "add --shard ddp or --shard fsdp" in err and out == ""


def test_one_process_of_torchrun_needs_no_shard(monkeypatch):
    for name in processes.SET_BY_TORCHRUN:
        monkeypatch.setenv(name, "1")
    processes.check_launch(None)


def test_every_process_needs_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    processes.check_device("ddp", "cpu")
    with pytest.raises(ValueError, match="--device cuda:1 with --shard ddp: expected cuda"):
        processes.check_device("ddp", "cuda:1")
    with pytest.raises(ValueError, match=r"LOCAL_RANK 99 has no device of its own.*--nproc-per-node"):
        processes.check_device("ddp", "cuda")


@pytest.mark.parametrize(("count", "size"), [(29, 2), (7, 3), (3, 3), (128, 8)])
def test_parts_make_up_the_batch(count, size):
    parts = [processes.Processes(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    lengths = [len(range(count)[part]) for part in parts]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1


def test_a_batch_of_one_image_per_process_is_enough():
    config = Config.from_arguments(on_ranks.arguments("--shard", "ddp", "--batch-size", "2"), 2)
    assert runner.plan(config, data.load_digits(), processes.Processes(1, 2)).processes.size == 2
