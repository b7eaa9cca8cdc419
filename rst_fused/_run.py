"""Where a run stands: the few Python numbers of an optimizer that change at every step.

They live in an object of their own because torch.compile writes back changes to a plain object, but not to attributes
of an optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Run:
    steps: int = 0  # those counted; one more is finished while `finished` is set
    sam_steps: int = 0
    finished: bool = False
    was_sam: bool = False
    perturbed: bool = False  # between perturb and step
    mixing: bool = False  # and gamma != 1, so the first gradients are kept
    first_grads: dict[Tensor, Tensor] = field(default_factory=dict)
    drawn_at: int = -1  # the step for which drawn and gamma hold
    drawn: bool = False
    gamma: float = 1.0
    mixes: bool = False  # gamma != 1, found outside of a compiled perturb, which must not depend on gamma itself

    def count(self) -> None:
        """Adds the finished step to the counters. A compiled step only sets flags: a count would be one graph more."""
        if self.finished:
            self.steps += 1
            self.sam_steps += self.was_sam
            self.finished = False

    def finish(self, counts: bool = True) -> None:
        """Notes that the step under way is done; one that was captured into a CUDA graph does not count."""
        if counts:
            self.finished = True
            self.was_sam = self.perturbed
        self.perturbed = self.mixing = False
