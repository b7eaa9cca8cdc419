"""Stochastic rounding once more: its random bits, and what they make of a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# (significant bits, exponent of the smallest subnormal number, bits of float32 that are cut off)
FORMATS = {torch.bfloat16: (8, -133, 16), torch.float16: (11, -24, 13)}


def values(dtype: torch.dtype, n: int = 20_000, seed: int = 0) -> Tensor:
    """float32 numbers over all exponents of the format, subnormal ones too, and a little beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-135, 127) if dtype == torch.bfloat16 else (-30, 15.9)
    exponents = torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return (signs * 2.0**exponents).float()


def random_bits(seed: int, step: int, tensor: int, elements: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer over (seed, step, tensor, element), written once more in wrapping uint32."""

    def mixed(x: Any) -> Any:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    elements = elements.astype(np.uint64)
    key = np.zeros_like(elements)
    for word in (seed, step, tensor, elements >> 32):
        for part in (word & 0xFFFFFFFF, word >> 32):
            key = (mixed(key ^ part) + 0x9E3779B9) & 0xFFFFFFFF
    pairs = (elements & 0xFFFFFFFF) // 2
    both = mixed((pairs * 0x9E3779B9 & 0xFFFFFFFF) ^ key)
    return np.where(elements % 2 == 1, both >> np.uint64(16), both & np.uint64(0xFFFF))


def normal_values(dtype: torch.dtype) -> Tensor:
    x = values(dtype, 5000)
    return x[(x.abs() >= torch.finfo(dtype).smallest_normal) & (x.abs() <= torch.finfo(dtype).max)]


def rounded_with(random: np.ndarray, x: Tensor, dtype: torch.dtype) -> Tensor:
    cut = FORMATS[dtype][2]
    pattern = x.numpy().view(np.uint32).astype(np.uint64)
    added = pattern + (random & np.uint64(2**cut - 1))
    return torch.from_numpy((added >> np.uint64(cut) << np.uint64(cut)).astype(np.uint32).view(np.float32)).to(dtype)
