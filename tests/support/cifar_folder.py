"""A small folder of random images in the form of cifar-10-batches-py, for the tests of training."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def batch(count: int, seed: int = 0) -> dict[bytes, Any]:
    """The content of a batch file: ``count`` rows of 3072 bytes and as many labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": images, b"labels": rng.integers(0, 10, count).tolist(), b"batch_label": b"a batch"}


def write_folder(parent: Path) -> Path:
    """Writes six batches of 20 images, batch k with seed k, and returns ``parent/cifar-10-batches-py``."""
    folder = parent / "cifar-10-batches-py"
    folder.mkdir()
    for k, name in enumerate(NAMES):
        (folder / name).write_bytes(pickle.dumps(batch(20, k), protocol=2))
    return folder
