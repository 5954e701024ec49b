"""Networks by name, for scoring, matching and evaluation.

The networks for images are in architectures.py, those for clips in architectures3d.py, those for samples of any shape in
architectures1d.py. `torchvision:NAME` is any of
torchvision's image classifiers as it is, for weights that were trained with it; `frame:NAME` is a network for images on
the middle frame of a clip, a control.

Left out: weights (scoring/weights.py), and torchvision's classifiers that answer with more than logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from distill_at_scale.config.load import suggest
from distill_at_scale.config.registry import resolve
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.models.image import VGG11, AlexNet, ConvNet, ResNet
from distill_at_scale.models.mlp import MLP
from distill_at_scale.models.video import ConvNet3D, OneFrame, VideoResNet

CACHE = 8 * 2**20  # bytes of one layer's activations that a CPU core keeps close
GPU_BYTES = 512 * 2**20  # the same for a GPU, where more at once only costs memory
TORCHVISION = "torchvision:"  # before a name of torchvision's own
FRAME = "frame:"  # before the name of a network for images, which then sees the middle frame of a clip
OTHERS = "take mlp, or a network of your own (package.module:Object)"
MORE_THAN_LOGITS = ("googlenet", "inception_v3")  # their extra outputs would be taken for a loss's input
COMPILE_FROM = 25 * 10**9  # bytes of widest layers to compute; below, compiling (10-30 s) costs more than it saves


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that defines a network but its weights. `shape` is (C, H, W), of clips (T, C, H, W), of tensors any.

    `kind` is images, clips or tensors; where it is left out, the shape tells images from clips.
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
    def columns(self) -> tuple[int, ...]:
        """The shape in which one number per channel meets samples [n, *shape]: (C, 1, 1), of tensors (C, 1, ...) or (1,)."""
        if not self.tensors:
            return (self.shape[-3], 1, 1)
        return (self.shape[0], *(1,) * (len(self.shape) - 1)) if len(self.shape) > 1 else (1,)

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
            raise UserError(
                f"distill.network: the network {self.name!r} has no method embed(images), which distribution matching "
                "needs; give it one, or take another network or method"
            )
        return embed

    def at_once(self, device: torch.device) -> int:
        """How many images go through the network at once: on a CPU as many as keep a layer in the cache.

        Measured on an EPYC (Zen 5) core with a ConvNet of width 128 at 32 x 32: 16 at once take half the time per image of 256.
        """
        return max(4, (CACHE if device.type == "cpu" else GPU_BYTES) // self.work(1))

    def layout(self, use: Literal["score", "train", "match"], device: torch.device, compiled: bool) -> Layout:
        """How weights and images lie in memory where the network is used for scoring, for training or for matching.

        On a GPU channels lie last, and of clips wherever the code is compiled: eagerly a CPU core loses by it. Of images they
        lie last for scoring on a CPU too. There, training and matching keep the order that their numbers were made with.
        """
        if self.clips:
            return Layout(self, compiled or device.type == "cuda")
        return Layout(self, use == "score" or (use == "train" and device.type == "cuda"))

    def lay_out(self, network: nn.Module) -> nn.Module:
        """The network with the weights of its convolutions laid out channels last, in place."""
        return Layout(self, True).network(network)

    def laid_out(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] or clips [n, T, C, H, W] with their channels last in memory; shape and values stay."""
        return Layout(self, True).images(images)

    def work(self, images: int) -> int:
        """Bytes of the widest layer for so many images: a measure of what is to be computed."""
        return images * widest_layer(self)


