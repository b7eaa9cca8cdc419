"""The one owner of a step under way: where the run stands, what is perturbed, and where its weights are kept.

A plain object, because torch.compile writes back changes to one, but not to attributes of an optimizer. Dictionaries in
it are replaced and never changed in place: a launch plan shares its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The fields that change when all weights are back, or a step is done. Executors set them together with the last kernel.
AFTER_RESTORE: dict[str, Any] = {
    "perturbed": False, "mixing": False, "captured": False, "first_grads": {}, "saved": {},
}  # fmt: skip
_AFTER_SAM_STEP: dict[str, Any] = {**AFTER_RESTORE, "finished": True, "was_sam": True}
_AFTER_BASE_STEP: dict[str, Any] = {"finished": True, "was_sam": False}


@dataclass
class StepState:
    steps: int = 0  # those counted; one more is finished while `finished` is set
    sam_steps: int = 0
    finished: bool = False
    was_sam: bool = False
    # --- the draw
    drawn_at: int = -1  # the step for which drawn and gamma hold
    drawn: bool = False
    gamma: float = 1.0
    mixes: bool = False  # gamma != 1, found outside of a compiled perturb, which must not depend on gamma itself
    # --- between perturb and step
    perturbed: bool = False
    mixing: bool = False  # and gamma != 1, so the first gradients are kept
    captured: bool = False  # the perturbation was recorded in a CUDA graph, and has not happened
    saved: dict[Tensor, Tensor] = field(default_factory=dict)  # perturbed parameter: its backup or its master copy
    # By parameter; or those that a launch plan keeps, in the order of `saved`.
    first_grads: Any = field(default_factory=dict)
    # --- kept from step to step
    backups: dict[Tensor, Tensor] = field(default_factory=dict)
    apart: list[int] = field(default_factory=list)  # addresses of parameters that were seen to share no memory

    def count(self) -> None:
        """Adds the finished step to the counters. A compiled step only sets flags: a count would be one graph more."""
        if self.finished:
            self.steps += 1
            self.sam_steps += self.was_sam
            self.finished = False

    def after_step(self, counts: bool = True) -> dict[str, Any]:
        """The fields that change when the step is done; one that was captured into a CUDA graph does not count."""
        if not counts:
            return AFTER_RESTORE
        return _AFTER_SAM_STEP if self.perturbed else _AFTER_BASE_STEP

    def become(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def holds_first_grads_elsewhere(self) -> bool:
        return type(self.first_grads) is not dict

    def take_first_grads(self) -> None:
        """Makes first_grads a dictionary."""
        if self.holds_first_grads_elsewhere():
            kept = self.first_grads
            # First: an interrupt must not find them nowhere.
            self.first_grads = dict(zip(self.saved, kept.as_list(), strict=True))
            kept.clear()

    def forget(self, params: Iterable[Tensor]) -> None:
        """These parameters are back at their weights, or got new ones."""
        saved, first_grads = dict(self.saved), dict(self.first_grads)
        for p in params:
            saved.pop(p, None)
            first_grads.pop(p, None)
        self.saved, self.first_grads = saved, first_grads
