"""The networks for clips, [n, T, C, H, W].

ConvNet3D is the small network of the video-distillation literature: ConvNet with every convolution and pooling
extended into time. As in C3D (Tran et al. 2015, arXiv 1412.0767) the first pooling leaves time alone; every other one
halves it until one frame is left. R3D-18 and R(2+1)D-18 (Tran et al. 2018, arXiv 1711.11248) are torchvision's.
`OneFrame` is a control: a network for images that sees nothing of a clip but its middle frame.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill_at_scale.core.errors import UserError
from distill_at_scale.models.image import default_depth, instance_norm


class ConvNet3D(nn.Module):
    """[conv 3x3x3 - norm - ReLU - average pool] x depth, then a linear classifier; `shape` is (T, C, H, W)."""

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None):
        super().__init__()
        frames, channels, height, wide = shape
        depth = default_depth(height) if depth is None else depth
        if min(height, wide) >> depth < 1:
            raise UserError(f"a ConvNet3D of depth {depth} is too deep for {height} x {wide} pixels; lower the depth")
        layers: list[nn.Module] = []
        for block in range(depth):
            halved = 2 if block and frames > 1 else 1
            layers += [nn.Conv3d(channels, width, 3, padding=1), instance_norm(width), nn.ReLU()]
            layers += [nn.AvgPool3d((halved, 2, 2))]
            frames, height, wide, channels = frames // halved, height // 2, wide // 2, width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(channels * frames * height * wide, classes)

    def embed(self, clips: Tensor) -> Tensor:
        """[n, T, C, H, W] -> features [n, width * what is left of T x H x W]."""
        return self.features(clips.transpose(1, 2))

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.embed(clips))


class VideoResNet(nn.Module):
    """torchvision's network `name` (r3d_18 or r2plus1d_18); unless `batch_norm`, with instance norm in the place of it.

    With batch norm it is torchvision's to the last weight: `fc` is called `classifier`, and every other name has
    `net.` before it.
    """

    def __init__(self, name: str, shape: Sequence[int], classes: int, batch_norm: bool):
        super().__init__()
        from torchvision.models import video  # here, because importing torchvision takes seconds in every process

        if min(shape[2:]) < 32 or shape[0] < 4:
            raise UserError(
                f"{name} needs at least 4 frames of 32 x 32 pixels, the data has {shape[0]} of {shape[2]} x {shape[3]}"
            )
        self.net = getattr(video, name)(num_classes=classes)
        if shape[1] != 3:
            first = self.net.stem[0]
            self.net.stem[0] = nn.Conv3d(
                shape[1], first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
            )
        if not batch_norm:
            _with_instance_norm(self.net)
        self.classifier, self.net.fc = self.net.fc, nn.Identity()

    def embed(self, clips: Tensor) -> Tensor:
        return self.net(clips.transpose(1, 2))

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.embed(clips))


class OneFrame(nn.Module):
    """A network for images on the middle frame of a clip: how much of the class needs no motion."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        return self.network(clips[:, clips.shape[1] // 2])


def _with_instance_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, name, instance_norm(child.num_features))
        else:
            _with_instance_norm(child)
