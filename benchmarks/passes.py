"""Where the gradients of a memory benchmark come from: GPT-2, or a graph that holds nothing but them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD = 64  # elements of one head of attention, in GPT-2 of every size


class _Gradient(torch.autograd.Function):
    """A link of a chain of empty tensors, whose backward makes the gradient of one parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.p = p
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, torch.full_like(ctx.p, 1e-3)


def gradients_alone(params: Sequence[Tensor]) -> None:
    """One gradient after another, the last parameter's first, as a model's backward makes them; no activations."""
    x = torch.empty(0)
    for p in params:
        x = _Gradient.apply(x, p)
    x.backward(torch.empty(0))


def gpt2_loss(params: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Of the next token, over the parameters of cases.gpt2 in their order."""
    embedding, positions, *layers, last_gain, last_bias = params
    dim = embedding.shape[1]

    def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), gain, bias)

    x = F.embedding(tokens[:, :-1], embedding) + positions[: tokens.shape[1] - 1]
    for i in range(0, len(layers), 12):
        gain1, bias1, qkv, qkv_bias, out, out_bias, gain2, bias2, up, up_bias, down, down_bias = layers[i : i + 12]
        q, k, v = (norm(x, gain1, bias1) @ qkv + qkv_bias).unflatten(-1, (3, dim // HEAD, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ out + out_bias
        x = x + F.gelu(norm(x, gain2, bias2) @ up + up_bias, approximate="tanh") @ down + down_bias
    logits = F.linear(norm(x, last_gain, last_bias), embedding)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
