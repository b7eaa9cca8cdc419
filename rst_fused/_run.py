"""Where a run stands: the few Python numbers of an optimizer that change at every step.

They live in an object of their own because torch.compile writes back changes to a plain object, but not to attributes
of an optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Run:
    steps: int = 0
    sam_steps: int = 0
    perturbed: bool = False  # between perturb and step
    mixing: bool = False  # and gamma != 1, so the first gradients are kept
    drawn_at: int = -1  # the step for which drawn and gamma hold
    drawn: bool = False
    gamma: float = 1.0
