"""Calls that torch.compile runs eagerly, by a graph break; with fullgraph=True it raises and gives their reason.

Whether it traces them, steps ask of is_dynamo_compiling: is_compiling is True for all threads while one compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_REASONS = {
    "perturb": "perturb() under torch.compile(fullgraph=True): pass fire=opt.draw(), evaluated outside the graph; with "
    "release_gradients=True call it outside",
    "step": "step() under torch.compile(fullgraph=True): no closure, and opt.draw() outside before every step; "
    "compile perturb() too, for what it keeps to be in reach of the graph; with release_gradients=True call it outside",
    "restore": "restore() under torch.compile(fullgraph=True): call opt.restore() outside of the graph, or compile "
    "perturb() too, for what it keeps to be in reach of the graph; with release_gradients=True call it outside",
}
call: dict[str, Callable[..., Any]] = {}
_callback: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)


def is_around() -> bool:
    """Whether torch.compile runs its caller eagerly, but would trace what that calls: pieces of a step, of which none
    knows that it is compiled."""
    return _callback() not in (None, False)


def prepare(**functions: Callable[..., Any]) -> None:
    """When the first optimizer is made, rather than with the package: it loads the compiler, which takes a second."""
    for name, function in functions.items():
        if name not in call:
            call[name] = torch.compiler.disable(function, reason=_REASONS[name])
