"""The least bytes that each kernel, and each part of a step, must move."""

from __future__ import annotations

from .modes import Mode

STATES = {"sgd": 1, "adamw": 2}
PARTS = ("perturb", "update", "base")
FP32_BYTES = 4


def kernel_bytes(kernel: str, mode: Mode) -> int:
    """Read plus written per element. ``kernel`` is norm, perturb, or the base optimizer of an update with restore."""
    size = mode.dtype.itemsize
    kept = FP32_BYTES if mode.masters else size  # of the state, and of what w is read from, which may be two halves
    copied = mode.masters is True
    if kernel == "norm":  # reads g, and ASAM w
        return size + (kept if mode.adaptive else 0)
    if kernel == "perturb":  # reads w and g; writes w, and the backup where no master copy is one
        return kept + size + size + (0 if copied else size)
    # Reads the backup or master, g and the first g to mix; writes w and the master; reads and writes the state.
    mixed, master = size if mode.mixing else 0, FP32_BYTES if copied else FP32_BYTES - size if mode.masters else 0
    return kept + size + mixed + size + master + 2 * STATES[kernel] * kept


def part_bytes(part: str, base: str, mode: Mode) -> int:
    """The same of a part of a step. A base step has nothing to mix."""
    if part == "perturb":
        return kernel_bytes("norm", mode) + kernel_bytes("perturb", mode)
    mixed = mode.dtype.itemsize if mode.mixing and part == "base" else 0
    return kernel_bytes(base, mode) - mixed
