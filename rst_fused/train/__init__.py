"""``rst-fused train``: SGD (or AdamW), SAM, RST and G-RST on real data, with cost and sharpness side by side.

Needs the extra ``train``. Modules: config (options), data, models, runner (one training run), sharpness,
report (table, picture, JSON); processes, shard, batch_norm (several processes).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rst_fused.schedule import FAMILIES
from rst_fused.train.config import BASES, METHODS, SHARDS, Config, fraction, gamma_value, non_negative, positive_int
from rst_fused.train.models import MODELS

if TYPE_CHECKING:
    from rst_fused.train.processes import Processes
    from rst_fused.train.runner import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rst-fused train``. Those left out take the defaults that suit the data."""
    add = parser.add_argument_group("what to train").add_argument
    add("--data", type=Path, metavar="DIR",
        help="CIFAR-10: cifar-10-batches-py or what holds it (default: the UCI digits of scikit-learn)")
    add("--model", choices=sorted(MODELS), help="default: cnn for digits, resnet18 for CIFAR-10")
    add("--subset", type=positive_int, metavar="N", help="only the first N training images")
    add("--label-noise", type=fraction, nargs="+", metavar="F",
        help="shares of labels drawn at random, each a series (default: 0 0.3 for digits, 0 for CIFAR-10)")
    add("--epochs", type=positive_int, metavar="N", help="default: 60 for digits, 30 for CIFAR-10")
    add("--seeds", type=positive_int, metavar="N", help="seeds 0 .. N-1 (default: 3 for digits, else 1)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")

    add = parser.add_argument_group("optimizer (the learning rate falls to 0 along a cosine)").add_argument
    add("--base", choices=BASES, default="sgd", help="base optimizer (sgd)")
    add("--lr", type=non_negative, help="default: 0.02 for digits, 0.1 for CIFAR-10; AdamW 0.001")
    add("--momentum", type=non_negative, help="of SGD (0.9)")
    add("--weight-decay", type=non_negative, help="default: 0.01 for digits and AdamW, else 0.0005")
    add("--batch-size", type=positive_int, metavar="N", help="default: 100 for digits, else 128")
    add("--rho", type=non_negative, help="radius of the perturbation (default: 0.1 for digits, else 0.05)")
    add("--gamma", type=gamma_value, default="match", help="of G-RST: a number or match, 1/p(t) (match)")
    add("--schedule", choices=FAMILIES, metavar="FAMILY", default="constant",
        help=f"of RST and G-RST: {', '.join(FAMILIES)} (constant)")
    add("--p", type=fraction, help="parameter of the schedule (0.5 where it is constant)")
    add("--b", type=fraction, help="late, early, piecewise: the switch, as a share of the run")
    add("--every", type=positive_int, metavar="K", help="interval: a SAM step every K steps")
    add("--offset", type=int, metavar="N", help="interval: the first SAM step")
    add("--cost", type=float, metavar="C", help="solve the schedule for C pairs per step instead")
    add("--warmup", type=int, default=0, metavar="N", help="base steps at the start (0)")

    add = parser.add_argument_group("machine and output").add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    add("--amp", action="store_true", help="bfloat16 autocast in the forward passes")
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: 1 for digits, else torch's choice)")
    add("--shard", choices=SHARDS,
        help="under torchrun (torchrun --nproc-per-node N -m rst_fused train --shard ddp ...): share each batch "
        "among the processes, as DistributedDataParallel or FSDP2; BatchNorm takes the whole batch, and the result is "
        "that of one process but for rounding")
    add("--output", type=Path, metavar="DIR", help="default: runs/ and a name made of the options")


def run(args: argparse.Namespace) -> int:
    """Trains, prints the table, writes results.json and accuracy.png. Returns 0, or 2 for wrong input.

    Raises ModuleNotFoundError, before any training, where a package of the extra ``train`` is missing.
    """
    for package in ("numpy", "tqdm", "matplotlib", *(["sklearn"] if args.data is None else [])):
        importlib.import_module(package)
    from rst_fused.train import processes

    try:
        processes.check_launch(args.shard)
    except ValueError as error:
        # From each process, none of which knows the others yet: torchrun may end the first one before it gets here.
        print(f"rst-fused train: {error}", file=sys.stderr)
        return 2
    if args.shard is None:
        return _run(args)
    from torch.distributed.elastic.multiprocessing.errors import record

    # torchrun's last words are then the exception of the process that failed first.
    return record(_run)(args) or 0


def _run(args: argparse.Namespace) -> int:
    from rst_fused.train import processes, report, runner

    with processes.join(args.shard, args.device) as joined:
        plan = _plan(args, joined)
        if plan is None:
            return 2
        runs = runner.run_all(plan)
        if joined.first:
            output = Path(plan.config.output)
            rows = report.summarise(plan, runs)
            print(report.table(plan, rows))
            report.write_json(plan, runs, rows, output / "results.json")
            report.draw(plan, rows, output / "accuracy.png")
            print(f"\nwrote {output / 'results.json'} and {output / 'accuracy.png'}")
    return 0


def _plan(args: argparse.Namespace, joined: Processes) -> Plan | None:
    """What the options ask for, and the folder for it. None where they are wrong, as the first process then says."""
    from rst_fused.train import data, processes, runner

    plan, complaint = None, None
    try:
        config = Config.from_arguments(args, joined.size)
        if config.shard is not None:
            processes.check_device(config.shard, config.device)
        if config.data is None:
            loaded = data.load_digits(config.subset)
        else:
            loaded = data.load_cifar10(Path(config.data), config.subset)
        plan = runner.plan(config, loaded, joined)
        if joined.first:
            Path(config.output).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        complaint = str(error)
    complaints = joined.gather(complaint)  # a GPU or a folder may be missing for one of them alone
    if joined.first:
        for text in dict.fromkeys(text for text in complaints if text is not None):
            print(f"rst-fused train: {text}", file=sys.stderr)
    return None if any(complaints) else plan
