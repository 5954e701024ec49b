"""Networks by name, for scoring, matching and evaluation.

A name is an entry of `NETWORKS`, `torchvision:NAME` (any of torchvision's image classifiers, unchanged, for weights trained
with it), `frame:NAME` (an image network on the middle frame of a clip) or `package.module:Object` (your own). Weights are in
`models/pretrained.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from distill_at_scale.config.explain import suggest
from distill_at_scale.config.registry import FRAME, resolve
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.models.image import VGG11, AlexNet, ConvNet, ResNet
from distill_at_scale.models.mlp import MLP
from distill_at_scale.models.video import ConvNet3D, OneFrame, VideoResNet

# bytes of one layer's activations per forward pass: a CPU core's cache; more on a GPU costs memory and saves no time
CPU_CACHE, GPU_ACTIVATIONS = 8 * 2**20, 512 * 2**20
TORCHVISION = "torchvision:"  # prefix of names
MULTIPLE_OUTPUTS = ("googlenet", "inception_v3")  # torchvision networks that return more than logits in training

Build = Callable[["NetworkSpec"], nn.Module]


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that defines a network except its weights.

    A network of your own, `package.module:Object`, is called with this specification and returns an `nn.Module`.

    Args:
        name: the network's name, see `builder`.
        shape: of one sample: (C, H, W) for images, (T, C, H, W) for clips, any for tensors.
        classes: number of logits.
        width: channels of a ConvNet, units of an MLP; other networks ignore it.
        depth: blocks of a ConvNet, hidden layers of an MLP; None: from the resolution, and 2 layers.
        kind: "images", "clips" or "tensors"; None: images or clips, from the number of axes of `shape`.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    width: int = 128
    depth: int | None = None
    kind: str | None = None

    @property
    def clips(self) -> bool:
        return self.kind == "clips" if self.kind else len(self.shape) == 4

    @property
    def tensors(self) -> bool:
        return self.kind == "tensors"

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which one number per channel broadcasts to samples: (C, 1, 1); for tensors (C, 1, ...) or (1,)."""
        if not self.tensors:
            return (self.shape[-3], 1, 1)
        return (self.shape[0], *(1,) * (len(self.shape) - 1)) if len(self.shape) > 1 else (1,)

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised network on the CPU, float32 [n, *shape] -> logits [n, classes]; a seed decides its weights.

        Its last linear layer computes in float32 under autocast too, so that close logits do not become equal.

        Raises UserError for an unknown name and for data that the network does not take.
        """
        with rng.default_generator(seed):
            network = builder("network", self.name)(self)
        if type(head := last_linear(network)) is nn.Linear:
            head.__class__ = Float32Linear
        return network

    def renew(self, network: nn.Module, seed: int) -> None:
        """Give a network of this specification, on any device, the weights of `build(seed)`, in place."""
        own = network.state_dict()
        for name, values in self.build(seed).state_dict().items():
            own[name].copy_(values, non_blocking=True)

    def skeleton(self) -> nn.Module:
        """The network on torch's meta device; on the CPU if its constructor reads the values of its weights."""
        with contextlib.suppress(RuntimeError), torch.device("meta"):
            return self.build(0)
        return self.build(0)

    def microbatch(self, device: torch.device) -> int:
        """Samples per forward pass: on a CPU as many as keep a layer's activations in the cache (twice as fast as 256)."""
        return max(4, (CPU_CACHE if device.type == "cpu" else GPU_ACTIVATIONS) // self.activation_bytes(1))

    def memory_format(
        self, use: Literal["score", "train", "match"], device: torch.device, compiled: bool
    ) -> MemoryFormat:
        """The memory format of weights and samples for scoring, training or matching.

        Channels last on a GPU (not for matching of images), in compiled code, and for scoring of images; other eager code on a
        CPU is slower with it.
        """
        fast = compiled or device.type == "cuda"
        if self.clips:
            return MemoryFormat(self, fast)
        return MemoryFormat(self, use == "score" or compiled or (use == "train" and fast))

    def training_seconds(self, device: torch.device) -> float:
        """Approximate seconds of one sample forward and backward on a device."""
        network, samples = self.build(0).to(device).train(), torch.zeros(4, *self.shape, device=device)
        for _ in range(2):
            began = time.perf_counter()
            network(samples).sum().backward()
            next(p.grad for p in network.parameters() if p.grad is not None).sum().item()  # waits for a GPU
        return max(1e-7, (time.perf_counter() - began) / len(samples))

    def activation_bytes(self, samples: int) -> int:
        """Bytes of the widest layer's output for this many samples: a measure of the computation."""
        return samples * widest_layer(self)


class Float32Linear(nn.Linear):
    """A linear layer in the precision of its weights, whatever autocast asks for."""

    def forward(self, features: Tensor) -> Tensor:
        if features.device.type == "meta":  # has no autocast
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The last nn.Linear without submodules."""
    linear = [m for m in network.modules() if isinstance(m, nn.Linear) and not any(True for _ in m.children())]
    return linear[-1] if linear else None


@dataclass(frozen=True)
class MemoryFormat:
    """Channels last or torch's default, for weights and samples; shapes and values are the same either way."""

    spec: NetworkSpec
    channels_last: bool

    def network(self, network: nn.Module) -> nn.Module:
        """Convert the weights of convolutions in place; returns the network."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in network.parameters() if self.channels_last else ():
            if parameter.dim() in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
        return network

    def images(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] or clips [n, T, C, H, W], of any dtype."""
        if not self.channels_last or self.spec.tensors:
            return images
        if not self.spec.clips:
            return images.contiguous(memory_format=torch.channels_last)
        return images.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d).transpose(1, 2)