@dataclass(frozen=True)
class Layout:
    """Where the channels of a network's weights and images lie in memory; shapes and values are the same either way.

    Measured on an EPYC (Zen 5) core with the channels last: eager inference 1.6 (ResNet-18 at 224 x 224) to 3 times (ConvNet)
    as fast, compiled the same. ConvNet3D is 1.3 to 2.5 times as fast compiled (1.2 to 2.2 with the backward pass),
    but slower eagerly.
    """

    spec: NetworkSpec
    channels_last: bool

    def network(self, network: nn.Module) -> nn.Module:
        """The network, the weights of its convolutions laid out in place."""
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in network.parameters() if self.channels_last else ():
            if parameter.dim() in layouts:
                parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
        return network

    def images(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] or clips [n, T, C, H, W], of any dtype."""
        if not self.channels_last or self.spec.tensors:
            return images
        if not self.spec.clips:
            return images.contiguous(memory_format=torch.channels_last)
        return images.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d).transpose(1, 2)


def _of_images(make: Callable[[NetworkSpec], nn.Module]) -> Callable[[NetworkSpec], nn.Module]:
    def build(spec: NetworkSpec) -> nn.Module:
        if spec.tensors and len(spec.shape) != 3:
            raise UserError(
                f"the network {spec.name!r} takes images, the data are arrays of shape {spec.shape}; {OTHERS}"
            )
        if spec.clips:
            raise UserError(
                f"the network {spec.name!r} takes images, the data are clips; take one of {', '.join(OF_CLIPS)}, or "
                f"{FRAME}{spec.name}, which sees their middle frame only"
            )
        return make(spec)

    return build


def _of_clips(make: Callable[[NetworkSpec], nn.Module]) -> Callable[[NetworkSpec], nn.Module]:
    def build(spec: NetworkSpec) -> nn.Module:
        if spec.tensors:
            raise UserError(
                f"the network {spec.name!r} takes clips, the data are arrays of shape {spec.shape}; {OTHERS}"
            )
        if not spec.clips:
            raise UserError(
                f"the network {spec.name!r} takes clips, the data are images; set data.frames, or take another network"
            )
        return make(spec)

    return build


OF_IMAGES: dict[str, Callable[[NetworkSpec], nn.Module]] = {
    "convnet": lambda spec: ConvNet(spec.shape, spec.classes, spec.width, spec.depth),
    "convnet_bn": lambda spec: ConvNet(spec.shape, spec.classes, spec.width, spec.depth, nn.BatchNorm2d),
    "alexnet": lambda spec: AlexNet(spec.shape, spec.classes),
    "vgg11": lambda spec: VGG11(spec.shape, spec.classes),
    "resnet18": lambda spec: ResNet(spec.shape, spec.classes, 18),
    "resnet18_bn": lambda spec: ResNet(spec.shape, spec.classes, 18, nn.BatchNorm2d),
    "resnet50": lambda spec: ResNet(spec.shape, spec.classes, 50),
    "resnet50_bn": lambda spec: ResNet(spec.shape, spec.classes, 50, nn.BatchNorm2d),
}
OF_CLIPS: dict[str, Callable[[NetworkSpec], nn.Module]] = {
    "convnet3d": lambda spec: ConvNet3D(spec.shape, spec.classes, spec.width, spec.depth),
    "r3d_18": lambda spec: VideoResNet("r3d_18", spec.shape, spec.classes, batch_norm=False),
    "r3d_18_bn": lambda spec: VideoResNet("r3d_18", spec.shape, spec.classes, batch_norm=True),
    "r2plus1d_18": lambda spec: VideoResNet("r2plus1d_18", spec.shape, spec.classes, batch_norm=False),
    "r2plus1d_18_bn": lambda spec: VideoResNet("r2plus1d_18", spec.shape, spec.classes, batch_norm=True),
}
OF_ANYTHING: dict[str, Callable[[NetworkSpec], nn.Module]] = {
    "mlp": lambda spec: MLP(spec.shape, spec.classes, spec.width, spec.depth),
}
NETWORKS = (
    OF_ANYTHING
    | {name: _of_images(make) for name, make in OF_IMAGES.items()}
    | {name: _of_clips(make) for name, make in OF_CLIPS.items()}
)


def builder(key: str, name: str) -> Callable[[NetworkSpec], nn.Module]:
    """What builds the network called `name`: of this table, `torchvision:NAME`, `frame:NAME`, or `package.module:Object`.

    Raises UserError, naming the configuration key, for a name that means nothing.
    """
    if name.startswith(FRAME):
        return partial(_of_one_frame, builder(key, name.removeprefix(FRAME)))
    if not name.startswith(TORCHVISION):
        return resolve(key, name, NETWORKS)
    wanted = name.removeprefix(TORCHVISION)
    if wanted in MORE_THAN_LOGITS:
        raise UserError(f"{key} = {name!r} has outputs beside its logits and cannot be used; take another network")
    if not is_of_torchvision(wanted):
        raise UserError(f"{key} = {name!r} is no classifier of torchvision; {suggest(wanted, _classifiers())}")
    return partial(_of_torchvision, wanted)


def is_plug_in(name: str) -> bool:
    """Whether the name stands for a user's own code, which only a configuration may name, never an artefact."""
    name = name.removeprefix(FRAME)
    return ":" in name and not name.startswith(TORCHVISION)


def is_of_torchvision(name: str) -> bool:
    """One of its classifiers of images, of those that can be used here."""
    return name in _classifiers()


def _classifiers() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models(module=models) if name not in MORE_THAN_LOGITS]


def _of_one_frame(make: Callable[[NetworkSpec], nn.Module], spec: NetworkSpec) -> nn.Module:
    if not spec.clips:
        raise UserError(f"{spec.name} takes a frame out of a clip, the data are images; leave {FRAME!r} out")
    return OneFrame(make(replace(spec, name=spec.name.removeprefix(FRAME), shape=spec.shape[1:], kind="images")))


def _of_torchvision(name: str, spec: NetworkSpec) -> nn.Module:
    from torchvision import models

    if spec.clips:
        raise UserError(f"{TORCHVISION}{name} takes images, the data are clips; take one of {', '.join(OF_CLIPS)}")
    if spec.shape[0] != 3:
        raise UserError(f"{TORCHVISION}{name} takes 3 channels, the data has {spec.shape[0]}; set data.channels to 3")
    return models.get_model(name, weights=None, num_classes=spec.classes)


def will_compile(choice: str, work: int) -> bool:
    return choice == "always" or (choice == "auto" and work >= COMPILE_FROM)


def maybe_compile(network: Callable[[Tensor], Tensor], choice: str, work: int) -> Callable[[Tensor], Tensor]:
    """torch.compile where it pays for so much work (NetworkSpec.work); eager, with a warning, where no compiler works."""
    if not will_compile(choice, work):
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


@lru_cache(maxsize=256)
def widest_layer(spec: NetworkSpec) -> int:
    """Bytes of the widest float32 output of a layer for one image or clip."""
    if spec.name in ("convnet", "convnet_bn", "convnet3d") and not spec.tensors:
        return spec.width * (spec.shape[0] if spec.clips else 1) * spec.shape[-1] * spec.shape[-2] * 4
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
