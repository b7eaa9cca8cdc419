"""Training on several ranks that is saved by torch.distributed.checkpoint, and goes on from what was saved."""

from __future__ import annotations

import os
import signal
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import batches, make_model, result, sharded_model, steps_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from rst_fused import RST

FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def go_on(
    how: str, recipe: dict[str, Any], form: str, first: int, last: int, total: int, load: str, save: str,
    asynchronous: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Steps ``first`` to ``last`` of ``total``, from the checkpoint at ``load`` and to that at ``save``, if any."""
    model, mine = sharded_model(how)
    opt = RST(model.parameters(), **recipe)
    options = FORMS[form]
    if load:
        _load(model, opt, options, load)
        assert opt.steps == first
    steps_of(opt, model, batches(total)[first:last], mine)
    if save:
        weights, state = get_state_dict(model, opt, options=options)
        whole = {"model": weights, "optim": state}
        if asynchronous:
            dcp.async_save(whole, checkpoint_id=save).result()
        else:
            dcp.save(whole, checkpoint_id=save)
    return result(opt, model)


def whole_and_half(
    how: str, recipe: dict[str, Any], form: str, total: int, save: str, asynchronous: bool = False
) -> dict[str, Any]:
    """What an uninterrupted run comes to, after which another one saves half way."""
    whole = go_on(how, recipe, form, 0, total, total, "", "")
    go_on(how, recipe, form, 0, total // 2, total, "", save, asynchronous)
    return whole


def _load(model: nn.Module, opt: RST, options: StateDictOptions, load: str) -> None:
    weights, state = get_state_dict(model, opt, options=options)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=load)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=options)


def go_on_until_a_rank_is_killed(recipe: dict[str, Any], form: str, total: int, load: str) -> None:
    """From the checkpoint, until rank 1 is killed between the passes of a SAM step."""
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), **recipe)
    _load(model, opt, FORMS[form], load)
    steps_of(opt, model, batches(total)[opt.steps : opt.steps + 2], mine)
    (x, y) = batches(total)[opt.steps]
    (model(mine(x)) - mine(y)).square().mean().backward()
    opt.perturb(fire=True)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (model(mine(x)) - mine(y)).square().mean().backward()


def refuses_to_save_while_perturbed() -> list[str]:
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), schedule=1.0, lr=0.1)
    (x, y) = batches(1)[0]
    before = [p.full_tensor().clone() for p in model.parameters()]
    (model(mine(x)) - mine(y)).square().mean().backward()
    opt.perturb()
    with pytest.raises(RuntimeError, match="state_dict while the weights are perturbed") as caught:
        get_optimizer_state_dict(model, opt)
    opt.restore()
    get_optimizer_state_dict(model, opt)
    assert all(a.equal(p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True))
    return [str(caught.value)]


def refuses_state_of_another_layout() -> list[str]:
    """Plain tensors, as of a run that was not sharded, and those of another model."""
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), lr=0.1, momentum=0.9)
    steps_of(opt, model, batches(2), mine)
    said = []
    plain = opt.state_dict()
    plain["state"] = {k: {n: v.full_tensor() for n, v in state.items()} for k, state in plain["state"].items()}
    other = opt.state_dict()
    other["state"] = dict(enumerate(reversed(list(other["state"].values()))))
    for wrong in (plain, other):
        before = result(opt, model)
        with pytest.raises(ValueError) as caught:
            opt.load_state_dict(wrong)
        said.append(str(caught.value))
        assert opt.steps == before["steps"] and all(type(p) is not nn.Parameter for p in opt.state)
    return said



def remainders_in_full() -> dict[str, Any]:
    """FSDP2 of bfloat16 parameters with remainders: in full and back again, and by a file that is read for copies."""

    def make(masters: bool | str) -> tuple[nn.Module, RST]:
        model = fully_shard(make_model().bfloat16())
        return model, RST(model.parameters(), "adamw", lr=0.1, schedule=0.0, master_weights=masters)

    def remainders(model: nn.Module, opt: RST) -> list[torch.Tensor]:
        return [opt.state[p]["remainder"].to_local() for p in model.parameters()]

    one, other, copies = make("remainder"), make("remainder"), make(True)
    for x, _ in batches(4):
        one[1].zero_grad()
        one[0](x.bfloat16()).float().square().mean().backward()
        one[1].step()
    assert any(r.any() for r in remainders(*one))
    weights, state = get_state_dict(*one, options=FORMS["full"])
    dtypes = {held["remainder"].dtype for held in state["state"].values()}
    set_state_dict(*other, model_state_dict=weights, optim_state_dict=state, options=FORMS["full"])
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    dcp.save({"optim": get_optimizer_state_dict(*one)}, checkpoint_id=folder[0])
    with pytest.raises(dcp.api.CheckpointException, match="Missing key.*master"):
        dcp.load({"optim": get_optimizer_state_dict(*copies)}, checkpoint_id=folder[0])
    return {"dtypes": dtypes, "resumed": all(map(torch.equal, remainders(*one), remainders(*other)))}
