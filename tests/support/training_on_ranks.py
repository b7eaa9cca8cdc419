"""What the tests of ``rst-fused train --shard`` run on ranks."""

from __future__ import annotations

import contextlib
import io
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rst_fused.train
from rst_fused.train import data, runner
from rst_fused.train.batch_norm import share_statistics
from rst_fused.train.config import Config
from rst_fused.train.processes import Processes


def arguments(*options: str) -> Namespace:
    parser = ArgumentParser()
    rst_fused.train.add_arguments(parser)
    return parser.parse_args(options)


def processes() -> Processes:
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, the command trains in float64, in which a difference of two runs is not one of rounding."""
    with pytest.MonkeyPatch.context() as patch:
        model, normalise = runner._model, data.Dataset.normalise
        patch.setattr(runner, "_model", lambda *args: model(*args).double())
        patch.setattr(data.Dataset, "normalise", lambda *args: normalise(*args).double())
        yield


def trained(*options: str, double: bool = False) -> dict[str, tuple[dict[str, Tensor], list[Any]]]:
    """What each method ends with: all weights and buffers, by name, and the losses."""
    if double:
        with in_float64():
            return trained(*options)
    config = Config.from_arguments(arguments(*options), processes().size)
    loaded = data.load_digits(config.subset) if config.data is None else data.load_cifar10(Path(config.data))
    plan = runner.plan(config, loaded, processes())
    found = {}
    for method in config.methods:
        result = runner.train_one(plan, plan.data.train_labels, 0, method, lambda _: None)
        found[method] = (result.model.state_dict(), result.losses)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compared(*options: str) -> tuple[list[runner.Run], str]:
    """All runs, and what is shown on a terminal meanwhile."""
    config = Config.from_arguments(arguments(*options), processes().size)
    with contextlib.redirect_stderr(Terminal()) as stderr:
        runs = runner.run_all(runner.plan(config, data.load_digits(config.subset), processes()))
    return runs, stderr.getvalue()


def planned(options: dict[int, list[str]]) -> tuple[bool, str]:
    """Whether the options of this rank are taken, and what it writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        plan = rst_fused.train._plan(arguments(*options[dist.get_rank()]), processes())
    return plan is not None, stderr.getvalue()


def normalised(images: Tensor, targets: Tensor, tracking: bool) -> list[Tensor]:
    """On this rank's images: the output, the gradients of images, weight and bias, and what is tracked.

    Alone, all of it is that of BatchNorm2d.
    """
    model = nn.Sequential(nn.BatchNorm2d(images.shape[1]))
    norm: Any = model[0]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, norm.num_features))
    if dist.is_initialized():
        share_statistics(model)
        norm = model[0]
    norm.track_running_stats = tracking
    part = processes().part(len(images))
    mine = images[part].clone().requires_grad_()
    output = model(mine)
    (output.float() * targets[part]).sum().backward()
    tracked = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [output.detach(), mine.grad, norm.weight.grad, norm.bias.grad, *tracked]
