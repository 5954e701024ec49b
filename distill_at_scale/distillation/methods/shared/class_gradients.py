"""The weight gradients of many classes from one forward and one backward pass.

The gradient of a layer's weight is a product of what entered the layer and of the gradient at its output. All classes
go through the network together, one backward pass gives the gradients at the outputs of all layers, and the products
are taken class by class in one call per layer: on a CPU by a convolution with a group per class (2 to 6 times as fast as
unfolding on an EPYC core), elsewhere by unfolding and batched matrix products. They can be differentiated once.

Left out: dilated and grouped convolutions, weights that are used twice or by anything but such layers; `supports_class_gradients` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distill_at_scale.distillation.methods.shared.gradient_distance import matched_parameters, real_gradient

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = (*CONVOLUTIONS, nn.Linear)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TOLERANCE = 1e-3  # of the largest entry, between the two ways to one gradient


def class_gradients(
    network: nn.Module, images: Tensor, labels: Sequence[int], weights: Tensor, differentiable: bool = False
) -> list[Tensor]:
    """Per matched parameter the gradient of each class's weighted cross-entropy [classes, *parameter].

    `images` [classes * m, *shape] lie class by class, `weights` [classes * m] are those of the samples (1 / m for the mean).
    """
    targets = torch.tensor(labels, device=images.device).repeat_interleave(len(images) // len(labels))
    with LayerRecorder(network) as record:
        loss = (F.cross_entropy(network(images), targets, reduction="none") * weights).sum()
    outputs = torch.autograd.grad(loss, record.outputs, create_graph=differentiable)
    with torch.set_grad_enabled(differentiable):
        triples = zip(record.layers, record.inputs, outputs, strict=True)
        return [_weight_gradient(layer, x, g, len(labels)) for layer, x, g in triples]


def supports_class_gradients(network: nn.Module, shape: Sequence[int], classes: int, device: torch.device) -> bool:
    """Whether `class_gradients` is right for a network, by a look at its layers and a small comparison with autograd.

    A network that draws at random (dropout) does not fit. Batch norm must be in evaluation mode.
    """
    labels = sorted({0, classes - 1})
    images = torch.linspace(-2, 2, 3 * len(labels) * math.prod(shape), device=device).sin().view(-1, *shape)
    try:
        found = class_gradients(network, images, labels, torch.full((len(images),), 1 / 3, device=device))
    except UnsupportedNetwork:
        return False
    for k, label in enumerate(labels):
        wanted = real_gradient(network, images[3 * k : 3 * k + 3], label, 3)
        if not all(_agree(a[k], b) for a, b in zip(found, wanted, strict=True)):
            return False
    return True


def _agree(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


class UnsupportedNetwork(Exception):
    """The network is not of the kind that this module knows."""


class LayerRecorder:
    """Notes, while a network runs, what enters its matched layers and where the gradients of their outputs will be."""

    def __init__(self, network: nn.Module):
        self.layers = matched_layers(network)
        self.noted: dict[nn.Module, tuple[Tensor, GradientEdge]] = {}

    def __enter__(self) -> LayerRecorder:
        self.handles = [layer.register_forward_hook(self._note) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        if len(self.noted) < len(self.layers):
            raise UnsupportedNetwork("a matched layer was not used")

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in self.noted:
            raise UnsupportedNetwork("a matched layer was used twice")
        self.noted[layer] = inputs[0], get_gradient_edge(output)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.noted[layer][0] for layer in self.layers]

    @property
    def outputs(self) -> list[GradientEdge]:
        return [self.noted[layer][1] for layer in self.layers]


def matched_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weights are the matched parameters, in their order.

    Raises Unsuited where one is of another kind.
    """
    owners = {id(m.weight): m for m in network.modules() if isinstance(m, PLAIN) and _known(m)}
    parameters = matched_parameters(network)
    if any(id(p) not in owners for p in parameters):
        raise UnsupportedNetwork("a matched parameter is not the weight of a plain convolution or linear layer")
    return [owners[id(p)] for p in parameters]


def _known(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS) and type(module) in CONVOLUTIONS:
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _weight_gradient(layer: nn.Module, x: Tensor, g: Tensor, classes: int) -> Tensor:
    """[classes, *weight] from what entered a layer [n, *in] and the gradient at its output [n, *out]."""
    if isinstance(layer, nn.Linear):
        x, g = (t.reshape(classes, -1, t.shape[-1]) for t in (x, g))  # classes x samples (x places) x features
        return g.transpose(1, 2) @ x
    return ConvolutionGradient.apply(x, g, classes, layer)


