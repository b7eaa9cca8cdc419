"""ema: average <- decay * average + (1 - decay) * w: 12 bytes per fp32 parameter."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import Stream, check_length, check_lists, each_part, launch, on_device
from .sam_math import ema
from .traversal import address, kernel, load, locate, store

_PARAM, _AVERAGE, _SLOTS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _average(average, param, at, count, decay, one_minus_decay, T: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr):
    before, w = load(average, at, count, WHOLE).to(V), load(param, at, count, WHOLE).to(V)
    store(average, at, count, ema(decay, one_minus_decay, before, w).to(T), WHOLE)


@kernel
def ema_kernel(
    table, tensors, decays, T: tl.constexpr, STATE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    record, begin, count, whole = locate(table, tensors, _SLOTS, BLOCK)
    param, average = address(record, _PARAM, begin, T), address(record, _AVERAGE, begin, STATE)
    decay = tl.load(decays)
    one_minus_decay, decay = (1 - decay).to(V), decay.to(V)
    for at in range(0, whole, BLOCK):
        _average(average, param, at + tl.arange(0, BLOCK), count, decay, one_minus_decay, T, V, True)
    for at in range(whole, count, TAIL):
        _average(average, param, at + tl.arange(0, TAIL), count, decay, one_minus_decay, T, V, False)


@torch.no_grad()
def ema_(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    op = "ema_"
    check_length(op, "averages", averages, params)
    streams = [Stream("params", params), Stream("averages", averages, written=True)]
    check_lists(op, streams, [len(params)])
    number = torch.tensor([decay], dtype=torch.float64)
    for part in each_part(streams, [len(params)]):
        (decays,) = on_device(part.device, number)
        launch(ema_kernel, part, decays, V=part.arithmetic)
