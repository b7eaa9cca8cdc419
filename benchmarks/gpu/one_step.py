"""A few SAM steps with AdamW in bf16, and nothing else: what a profiler of kernels is pointed at."""

from __future__ import annotations

import argparse
import sys

from ..cases import gpt2
from ..peers import make
from . import modes, race
from .device import available_backends, device_of
from .kernels import HYPER, gpt2_small

STEPS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args()
    device = device_of(args.device)
    case = gpt2_small() if args.device == "cuda" else gpt2("gpt2", "GPT-2, shrunk", 16, 1, 101, 8)
    names, notes = available_backends(device)
    if not names:
        raise SystemExit("; ".join(notes))
    racer = make("ours", case, modes.BF16.dtype, HYPER, device.name, backend=names[0], base="adamw")
    grads = modes.BF16.gradients(device, case)
    for _ in range(STEPS):
        race.sam_step(racer, grads)
    device.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
