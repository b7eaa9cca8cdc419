"""Draws as a pure function of (seed, step): known answers, a twin in numpy, statistics on fixed inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rst_fused import schedule as S


def reference_uniform(seed: int, steps: np.ndarray) -> np.ndarray:
    """The same hash in numpy's wrapping uint64 arithmetic."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.array([seed], dtype=np.uint64) + golden)
    return (mix(key + (steps.astype(np.uint64) + np.uint64(1)) * golden) >> np.uint64(11)) * 2.0**-53


def test_uniform_known_answers() -> None:
    """Changing the hash changes every recorded run: these values may never change."""
    assert S.uniform(0, 0) == 0.6524484863740322
    assert S.uniform(0, 1) == 0.7012121095215252
    assert S.uniform(1, 0) == 0.36818951565166946
    assert S.uniform(42, 1000) == 0.6952598398323256
    assert S.uniform(2**64 - 1, 2**64 - 1) == 0.2668471864940366
    assert "".join(str(int(S.draw(0, t, 0.5))) for t in range(32)) == DRAWS_OF_SEED_0
    # splitmix64's published first output for the seed 1234567.
    from rst_fused._draws import _GOLDEN, _mix

    assert _mix(1234567 + _GOLDEN) == 6457827717110365317


DRAWS_OF_SEED_0 = "00100101101110010001000000111111"


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
def test_uniform_against_numpy(seed: int) -> None:
    steps = np.concatenate([np.arange(500), [2**31, 2**32, 2**53 + 1, 2**63]]).astype(np.uint64)
    assert [S.uniform(seed, int(t)) for t in steps] == reference_uniform(seed, steps).tolist()
    assert S.uniform(np.uint64(seed), np.int32(3)) == S.uniform(seed, 3)


def test_draws_at_the_ends() -> None:
    for seed in range(20):
        assert not any(S.draw(seed, t, 0.0) for t in range(500))
        assert all(S.draw(seed, t, 1.0) for t in range(500))
    u = S.uniform(3, 5)
    assert not S.draw(3, 5, u) and S.draw(3, 5, math.nextafter(u, 1.0))
    assert type(S.draw(3, 5, 0.5)) is bool


def test_draws_depend_on_nothing_else() -> None:
    forward = [S.draw(9, t, 0.4) for t in range(200)]
    assert [S.draw(9, t, 0.4) for t in reversed(range(200))][::-1] == forward
    assert forward != [S.draw(10, t, 0.4) for t in range(200)]


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    """uniform(seed, step) for 256 adjacent seeds and 1024 adjacent steps."""
    return np.array([[S.uniform(seed, step) for step in range(1024)] for seed in range(256)])


def chi_square_z(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, as standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# All inputs are fixed, so these cannot flake; a sound hash is within 4 sigma in all but 1 of 16,000 cases.
def test_uniform_moments(grid: np.ndarray) -> None:
    n = grid.size
    assert abs(grid.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(grid.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    for p in (0.01, 0.3, 0.5, 0.9):
        fired = grid < p
        assert abs(fired.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
        # Counts per seed and per step spread as binomials do, neither more nor less.
        for axis in (0, 1):
            trials = grid.shape[axis]
            ratio = fired.sum(axis=axis).var() / (trials * p * (1 - p))
            assert abs(ratio - 1) < 6 * math.sqrt(2 / grid.shape[1 - axis])


def test_uniform_is_flat(grid: np.ndarray) -> None:
    assert abs(chi_square_z(np.bincount((grid * 512).astype(int).ravel(), minlength=512))) < 4
    low = (grid * 2.0**53).astype(np.uint64) & np.uint64(511)
    assert abs(chi_square_z(np.bincount(low.astype(int).ravel(), minlength=512))) < 4


@pytest.mark.parametrize(("seeds", "steps"), [
    (0, 1), (0, 2), (0, 64), (1, 0), (2, 0), (128, 0), (1, 1), (1, -1), (3, 5), (16, -16),
])  # fmt: skip
def test_neighbours_are_independent(grid: np.ndarray, seeds: int, steps: int) -> None:
    here = grid[: grid.shape[0] - seeds, max(0, -steps) : grid.shape[1] - max(0, steps)]
    there = grid[seeds:, max(0, steps) : grid.shape[1] + min(0, steps)]
    assert here.shape == there.shape
    correlation = np.corrcoef(here.ravel(), there.ravel())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(here.size)
    pairs = (here * 16).astype(int) * 16 + (there * 16).astype(int)
    assert abs(chi_square_z(np.bincount(pairs.ravel(), minlength=256))) < 4


def test_far_seeds_do_not_share_a_stream() -> None:
    """seed + G would be seed's stream one step on, were the seed not mixed first."""
    golden = 0x9E3779B97F4A7C15
    for delta in (golden, 2**32, 2**63):
        a = {S.uniform(5, t) for t in range(300)}
        b = {S.uniform((5 + delta) % 2**64, t) for t in range(300)}
        assert not a & b


def test_draws_make_the_promised_cost() -> None:
    for schedule in (S.linear(0.3, 4000), S.cosine(4000), S.warmup(S.late(0.7, 4000), 100), S.interval(5)):
        fired = sum(S.draw(11, t, schedule(t)) for t in range(4000))
        assert abs(fired / 4000 - schedule.mean_p) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: S.draw(-1, 0, 0.5), "seed=-1: expected an integer from 0 to 18446744073709551615"),
    (lambda: S.draw(2**64, 0, 0.5), "seed=18446744073709551616"),
    (lambda: S.draw(0, -1, 0.5), "step=-1"),
    (lambda: S.draw(0, 2**64, 0.5), "step=18446744073709551616"),
    (lambda: S.draw(0, 1.0, 0.5), "step=1.0"),
    (lambda: S.draw(0.5, 1, 0.5), "seed=0.5"),
    (lambda: S.draw(0, 0, 1.5), "p=1.5"),
    (lambda: S.draw(0, 0, math.nan), "p=nan"),
    (lambda: S.uniform(None, 0), "seed=None"),
])  # fmt: skip
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
