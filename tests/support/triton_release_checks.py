"""release_gradients=True on the Triton backend: plans perturb, and the ops update parameters within the backward.

Collected by test_triton_plan only, in processes where a plugin runs the kernels on CPU tensors.
"""

from __future__ import annotations

import pytest
import torch
from paths import observed
from triton_plan_checks import Run

from rst_fused._step import release

pytestmark = pytest.mark.usefixtures("one_thread")


def backward(run: Run, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    aims = [torch.randn(p.shape, generator=generator) for p in run.params]
    torch.stack([(p.float() - aim).square().sum() for p, aim in zip(run.params, aims, strict=True)]).sum().backward()


@pytest.mark.parametrize(
    ("base", "bucket"), [("sgd", 1), ("adamw", 1), ("adamw", 100), ("plain-mixed", 100), ("remainders-asam", 1)]
)
def test_the_bits_of_a_run_without_it(monkeypatch: pytest.MonkeyPatch, base: str, bucket: int) -> None:
    """With 1 byte every parameter is updated at once, with 100 some are left for step(). One step is a base step."""
    monkeypatch.setattr(release, "BUCKET", bucket)
    found = []
    for released in (False, True):
        run = Run(base, release_gradients=released, schedule=lambda t: t != 1)
        for t in range(4):
            backward(run, 2 * t)
            sam = run.opt.perturb()
            if sam:
                backward(run, 2 * t + 1)
            left = [p for p in run.params if p.grad is not None]
            assert len(left) < len(run.params) if released else len(left) == len(run.params)
            run.opt.step()
            run.opt.zero_grad()
        assert not run.opt._step_state.saved and not run.opt._step_state.released
        found.append(observed(run.params, run.opt))
    assert found[0] == found[1] and found[0]["sam_steps"] == 3
