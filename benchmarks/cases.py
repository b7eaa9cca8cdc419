"""What is measured: parameter lists (shapes only, random values) and the hyperparameters of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Hyper:
    """One set of hyperparameters for every competitor; the small lr keeps the repeated weights finite."""

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05

    @property
    def sgd(self) -> dict[str, Any]:
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def adamw(self) -> dict[str, Any]:
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    def of(self, base: str) -> dict[str, Any]:
        return {"sgd": self.sgd, "adamw": self.adamw}[base]


@dataclass(frozen=True)
class Case:
    """A named list of tensor shapes."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def tensors(
        self, dtype: torch.dtype, seed: int, scale: float = 1.0, device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """Normal values times ``scale``, drawn where they will lie; the same for the same seed and kind of device."""
        generator = torch.Generator(device).manual_seed(seed)
        return [(torch.randn(s, generator=generator, device=device) * scale).to(dtype) for s in self.shapes]


def _resnet18() -> Case:
    shapes: list[Shape] = [(64, 3, 3, 3), (64,), (64,)]
    width = 64
    for out, blocks in ((64, 2), (128, 2), (256, 2), (512, 2)):
        for block in range(blocks):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    shapes += [(10, 512), (10,)]
    return Case("resnet18", "ResNet-18 (CIFAR)", tuple(shapes))


def gpt2(name: str, title: str, d: int, layers: int, vocabulary: int = 50257, context: int = 1024) -> Case:
    """The parameters of a GPT-2 of any size; the output layer is the embedding."""
    layer: list[Shape] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    layer += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return Case(name, title, ((vocabulary, d), (context, d), *layer * layers, (d,), (d,)))


def many(count: int, size: int) -> Case:
    """``count`` one-dimensional tensors of ``size`` elements."""
    return Case(f"{count}x{size}", f"{count} tensors of {size}", ((size,),) * count)


CASES: dict[str, Callable[[], Case]] = {
    "resnet18": _resnet18,
    "gpt2": lambda: gpt2("gpt2", "GPT-2 small", 768, 12),
    "1000x1000": lambda: many(1000, 1000),
}
HOST_COUNTS = (3, 150, 1000)
HOST_SIZE = 64


LARGE = ("resnet18", "gpt2")  # every stream of these is larger than a usual last-level cache


@dataclass(frozen=True)
class Goal:
    """A ratio or fraction of ``against``'s time over ours that a result should reach: at least ``value``."""

    cases: tuple[str, ...]
    what: str
    against: str
    value: float


GOALS = (
    Goal(LARGE, "perturb", "probe", 0.95),
    Goal(LARGE, "update", "probe", 0.92),
    Goal(("gpt2",), "step", "usual", 2.8),
    Goal(("gpt2",), "step", "foreach", 1.5),
    Goal(("gpt2",), "step", "compile", 1.25),
    Goal(("gpt2",), "step", "pytorch_optimizer", 2.8),
    Goal(("1000x1000",), "perturb", "probe", 0.9),
    Goal(("1000x1000",), "update", "probe", 0.9),
    Goal(("1000x1000",), "step", "foreach", 12.0),
    Goal(tuple(CASES), "update", "torch base", 1.0),
)
# Of `host`, with gradients that somebody holds: another machine has other absolute times.
HOST_GOALS = (Goal(("150x64",), "step", "foreach", 25.0), Goal(("150x64",), "update", "torch base", 20.0))
