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
from rst_fused.train.processes import Processes
from rst_fused.train.sharpness import eval_mode, loss_rise, mean_loss, top_eigenvalue

# Enough images for a stable estimate, few enough at a time for the second derivatives of ResNet-18 to fit.
SHARPNESS_IMAGES, SHARPNESS_BATCH = 200, 100
TEST_BATCH = 500


@dataclass(frozen=True)
class Plan:
    """What is to be run: options, data on its device, steps per run, the schedule of RST and G-RST, and who runs it."""

    config: Config
    data: Dataset
    steps: int
    schedule: Schedule
    processes: Processes = Processes()

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


@dataclass(frozen=True)
class Trained:
    """What training leaves: the whole model on its device, mean loss of each epoch, and Run's cost and times."""

    model: nn.Module
    losses: list[float | None]
    cost: float
    seconds_per_step: float


def plan(config: Config, data: Dataset, processes: Processes | None = None) -> Plan:
    """Checks the options against the data. ValueError for a batch size or a schedule that does not fit."""
    processes = processes or Processes()
    images = len(data.train_labels)
    if config.batch_size < processes.size:
        raise ValueError(
            f"--batch-size {config.batch_size} is less than the {processes.size} processes that share a batch: give at "
            f"least {processes.size}, or start fewer with --nproc-per-node"
        )
    if config.batch_size > images:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {images} training images")
    steps = config.epochs * (images // config.batch_size)
    return Plan(config, data.to(torch.device(config.device)), steps, config.build_schedule(steps), processes)


def run_all(plan: Plan) -> list[Run]:
    """All runs, in order of label noise, seed, method; of several processes the first one alone has them.

    Progress goes to stderr: a bar where that is a terminal, and a line for every finished run.
    """
    config = plan.config
    jobs = [(n, s, m) for n in config.label_noise for s in range(config.seeds) for m in config.methods]
    runs: list[Run] = []
    quiet = not plan.processes.first or not sys.stderr.isatty()
    with ExitStack() as stack:
        if config.threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(config.threads)
        bar = stack.enter_context(tqdm(total=len(jobs) * config.epochs, unit="epoch", disable=quiet))
        for noise, seed, method in jobs:
            name = f"label noise {noise:g}, seed {seed}, {config.label(method)}"
            bar.set_description(name)
            run = run_one(plan, noise, seed, method, bar.update)
            if run is None:
                continue
            runs.append(run)
            accuracy = runs[-1].test_accuracy
            outcome = "diverged" if accuracy is None else f"{accuracy:.2f}%"
            bar.write(f"[{len(runs)}/{len(jobs)}] {name}: {outcome}", file=sys.stderr)
    return runs


def run_one(plan: Plan, noise: float, seed: int, method: str, progress: Callable[[int], object]) -> Run | None:
    """One run; a diverged one ends early. ``progress`` is called with numbers that add up to the epochs.

    Of several processes the first one looks at the whole model; the others have None, and may go on to the next run.
    """
    config, data = plan.config, plan.data
    labels = randomise_labels(data.train_labels, noise, CLASSES, seed)
    trained = train_one(plan, labels, seed, method, progress)
    if not plan.processes.first:
        return None
    model, losses = trained.model, trained.losses
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
        cost=trained.cost,
        seconds_per_step=trained.seconds_per_step,
        train_losses=losses,
        test_accuracy=None if diverged else accuracy(model, data),
        loss_rise=None if diverged else _finite(loss_rise(model, probe, config.rho)),
        top_eigenvalue=None if diverged else _finite(top_eigenvalue(model, probe)),
    )


def train_one(plan: Plan, labels: Tensor, seed: int, method: str, progress: Callable[[int], object]) -> Trained:
    """Trains on ``labels``, or until the loss is not finite. Several processes share each batch."""
    config, data, processes = plan.config, plan.data, plan.processes
    model = whole = _model(plan, seed)
    if config.shard is not None:
        # Not at the top: only here is torch.distributed needed, which some builds of torch lack.
        from rst_fused.train import shard

        model = shard.sharded(model, config.shard, processes.size, torch.device(config.device))
    optimizer = _optimizer(plan, method, model, seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    generator = torch.Generator().manual_seed(seed)

    clock = _Clock(torch.device(config.device))
    losses: list[float | None] = []
    for epoch in range(1, config.epochs + 1):
        total = torch.zeros((), dtype=torch.float64, device=config.device)
        # Every process draws the whole batch, and so the same order and the same augmentation.
        for images, targets in batches(data, labels, config.batch_size, generator):
            part = processes.part(len(targets))
            share = len(targets[part]) / len(targets)
            closure = partial(
                _backward, optimizer, model, images[part], targets[part], config.amp, share, processes.size
            )
            before, start = getattr(optimizer, "sam_steps", 0), clock.now()
            total += optimizer.step(closure)
            clock.laps[getattr(optimizer, "sam_steps", 0) > before].append(clock.now() - start)
        decay.step()
        losses.append(_finite(float(processes.add(total)) / (plan.steps // config.epochs)))
        if losses[-1] is None:
            progress(config.epochs - epoch + 1)
            break
        progress(1)
    if config.shard is not None:
        whole = _model(plan, seed)
        whole.load_state_dict(shard.whole_state(model))
    return Trained(whole, losses, getattr(optimizer, "cost", 1.0), clock.seconds_per_step())


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Percent of the test images that the model, in eval mode, puts into their class."""
    right = 0
    with eval_mode(model), torch.no_grad():
        for images, labels in zip(
            data.test_images.split(TEST_BATCH), data.test_labels.split(TEST_BATCH), strict=True
        ):
            right += int((model(data.normalise(images)).argmax(1) == labels).sum())
    return 100.0 * right / len(data.test_labels)


def _model(plan: Plan, seed: int) -> nn.Module:
    channels, size = plan.data.train_images.shape[1:3]
    return build_model(plan.config.model, channels, CLASSES, size, seed).to(plan.config.device)


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
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    amp: bool,
    share: float,
    processes: int,
) -> Any:
    """The part of the batch's loss that is of these images, a ``share`` of the batch. Leaves gradients in parameters.

    These are means over the processes, so each of these has to give its part as many times as there are processes.
    """
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(images), labels) * share
    (loss * processes).backward()
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
