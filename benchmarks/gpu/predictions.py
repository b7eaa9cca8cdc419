"""What was predicted before a GPU had run the kernels, to stand beside what is measured.

Read off the machine code for sm_90 of commit 84ba859, by a model of warps that knows latencies and issue rates: so of
the kernels as they were before what this showed was mended. To be trusted within 0.05, for the norm and Adam in bf16
within 0.10.
"""

from __future__ import annotations

from . import modes

SOURCE = "predicted: from the machine code of the kernels of commit 84ba859, before anything was measured"
KINDS = ("H100", "H200")
# (kernel or part, mode) -> fraction of the copy bandwidth on an H100 and on an H200; None: not predicted.
FRACTIONS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("norm", modes.FP32.name): (0.96, 0.91),
    ("norm", modes.BF16.name): (0.82, 0.67),
    ("norm", modes.MASTERS.name): (0.82, 0.67),  # the same kernel
    ("perturb", modes.FP32.name): (0.96, 0.96),
    ("perturb", modes.BF16.name): (0.96, 0.95),
    ("perturb", modes.MASTERS.name): (0.95, 0.93),
    ("norm + perturb", modes.FP32.name): (0.95, 0.94),
    ("norm + perturb", modes.BF16.name): (0.92, 0.86),
    ("sgd", modes.FP32.name): (0.96, 0.96),
    ("sgd", modes.BF16.name): (0.95, 0.94),
    ("sgd", modes.MASTERS.name): (0.94, 0.93),
    ("adamw", modes.FP32.name): (0.94, 0.90),
    ("adamw", modes.BF16.name): (0.82, 0.68),
    ("adamw", modes.MASTERS.name): (0.94, 0.90),
    ("adamw", modes.ZERO_ROWS.name): (0.6, None),
    **{(kernel, modes.OFF_BY_4.name): (0.85, 0.72) for kernel in ("norm", "perturb", "sgd")},
    **{(kernel, modes.OFF_BY_8.name): (0.58, 0.42) for kernel in ("norm", "perturb", "sgd")},
}


def predicted(kernel: str, mode: str, device: str) -> float | None:
    """For the GPU called ``device``; None where nothing was predicted."""
    values = FRACTIONS.get((kernel, mode))
    return next((v for kind, v in zip(KINDS, values, strict=True) if kind in device), None) if values else None


def predicted_part(part: str, base: str, mode: str, device: str) -> float | None:
    """The same for a part of a step. A base step moves as much as an update."""
    return predicted("norm + perturb" if part == "perturb" else base, mode, device)
