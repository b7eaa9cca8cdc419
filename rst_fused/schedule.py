"""When to take a SAM step: schedules p(t), the draws X_t ~ Bernoulli(p(t)), and the gamma that suits them.

A schedule maps a step t = 0, 1, 2, ... to the probability p(t) that this step is a SAM step. A base step
costs one forward-backward pair and a SAM step two, so a schedule costs 1 + mean p pairs per step.

Rules that hold for every schedule:

* ``steps`` is T, the length of the run: the formulas cover t = 0 .. T-1. Training for longer is no error:
  from t = T on, p stays at p(T-1).
* ``mean_p`` and ``mean_cost`` are exact over t = 0 .. T-1. The cost in a docstring is the closed form, which
  is within 1/T of that.
* The border of late, early and piecewise, t <= b*T, is evaluated as t / T <= b. That is rounded once, so b
  written as a decimal or as a ratio means what it does on paper: b = 0.29, T = 100 includes t = 29, though
  the float product 0.29 * 100 is 28.999999999999996. The border step is included, so b = 0 covers step 0.
* Schedules are immutable values: equal when their parameters are, hashable, picklable, and their ``repr`` is
  the call that makes them. Arguments out of range raise ValueError.

Source: Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep
Learning", arXiv 2203.09962.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, SupportsIndex

from rst_fused._checks import as_integer, as_real
from rst_fused._draws import draw, uniform

__all__ = [
    "Schedule", "as_schedule", "constant", "cosine", "cosine_increasing", "draw", "early", "for_cost",
    "from_callable", "interval", "late", "linear", "linear_swap", "match", "piecewise", "uniform", "warmup",
]  # fmt: skip


def _set(instance: object, **values: object) -> None:
    """Stores checked fields on a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


class Schedule(ABC):
    """The probability p(t) of a SAM step, as a callable: ``schedule(step) -> float`` in [0, 1]."""

    @property
    def length(self) -> int | None:
        """T, the number of steps the formula covers: the parameter ``steps``; None where there is none."""
        return getattr(self, "steps", None)

    @abstractmethod
    def _p(self, t: int) -> float:
        """p(t) for 0 <= t, and t < T where there is a T."""

    def __call__(self, step: SupportsIndex) -> float:
        t = as_integer("step", step, 0)
        length = self.length
        return self._p(t if length is None or t < length else length - 1)

    def mean_over(self, steps: int) -> float:
        """Mean of p(t) over t = 0 .. steps-1: for a run of another length than T, or with no T."""
        steps = as_integer("steps", steps, 1)
        return math.fsum(map(self, range(steps))) / steps

    def _mean(self) -> float:
        if self.length is None:
            raise ValueError(f"{self!r} has no length, so no mean: use mean_over(steps) or give it steps=T")
        return self.mean_over(self.length)

    @property
    def mean_p(self) -> float:
        """Mean of p(t) over t = 0 .. T-1; without a T the long-run mean, or ValueError if that is unknown."""
        return self._mean()

    @property
    def mean_cost(self) -> float:
        """Forward-backward pairs per step, 1 + mean p: 1 is the base optimizer, 2 is SAM."""
        return 1.0 + self.mean_p


# The classes below are used as functions, hence their lower-case names: the repr of a dataclass is then the
# very call that makes the value.


@dataclass(frozen=True)
class constant(Schedule):
    """p(t) = p. Cost 1 + p. No length."""

    p: float

    def __post_init__(self) -> None:
        _set(self, p=as_real("p", self.p, 0, 1))

    def _p(self, t: int) -> float:
        return self.p

    def _mean(self) -> float:
        return self.p


@dataclass(frozen=True)
class interval(Schedule):
    """p(t) = 1 where t mod every = offset, else 0: every k-th step from t = offset on, 0 <= offset < every.

    Cost 1 + 1/every, the mean over any whole number of periods. No length.
    """

    every: int
    offset: int = 0

    def __post_init__(self) -> None:
        every = as_integer("every", self.every, 1)
        _set(self, every=every, offset=as_integer("offset", self.offset, 0, every - 1))

    def _p(self, t: int) -> float:
        return float(t % self.every == self.offset)

    def _mean(self) -> float:
        return 1.0 / self.every


class _Timed(Schedule):
    """A schedule of T steps; what its subclasses call p or b lies in [0, 1]."""

    steps: int

    def __post_init__(self) -> None:
        _set(self, steps=as_integer("steps", self.steps, 1))
        for name in ("p", "b"):
            if name in vars(self):
                _set(self, **{name: as_real(name, vars(self)[name], 0, 1)})


def _share(b: float, steps: int) -> int:
    """How many of the steps t = 0 .. T-1 have t / T <= b."""
    return bisect_right(range(steps), b, key=lambda t: t / steps)


