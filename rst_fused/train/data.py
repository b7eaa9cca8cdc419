"""Training data: the UCI digits of scikit-learn and CIFAR-10 in its ``cifar-10-batches-py`` form.

Images stay uint8 until a batch is drawn; cropping, flipping and normalising are done on the batch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS_TRAIN = 1000
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_FILES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
CIFAR_PIXELS = 3 * 32 * 32
CROP_PADDING = 4
CLASSES = 10


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, C, H, W), labels int64 (N,); ``mean`` and ``std`` float32 (C,) in units of a pixel."""

    name: str
    augmented: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` per channel, float32."""
        return (images.float() - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def to(self, device: torch.device) -> Dataset:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _dataset(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], subset: int | None, augmented: bool
) -> Dataset:
    images, labels = train
    if subset is not None and not 1 <= subset <= len(labels):
        raise ValueError(f"--subset must lie in 1..{len(labels)} for {name}, got {subset}")
    images, labels = images[:subset], labels[:subset]
    pixels = images.float()
    return Dataset(
        name=name,
        augmented=augmented,
        train_images=images.contiguous(),
        train_labels=labels.contiguous(),
        test_images=test[0],
        test_labels=test[1],
        mean=pixels.mean((0, 2, 3)),
        std=pixels.std((0, 2, 3)),
    )


def load_digits(subset: int | None = None) -> Dataset:
    """The UCI digits that ship with scikit-learn: 1797 images of 8x8, 1000 of them for training.

    The images come sorted by writer, so they are shuffled (always in the same way) before the split.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order].astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    train = images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]
    test = images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]
    return _dataset("digits", train, test, subset, augmented=False)


# A pickle may name any callable and call it, so only these two, which build arrays, are admitted.
# They are taken from numpy's own answer because their home differs between numpy 1 and 2.
_ARRAY = np.empty(0)
_RECONSTRUCT, _FROMBUFFER = _ARRAY.__reduce_ex__(2)[0], _ARRAY.__reduce_ex__(5)[0]


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into pickles of protocol 2 and below.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
    ("_codecs", "encode"): _latin1,
}


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"the name {module}.{name} is not admitted")
        return _ADMITTED[module, name]


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One batch file: ``(images uint8 (N, 3, 32, 32), labels int64 (N,))``.

    Raises ValueError for a file that is no CIFAR-10 batch, among them any pickle that names something
    other than numpy arrays and plain Python values: such a pickle could run code, so it is not opened.
    """
    try:
        with path.open("rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError(f"holds {type(batch).__name__}, expected a dict")
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != CIFAR_PIXELS:
            raise ValueError(f"data is {images.dtype} {images.shape}, expected uint8 (N, {CIFAR_PIXELS})")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected {len(images)} integers")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"labels span {labels.min()}..{labels.max()}, expected 0..9")
    # A damaged pickle can raise almost anything, so every Exception becomes one that names the file.
    except Exception as error:
        raise ValueError(f"{path} is not a CIFAR-10 batch: {error!r}") from error
    return (
        torch.from_numpy(images.copy()).view(-1, 3, 32, 32),
        torch.from_numpy(labels.astype(np.int64)),
    )


def load_cifar10(folder: Path, subset: int | None = None) -> Dataset:
    """CIFAR-10 from ``folder``, which is or holds ``cifar-10-batches-py`` (six pickled batches)."""
    inner = folder / CIFAR_FOLDER
    root = inner if inner.is_dir() else folder
    missing = [name for name in CIFAR_FILES if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"--data {folder}: no {', '.join(missing)} in {root}; give the folder that "
            f"cifar-10-python.tar.gz unpacks to ({CIFAR_FOLDER}) or the one that holds it"
        )
    *parts, test = (read_cifar_batch(root / name) for name in CIFAR_FILES)
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return _dataset("cifar10", (images, labels), test, subset, augmented=True)


def randomise_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """A copy of ``labels`` in which ``round(fraction * N)`` are drawn again, uniformly over all classes.

    A new label may equal the old one, so about ``fraction * (1 - 1 / classes)`` of them end up wrong.
    The same arguments always give the same labels.
    """
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    drawn = torch.randint(classes, (count,), generator=generator).to(labels.device)
    noisy = labels.clone()
    noisy[chosen] = drawn
    return noisy


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual CIFAR augmentation of a batch (N, C, H, W): zero-pad by 4, crop at random, mirror half.

    The draws come from the CPU ``generator`` wherever the images are, so that devices see the same batches.
    """
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator).to(device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    padded = F.pad(images, [CROP_PADDING] * 4)
    picture = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


def batches(
    data: Dataset, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches ``(normalised images, labels)``; a last, smaller batch is left out."""
    order = torch.randperm(len(labels), generator=generator)
    for start in range(0, len(labels) - batch_size + 1, batch_size):
        index = order[start : start + batch_size].to(labels.device)
        images = data.train_images[index]
        if data.augmented:
            images = crop_and_flip(images, generator)
        yield data.normalise(images), labels[index]
