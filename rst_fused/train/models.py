"""The networks of the training command: a small CNN and two ResNets, for images of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_bn(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class SmallCNN(nn.Module):
    """Two rounds of 3x3 conv, BN, ReLU and 2x2 max-pooling, 16 and 32 channels, then a linear layer.

    The linear layer sees every pixel that is left. 6k parameters for the 8x8 digits.
    """

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn(channels, 16), nn.ReLU(), nn.MaxPool2d(2), _conv_bn(16, 32), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(32 * (size // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class _Block(nn.Module):
    """The basic residual block (He et al. 2016), with a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(inputs, outputs, stride)
        self.second = _conv_bn(outputs, outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _conv_bn(inputs, outputs, stride, kernel=1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with the CIFAR stem: a 3x3 convolution, no pooling. All stages but the first halve the size."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(channels, widths[0]), nn.ReLU()]
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                layers.append(_Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "resnet8": lambda channels, classes, size: ResNet(channels, classes, (16, 32, 64), blocks=1),
    "resnet18": lambda channels, classes, size: ResNet(channels, classes, (64, 128, 256, 512), blocks=2),
}


def build_model(name: str, channels: int, classes: int, size: int, seed: int) -> nn.Module:
    """The network ``name`` for square images of side ``size``; equal seeds give equal weights.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](channels, classes, size)
