"""Kinds of faults with sharded parameters: each was seen once, or stands behind a line that only it needs."""

from __future__ import annotations

import pytest
import ranks
import sharded_faults as faults
import torch


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_partial_gradients_are_added_up(placement: str, compiled: bool):
    """g1 = 3, g2 = 6 everywhere: ||g1|| = 6, e = 3 / 6."""
    for moved, after, norm in ranks.run(2, faults.partial_gradients, compiled, placement, seconds=300):
        assert norm == pytest.approx(6.0)
        assert moved.tolist() == pytest.approx([1.5] * 4) and after.tolist() == pytest.approx([1.0 - 0.5 * 6.0] * 4)


def test_partial_gradients_are_added_up_in_one_order():
    for found in ranks.run(2, faults.partial_gradients_on_two_paths, seconds=30):
        assert [g[0] for g in found] == pytest.approx([1.0, 10.0, 100.0])


def test_a_group_added_while_weights_are_gathered():
    for losses in ranks.run(2, faults.groups_added_while_gathered):
        assert all(second > 1.01 * first for first, second in losses)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_parameters_replaced_while_weights_are_gathered(p):
    for seen in ranks.run(2, faults.parameters_replaced_while_gathered, p):
        assert seen == [True] * (4 if p else 2)


def test_layouts_that_change():
    assert ranks.run(2, faults.layouts_that_change) == [pytest.approx([2.0, 2.0])] * 2


def test_momentum_that_is_zero_on_one_rank():
    """m = 0.9 m + 0.5 g, w = 1 - 0.1 m, with momentum 1, 1, 0, 0 and g = 1."""
    for weights in ranks.run(2, faults.momentum_of_zeros_on_one_rank):
        assert weights.tolist() == pytest.approx([0.86, 0.86, 0.95, 0.95])


def test_step_counts_that_become_equal():
    first, second = ranks.run(2, faults.step_counts_that_become_equal, seconds=30)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_for_state_on_a_rank_without_gradients(rank: int):
    assert ranks.run(2, faults.first_step_without_gradients, rank, seconds=30) == [0, 0]


def test_state_of_an_optimizer_instance():
    for p, q in ranks.run(2, faults.state_of_an_instance):
        assert p.equal(torch.ones(4)) and q.equal(torch.ones(3))


def test_a_gradient_on_another_mesh_is_refused():
    for said in ranks.run(2, faults.gradient_on_another_mesh):
        assert "the gradient of parameter 0 of group 0" in said and "expected the same mesh" in said


def test_local_tensors_keep_no_gradient():
    for found in ranks.run(2, faults.lent_gradients, 0):
        assert found == {"keeps": [False] * 6, "same": False, "step": 3}


@pytest.mark.parametrize("call", range(1, 13))
def test_local_tensors_keep_no_gradient_after_an_interrupt(call: int):
    for found in ranks.run(2, faults.lent_gradients, call):
        assert not any(found["keeps"]) and found["step"] < 3


def test_replaced_local_tensors():
    expected = []
    w, m = 1.0, 0.0
    for _ in range(5):
        m = 0.9 * m + 1.0
        w -= 0.1 * m
        expected.append([w] * 4)
    for seen in ranks.run(2, faults.replaced_local_tensors):
        assert [s.tolist() for s in seen] == [pytest.approx(e) for e in expected]