@dataclass(frozen=True)
class late(_Timed):
    """p(t) = 0 while t <= b*T, then 1. Cost 2 - b."""

    b: float
    steps: int

    def _p(self, t: int) -> float:
        return float(t / self.steps > self.b)

    def _mean(self) -> float:
        return (self.steps - _share(self.b, self.steps)) / self.steps


@dataclass(frozen=True)
class early(_Timed):
    """p(t) = 1 while t <= b*T, then 0. Cost 1 + b."""

    b: float
    steps: int

    def _p(self, t: int) -> float:
        return float(t / self.steps <= self.b)

    def _mean(self) -> float:
        return _share(self.b, self.steps) / self.steps


@dataclass(frozen=True)
class piecewise(_Timed):
    """p(t) = p while t <= b*T, then 1 - p. Cost 1 + p b + (1-p)(1-b)."""

    p: float
    b: float
    steps: int

    def _p(self, t: int) -> float:
        return self.p if t / self.steps <= self.b else 1.0 - self.p

    def _mean(self) -> float:
        first = _share(self.b, self.steps)
        return (first * self.p + (self.steps - first) * (1.0 - self.p)) / self.steps


@dataclass(frozen=True)
class linear(_Timed):
    """A rising line through mean p: (2p/T) t where p <= 1/2, else (2p-1) + (2(1-p)/T) t. Cost 1 + p."""

    p: float
    steps: int

    def _p(self, t: int) -> float:
        x = t / self.steps
        return 2.0 * self.p * x if self.p <= 0.5 else (2.0 * self.p - 1.0) + 2.0 * (1.0 - self.p) * x

    def _mean(self) -> float:
        # t / T is 1/2T short of one half on average, and the slope is twice the min().
        return self.p - min(self.p, 1.0 - self.p) / self.steps


@dataclass(frozen=True)
class linear_swap(_Timed):
    """A line from p to 1 - p: p + ((1-2p)/T) t. Cost 1.5."""

    p: float
    steps: int

    def _p(self, t: int) -> float:
        return self.p + (1.0 - 2.0 * self.p) * (t / self.steps)

    def _mean(self) -> float:
        return 0.5 - (0.5 - self.p) / self.steps


@dataclass(frozen=True)
class cosine(_Timed):
    """p(t) = 1/2 + 1/2 cos(pi t / T), falling from 1 to 0. Cost 1.5."""

    steps: int

    def _p(self, t: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * (t / self.steps))

    def _mean(self) -> float:
        # The cosines at t and T - t cancel, which leaves t = 0.
        return 0.5 + 0.5 / self.steps


@dataclass(frozen=True)
class cosine_increasing(_Timed):
    """p(t) = 1/2 - 1/2 cos(pi t / T), the mirror of ``cosine``, rising from 0 to 1. Cost 1.5."""

    steps: int

    def _p(self, t: int) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * (t / self.steps))

    def _mean(self) -> float:
        return 0.5 - 0.5 / self.steps


@dataclass(frozen=True)
class warmup(Schedule):
    """Base steps only (p = 0) for the first ``steps`` steps, then ``schedule``.

    The inner schedule sees t, not t - steps: warm-up hides the start of the run and shifts nothing, so T is
    always the whole run. ``steps`` may be 0 and must be below the inner T. Without an inner T, ``mean_p`` is
    the long-run mean, which no warm-up changes; ``mean_over(T)`` counts the warm-up.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        inner, steps = as_schedule(self.schedule), as_integer("steps", self.steps, 0)
        if inner.length is not None and steps >= inner.length:
            raise ValueError(f"steps={steps}: expected a warm-up below the {inner.length} steps of {inner!r}")
        _set(self, schedule=inner, steps=steps)

    @property
    def length(self) -> int | None:
        return self.schedule.length

    def _p(self, t: int) -> float:
        return 0.0 if t < self.steps else self.schedule(t)

    def _mean(self) -> float:
        return self.schedule.mean_p if self.length is None else super()._mean()


@dataclass(frozen=True)
class from_callable(Schedule):
    """p(t) = fn(t), any function of the step. Pickles and hashes when fn does; the repr shows fn.

    steps: T, where the run has a known length: gives ``mean_p`` and holds fn(T-1) from then on. Each value is
    checked: ValueError, naming the schedule, the step and the value, unless it is a real number in [0, 1].
    """

    fn: Callable[[int], float]
    steps: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ValueError(f"fn={self.fn!r}: expected a callable step -> p")
        if self.steps is not None:
            _set(self, steps=as_integer("steps", self.steps, 1))

    def _p(self, t: int) -> float:
        value = self.fn(t)
        if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"{self!r} gave p={value!r} at step {t}: expected a real number in [0, 1]")
        return float(value)


def as_schedule(schedule: float | Callable[[int], float]) -> Schedule:
    """A number becomes ``constant``, a Schedule stays itself, any other callable becomes ``from_callable``.

    Raises ValueError for a number outside [0, 1] and TypeError for anything else.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Real):
        return constant(as_real("schedule", schedule, 0, 1))
    if callable(schedule) and not isinstance(schedule, type):
        return from_callable(schedule)
    raise TypeError(f"schedule={schedule!r}: expected a number in [0, 1], a Schedule or a function step -> p")


