"""Training on several ranks through torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from sharded import batches, sharded_model, weights

from rst_fused import RST


def train(how: str, recipe: dict[str, Any], model_too: bool, steps: int) -> dict[str, Any]:
    """With full graphs of both phases, and of the model if ``model_too``. Counts the graphs after every step."""
    torch._dynamo.utils.counters.clear()
    model, mine = sharded_model(how)
    opt = RST(model.parameters(), **recipe)
    forward = torch.compile(model) if model_too else model
    perturb = torch.compile(lambda fire: opt.perturb(fire), fullgraph=True)
    step = torch.compile(lambda: opt.step(), fullgraph=True)
    graphs, fired = [], []
    for x, y in batches(steps):
        opt.zero_grad()
        (forward(mine(x)) - mine(y)).square().mean().backward()
        fired.append(opt.draw())
        if perturb(fired[-1]):
            with opt.second_pass():
                (forward(mine(x)) - mine(y)).square().mean().backward()
        step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {"weights": weights(model), "sam_steps": opt.sam_steps, "graphs": graphs, "fired": fired}
