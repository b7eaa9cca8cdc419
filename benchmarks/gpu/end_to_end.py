"""The stage ``end_to_end``: whole training steps of RST(p), against what its forward and backward passes cost."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rst_fused import RST

from ..peers import torch_base
from ..runner import quiet
from . import stage
from .device import LONGEST_HOLD, Device
from .kernels import HYPER
from .models import ResNet, VisionTransformer

# Which steps of a period of four are SAM steps, so that the share is exactly p.
PATTERNS = {0.0: (0, 0, 0, 0), 0.25: (1, 0, 0, 0), 0.5: (1, 0, 1, 0), 0.75: (1, 1, 1, 0), 1.0: (1, 1, 1, 1)}
PERIOD = 4
GOAL = 0.01  # how far a step may exceed its passes and one base step


@dataclass(frozen=True)
class Setting:
    """A model with its images, which steps are measured in. Weights are fp32; the passes run in bf16 autocast."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    image: int
    classes: int
    base: str
    rounds: int
    channels_last: bool = False


def full_size() -> list[Setting]:
    """The natural pairs of model and optimizer first."""
    vit, resnet = ("ViT-B/16", VisionTransformer, 64, 224, 1000), ("ResNet-50", ResNet, 128, 224, 1000)
    return [
        Setting(*resnet, "sgd", 8, channels_last=True),
        Setting(*vit, "adamw", 6),
        Setting(*resnet, "adamw", 8, channels_last=True),
        Setting(*vit, "sgd", 6),
    ]


def rehearsal_size() -> list[Setting]:
    def vit() -> nn.Module:
        return VisionTransformer(32, 16, 16, 1, 2, 10)

    def resnet() -> nn.Module:
        return ResNet(4, (1, 1, 1, 1), 10)

    return [
        Setting("ResNet-50, shrunk", resnet, 2, 32, 10, "sgd", 2, channels_last=True),
        Setting("ViT-B/16, shrunk", vit, 2, 32, 10, "adamw", 2),
    ]


class Training:
    """One model and its batch. All optimizers train the same weights, which keeps their memory and caches alike."""

    def __init__(self, setting: Setting, device: Device) -> None:
        torch.manual_seed(0)
        self.device = device
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.model = setting.build().to(device.name, memory_format=layout)  # type: ignore[call-overload]
        shape = (setting.batch, 3, setting.image, setting.image)
        self.images = torch.randn(shape, device=device.name).to(memory_format=layout)
        self.targets = torch.randint(0, setting.classes, (setting.batch,), device=device.name)
        self.params = list(self.model.parameters())

    def passes(self) -> None:
        """One forward and backward."""
        with torch.autocast(self.device.name, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()

    def clear_grads(self) -> None:
        for p in self.params:
            p.grad = None

    def plain(self) -> None:
        """A forward and backward without any optimizer."""
        self.clear_grads()
        self.passes()

    def torch_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.plain()
        optimizer.step()

    def rst_step(self, optimizer: RST, pattern: Sequence[int], t: int) -> None:
        self.plain()
        if optimizer.perturb(fire=bool(pattern[t % PERIOD])):
            with optimizer.second_pass(self.model):
                self.passes()
        optimizer.step()


def entries(training: Training, setting: Setting, backend: str) -> dict[str, Callable[[int], None]]:
    """What is timed: name -> the t-th step of it."""
    theirs = torch_base(setting.base, training.params, HYPER)
    found: dict[str, Callable[[int], None]] = {
        "passes": lambda t: training.plain(),
        "base": lambda t: theirs.step(),  # with the gradients that are there
        "torch": lambda t: training.torch_step(theirs),
    }
    for p, pattern in PATTERNS.items():
        ours = RST(training.params, setting.base, rho=HYPER.rho, schedule=p, backend=backend, **HYPER.of(setting.base))
        found[f"RST({p:g})"] = partial(training.rst_step, ours, pattern)
    return found


def seconds_per_step(device: Device, step: Callable[[int], None], periods: int = 1, hold: float = 0.0) -> float:
    """Mean over whole periods, back to back, behind a device that is held busy for ``hold`` seconds."""
    device.synchronize()
    device.hold(hold)
    start = device.mark()
    for t in range(periods * PERIOD):
        step(t)
    end = device.mark()
    device.synchronize()
    return device.elapsed(start, end) / (periods * PERIOD)


def summary(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of every entry its median, and for RST(p) what it takes over (1 + p) passes and one base step, per round."""
    found = []
    for name, rounds in times.items():
        result: dict[str, Any] = {"who": name, "median_s": statistics.median(rounds), "best_s": min(rounds)}
        share = next((p for p in PATTERNS if name == f"RST({p:g})"), 0.0 if name == "torch" else None)
        if share is not None:
            expected = [(1 + share) * f + b for f, b in zip(times["passes"], times["base"], strict=True)]
            overhead = statistics.median(t / e - 1 for t, e in zip(rounds, expected, strict=True))
            result |= {"p": share, "expected_s": statistics.median(expected), "overhead": overhead}
        found.append({**result, "rounds_s": rounds})
    return found


def measure(part: stage.Part, setting: Setting, backend: str) -> None:
    device = part.device
    training = Training(setting, device)
    timed = entries(training, setting, backend)
    times: dict[str, list[float]] = {name: [] for name in timed}
    with quiet():
        for step in timed.values():
            for t in range(2):  # a SAM step and a base step, where there are both
                step(t)
        for turn in range(setting.rounds):
            # Every other round backwards, so that a drift of the clocks favours nobody.
            for name, step in list(timed.items())[:: -1 if turn % 2 else 1]:
                # Within a training step the host is ahead of the device, so a base step costs its device time alone.
                periods, hold = (10, LONGEST_HOLD) if name == "base" else (1, 0.0)
                times[name].append(seconds_per_step(device, step, periods, hold))
    part.add("trainings", {
        "model": setting.name, "base": setting.base, "backend": backend, "batch": setting.batch,
        "parameters": sum(p.numel() for p in training.params), "results": summary(times),
    })  # fmt: skip
    if not all(bool(p.isfinite().all()) for p in training.params):
        part.error(f"{setting.name}, {setting.base}: weights are not finite after training")


def measure_first(part: stage.Part, setting: Setting) -> None:
    """With the most important backend; with the next one only where that fails."""
    for backend in part.backends or ("reference",):
        if part.attempt(f"{setting.name}, {setting.base}, {backend}", partial(measure, part, setting, backend)):
            return


def main() -> int:
    parser = stage.parser(__doc__)
    parser.add_argument("--more", action="store_true", help="instead: all but the first pair of model and optimizer")
    args = parser.parse_args()
    part = stage.start(args)
    if not part.backends:
        part.note("no backend for this device is available: training steps ran on the reference backend")
    torch.backends.cudnn.benchmark = True
    settings = rehearsal_size() if args.device == "cpu" else full_size()
    for setting in settings[1:] if args.more else settings[:1]:
        measure_first(part, setting)
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
