"""The training command: models, sharpness against exact values, and whole runs of a few epochs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rst_fused import cli
from rst_fused.train import models, sharpness

pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from cifar_folder import write_folder  # noqa: E402

from rst_fused.train import config as train_config  # noqa: E402
from rst_fused.train import data, report, runner  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small, and waiting for a second thread on a busy machine costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_models_give_a_logit_per_class(name, channels, size):
    model = models.build_model(name, channels, 10, size, seed=0)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 10)


def test_resnet18_is_the_usual_one():
    parameters = list(models.build_model("resnet18", 3, 10, 32, seed=0).parameters())
    assert len(parameters) == 62
    assert sum(p.numel() for p in parameters) == 11_173_962


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    weights = [
        torch.cat([p.flatten() for p in models.build_model("resnet8", 3, 10, 32, seed).parameters()])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


# --- sharpness -------------------------------------------------------------------------------------------


def small_problem(seed, batchnorm=True):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = nn.BatchNorm1d(4) if batchnorm else nn.Identity()
        model = nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 3)).double()
    images = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (30,), generator=generator)
    return model, [(images[:20], labels[:20]), (images[20:], labels[20:])]


def loss_at(model, batches, vector):
    """L as a function of the flat parameters, written without the code under test."""
    names = [name for name, _ in model.named_parameters()]
    parts = vector.split([p.numel() for p in model.parameters()])
    values = {n: v.view_as(p) for n, v, p in zip(names, parts, model.parameters(), strict=True)}
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    output = torch.func.functional_call(model, values, (images,))
    return nn.functional.cross_entropy(output, labels)


@pytest.mark.parametrize("seed", range(3))
def test_top_eigenvalue_matches_the_exact_hessian(seed):
    model, batches = small_problem(seed)
    model.eval()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(lambda v: loss_at(model, batches, v), flat)
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    model.train()
    found = sharpness.top_eigenvalue(model, batches, iterations=300, tolerance=1e-9)
    assert found == pytest.approx(exact, rel=1e-4)
    # The default is a bound from below: twenty iterations, equal for equal seeds.
    quick = sharpness.top_eigenvalue(model, batches)
    assert 0.7 * exact < quick <= exact * (1 + 1e-9)
    assert quick == sharpness.top_eigenvalue(model, batches)
    assert all(module.training for module in model.modules())


class Product(nn.Module):
    """Logits (a b - k c^2, 0), for which label 1 gives L = log(1 + exp(a b - k c^2)), a saddle at 0."""

    def __init__(self, k):
        super().__init__()
        self.k = k
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3))

    def forward(self, images):
        logit = self.a * self.b - self.k * self.c**2
        return torch.stack([logit.expand(len(images)), torch.zeros(len(images), dtype=torch.float64)], 1)


def test_the_largest_eigenvalue_is_found_behind_a_more_negative_one():
    # L has the slope 1/2 in the logit, so the Hessian has the eigenvalues 1/2 and -1/2 (a, b) and -k (c).
    batches = [(torch.zeros(2, 1), torch.ones(2, dtype=torch.long))]
    found = sharpness.top_eigenvalue(Product(3.0), batches, iterations=300, tolerance=1e-12)
    assert found == pytest.approx(0.5, rel=1e-6)


def test_loss_rise_is_the_loss_at_the_perturbed_weights():
    model, batches = small_problem(0)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    found = sharpness.loss_rise(model, batches, rho=0.3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training

    model.eval()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    loss = loss_at(model, batches, flat)
    (gradient,) = torch.autograd.grad(loss, flat)
    moved = loss_at(model, batches, flat + 0.3 * gradient / gradient.norm())
    assert found == pytest.approx((moved - loss).item(), rel=1e-9)
    assert sharpness.loss_rise(model, batches, rho=0.0) == pytest.approx(0.0, abs=1e-12)


# --- the command -----------------------------------------------------------------------------------------

QUICK = ["--subset", "60", "--batch-size", "30", "--epochs", "2", "--threads", "1"]


def train(*options):
    return cli.main(["train", *map(str, options)])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def without_times(runs):
    return [{k: v for k, v in run.items() if k != "seconds_per_step"} for run in runs]


def test_a_whole_comparison(tmp_path, capfd):
    threads = torch.get_num_threads()
    assert train(*QUICK, "--seeds", 2, "--output", tmp_path / "a" / "b") == 0
    assert torch.get_num_threads() == threads
    out, err = capfd.readouterr()
    for word in ("SGD", "SAM", "RST(0.5)", "G-RST(0.5, match)", "pairs/step", "top eig.", "30%"):
        assert word in out
    assert "it/s" not in err and len(err.splitlines()) == 16  # no terminal: a line per run
    picture = (tmp_path / "a" / "b" / "accuracy.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000

    found = results(tmp_path / "a" / "b")
    assert set(found) == {"config", "versions", "schedule", "runs", "table"}
    assert set(found["versions"]) == {"rst_fused", "torch", "numpy", "python"}
    assert found["schedule"]["steps"] == 4 and found["schedule"]["mean_cost"] == 1.5
    assert len(found["runs"]) == 16 and len(found["table"]) == 8
    for run in found["runs"]:
        assert 0 <= run["test_accuracy"] <= 100 and len(run["train_losses"]) == 2
        assert run["loss_rise"] > 0 and run["top_eigenvalue"] > 0 and run["seconds_per_step"] > 0
    rows = {(row["label_noise"], row["method"]): row for row in found["table"]}
    assert rows[0.0, "base"]["cost"] == 1 and rows[0.3, "sam"]["cost"] == 2
    assert rows[0.0, "base"]["relative_time"] == 1
    two = [r["test_accuracy"] for r in found["runs"] if (r["label_noise"], r["method"]) == (0.3, "rst")]
    assert rows[0.3, "rst"]["accuracy"] == pytest.approx(sum(two) / 2)
    assert rows[0.3, "rst"]["accuracy_std"] == pytest.approx(abs(two[0] - two[1]) / 2**0.5)


def test_repeating_a_run_repeats_every_number(tmp_path):
    options = [*QUICK, "--seeds", 1, "--label-noise", 0.3]
    assert train(*options, "--output", tmp_path / "1") == 0
    torch.rand(3)  # the global generator has no say
    assert train(*options, "--output", tmp_path / "2") == 0
    first, second = results(tmp_path / "1"), results(tmp_path / "2")
    assert without_times(first["runs"]) == without_times(second["runs"])
    # A method on its own does what it does beside others.
    assert train(*options, "--methods", "rst", "--output", tmp_path / "3") == 0
    alone = without_times(results(tmp_path / "3")["runs"])
    assert alone == [run for run in without_times(first["runs"]) if run["method"] == "rst"]
    assert results(tmp_path / "3")["table"][0]["relative_time"] is None


def test_p_0_is_the_base_and_p_1_is_sam(tmp_path):
    options = [*QUICK, "--seeds", 1, "--label-noise", 0]
    seen: dict[int, dict[str, list[float]]] = {}
    for p in (0, 1):
        assert train(*options, "--p", p, "--output", tmp_path / str(p)) == 0
        seen[p] = {run["method"]: run["train_losses"] for run in results(tmp_path / str(p))["runs"]}
    assert seen[0]["rst"] == pytest.approx(seen[0]["base"], rel=1e-5)
    assert seen[1]["rst"] == seen[1]["sam"] == seen[1]["g-rst"]
    assert seen[1]["sam"] != seen[1]["base"]


def test_cifar_with_augmentation_adamw_and_a_schedule(tmp_path, capsys):
    cifar = write_folder(tmp_path)
    assert train(
        "--data", cifar.parent, "--model", "cnn", "--batch-size", 10, "--epochs", 2, "--subset", 30,
        "--base", "adamw", "--schedule", "linear", "--p", 0.3, "--warmup", 1, "--gamma", 1.5,
        "--label-noise", 0.2, "--methods", "base", "rst", "g-rst", "--output", tmp_path,
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "AdamW" in out and "  RST(linear p=0.3 warmup=1)" in out
    assert "G-RST(linear p=0.3 warmup=1, 1.5)" in out
    found = results(tmp_path)
    assert found["config"]["momentum"] is None and found["config"]["data"] == str(cifar.parent)
    assert found["schedule"]["steps"] == 6
    assert len(found["runs"]) == 3 and all(run["test_accuracy"] is not None for run in found["runs"])


def test_amp_runs_the_forward_passes_in_bfloat16(tmp_path):
    options = [*QUICK, "--seeds", 1, "--label-noise", 0, "--methods", "g-rst"]
    losses = []
    for name, extra in (("plain", []), ("amp", ["--amp"])):
        assert train(*options, *extra, "--output", tmp_path / name) == 0
        losses.append(results(tmp_path / name)["runs"][0]["train_losses"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_diverged_run_is_a_line_of_the_table(tmp_path, capsys):
    assert train(*QUICK, "--seeds", 1, "--lr", 1e30, "--methods", "base", "sam", "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 diverged" in out and err.count(": diverged") == 4
    found = results(tmp_path)
    assert all(run["diverged"] and run["test_accuracy"] is None for run in found["runs"])
    assert all(row["accuracy"] is None and row["diverged"] == 1 for row in found["table"])
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_a_row_averages_the_runs_that_did_not_diverge():
    from argparse import ArgumentParser

    from rst_fused.train import add_arguments

    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--seeds", "3", "--label-noise", "0", "--methods", "sam"])
    plan = runner.plan(train_config.Config.from_arguments(args), data.load_digits())
    good = runner.Run(0.0, "sam", 0, False, 2.0, 1.0, [0.5], 90.0, 0.1, 3.0)
    other = runner.Run(0.0, "sam", 1, False, 2.0, 1.0, [0.5], 94.0, 0.3, 5.0)
    bad = runner.Run(0.0, "sam", 2, True, 2.0, 1.0, [None], None, None, None)
    (row,) = report.summarise(plan, [good, other, bad])
    assert (row.runs, row.diverged, row.accuracy, row.loss_rise, row.top_eigenvalue) == (3, 1, 92.0, 0.2, 4.0)
    assert row.accuracy_std == pytest.approx(8**0.5)
    assert "92.0 ± 2.8" in report.table(plan, [row]) and "1 of 3 diverged" in report.table(plan, [row])


def test_the_output_folder_follows_from_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lr in (0.02, 0.02, 0.03):
        assert train(*QUICK, "--seeds", 1, "--label-noise", 0, "--methods", "base", "--lr", lr) == 0
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert len(folders) == 2 and all(name.startswith("digits-cnn-sgd-") for name in folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere"], "--data /nowhere: no data_batch_1"),
        (["--subset", "5000"], "--subset must lie in 1..1000"),
        (["--subset", "20"], "--batch-size 100 is more than the 20 training images"),
        (["--base", "adamw", "--momentum", "0.9"], "only sgd has a momentum"),
        (["--schedule", "linear"], "linear needs --p"),
        (["--schedule", "cosine", "--p", "0.3"], "cosine takes no --p"),
        (["--device", "meta"], "--device meta: expected cpu or cuda"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--output", "/dev/null/x"], "/dev/null"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(options, message, capsys):
    assert train(*options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rst-fused train: ") and message in err and out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "expected an integer >= 1"),
        (["--rho", "-1"], "expected a finite number >= 0"),
        (["--lr", "nan"], "expected a finite number >= 0"),
        (["--p", "1.5"], "expected a number from 0 to 1"),
        (["--label-noise", "2"], "expected a number from 0 to 1"),
        (["--gamma", "some"], "--gamma: some: expected a number >= 0, or match"),
        (["--seeds", "3.5"], "--seeds: 3.5: expected an integer >= 1"),
        (["--rho", "small"], "--rho: small: expected a finite number >= 0"),
        (["--schedule", "zigzag"], "--schedule"),
        (["--methods", "adam"], "--methods"),
    ],
)
def test_values_out_of_range_are_refused_by_the_parser(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named_with_the_command_that_brings_it(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert train(*QUICK) == 1
    err = capsys.readouterr().err
    assert repr(package) in err and "pip install 'rst_fused[train]'" in err
