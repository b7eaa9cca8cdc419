"""Join() with uneven data, down to a rank without any; GradScaler; ranks that fail. Nothing drifts, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import ddp_on_ranks as ddp
import pytest
import ranks
import torch.distributed as dist
import uneven_on_ranks as workers
from oracle_optimizer import bits

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.usefixtures("one_thread"),
]
MOST = 2e-7


@pytest.mark.parametrize("form", ["closure", "phases"])
@pytest.mark.parametrize(("base", "gamma"), [("sgd", 1.0), ("adamw", 1.5), ("instance", 1.5)])
def test_uneven_data(base: str, gamma: float, form: str) -> None:
    """Epochs in which now this and now that rank has less: step counts and momentum agree after each."""
    batches = [[20, 13], [7, 20], [20, 20]]
    right = workers.uneven_alone(batches, base, gamma, form)
    for weights, drifts, steps, sam_steps, said in ranks.run(2, workers.uneven, batches, base, gamma, form, 20.0):
        assert drifts == [0.0] * 3 and steps == 60 and 10 < sam_steps < 50 and said == []
        assert ddp.difference(weights, right) <= MOST


def test_uneven_data_with_m_sharpness() -> None:
    """A rank without data follows only the passes that reduce."""
    for form in ("closure", "phases"):
        results = ranks.run(2, workers.uneven, [[20, 13], [7, 20]], "sgd", 1.0, form, 20.0, True)
        for _, drifts, steps, sam_steps, said in results:
            assert drifts == [0.0] * 2 and steps == 40 and 5 < sam_steps < 35 and said == []


@pytest.mark.parametrize("batches", [[[12, 12, 0, 12]], [[0, 12, 12, 12]], [[0, 3, 12, 7], [12, 12, 12, 12]]])
def test_a_rank_without_any_data(batches: list[list[int]]) -> None:
    """It says so to the others, who neither wait for it nor wonder; also where it is the first rank."""
    right = workers.uneven_alone(batches, "sgd", 1.5, "closure")
    results = ranks.run(4, workers.uneven, batches, "sgd", 1.5, "closure", 60.0, seconds=50)
    for weights, drifts, steps, _, said in results:
        assert set(drifts) == {0.0} and steps == 12 * len(batches) and said == []
        assert ddp.difference(weights, right) <= MOST


def test_gradient_scaler_without_overflow() -> None:
    """Powers of two scale without rounding: as without a scaler."""
    for gamma in (1.0, 1.5):
        right, _ = ddp.alone(2, "adamw", "phases", {"gamma": gamma, "schedule": 1.0})
        for weights, drift, _, scale, steps in ranks.run(2, workers.scaled, gamma, "adamw", None, False, ddp.STEPS):
            assert drift == 0.0 and scale == 256.0 and steps == ddp.STEPS
            assert ddp.difference(weights, right) <= MOST


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(("gamma", "local"), [(1.0, False), (1.5, False), (1.0, True)])
@pytest.mark.parametrize("base", ["sgd", "instance"])
def test_an_overflow_on_one_rank(base: str, gamma: float, local: bool, which: int) -> None:
    """No rank skips alone. In the first pass it only leaves e = 0, unless the first gradients are mixed in."""
    results = ranks.run(2, workers.scaled, gamma, base, (5, which), local, 12)
    skips = which == 2 or gamma != 1.0
    for _, drift, moved, scale, steps in results:
        assert drift == 0.0 and steps == 12
        assert moved == [t != 5 or not skips for t in range(12)]
        assert scale == (128.0 if which == 2 else 256.0)  # it looks at the gradients of the second pass


@pytest.mark.parametrize(
    ("where", "form"),
    [("pass 1", "closure"), ("pass 2", "closure"), *((w, "phases") for w in ("pass 1", "between", "pass 2", "saving"))],
)
def test_an_exception_on_one_rank(where: str, form: str) -> None:
    """Weights come back on the rank that fails, and on those whose collectives fail then: all are where they were."""
    (other, whole, steps), (said, *rest) = ranks.run(2, workers.failing, where, 1.5, form, seconds=60)
    assert said.startswith("RuntimeError: state_dict while" if where == "saving" else "Stop: on purpose")
    assert rest == [True, 2]
    assert other and (whole, steps) == (True, 2)


def test_a_killed_rank_and_a_resumed_run(tmp_path: Path) -> None:
    """SIGKILL between the passes; the checkpoint from before it leads to where an uninterrupted run ends."""
    (tmp_path / "other").mkdir()
    whole = ranks.run(2, workers.checkpointing, str(tmp_path / "other"), 60, None)
    results, errors = ranks.outcomes(2, workers.checkpointing, str(tmp_path), 60, 33, seconds=20)
    assert "SIGKILL" in errors[1] and "not done" not in errors.get(0, "not done") and not results
    resumed = ranks.run(2, workers.checkpointing, str(tmp_path), 60, None)
    for (a, steps, drift), (b, _, _) in zip(resumed, whole, strict=True):
        assert steps == 60 and drift == 0.0 and bits(a) == bits(b)