@dataclass(frozen=True)
class match:
    """gamma(t) = degree / p(t): gives G-RST the same expected regularization, p * gamma, at every step.

    Degree 1 regularizes as much as SAM: p = 0.5 then means gamma = 2. Where p is tiny gamma is huge, as in
    the first steps of a rising line; warm-up keeps those out. Where p(t) = 0 no SAM step fires and gamma is
    never used: it is 1 there. Raises ValueError unless degree is finite and >= 0.
    """

    schedule: Schedule
    degree: float = 1.0

    def __post_init__(self) -> None:
        degree = as_real("degree", self.degree, 0, 1.7976931348623157e308)
        _set(self, schedule=as_schedule(self.schedule), degree=degree)

    def __call__(self, step: SupportsIndex) -> float:
        p = self.schedule(step)
        return self.degree / p if p > 0.0 else 1.0


FAMILIES = {  # name: the parameters that for_cost takes as given
    "constant": (), "late": (), "early": (), "piecewise": ("p", "b"), "linear": (), "linear_swap": ("p",),
    "cosine": (), "cosine_increasing": (), "interval": ("offset",),
}  # fmt: skip


def for_cost(family: str, cost: float, steps: int | None = None, **given: Any) -> Schedule:
    """The member of a family whose mean cost over exactly T steps is as close to ``cost`` as the family gets.

    cost is in pairs per step, from 1 to 2. What each family takes besides it, and how close it gets:

    * "constant": nothing; exact.
    * "linear": steps; exact.
    * "late", "early": steps; moves by whole steps, with at least one in the first phase.
    * "piecewise": steps and either p (solves b, by whole steps as above) or b (solves p, exact).
    * "interval": optionally offset; the nearest of 1 + 1/k, k = 1, 2, ...
    * "linear_swap" (with p), "cosine", "cosine_increasing": steps; only cost = 1.5, which is all they have.

    Families without a length ignore ``steps``. Raises ValueError for all else and for costs out of reach.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")
    if unknown := sorted(given.keys() - set(FAMILIES[family])):
        raise ValueError(f"for_cost({family!r}) takes no {', '.join(unknown)}")
    # Decimal, because 1.3 - 1 in floats is 0.30000000000000004 and would print like that.
    mean = float(Decimal(repr(as_real("cost", cost, 1, 2))) - 1)
    if family == "constant":
        return constant(mean)
    if family == "interval":
        if mean == 0.0:
            raise ValueError("cost=1.0: an interval takes SAM steps, so it costs more; use constant(0)")
        every = int(1.0 / mean)
        return interval(min((every, every + 1), key=lambda k: abs(1.0 / k - mean)), **given)
    total = as_integer("steps", steps, 1)
    if family == "late":
        return late(_border(total * (1.0 - mean), total), total)
    if family == "early":
        return early(_border(total * mean, total), total)
    if family == "piecewise":
        return _solve_piecewise(mean, total, **given)
    if family == "linear":
        # linear._mean solved for p, on either side of p = 1/2.
        upper = 2.0 * mean * total > total - 1
        return linear((mean * total + 1) / (total + 1) if upper else mean * total / max(total - 1, 1), total)
    if mean != 0.5:
        raise ValueError(f"cost={cost!r}: {family} always costs 1.5; linear and piecewise reach other costs")
    if family == "linear_swap":
        return linear_swap(given.get("p"), total)  # type: ignore[arg-type]  # checked there
    return cosine(total) if family == "cosine" else cosine_increasing(total)


def _border(first: float, steps: int) -> float:
    """b for a first phase of ``first`` steps, to the nearest whole step and at least one."""
    return (max(round(first), 1) - 1) / steps


def _solve_piecewise(mean: float, steps: int, p: float | None = None, b: float | None = None) -> Schedule:
    if (p is None) == (b is None):
        raise ValueError("for_cost('piecewise') needs either p (to solve b) or b (to solve p)")
    # With x the share of the first phase, the mean p x + (1-p)(1-x) is symmetric in p and x; 1/2 at x = 1/2.
    known = as_real("p", p, 0, 1) if b is None else _share(as_real("b", b, 0, 1), steps) / steps
    low, high = sorted((known, 1.0 - known))
    if not low - 1e-12 <= mean <= high + 1e-12:
        what = f"p={p!r}" if b is None else f"b={b!r}"
        raise ValueError(f"cost={1 + mean!r}: piecewise with {what} costs {1 + low:.6g} to {1 + high:.6g}")
    other = 0.5 if known == 0.5 else min(max((mean - (1.0 - known)) / (2.0 * known - 1.0), 0.0), 1.0)
    return piecewise(known, _border(other * steps, steps), steps) if b is None else piecewise(other, b, steps)
