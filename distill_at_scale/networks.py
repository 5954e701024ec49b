"""Networks by name, for scoring, matching and evaluation.

ConvNet is the standard network of the field (METHOD.md section 4): blocks of conv 3x3, instance norm (GroupNorm with
as many groups as channels), ReLU and average pooling, then one linear layer; its depth grows with the resolution.
The others take the place of the literature's cross-architecture list, sized for small images; ResNet-18 and -50 are
torchvision's. `torchvision:NAME` is any of its classifiers as it is, for weights that were trained with it.

Left out: weights (scoring/weights.py), and torchvision's classifiers that answer with more than logits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from distill_at_scale import rng
from distill_at_scale.config import nearest
from distill_at_scale.errors import UserError
from distill_at_scale.registry import resolve

CACHE = 8 * 2**20  # bytes of one layer's activations that a CPU core keeps close
GPU_BYTES = 512 * 2**20  # the same for a GPU, where more at once only costs memory
TORCHVISION = "torchvision:"  # before a name of torchvision's own
MORE_THAN_LOGITS = ("googlenet", "inception_v3")  # their extra outputs would be taken for a loss's input
COMPILE_FROM = 25 * 10**9  # bytes of widest layers to compute; below, compiling (10-30 s) costs more than it saves


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that defines a network but its weights. `shape` is (channels, height, width)."""

    name: str
    shape: tuple[int, ...]
    classes: int
    width: int = 128
    depth: int | None = None

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised network on the CPU; the same seed gives the same weights."""
        with rng.default_generator(seed):
            return builder("network", self.name)(self)

    def skeleton(self) -> nn.Module:
        """The network with its shapes but without numbers (on torch's meta device), where it can be built so."""
        try:
            with torch.device("meta"):
                return self.build(0)
        except RuntimeError:  # some constructors look at their numbers
            return self.build(0)

    def embedding(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """The map from images to features, which feature matching needs.

        Raises UserError for a network that has none.
        """
        embed = getattr(network, "embed", None)
        if not callable(embed):
            raise UserError(f"the network {self.name!r} has no method embed(images), which distribution matching needs")
        return embed

    def at_once(self, device: torch.device) -> int:
        """How many images go through the network at once: on a CPU as many as keep a layer in the cache.

        Measured on an EPYC (Zen 5) core with a ConvNet of width 128 at 32 x 32: 16 at once take half the time per image of 256.
        """
        return max(4, (CACHE if device.type == "cpu" else GPU_BYTES) // self.work(1))

    def layout(self) -> torch.memory_format:
        """How images and weights lie in memory for the fastest inference: channels last.

        Measured on an EPYC (Zen 5) core: eager 1.6 (ResNet-18 at 224 x 224) to 3 times (ConvNet) as fast, compiled the same.
        """
        return torch.channels_last

    def work(self, images: int) -> int:
        """Bytes of the widest layer for so many images: a measure of what is to be computed."""
        return images * widest_layer(self)


def instance_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """[conv - norm - ReLU - pool] x depth, then a linear classifier."""

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None):
        super().__init__()
        channels, height, wide = shape
        depth = default_depth(height) if depth is None else depth
        if min(height, wide) >> depth < 1:
            raise UserError(f"a ConvNet of depth {depth} is too deep for {height} x {wide} pixels; lower the depth")
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 and height == 28 else 1  # MNIST's 28 becomes 32
            layers += [nn.Conv2d(channels, width, 3, padding=padding), instance_norm(width), nn.ReLU(), nn.AvgPool2d(2)]
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


NETWORKS: dict[str, Callable[[NetworkSpec], nn.Module]] = {
    "convnet": lambda spec: ConvNet(spec.shape, spec.classes, spec.width, spec.depth),
    "alexnet": lambda spec: AlexNet(spec.shape, spec.classes),
    "vgg11": lambda spec: VGG11(spec.shape, spec.classes),
    "resnet18": lambda spec: ResNet(spec.shape, spec.classes, 18),
    "resnet18_bn": lambda spec: ResNet(spec.shape, spec.classes, 18, nn.BatchNorm2d),
    "resnet50": lambda spec: ResNet(spec.shape, spec.classes, 50),
    "resnet50_bn": lambda spec: ResNet(spec.shape, spec.classes, 50, nn.BatchNorm2d),
}


def builder(key: str, name: str) -> Callable[[NetworkSpec], nn.Module]:
    """What builds the network called `name`: of this table, `torchvision:NAME`, or `package.module:Object`.

    Raises UserError, naming the configuration key, for a name that means nothing.
    """
    if not name.startswith(TORCHVISION):
        return resolve(key, name, NETWORKS)
    from torchvision import models

    known = [n for n in models.list_models(module=models) if n not in MORE_THAN_LOGITS]
    wanted = name.removeprefix(TORCHVISION)
    if wanted in MORE_THAN_LOGITS:
        raise UserError(f"{key} = {name!r} has outputs beside its logits and cannot be used; take another network")
    if wanted not in known:
        raise UserError(f"{key} = {name!r} is no classifier of torchvision; {nearest(wanted, known)}")
    return partial(_of_torchvision, wanted)


def _of_torchvision(name: str, spec: NetworkSpec) -> nn.Module:
    from torchvision import models

    if spec.shape[0] != 3:
        raise UserError(f"{TORCHVISION}{name} takes 3 channels, the data has {spec.shape[0]}; set data.channels to 3")
    return models.get_model(name, weights=None, num_classes=spec.classes)


def maybe_compile(network: Callable[[Tensor], Tensor], choice: str, work: int) -> Callable[[Tensor], Tensor]:
    """torch.compile where it pays for so much work (NetworkSpec.work); eager, with a warning, where no compiler works."""
    if choice == "never" or (choice == "auto" and work < COMPILE_FROM):
        return network
    compiled = torch.compile(network)
    failed = False

    def forward(images: Tensor) -> Tensor:
        nonlocal failed
        if not failed:
            try:
                return compiled(images)
            except Exception as error:
                if "torch._inductor" not in type(error).__module__ and "torch._dynamo" not in type(error).__module__:
                    raise
                failed = True
                reason = str(error).partition("\n")[0] or type(error).__name__
                warnings.warn(f"torch.compile does not work here ({reason}); going on without, slower", stacklevel=2)
        return network(images)

    return forward


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor, at_once: int) -> Tensor:
    """function(images) for [n, *shape] in parts of one fixed size, the last one padded (compiled code wants one shape)."""
    if len(images) <= at_once:
        return function(images)
    missing = -len(images) % at_once
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
    return torch.cat([function(part) for part in padded.split(at_once)])[: len(images)]


def mixes_samples(network: nn.Module) -> bool:
    """Whether the network's output for a sample depends on the rest of the batch (batch norm in training)."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def default_depth(pixels: int) -> int:
    """3 at 32 pixels and one more per doubling (4 at 64, 5 at 128, 6 at 224), 2 from 8 to 16, else 1."""
    return max(2 if pixels >= 8 else 1, min(6, round(math.log2(pixels / 32)) + 3))


@lru_cache(maxsize=256)
def widest_layer(spec: NetworkSpec) -> int:
    """Bytes of the widest float32 output of a layer for one image."""
    if spec.name == "convnet":
        return spec.width * spec.shape[-1] * spec.shape[-2] * 4
    try:
        return _widest_output(spec.skeleton(), spec.shape)
    except RuntimeError:  # some networks look at numbers on their way
        return _widest_output(spec.build(0), spec.shape)


@torch.no_grad()
def _widest_output(network: nn.Module, shape: Sequence[int]) -> int:
    """Bytes of the largest tensor that a module without children gives for one image."""
    sizes = [0]

    def note(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.numel() * 4 if isinstance(output, Tensor) else 0)

    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(note)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval()(torch.zeros(1, *shape, device=device))
    return max(sizes)


def _width(features: nn.Module, shape: Sequence[int]) -> int:
    with torch.no_grad():
        return features(torch.zeros(1, *shape)).shape[1]
