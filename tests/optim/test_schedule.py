"""Schedules and gamma against their formulas written a second time, in exact fractions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rst_fused import schedule as S

LENGTHS = [1, 2, 3, 7, 10, 100, 365]
SHARES = [0.0, 0.1, 0.29, 1 / 3, 0.5, 0.7, 0.999, 1.0]


def exact(x: float) -> Fraction:
    """What the author of a float meant: the simplest fraction near it (0.29 -> 29/100, 1/3 -> 1/3)."""
    return Fraction(x).limit_denominator(10**6)


# The table of schedules in exact fractions: p(t) of t, T, p, b, and the closed form of the mean.
TABLE = {
    "late": (lambda t, T, p, b: Fraction(0 if t <= b * T else 1), lambda p, b: 1 - b),
    "early": (lambda t, T, p, b: Fraction(1 if t <= b * T else 0), lambda p, b: b),
    "piecewise": (lambda t, T, p, b: p if t <= b * T else 1 - p, lambda p, b: p * b + (1 - p) * (1 - b)),
    "linear": (
        lambda t, T, p, b: (2 * p / T) * t if p <= Fraction(1, 2) else (2 * p - 1) + (2 * (1 - p) / T) * t,
        lambda p, b: p,
    ),
    "linear_swap": (lambda t, T, p, b: p + ((1 - 2 * p) / T) * t, lambda p, b: Fraction(1, 2)),
    "cosine": (
        lambda t, T, p, b: Fraction(0.5 + 0.5 * np.cos(np.pi * t / T)),
        lambda p, b: Fraction(1, 2),
    ),
    "cosine_increasing": (
        lambda t, T, p, b: Fraction(0.5 - 0.5 * np.cos(np.pi * t / T)),
        lambda p, b: Fraction(1, 2),
    ),
}
TAKES = {
    "late": "b", "early": "b", "piecewise": "pb", "linear": "p", "linear_swap": "p",
    "cosine": "", "cosine_increasing": "",
}  # fmt: skip


def build(family: str, steps: int, p: float, b: float) -> S.Schedule:
    values = {"p": p, "b": b}
    return getattr(S, family)(**{name: values[name] for name in TAKES[family]}, steps=steps)


def mean(schedule: S.Schedule, steps: int) -> Fraction:
    return sum((Fraction(schedule(t)) for t in range(steps)), Fraction(0)) / steps


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("family", TABLE)
def test_every_row_of_the_table(family: str, steps: int) -> None:
    formula, closed_form = TABLE[family]
    for p in SHARES if "p" in TAKES[family] else [0.0]:
        for b in SHARES if "b" in TAKES[family] else [0.0]:
            schedule = build(family, steps, p, b)
            want = [formula(t, steps, exact(p), exact(b)) for t in range(steps)]
            # p is a float where the formula has a fraction, hence not to the last bit.
            assert [schedule(t) for t in range(steps)] == pytest.approx([float(w) for w in want], abs=1e-9)
            assert schedule.mean_p == pytest.approx(float(sum(want) / steps), abs=1e-9)
            assert schedule.mean_p == pytest.approx(float(mean(schedule, steps)), abs=1e-15)
            assert schedule.mean_cost == 1 + schedule.mean_p
            assert abs(schedule.mean_p - float(closed_form(exact(p), exact(b)))) <= 1 / steps + 1e-9
            assert schedule.length == steps
            assert schedule.mean_over(steps) == pytest.approx(schedule.mean_p, abs=1e-15)


@pytest.mark.parametrize(("b", "steps", "border"), [
    (0.29, 100, 29),  # 0.29 * 100 = 28.999999999999996 in floats
    (0.07, 100, 7),  # 0.07 * 100 = 7.000000000000001
    (1 / 3, 3, 1), (2 / 3, 3, 2), (0.1, 30, 3), (0.57, 100, 57), (0.0, 10, 0), (0.55, 10, 5), (1.0, 10, 9),
])  # fmt: skip
def test_the_border_step_belongs_to_the_first_phase(b: float, steps: int, border: int) -> None:
    early, late, piecewise = S.early(b, steps), S.late(b, steps), S.piecewise(0.25, b, steps)
    assert [t for t in range(steps) if early(t) == 1.0] == list(range(border + 1))
    assert [t for t in range(steps) if late(t) == 0.0] == list(range(border + 1))
    assert [t for t in range(steps) if piecewise(t) == 0.25] == list(range(border + 1))
    assert early.mean_p == (border + 1) / steps


def test_every_k_over_T_is_hit_exactly() -> None:
    for steps in (7, 10, 49, 100, 365):
        for k in range(steps):
            assert S.early(k / steps, steps).mean_p == (k + 1) / steps


def test_constant_and_interval() -> None:
    assert [S.constant(0.25)(t) for t in (0, 1, 10**9)] == [0.25] * 3
    assert (S.constant(0.25).mean_cost, S.constant(0.25).length) == (1.25, None)
    assert [t for t in range(10) if S.interval(3)(t)] == [0, 3, 6, 9]
    assert [t for t in range(10) if S.interval(3, offset=2)(t)] == [2, 5, 8]
    assert S.interval(4).mean_cost == 1.25
    assert S.interval(4, 3).mean_over(10) == 0.2
    assert {S.interval(1)(t) for t in range(5)} == {1.0}


def test_warmup_hides_the_start_and_shifts_nothing() -> None:
    inner = S.linear(0.4, 10)
    schedule = S.warmup(inner, 4)
    assert [schedule(t) for t in range(12)] == [0.0] * 4 + [inner(t) for t in range(4, 12)]
    assert schedule.length == 10
    assert schedule.mean_p == pytest.approx(float(mean(schedule, 10)), abs=1e-15)
    assert S.warmup(inner, 0).mean_p == pytest.approx(inner.mean_p, abs=1e-15)
    endless = S.warmup(0.5, 6)
    assert endless == S.warmup(S.constant(0.5), 6)
    assert (endless.mean_p, endless.mean_over(8), endless.length) == (0.5, 0.125, None)
    assert [S.warmup(S.interval(3), 4)(t) for t in range(7)] == [0, 0, 0, 0, 0, 0, 1]


def test_after_the_last_step_the_last_value_stays() -> None:
    for family in TABLE:
        schedule = build(family, 8, 0.3, 0.5)
        assert {schedule(t) for t in (7, 8, 9, 10**12)} == {schedule(7)}
    quarters = S.from_callable(lambda t: t / 4, steps=4)
    assert [quarters(t) for t in range(6)] == [0, 0.25, 0.5, 0.75, 0.75, 0.75]


def test_callables() -> None:
    halving = S.as_schedule(lambda t: 0.5**t)
    assert [halving(t) for t in range(3)] == [1.0, 0.5, 0.25]
    assert halving.mean_over(3) == 1.75 / 3
    with pytest.raises(ValueError, match="no length.*mean_over"):
        _ = halving.mean_p
    assert S.from_callable(lambda t: 0.5**t, steps=3).mean_cost == 1 + 1.75 / 3
    assert S.as_schedule(lambda t: np.float32(0.5))(0) == 0.5
    assert type(S.as_schedule(lambda t: np.float64(0.5))(0)) is float
    assert S.from_callable(math.cos) == S.from_callable(math.cos)
    for bad in (-0.1, 1.0000001, math.nan, math.inf, "0.5", None, 0.5j, np.array([0.5, 0.5])):
        wrapped = S.as_schedule(lambda t, bad=bad: bad if t == 7 else 0.5)
        assert wrapped(6) == 0.5
        with pytest.raises(ValueError, match=r"from_callable\(fn=.*gave p=.*at step 7") as caught:
            wrapped(7)
        assert repr(bad) in str(caught.value)


def test_as_schedule() -> None:
    assert {S.as_schedule(half) for half in (0.5, Fraction(1, 2), np.float32(0.5))} == {S.constant(0.5)}
    assert S.as_schedule(1) == S.constant(1.0)
    linear = S.linear(0.3, 10)
    assert S.as_schedule(linear) is linear
    for wrong in ("0.5", None, [0.5], S.linear):
        with pytest.raises(TypeError, match="schedule="):
            S.as_schedule(wrong)
    for wrong in (-0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="schedule="):
            S.as_schedule(wrong)


# One of each, built from positional arguments.
SAMPLES = [
    S.constant(0.3), S.late(0.3, 10), S.early(0.3, 10), S.piecewise(0.3, 0.6, 10), S.linear(0.3, 1000),
    S.linear_swap(0.3, 10), S.cosine(10), S.cosine_increasing(10), S.interval(3, 1),
    S.warmup(S.warmup(S.linear(1 / 3, 10), 2), 4),
]  # fmt: skip


def test_values() -> None:
    assert repr(S.linear(0.3, 1000)) == "linear(p=0.3, steps=1000)"
    again = [eval(repr(schedule), vars(S)) for schedule in SAMPLES]
    for copies in (again, pickle.loads(pickle.dumps(SAMPLES)), copy.deepcopy(SAMPLES)):
        assert copies == SAMPLES
        assert [hash(schedule) for schedule in copies] == [hash(schedule) for schedule in SAMPLES]
        assert [s(5) for s in copies] == [s(5) for s in SAMPLES]
    assert len(set(SAMPLES + again)) == len(SAMPLES)
    assert S.cosine(10) != S.cosine_increasing(10) and S.late(0.3, 10) != S.early(0.3, 10)
    assert S.linear(0.3, 10) != S.linear(0.3, 11)
    assert S.constant(1) == S.constant(1.0) and repr(S.constant(1)) == "constant(p=1.0)"
    assert pickle.loads(pickle.dumps(S.from_callable(math.cos, 3))) == S.from_callable(math.cos, 3)
    with pytest.raises(AttributeError):
        S.linear(0.3, 10).p = 0.4


@pytest.mark.parametrize(("call", "message"), [
    (lambda: S.constant(1.5), r"p=1.5: expected a number in \[0, 1\]"),
    (lambda: S.constant(math.nan), "p=nan"),
    (lambda: S.constant("0.5"), "p='0.5'"),
    (lambda: S.linear(-0.1, 10), "p=-0.1"),
    (lambda: S.linear(0.1, 0), "steps=0: expected an integer >= 1"),
    (lambda: S.linear(0.1, 10.0), "steps=10.0"),
    (lambda: S.linear(0.1, True), "steps=True"),
    (lambda: S.late(1.1, 10), "b=1.1"),
    (lambda: S.early(None, 10), "b=None"),
    (lambda: S.piecewise(0.5, math.inf, 10), "b=inf"),
    (lambda: S.linear_swap(2, 10), "p=2"),
    (lambda: S.cosine(-3), "steps=-3"),
    (lambda: S.cosine_increasing(None), "steps=None"),
    (lambda: S.interval(0), "every=0"),
    (lambda: S.interval(3, 3), "offset=3: expected an integer from 0 to 2"),
    (lambda: S.interval(3, -1), "offset=-1"),
    (lambda: S.warmup(0.5, -1), "steps=-1"),
    (lambda: S.warmup(S.cosine(10), 10), "steps=10: expected a warm-up below the 10 steps of cosine"),
    (lambda: S.from_callable(0.5), "fn=0.5"),
    (lambda: S.from_callable(math.cos, 0), "steps=0"),
    (lambda: S.constant(0.5)(-1), "step=-1"),
    (lambda: S.constant(0.5)(1.0), "step=1.0"),
    (lambda: S.linear(0.5, 10).mean_over(0), "steps=0"),
    (lambda: S.match(0.5, -1.0), "degree=-1.0"),
    (lambda: S.match(0.5, math.inf), "degree=inf"),
    (lambda: S.match(0.5, math.nan), "degree=nan"),
    (lambda: S.for_cost("square", 1.5), "family='square': expected one of constant, late"),
    (lambda: S.for_cost("constant", 2.5), r"cost=2.5: expected a number in \[1, 2\]"),
    (lambda: S.for_cost("constant", 0.5), "cost=0.5"),
    (lambda: S.for_cost("linear", 1.5), "steps=None: expected an integer >= 1"),
    (lambda: S.for_cost("linear", 1.5, 10, p=0.3), "takes no p"),
    (lambda: S.for_cost("interval", 1.0), "constant"),
    (lambda: S.for_cost("cosine", 1.4, 10), "cosine always costs 1.5"),
    (lambda: S.for_cost("cosine_increasing", 1.6, 10), "always costs 1.5"),
    (lambda: S.for_cost("linear_swap", 1.4, 10, p=0.2), "always costs 1.5"),
    (lambda: S.for_cost("linear_swap", 1.5, 10), "p=None"),
    (lambda: S.for_cost("piecewise", 1.5, 10), "either p .* or b"),
    (lambda: S.for_cost("piecewise", 1.5, 10, p=0.5, b=0.5), "either p .* or b"),
    (lambda: S.for_cost("piecewise", 1.1, 10, p=0.7), "p=0.7 costs 1.3 to 1.7"),
    (lambda: S.for_cost("piecewise", 1.4, 10, p=0.5), "p=0.5 costs 1.5 to 1.5"),
    (lambda: S.for_cost("piecewise", 1.95, 10, b=0.2), "b=0.2 costs 1.3 to 1.7"),
])  # fmt: skip
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


shares = st.floats(0, 1)
lengths = st.integers(1, 400)


@settings(deadline=None)
@given(st.sampled_from(sorted(TABLE)), lengths, shares, shares, st.integers(0, 10**6))
def test_p_is_a_probability_and_the_mean_is_near_its_closed_form(family, steps, p, b, step) -> None:
    schedule = build(family, steps, p, b)
    assert 0.0 <= schedule(step) <= 1.0
    assert all(0.0 <= schedule(t) <= 1.0 for t in range(steps))
    assert abs(schedule.mean_p - TABLE[family][1](p, b)) <= 1 / steps + 1e-12
    assert schedule.mean_p == pytest.approx(float(mean(schedule, steps)), abs=1e-14)
    assert eval(repr(schedule), vars(S)) == schedule


@settings(deadline=None)
@given(shares, st.integers(1, 2**70), st.integers(0, 2**70))
def test_p_is_a_probability_for_any_length(p, steps, step) -> None:
    assert 0.0 <= S.linear(p, steps)(step) <= 1.0
    assert 0.0 <= S.linear_swap(p, steps)(step) <= 1.0


costs = st.floats(1, 2)


@settings(deadline=None)
@given(costs, lengths)
def test_for_cost_exact_families(cost, steps) -> None:
    assert S.for_cost("constant", cost).mean_cost == pytest.approx(cost, abs=1e-15)
    assert S.for_cost("linear", cost, steps).mean_cost == pytest.approx(cost, abs=1e-12)


@settings(deadline=None)
@given(costs, lengths)
def test_for_cost_finds_the_closest_border(cost, steps) -> None:
    """A first phase of n = 1 .. T steps is all that b in [0, 1] gives: no n may be closer than that found."""
    for family, ones in (("early", lambda n: n), ("late", lambda n: steps - n)):
        schedule = S.for_cost(family, cost, steps)
        best = min(abs(ones(n) / steps - (cost - 1)) for n in range(1, steps + 1))
        assert abs(float(mean(schedule, steps)) - (cost - 1)) <= best + 1e-12


@settings(deadline=None)
@given(shares, shares, lengths)
def test_for_cost_piecewise(p, x, steps) -> None:
    # Given p: a mean between p and 1 - p, to the closest whole step.
    wanted = p * x + (1 - p) * (1 - x)
    schedule = S.for_cost("piecewise", 1 + wanted, steps, p=p)
    assert schedule.p == p
    best = min(abs((n * p + (steps - n) * (1 - p)) / steps - wanted) for n in range(1, steps + 1))
    assert abs(float(mean(schedule, steps)) - wanted) <= best + 1e-9
    # Given b: whatever mean it has for some p, it has again.
    wanted = S.piecewise(p, x, steps).mean_p
    schedule = S.for_cost("piecewise", 1 + wanted, steps, b=x)
    assert schedule.b == x
    assert schedule.mean_p == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(st.floats(1, 2, exclude_min=True), st.integers(1, 50))
def test_for_cost_interval_is_the_nearest(cost, other) -> None:
    schedule = S.for_cost("interval", cost)
    assert abs(schedule.mean_p - (cost - 1)) <= abs(1 / other - (cost - 1)) + 1e-15


def test_for_cost_examples() -> None:
    assert S.for_cost("constant", 1.3) == S.constant(0.3)
    assert S.for_cost("constant", 1.3, 100) == S.constant(0.3)
    assert S.for_cost("interval", 1.3) == S.interval(3)
    assert S.for_cost("interval", 1.25, offset=2) == S.interval(4, 2)
    assert S.for_cost("late", 1.3, 1000).mean_cost == 1.3
    assert S.for_cost("early", 1.3, 1000).mean_cost == 1.3
    assert S.for_cost("late", 2.0, 10) == S.late(0.0, 10) and S.late(0.0, 10).mean_cost == 1.9
    assert S.for_cost("late", 1.0, 10).mean_cost == 1.0
    assert S.for_cost("early", 1.0, 10).mean_cost == 1.1
    assert S.for_cost("linear", 2.0, 10) == S.linear(1.0, 10)
    assert S.for_cost("piecewise", 1.3, 10, p=0.7).mean_cost == pytest.approx(1.34)  # step 0 is at p
    assert S.for_cost("piecewise", 1.5, 10, p=0.5).mean_cost == 1.5
    assert S.for_cost("linear_swap", 1.5, 10, p=0.2) == S.linear_swap(0.2, 10)
    assert S.for_cost("cosine", 1.5, 10) == S.cosine(10)
    assert S.for_cost("cosine_increasing", 1.5, 10) == S.cosine_increasing(10)


def test_match() -> None:
    gamma = S.match(0.5)
    assert [gamma(t) for t in (0, 7)] == [2.0, 2.0]
    assert S.match(S.late(0.5, 4), degree=0.5)(3) == 0.5
    linear = S.linear(0.3, 10)
    assert [S.match(linear, 0.8)(t) * linear(t) for t in range(1, 10)] == pytest.approx([0.8] * 9)
    assert S.match(linear, 0.8)(0) == 1.0  # p = 0: never used
    assert pickle.loads(pickle.dumps(gamma)) == gamma == S.match(S.constant(0.5), 1)
    assert eval(repr(S.match(linear)), vars(S)) == S.match(linear)
