"""The training command: data, models, sharpness against exact values, and whole runs of a few epochs."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rst_fused import cli
from rst_fused.train import models, sharpness

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from rst_fused.train import config as train_config  # noqa: E402
from rst_fused.train import data, report, runner  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small, and waiting for a second thread on a busy machine costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- data ------------------------------------------------------------------------------------------------


def test_digits_are_split_into_1000_and_797():
    digits = data.load_digits()
    assert digits.train_images.shape == (1000, 1, 8, 8) and digits.train_images.dtype == torch.uint8
    assert digits.test_images.shape == (797, 1, 8, 8)
    assert digits.train_labels.shape == (1000,) and digits.test_labels.shape == (797,)
    counts = torch.bincount(torch.cat([digits.train_labels, digits.test_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Every digit is on both sides.
    assert torch.bincount(digits.train_labels, minlength=10).min() > 80


def test_digits_are_the_same_every_time_and_normalised():
    first, second = data.load_digits(), data.load_digits()
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
    normal = first.normalise(first.train_images)
    assert normal.dtype == torch.float32
    assert abs(float(normal.mean())) < 1e-5 and abs(float(normal.std()) - 1) < 1e-3


def test_subset_takes_the_first_images():
    assert torch.equal(data.load_digits(50).train_images, data.load_digits().train_images[:50])
    with pytest.raises(ValueError, match=r"--subset must lie in 1\.\.1000 for digits, got 1001"):
        data.load_digits(1001)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_label_noise_draws_its_share_anew(fraction):
    labels = torch.randint(10, (20000,), generator=torch.Generator().manual_seed(1))
    before = labels.clone()
    noisy = data.randomise_labels(labels, fraction, 10, seed=0)
    assert torch.equal(labels, before)
    changed = float((noisy != labels).float().mean())
    assert changed == 0 if fraction == 0 else abs(changed - 0.9 * fraction) < 0.01
    assert int(noisy.min()) >= 0 and int(noisy.max()) <= 9
    assert torch.equal(noisy, data.randomise_labels(labels, fraction, 10, seed=0))
    assert fraction == 0 or not torch.equal(noisy, data.randomise_labels(labels, fraction, 10, seed=1))


def batch(count, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": images, b"labels": rng.integers(0, 10, count).tolist(), b"batch_label": b"a batch"}


@pytest.fixture
def cifar(tmp_path):
    """A folder in the standard form, with 20 images a batch."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k, name in enumerate([*data.CIFAR_TRAIN_FILES, data.CIFAR_TEST_FILE]):
        (folder / name).write_bytes(pickle.dumps(batch(20, k), protocol=2))
    return folder


def test_cifar_loads_from_the_folder_or_its_parent(cifar):
    inside, above = data.load_cifar10(cifar), data.load_cifar10(cifar.parent)
    assert inside.train_images.shape == (100, 3, 32, 32) and inside.test_images.shape == (20, 3, 32, 32)
    assert torch.equal(inside.train_images, above.train_images)
    second = batch(20, 1)
    assert torch.equal(inside.train_images[20:40].flatten(1), torch.from_numpy(second[b"data"]))
    assert inside.train_labels[20:40].tolist() == second[b"labels"]
    # Channels are planes: the first 1024 values of a row are the red ones.
    assert torch.equal(inside.train_images[20, 0].flatten(), torch.from_numpy(second[b"data"][0, :1024]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_batches_of_every_pickle_protocol_load(tmp_path, protocol):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch(3), protocol=protocol))
    images, labels = data.read_cifar_batch(path)
    assert torch.equal(images.flatten(1), torch.from_numpy(batch(3)[b"data"]))
    assert labels.tolist() == batch(3)[b"labels"]


def test_cifar_batches_of_python_2_and_old_numpy_load(tmp_path):
    # As in the published archive: strings of bytes, and the module names of numpy before 2.0.
    text = pickle.dumps(batch(3), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = tmp_path / "data_batch_1"
    path.write_bytes(text)
    assert data.read_cifar_batch(path)[0].shape == (3, 3, 32, 32)


class Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["whole", "value", "key"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol, place):
    bait = tmp_path / "bait"
    attack = Malicious(os.mkdir, str(bait))
    content = {"whole": attack, "value": {**batch(2), b"x": attack}, "key": {**batch(2), attack: 1}}[place]
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_1 is not a CIFAR-10 batch.*mkdir is not admitted"):
        data.read_cifar_batch(path)
    assert not bait.exists()
    with path.open("rb") as file:  # the attack is a real one
        pickle.load(file)
    assert bait.exists()


@pytest.mark.parametrize("call", [eval, getattr, __import__, np.load, np.fromfile])
def test_builtins_and_the_rest_of_numpy_are_refused_too(tmp_path, call):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**batch(2), b"x": Malicious(call, "1")}))
    with pytest.raises(ValueError, match="is not admitted"):
        data.read_cifar_batch(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list, expected a dict"),
        ({b"labels": [1]}, "data"),
        ({**batch(2), b"data": np.zeros((2, 100), np.uint8)}, r"data is uint8 \(2, 100\), expected"),
        ({**batch(2), b"data": np.zeros((2, 3072))}, "data is float64"),
        ({**batch(2), b"labels": [1]}, r"labels are int64 \(1,\), expected 2"),
        ({**batch(2), b"labels": [1, 10]}, r"labels span 1\.\.10"),
        ({**batch(2), b"labels": [0.5, 1.0]}, "labels are float64"),
    ],
)
def test_a_batch_of_another_form_is_named(tmp_path, content, message):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"data_batch_1 is not a CIFAR-10 batch.*{message}"):
        data.read_cifar_batch(path)


def test_a_damaged_or_missing_batch_is_named(cifar):
    whole = (cifar / "data_batch_3").read_bytes()
    (cifar / "data_batch_3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="data_batch_3 is not a CIFAR-10 batch"):
        data.load_cifar10(cifar)
    (cifar / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="no data_batch_3 in .*cifar-10-python.tar.gz"):
        data.load_cifar10(cifar)


def test_crop_and_flip_moves_whole_images():
    height = width = 8
    image = torch.arange(1, 2 * height * width + 1, dtype=torch.uint8).view(2, height, width)
    out = data.crop_and_flip(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    padded = nn.functional.pad(image, [4] * 4)
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + height, left : left + width]
            windows[window.numpy().tobytes()] = (top, left, False)
            windows[window.flip(2).numpy().tobytes()] = (top, left, True)
    seen = [windows[one.numpy().tobytes()] for one in out]
    assert {top for top, _, _ in seen} == set(range(9)) == {left for _, left, _ in seen}
    assert 150 < sum(flipped for *_, flipped in seen) < 250


def test_batches_cover_an_epoch_once_and_leave_out_the_rest():
    digits = data.load_digits(105)
    labels = torch.arange(105)
    seen = list(data.batches(digits, labels, 20, torch.Generator().manual_seed(0)))
    assert [len(targets) for _, targets in seen] == [20] * 5
    index = torch.cat([targets for _, targets in seen])
    assert len(set(index.tolist())) == 100
    images = torch.cat([images for images, _ in seen])
    assert torch.equal(images, digits.normalise(digits.train_images[index]))


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


def test_cifar_with_augmentation_adamw_and_a_schedule(cifar, tmp_path, capsys):
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
        (["--gamma", "some"], "--gamma"),
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
