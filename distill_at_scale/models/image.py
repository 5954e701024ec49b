"""The networks for images (METHOD.md section 4).

ConvNet is the standard network of the field: blocks of conv 3x3, instance norm (GroupNorm with as many groups as
channels), ReLU and average pooling, then one linear layer; its depth grows with the resolution. The others take the
place of the literature's cross-architecture list, sized for small images; ResNet-18 and -50 are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill_at_scale.core.errors import UserError


def instance_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """[conv - norm - ReLU - pool] x depth, then a linear classifier."""

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None,
                 norm: Callable[[int], nn.Module] = instance_norm):  # fmt: skip
        super().__init__()
        channels, height, wide = shape
        depth = default_depth(height) if depth is None else depth
        if min(height, wide) >> depth < 1:
            raise UserError(f"a ConvNet of depth {depth} is too deep for {height} x {wide} pixels; lower the depth")
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 and height == 28 else 1  # MNIST's 28 becomes 32
            layers += [nn.Conv2d(channels, width, 3, padding=padding), norm(width), nn.ReLU(), nn.AvgPool2d(2)]
            height, wide, channels = (height + 2 * padding - 2) // 2, (wide + 2 * padding - 2) // 2, width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(channels * height * wide, classes)

    def embed(self, images: Tensor) -> Tensor:
        """[n, *shape] -> features [n, width * height * width after pooling]."""
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


class AlexNet(nn.Module):
    """AlexNet for small images: five convolutions, three poolings, one linear layer."""

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        plan = [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)]
        layers: list[nn.Module] = []
        before = shape[0]
        for after, kernel, pool in plan:
            layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
            before = after
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(_width(self.features, shape), classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


class VGG11(nn.Module):
    """VGG-11 for small images, with instance norm; a pooling is left out once the picture is one pixel wide."""

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = shape[0], min(shape[1:])
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(step, int):
                layers += [nn.Conv2d(channels, step, 3, padding=1), instance_norm(step), nn.ReLU()]
                channels = step
            elif side >= 4:  # instance norm needs more than one pixel
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


class ResNet(nn.Module):
    """torchvision's ResNet of 18 or 50 layers; up to 64 pixels with a 3x3 stem and without its pooling.

    With batch norm and more than 64 pixels it is torchvision's to the last weight: `fc` is called `classifier`, and
    every other name has `net.` before it.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, layers: int = 18, norm: Callable[..., nn.Module] = instance_norm
    ):
        super().__init__()
        from torchvision.models import resnet  # here, because importing torchvision takes seconds in every process

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

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


def default_depth(pixels: int) -> int:
    """3 at 32 pixels and one more per doubling (4 at 64, 5 at 128, 6 at 224), 2 from 8 to 16, else 1."""
    return max(2 if pixels >= 8 else 1, min(6, round(math.log2(pixels / 32)) + 3))


def _width(features: nn.Module, shape: Sequence[int]) -> int:
    with torch.no_grad():
        return features(torch.zeros(1, *shape)).shape[1]
