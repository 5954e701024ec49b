"""Networks for clips, float32 [n, T, C, H, W].

R3D-18 and R(2+1)D-18 (Tran et al. 2018, arXiv 1711.11248) are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill_at_scale.core.errors import UserError
from distill_at_scale.models.image import ConvNet, EmbeddingNetwork, instance_norm


class ConvNet3D(ConvNet):
    """The ConvNet extended into time; `shape` is (T, C, H, W)."""

    def embed(self, clips: Tensor) -> Tensor:
        return self.features(clips.transpose(1, 2))


class VideoResNet(EmbeddingNetwork):
    """torchvision's network `name` (r3d_18 or r2plus1d_18); without `batch_norm` it has instance norm instead.

    With batch norm its weights are torchvision's: `fc` is called `classifier`, and every other name starts with `net.`.
    """

    def __init__(self, name: str, shape: Sequence[int], classes: int, batch_norm: bool):
        super().__init__()
        from torchvision.models import video  # imported here: it takes seconds in every process

        if min(shape[2:]) < 32 or shape[0] < 4:
            raise UserError(
                f"{name} needs at least 4 frames of 32 x 32 pixels, the data has {shape[0]} of {shape[2]} x {shape[3]}"
            )
        self.net = getattr(video, name)(num_classes=classes)
        if shape[1] != 3:
            stem, conv = self.net.stem, self.net.stem[0]
            stem[0] = nn.Conv3d(shape[1], conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        if not batch_norm:
            _replace_batch_norm(self.net)
        self.classifier, self.net.fc = self.net.fc, nn.Identity()

    def embed(self, clips: Tensor) -> Tensor:
        return self.net(clips.transpose(1, 2))


class OneFrame(nn.Module):
    """An image network on the middle frame of a clip, a control: how much of the class needs no motion."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        return self.network(clips[:, clips.shape[1] // 2])


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, name, instance_norm(child.num_features))
        else:
            _replace_batch_norm(child)
