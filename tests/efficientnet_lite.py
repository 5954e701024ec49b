"""EfficientNet-Lite0 as a user's network plug-in, with the layer names of efficientnet-lite-pytorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.models.spec import NetworkSpec

# blocks, kernel, stride of the first block, expansion, channels: the table of EfficientNet-B0 (arXiv 1905.11946)
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class SameConv(nn.Conv2d):
    """Padded as TensorFlow pads `same`: the odd pixel is at the bottom and on the right."""

    def forward(self, images: Tensor) -> Tensor:
        sides = []
        for size, kernel, stride in zip(images.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(images, sides))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner, self.skips = inputs * expansion, stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv, self._bn0 = conv(inputs, inner), norm(inner)
        self.expands = expansion > 1
        self._depthwise_conv, self._bn1 = conv(inner, inner, kernel, stride, inner), norm(inner)
        self._project_conv, self._bn2 = conv(inner, outputs), norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(images))) if self.expands else images
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + images if self.skips else x


class EfficientNetLite0(nn.Module):
    def __init__(self, spec: NetworkSpec):
        super().__init__()
        self._conv_stem, self._bn0 = conv(spec.shape[0], 32, 3, 2), norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for number in range(count):
                blocks.append(Block(channels, outputs, kernel, stride if number == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = conv(channels, 1280), norm(1280)
        self._fc = nn.Linear(1280, spec.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))
