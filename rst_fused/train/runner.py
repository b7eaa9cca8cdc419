"""Trains every method on the same data: equal initial weights, label noise and batches for equal seeds."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rst_fused import RST
from rst_fused.schedule import Schedule, constant
from rst_fused.train.config import Config
from rst_fused.train.data import CLASSES, Dataset, batches, randomise_labels
from rst_fused.train.models import build_model
from rst_fused.train.sharpness import eval_mode, loss_rise, mean_loss, top_eigenvalue

# Enough images for a stable estimate, few enough at a time for the second derivatives of ResNet-18 to fit.
SHARPNESS_IMAGES, SHARPNESS_BATCH = 200, 100
TEST_BATCH = 500


@dataclass(frozen=True)
class Plan:
    """What is to be run: options, data on its device, steps per run, and the schedule of RST and G-RST."""

    config: Config
    data: Dataset
    steps: int
    schedule: Schedule

    def schedule_of(self, method: str) -> Schedule:
        return {"base": constant(0.0), "sam": constant(1.0)}.get(method, self.schedule)


@dataclass(frozen=True)
class Run:
    """One training run. Quantities that a diverged run does not have are None.

    test_accuracy in percent after the last epoch; cost in forward-backward pairs per step; seconds_per_step:
    see _Clock; train_losses: mean loss of the steps of each epoch.
    """

    label_noise: float
    method: str
    seed: int
    diverged: bool
    cost: float
    seconds_per_step: float
    train_losses: list[float | None]
    test_accuracy: float | None
    loss_rise: float | None
    top_eigenvalue: float | None


def plan(config: Config, data: Dataset) -> Plan:
    """Checks the options against the data. ValueError for a batch size or a schedule that does not fit."""
    images = len(data.train_labels)
    if config.batch_size > images:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {images} training images")
    steps = config.epochs * (images // config.batch_size)
    return Plan(config, data.to(torch.device(config.device)), steps, config.build_schedule(steps))


def run_all(plan: Plan) -> list[Run]:
    """All runs, in order of label noise, seed, method.

    Progress goes to stderr: a bar where that is a terminal, and a line for every finished run.
    """
    config = plan.config
    jobs = [(n, s, m) for n in config.label_noise for s in range(config.seeds) for m in config.methods]
    runs: list[Run] = []
    quiet = not sys.stderr.isatty()
    with ExitStack() as stack:
        if config.threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(config.threads)
        bar = stack.enter_context(tqdm(total=len(jobs) * config.epochs, unit="epoch", disable=quiet))
        for noise, seed, method in jobs:
            name = f"label noise {noise:g}, seed {seed}, {config.label(method)}"
            bar.set_description(name)
            runs.append(run_one(plan, noise, seed, method, bar.update))
            accuracy = runs[-1].test_accuracy
            outcome = "diverged" if accuracy is None else f"{accuracy:.2f}%"
            bar.write(f"[{len(runs)}/{len(jobs)}] {name}: {outcome}", file=sys.stderr)
    return runs


def run_one(plan: Plan, noise: float, seed: int, method: str, progress: Callable[[int], object]) -> Run:
    """One run; a diverged one ends early. ``progress`` is called with numbers that add up to the epochs."""
    config, data = plan.config, plan.data
    labels = randomise_labels(data.train_labels, noise, CLASSES, seed)
    channels, size = data.train_images.shape[1:3]
    model = build_model(config.model, channels, CLASSES, size, seed).to(config.device)
    optimizer = _optimizer(plan, method, model, seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    generator = torch.Generator().manual_seed(seed)

    clock = _Clock(torch.device(config.device))
    losses: list[float | None] = []
    for epoch in range(1, config.epochs + 1):
        total = torch.zeros((), dtype=torch.float64, device=config.device)
        for images, targets in batches(data, labels, config.batch_size, generator):
            before, start = getattr(optimizer, "sam_steps", 0), clock.now()
            total += optimizer.step(partial(_backward, optimizer, model, images, targets, config.amp))
            clock.laps[getattr(optimizer, "sam_steps", 0) > before].append(clock.now() - start)
        decay.step()
        losses.append(_finite(float(total) / (plan.steps // config.epochs)))
        if losses[-1] is None:
            progress(config.epochs - epoch + 1)
            break
        progress(1)

    probe = [
        (data.normalise(data.train_images[part]), labels[part])
        for part in torch.arange(min(SHARPNESS_IMAGES, len(labels))).split(SHARPNESS_BATCH)
    ]
    diverged = losses[-1] is None or not math.isfinite(mean_loss(model, probe))
    return Run(
        label_noise=noise,
        method=method,
        seed=seed,
        diverged=diverged,
        cost=getattr(optimizer, "cost", 1.0),
        seconds_per_step=clock.seconds_per_step(),
        train_losses=losses,
        test_accuracy=None if diverged else accuracy(model, data),
        loss_rise=None if diverged else _finite(loss_rise(model, probe, config.rho)),
        top_eigenvalue=None if diverged else _finite(top_eigenvalue(model, probe)),
    )


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Percent of the test images that the model, in eval mode, puts into their class."""
    right = 0
    with eval_mode(model), torch.no_grad():
        for images, labels in zip(
            data.test_images.split(TEST_BATCH), data.test_labels.split(TEST_BATCH), strict=True
        ):
            right += int((model(data.normalise(images)).argmax(1) == labels).sum())
    return 100.0 * right / len(data.test_labels)


def _optimizer(plan: Plan, method: str, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    config = plan.config
    if method == "base":
        # The baseline is torch's own optimizer, not RST with p = 0.
        baseline = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.base]
        return baseline(model.parameters(), **config.hyper)
    return RST(
        model.parameters(),
        config.base,
        rho=config.rho,
        schedule=plan.schedule_of(method),
        gamma=config.gamma if method == "g-rst" else 1.0,
        seed=seed,
        model=model,
        **config.hyper,
    )


def _backward(
    optimizer: torch.optim.Optimizer, model: nn.Module, images: Tensor, labels: Tensor, amp: bool
) -> Any:
    """The loss, whose gradients are left in the parameters."""
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Clock:
    """Times steps, waiting for a GPU at both ends, and keeps SAM steps apart from base steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[bool, list[float]] = {False: [], True: []}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds_per_step(self) -> float:
        """Mean over all steps of the median of the step's kind: first calls and a busy machine hardly show."""
        kinds = [laps for laps in self.laps.values() if laps]
        return sum(statistics.median(laps) * len(laps) for laps in kinds) / sum(map(len, kinds))
