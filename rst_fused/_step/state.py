"""The one owner of a step under way: where the run stands, what is perturbed, and where its weights are kept.

A plain object, because torch.compile writes back changes to one, but not to attributes of an optimizer. Dictionaries in
it are replaced and never changed in place: a launch plan shares its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

# The fields that change when all weights are back, or a step is done. Executors set them together with the last kernel.
# `mixing` first: an interrupt among them must not leave it without a perturbation.
AFTER_RESTORE: dict[str, Any] = {
    "mixing": False, "perturbed": False, "captured": False, "first_grads": {}, "saved": {},
}  # fmt: skip
# Once the weights are back and gradients are mixed, before an update.
NOTHING_KEPT: dict[str, Any] = {"mixing": False, "first_grads": {}, "saved": {}}
_AFTER_SAM_STEP: dict[str, Any] = {**AFTER_RESTORE, "finished": True, "was_sam": True}
# The same without the fields that only mixing or capturing sets: each one costs time at every step.
_AFTER_PLAIN_SAM_STEP: dict[str, Any] = {"perturbed": False, "saved": {}, "finished": True, "was_sam": True}
_AFTER_BASE_STEP: dict[str, Any] = {"finished": True, "was_sam": False}


class StepState:
    def __init__(self, steps: int = 0, sam_steps: int = 0) -> None:
        # Not a dataclass: where the class has a default of the same name, Python 3.12 is slow to set an attribute.
        self.steps, self.sam_steps = steps, sam_steps  # those counted; one more is finished while `finished` is set
        self.finished = self.was_sam = False
        # --- the draw
        self.drawn_at = -1  # the step for which drawn and gamma hold
        self.drawn = False
        self.gamma = 1.0
        self.unasked_at = -1  # the step for which a backward asked, to release gradients, and nobody else
        self.mixes = False  # gamma != 1, found outside of a compiled perturb, which must not depend on gamma itself
        # --- the other ranks (rst_fused._step.agreement, m_sharpness)
        self.check_at: float = 0  # the step from which on a look at them is due
        self.agreement: Any = None  # what was compared; None: nothing yet, or this process is alone
        self.norm_unseen = False  # they have not compared ||g1||, as a step that mixes wants
        self.local_grads = False  # p.grad is that of this rank alone: perturb may use it, and an update may not
        # --- between perturb and step
        self.perturbed = False
        self.mixing = False  # and gamma != 1, so the first gradients are kept
        self.captured = False  # the perturbation was recorded in a CUDA graph, and has not happened
        # Perturbed parameter: its backup, its master copy, or what was its gradient; or SavedByPlan of a launch plan.
        self.saved: Mapping[Tensor, Tensor] = {}
        self.swaps: frozenset[int] = frozenset()  # while perturb decides that: see rst_fused._step.gradient_memory
        # Parameters that are updated within the backward (rst_fused._step.release), of this step so far: complete
        # gradients, with the stream that each came on, of which this dictionary alone changes in place; and updates.
        self.waiting: dict[Tensor, Any] = {}
        self.released: dict[Tensor, None] = {}
        self.first_grads: Any = {}  # by parameter; or those that a launch plan keeps, in the order of `saved`
        # --- kept from step to step
        self.backups: dict[Tensor, Tensor] = {}  # of parameters whose gradient cannot keep the weights
        self.placeholders: dict[int, Any] = {}  # see rst_fused._step.placeholders
        self.apart: list[int] = []  # addresses of parameters that were seen to share no memory

    def count(self) -> None:
        """Adds the finished step to the counters. A compiled step only sets flags: a count would be one graph more."""
        if self.finished:
            # In one statement, within which no interrupt finds the step counted twice.
            self.steps, self.sam_steps, self.finished = self.steps + 1, self.sam_steps + self.was_sam, False

    def after_step(self, counts: bool = True) -> dict[str, Any]:
        """The fields that change when the step is done; one that was captured into a CUDA graph does not count."""
        if not counts:
            return AFTER_RESTORE
        if not self.perturbed:
            return _AFTER_BASE_STEP
        return _AFTER_SAM_STEP if self.mixing or self.captured else _AFTER_PLAIN_SAM_STEP

    def become(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def holds_first_grads_elsewhere(self) -> bool:
        return type(self.first_grads) is not dict

    def is_kept_by_plan(self) -> bool:
        """Whether a launch plan keeps something that only eager code can ask it for."""
        return type(self.saved) is not dict or self.holds_first_grads_elsewhere()

    def saved_now(self) -> dict[Tensor, Tensor]:
        kept: Any = self.saved
        return kept if type(kept) is dict else kept.as_dict()

    def take_saved(self) -> dict[Tensor, Tensor]:
        """Makes ``saved`` a dictionary."""
        kept: Any = self.saved
        saved = self.saved_now()
        if saved is not kept:
            self.saved = saved  # first: an interrupt must not find the weights nowhere
            kept.clear()
        return saved

    def take_first_grads(self) -> None:
        """Makes first_grads a dictionary."""
        if self.holds_first_grads_elsewhere():
            kept = self.first_grads
            # First: an interrupt must not find them nowhere.
            self.first_grads = dict(zip(self.saved, kept.as_list(), strict=True))
            kept.clear()

    def forget(self, params: Iterable[Tensor]) -> None:
        """These parameters are back at their weights, or got new ones."""
        saved, first_grads = dict(self.saved_now()), dict(self.first_grads)
        for p in params:
            saved.pop(p, None)
            first_grads.pop(p, None)
        self.saved, self.first_grads = saved, first_grads