class ConvolutionGradient(torch.autograd.Function):
    """What entered a convolution [n, in, *], the gradient at its output [n, out, *] -> [classes, out, in, *kernel]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.classes, ctx.layer = classes, layer
        return convolution_kernels(x.device).products(x, g, classes, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kernels: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, g = ctx.saved_tensors
        way = convolution_kernels(x.device)
        for_x, for_g = way.derivatives(x, g, kernels, ctx.classes, ctx.layer, ctx.needs_input_grad[0])
        return for_x, for_g, None, None


class ConvolutionKernels(NamedTuple):
    """How the products of a convolution, and their derivatives in x (where they are asked for) and g, are found."""

    products: Callable[[Tensor, Tensor, int, Conv], Tensor]
    derivatives: Callable[[Tensor, Tensor, Tensor, int, Conv, bool], tuple[Tensor | None, Tensor]]


def convolution_kernels(device: torch.device) -> ConvolutionKernels:
    """Grouped convolutions on a CPU only; on a GPU they are taken to be slow (0.17 s a step on an H200, not profiled)."""
    return GROUPS if device.type == "cpu" else UNFOLDING


def by_groups(x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
    """One convolution with as many groups as classes."""
    shape = (classes * layer.out_channels, layer.in_channels, *layer.kernel_size)
    kernels = x.new_zeros(()).expand(shape)  # only its shape counts
    x, g = _classes_to_channels(x, classes), _classes_to_channels(g, classes)
    return _backward(x, g, kernels, classes, layer, 1).unflatten(0, (classes, -1))


def through_groups(
    x: Tensor, g: Tensor, kernels: Tensor, classes: int, layer: Conv, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The products are bilinear: a convolution for g, and a transposed one for x, with a kernel per class."""
    x, g = _classes_to_channels(x, classes), _classes_to_channels(g, classes)
    kernels = kernels.flatten(0, 1).contiguous()
    convolve = CONVOLVE[len(layer.kernel_size)]
    for_g = convolve(x, kernels, None, layer.stride, layer.padding, layer.dilation, classes)
    for_x = _channels_to_classes(_backward(x, g, kernels, classes, layer, 0), classes) if of_x else None
    return for_x, _channels_to_classes(for_g, classes)


def by_unfolding(x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
    """Patches as rows, and one matrix product per class."""
    axes = len(layer.kernel_size)
    assert not isinstance(layer.padding, str)
    patches = F.pad(x, [side for p in reversed(layer.padding) for side in (p, p)])
    for axis, (size, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        patches = patches.unfold(2 + axis, size, stride)  # n x in x *places x *kernel
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    rows = patches.permute(order).reshape(classes, -1, layer.in_channels * math.prod(layer.kernel_size))
    columns = g.movedim(1, -1).reshape(classes, -1, layer.out_channels)
    return (columns.transpose(1, 2) @ rows).view(classes, layer.out_channels, layer.in_channels, *layer.kernel_size)


def through_unfolding(
    x: Tensor, g: Tensor, kernels: Tensor, classes: int, layer: Conv, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Two more matrix products per class; the patches are unfolded again rather than kept."""
    x, g = x.detach().requires_grad_(of_x), g.detach().requires_grad_(True)
    with torch.enable_grad():
        products = by_unfolding(x, g, classes, layer)
    found = torch.autograd.grad(products, [x, g] if of_x else [g], kernels)
    return found[0] if of_x else None, found[-1]


GROUPS, UNFOLDING = ConvolutionKernels(by_groups, through_groups), ConvolutionKernels(by_unfolding, through_unfolding)


def _backward(x: Tensor, g: Tensor, kernels: Tensor, groups: int, layer: Conv, which: int) -> Tensor:
    """A grouped convolution's gradient: of its input (which = 0) or of its kernels (1)."""
    mask, none = [which == 0, which == 1, False], [0] * len(layer.kernel_size)
    return torch.ops.aten.convolution_backward(
        g, x, kernels, None, layer.stride, layer.padding, layer.dilation, False, none, groups, mask
    )[which]


def _classes_to_channels(t: Tensor, classes: int) -> Tensor:
    """[classes * m, c, *] -> [m, classes * c, *]."""
    return t.unflatten(0, (classes, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _channels_to_classes(t: Tensor, classes: int) -> Tensor:
    return t.unflatten(1, (classes, -1)).transpose(0, 1).flatten(0, 1)
