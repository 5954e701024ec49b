"""Networks for images: the ConvNet of the literature, and AlexNet, VGG-11 and ResNets for cross-architecture tests.

AlexNet and VGG-11 are sized for small images; ResNet-18 and -50 are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_at_scale.core.errors import UserError


def instance_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels, channels)


class FastAvgPool2d(nn.AvgPool2d):
    """Average pooling of 2 x 2 pixels; on a CPU, where torch's takes as long as the convolutions, a matrix product.

    Eager code with channels first, that is: torch's own is fast where channels are last, and the compiler has its own.
    """

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[-2:]
        own = images.device.type == "cpu" and images.is_contiguous() and not torch.compiler.is_compiling()
        if not own or rows % 2 or columns % 2:
            return super().forward(images)
        half = columns // 2
        quarters = torch.eye(half, dtype=images.dtype, device=images.device) / 4
        # of two rows behind each other: pixels j and j + 1 of both become pixel j / 2
        pairs = quarters.view(1, half, 1, half).expand(2, half, 2, half).reshape(2 * columns, half)
        return images.unflatten(-2, (rows // 2, 2)).flatten(-2) @ pairs


class EmbeddingNetwork(nn.Module):
    """float32 [n, *shape] -> features [n, d] (`embed`) -> logits [n, classes]."""

    features: nn.Module
    classifier: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


class ConvNet(EmbeddingNetwork):
    """[conv 3x3 - norm - ReLU - average pool] x depth, then a linear layer; the depth grows with the resolution.

    `shape` is (C, H, W), or (T, C, H, W) for convolutions and poolings that are extended into time. The first pooling keeps
    all frames, each later one halves their number until one is left (C3D, Tran et al. 2015, arXiv 1412.0767).
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None,
                 norm: Callable[[int], nn.Module] = instance_norm):  # fmt: skip
        super().__init__()
        *time, channels, rows, columns = shape
        conv: Any = nn.Conv3d if time else nn.Conv2d
        pool: Any = nn.AvgPool3d if time else FastAvgPool2d
        depth = default_depth(rows) if depth is None else depth
        if min(rows, columns) >> depth < 1:
            raise UserError(
                f"a {type(self).__name__} of depth {depth} is too deep for {rows} x {columns} pixels; lower the depth"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if block == 0 and not time and (channels, rows) == (1, 28) else 1  # MNIST's 28 becomes 32
            strides = [2 if block and frames > 1 else 1 for frames in time]
            layers += [conv(channels, width, 3, padding=padding), norm(width), nn.ReLU(), pool((*strides, 2, 2))]
            rows, columns, channels = (rows + 2 * padding - 2) // 2, (columns + 2 * padding - 2) // 2, width
            time = [frames // stride for frames, stride in zip(time, strides, strict=True)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(channels * math.prod(time) * rows * columns, classes)


class AlexNet(EmbeddingNetwork):
    """AlexNet for small images: five convolutions, three poolings, one linear layer."""

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        blocks = [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)]
        layers, channels = list[nn.Module](), shape[0]
        for width, kernel, pool in blocks:
            layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.features(torch.zeros(1, *shape)).shape[1]
        self.classifier = nn.Linear(size, classes)


class VGG11(EmbeddingNetwork):
    """VGG-11 for small images, with instance norm; below 4 pixels it stops pooling."""

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        layers, channels, side = list[nn.Module](), shape[0], min(shape[1:])
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(step, int):
                layers += [nn.Conv2d(channels, step, 3, padding=1), instance_norm(step), nn.ReLU()]
                channels = step
            elif side >= 4:  # instance norm needs more than one pixel
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, classes)


class ResNet(EmbeddingNetwork):
    """torchvision's ResNet of 18 or 50 layers; up to 64 pixels with a 3x3 stem and without its pooling.

    With batch norm and more than 64 pixels its weights are torchvision's: `fc` is called `classifier`, and every other name
    starts with `net.`.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, layers: int = 18, norm: Callable[..., nn.Module] = instance_norm
    ):
        super().__init__()
        from torchvision.models import resnet  # imported here: it takes seconds in every process

        if min(shape[1:]) < 16:
            raise UserError(f"resnet{layers} needs at least 16 x 16 pixels, the data has {shape[1]} x {shape[2]}")
        self.net = getattr(resnet, f"resnet{layers}")(num_classes=classes, norm_layer=norm)
        if min(shape[1:]) <= 64:
            self.net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()
        elif shape[0] != 3:
            self.net.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
        self.classifier, self.net.fc = self.net.fc, nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        return self.net(images)


def default_depth(pixels: int) -> int:
    """3 at 32 pixels and one more per doubling (4 at 64, 5 at 128, 6 at 224), 2 from 8 to 16, else 1."""
    return max(2 if pixels >= 8 else 1, min(6, round(math.log2(pixels / 32)) + 3))
