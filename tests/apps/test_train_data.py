"""Data for training: the split, label noise, CIFAR-10 files (hostile ones too) and the batches."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")

from cifar_folder import batch, write_folder  # noqa: E402

from rst_fused.train import data  # noqa: E402


@pytest.fixture
def cifar(tmp_path):
    return write_folder(tmp_path)


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
