"""Launch plans of the eager CPU path."""

from __future__ import annotations

from typing import Any


class Plans:
    def perturb(self, opt: Any) -> bool:
        return False

    def update(self, opt: Any, perturbed: bool, mixing: bool) -> bool:
        return False

    def restore(self, opt: Any) -> None:
        return None
