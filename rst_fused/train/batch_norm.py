"""BatchNorm over a batch that several processes share, so that the batch is normalised as it is on one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over all processes. What each of them makes of it has a gradient, and these are added, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes, which may have different numbers of images.

    torch.nn.SyncBatchNorm serves GPUs only. One all-reduce in each direction; in eval mode none.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        images = input.to(torch.promote_types(input.dtype, torch.float32))  # in autocast it is bfloat16
        dims = (0, 2, 3)
        # In float64: the difference of the two means below then loses nothing that counts in float32.
        sums = images.sum(dims, dtype=torch.float64), images.square().sum(dims, dtype=torch.float64)
        count = sums[0].new_full((1,), images.numel() // images.shape[1])
        total, squares, counts = _Sum.apply(torch.cat([*sums, count])).split([self.num_features, self.num_features, 1])
        mean = total / counts
        variance = squares / counts - mean.square()
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((variance * counts / (counts - 1)).to(self.running_var), self.momentum)
        scale = torch.rsqrt(variance + self.eps).to(images) * self.weight
        shape = (1, -1, 1, 1)
        return ((images - mean.to(images).view(shape)) * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def share_statistics(model: nn.Module) -> None:
    """Replaces every BatchNorm2d within ``model``, whose names and values stay, by one over all processes."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                setattr(module, name, shared.to(child.weight))
