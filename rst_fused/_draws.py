"""The draws X_t ~ Bernoulli(p(t)) as a pure function of (seed, step). Public face: ``rst_fused.schedule``."""

from __future__ import annotations

from functools import lru_cache

from rst_fused._checks import as_integer

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: the step of splitmix64's counter


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes them well."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2^-53, that depends on (seed, step) and on nothing else.

    The top 53 bits of ``mix(mix(seed + G) + (step + 1) G)`` in 64-bit arithmetic, mix and G being those of
    splitmix64: integers only, so it is the same on every machine and rank, and a run resumes from its step
    count. Raises ValueError unless seed and step are integers from 0 to 2^64 - 1.
    """
    seed, step = as_integer("seed", seed, 0, _MASK), as_integer("step", step, 0, _MASK)
    return _block(seed, step >> 6)[step & 63]


@lru_cache(maxsize=64)
def _block(seed: int, number: int) -> tuple[float, ...]:
    """uniform for the 64 steps from 64 * number on: made at once, a number costs a training step next to nothing."""
    # Were the bare seed the counter's start, seed + G would be the stream of seed, one step on.
    key, first = _mix((seed + _GOLDEN) & _MASK), 64 * number + 1
    return tuple((_mix((key + t * _GOLDEN) & _MASK) >> 11) * 2.0**-53 for t in range(first, first + 64))


def draw(seed: int, step: int, p: float) -> bool:
    """X_t ~ Bernoulli(p), whether this step of this seed is a SAM step: ``uniform(seed, step) < p``.

    p = 0 never fires and p = 1 always does. Raises ValueError as ``uniform`` does, and unless p is in [0, 1].
    """
    return draw_at(as_integer("seed", seed, 0, _MASK), as_integer("step", step, 0, _MASK), p)


def draw_at(seed: int, step: int, p: float) -> bool:
    """``draw`` for a seed and a step that are known to be integers in range."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p!r}: expected a probability in [0, 1]")
    if p in (0.0, 1.0):  # as most steps of a late schedule: every number is below 1, and none below 0
        return p == 1.0
    return _block(seed, step >> 6)[step & 63] < p