def _build_for(kind: Literal["images", "clips"], make: Build, spec: NetworkSpec) -> nn.Module:
    problem = None
    if spec.tensors and (kind == "clips" or len(spec.shape) != 3):
        problem = f"arrays of shape {spec.shape}; take mlp, or a network of your own (package.module:Object)"
    elif kind == "images" and spec.clips:
        problem = f"clips; take one of {', '.join(OF_CLIPS)}, or {FRAME}{spec.name}, which sees their middle frame only"
    elif kind == "clips" and not spec.clips:
        problem = "images; set data.frames, or take another network"
    if problem:
        raise UserError(f"the network {spec.name!r} takes {kind}, the data are {problem}")
    return make(spec)


OF_IMAGES: dict[str, Build] = {
    "convnet": lambda spec: ConvNet(spec.shape, spec.classes, spec.width, spec.depth),
    "convnet_bn": lambda spec: ConvNet(spec.shape, spec.classes, spec.width, spec.depth, nn.BatchNorm2d),
    "alexnet": lambda spec: AlexNet(spec.shape, spec.classes),
    "vgg11": lambda spec: VGG11(spec.shape, spec.classes),
    "resnet18": lambda spec: ResNet(spec.shape, spec.classes, 18),
    "resnet18_bn": lambda spec: ResNet(spec.shape, spec.classes, 18, nn.BatchNorm2d),
    "resnet50": lambda spec: ResNet(spec.shape, spec.classes, 50),
    "resnet50_bn": lambda spec: ResNet(spec.shape, spec.classes, 50, nn.BatchNorm2d),
}
OF_CLIPS: dict[str, Build] = {
    "convnet3d": lambda spec: ConvNet3D(spec.shape, spec.classes, spec.width, spec.depth),
    "r3d_18": lambda spec: VideoResNet("r3d_18", spec.shape, spec.classes, batch_norm=False),
    "r3d_18_bn": lambda spec: VideoResNet("r3d_18", spec.shape, spec.classes, batch_norm=True),
    "r2plus1d_18": lambda spec: VideoResNet("r2plus1d_18", spec.shape, spec.classes, batch_norm=False),
    "r2plus1d_18_bn": lambda spec: VideoResNet("r2plus1d_18", spec.shape, spec.classes, batch_norm=True),
}
NETWORKS: dict[str, Build] = {
    "mlp": lambda spec: MLP(spec.shape, spec.classes, spec.width, spec.depth),
    **{name: partial(_build_for, "images", make) for name, make in OF_IMAGES.items()},
    **{name: partial(_build_for, "clips", make) for name, make in OF_CLIPS.items()},
}


