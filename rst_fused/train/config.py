"""The options of the training command with their defaults, as one immutable value."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from rst_fused import schedule_cli
from rst_fused.schedule import Schedule

Number = TypeVar("Number", int, float)

METHODS = ("base", "sam", "rst", "g-rst")
BASES = ("sgd", "adamw")
SHARDS = ("ddp", "fsdp")
SCHEDULE_OPTIONS = ("p", "b", "every", "offset", "cost", "warmup")

# Found on the data itself. Digits: this much weight decay keeps the weights small enough for rho = 0.1 to
# matter, and the tensors are too small for threads to share. CIFAR-10: the usual settings of ResNet-18 and SAM.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "cnn", "epochs": 60, "batch_size": 100, "seeds": 3, "rho": 0.1, "label_noise": (0.0, 0.3),
        "threads": 1,
        "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}, "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    },
    "cifar10": {
        "model": "resnet18", "epochs": 30, "batch_size": 128, "seeds": 1, "rho": 0.05, "label_noise": (0.0,),
        "threads": None,
        "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}, "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    },
}  # fmt: skip


def _parsed(kind: type[Number], text: str, fits: Callable[[Number], bool], expected: str) -> Number:
    with contextlib.suppress(ValueError):
        value = kind(text)
        if fits(value):
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected {expected}")


def positive_int(text: str) -> int:
    return _parsed(int, text, lambda n: n >= 1, "an integer >= 1")


def non_negative(text: str) -> float:
    return _parsed(float, text, lambda x: 0 <= x < math.inf, "a finite number >= 0")


def fraction(text: str) -> float:
    return _parsed(float, text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def gamma_value(text: str) -> float | str:
    return text if text == "match" else _parsed(float, text, lambda x: 0 <= x < math.inf, "a number >= 0, or match")


@dataclass(frozen=True)
class Config:
    """Every option, resolved. ``schedule`` holds the family and the options of ``rst-fused schedule``."""

    data: str | None
    model: str
    subset: int | None
    label_noise: tuple[float, ...]
    epochs: int
    seeds: int
    methods: tuple[str, ...]
    base: str
    lr: float
    momentum: float | None
    weight_decay: float
    batch_size: int
    rho: float
    gamma: float | str
    schedule: dict[str, Any]
    device: str
    amp: bool
    threads: int | None
    shard: str | None
    processes: int
    output: str

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, processes: int = 1) -> Config:
        """Fills in the defaults. Raises ValueError where options contradict each other."""
        if args.base != "sgd" and args.momentum is not None:
            raise ValueError(f"--momentum {args.momentum} with --base {args.base}: only sgd has a momentum")
        options = {name: getattr(args, name) for name in SCHEDULE_OPTIONS}
        if args.schedule == "constant" and args.p is None and args.cost is None:
            options["p"] = 0.5
        of_data = _DEFAULTS["digits" if args.data is None else "cifar10"]
        defaults = {**of_data, **of_data[args.base]}
        options_of_args = [field.name for field in fields(cls) if field.name not in ("processes", "output")]
        given = {name: getattr(args, name) for name in options_of_args}
        values: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        values |= {
            "data": None if args.data is None else str(args.data),
            "label_noise": tuple(dict.fromkeys(values["label_noise"])),
            "methods": tuple(name for name in METHODS if name in args.methods),
            "schedule": {"family": args.schedule, **options},
            "device": _checked_device(args.device),
            "processes": processes,
        }
        return cls(**values, output=str(args.output or _output_name(values)))

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments of the base optimizer."""
        momentum = {} if self.momentum is None else {"momentum": self.momentum}
        return {"lr": self.lr, "weight_decay": self.weight_decay, **momentum}

    def build_schedule(self, steps: int) -> Schedule:
        """The schedule of RST and G-RST for a run of ``steps`` steps. ValueError where options do not fit."""
        return schedule_cli.build(argparse.Namespace(steps=steps, **self.schedule))

    def label(self, method: str) -> str:
        """The method's name in tables and pictures, such as ``G-RST(0.5, match)``."""
        if method in ("base", "sam"):
            return "SAM" if method == "sam" else {"sgd": "SGD", "adamw": "AdamW"}[self.base]
        given = {k: self.schedule[k] for k in SCHEDULE_OPTIONS if self.schedule[k] is not None}
        if not given["warmup"]:
            del given["warmup"]
        if self.schedule["family"] == "constant" and list(given) == ["p"]:
            text = f"{given['p']:g}"
        else:
            text = " ".join([self.schedule["family"], *(f"{k}={v:g}" for k, v in given.items())])
        return f"RST({text})" if method == "rst" else f"G-RST({text}, {self.gamma})"


def _checked_device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: the last of torch's devices is {torch.cuda.device_count() - 1}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu or cuda")
    return name


def _output_name(values: dict[str, Any]) -> str:
    """runs/DATA-MODEL-BASE-HASH: equal options give the same folder, others another."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    data = "digits" if values["data"] is None else "cifar10"
    return f"runs/{data}-{values['model']}-{values['base']}-{digest}"