def builder(key: str, name: str) -> Build:
    """The function that builds the network called `name` from its specification; messages cite the configuration's `key`.

    Raises UserError if no network has this name.
    """
    if name.startswith(FRAME):
        return partial(_build_one_frame, builder(key, name.removeprefix(FRAME)))
    if not name.startswith(TORCHVISION):
        return resolve(key, name, NETWORKS)
    architecture = name.removeprefix(TORCHVISION)
    if architecture in MULTIPLE_OUTPUTS:
        raise UserError(f"{key} = {name!r} has outputs besides its logits and cannot be used; take another network")
    if architecture not in torchvision_classifiers():
        raise UserError(
            f"{key} = {name!r} is no classifier of torchvision; {suggest(architecture, torchvision_classifiers())}"
        )
    return partial(_build_torchvision, architecture)


def is_plug_in(name: str) -> bool:
    """Whether the name is a user's own code, which only a configuration may name, never an artefact."""
    name = name.removeprefix(FRAME)
    return ":" in name and not name.startswith(TORCHVISION)


def torchvision_classifiers() -> list[str]:
    """The image classifiers of torchvision that can be used here."""
    from torchvision import models

    return [name for name in models.list_models(module=models) if name not in MULTIPLE_OUTPUTS]


def _build_one_frame(make: Build, spec: NetworkSpec) -> nn.Module:
    if not spec.clips:
        raise UserError(f"{spec.name} takes a frame out of a clip, the data are images; leave {FRAME!r} out")
    return OneFrame(make(replace(spec, name=spec.name.removeprefix(FRAME), shape=spec.shape[1:], kind="images")))


def _build_torchvision(name: str, spec: NetworkSpec) -> nn.Module:
    from torchvision import models

    if spec.clips:
        raise UserError(f"{TORCHVISION}{name} takes images, the data are clips; take one of {', '.join(OF_CLIPS)}")
    if spec.shape[0] != 3:
        raise UserError(f"{TORCHVISION}{name} takes 3 channels, the data has {spec.shape[0]}; set data.channels to 3")
    return models.get_model(name, weights=None, num_classes=spec.classes)


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor, size: int, one_shape: bool = False) -> Tensor:
    """function(images) for [n, *shape], `size` samples at a time; pads the last part.

    With `one_shape`, for compiled code, fewer than `size` samples are padded too: each shape is compiled on its own.
    """
    if len(images) <= size and not (one_shape and len(images)):
        return function(images)
    missing = -len(images) % size
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
    return torch.cat([function(part) for part in padded.split(size)])[: len(images)]


def mixes_samples(network: nn.Module) -> bool:
    """Whether a sample's output depends on the rest of the batch (batch norm in training)."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@lru_cache(maxsize=256)
def widest_layer(spec: NetworkSpec) -> int:
    """Bytes of the widest float32 output of a layer for one image or clip."""
    if spec.name in ("convnet", "convnet_bn", "convnet3d") and not spec.tensors:
        return spec.width * (spec.shape[0] if spec.clips else 1) * spec.shape[-1] * spec.shape[-2] * 4
    try:
        return _widest_output(spec.skeleton(), spec.shape)
    except RuntimeError:  # some networks read values in their forward pass
        return _widest_output(spec.build(0), spec.shape)


@torch.no_grad()
def _widest_output(network: nn.Module, shape: Sequence[int]) -> int:
    sizes = [0]

    def record(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.numel() * 4 if isinstance(output, Tensor) else 0)

    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(record)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval()(torch.zeros(1, *shape, device=device))
    return max(sizes)
