"""The weight gradients of many classes from one forward and one backward pass.

The gradient of a layer's weight is a product of the layer's input and the gradient at its output, taken per class: on a CPU
by a convolution with a group per class (2 to 6 times as fast as unfolding on an EPYC core), elsewhere by unfolding and
batched matrix products. The results can be differentiated once. Not covered: dilated and grouped convolutions, and weights
that are used twice or outside of their layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from distill_at_scale.distillation.methods.shared.gradient_distance import matched_parameters, real_gradient
from distill_at_scale.models.spec import Float32Linear

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Derivatives = tuple[Tensor | None, Tensor]  # in a layer's input, if needed, and in the gradient at its output
TOLERANCE = 1e-3  # of the largest entry, between `class_gradients` and autograd


class UnsupportedNetwork(Exception):
    """`class_gradients` does not apply to the network."""


def class_gradients(
    network: nn.Module, images: Tensor, labels: Sequence[int], weights: Tensor, differentiable: bool = False
) -> list[Tensor]:
    """Per matched parameter the gradient of each class's weighted cross-entropy [classes, *parameter].

    The images [classes * m, *shape] are class by class in the order of `labels`; `weights` [classes * m] are 1 / m for the
    mean. With `differentiable` the result can be differentiated in the images. Under autocast layers and products compute in
    its precision; the result is float32.

    Raises:
        UnsupportedNetwork: a matched parameter is not the weight of a plain layer, or the layer is not used exactly once.
    """
    targets = torch.tensor(labels).repeat_interleave(len(images) // len(labels)).to(images.device, non_blocking=True)
    layers = matched_layers(network)
    if not images.requires_grad:
        images = images.detach().requires_grad_(True)
    # autograd differentiates in the outputs of the layers only; it would compute gradients of weights in second derivatives
    with frozen(network), recorded(layers) as uses:
        loss = (F.cross_entropy(network(images).float(), targets, reduction="none") * weights).sum()
    by_layer = {layer: (x, edge) for layer, x, edge in uses}
    if len(uses) != len(layers) or len(by_layer) != len(layers):
        raise UnsupportedNetwork("a matched layer was not used exactly once")
    outputs = torch.autograd.grad(loss, [by_layer[layer][1] for layer in layers], create_graph=differentiable)
    gradients = []
    with torch.set_grad_enabled(differentiable):
        for layer, g in zip(layers, outputs, strict=True):
            x = by_layer[layer][0].to(g.dtype)
            if isinstance(layer, nn.Linear):
                x, g = (t.reshape(len(labels), -1, t.shape[-1]) for t in (x, g))  # classes x samples x features
                gradients.append((g.transpose(1, 2) @ x).float())
            else:
                gradients.append(ConvolutionGradient.apply(x, g, len(labels), layer).float())
    return gradients


def supports_class_gradients(network: nn.Module, shape: Sequence[int], classes: int, device: torch.device) -> bool:
    """Whether `class_gradients` agrees with autograd, by the network's layers and a small comparison.

    A network with dropout is not supported; batch norm must be in evaluation mode.
    """
    labels = sorted({0, classes - 1})
    images = torch.linspace(-2, 2, 3 * len(labels) * math.prod(shape), device=device).sin().view(-1, *shape)
    try:
        gradients = class_gradients(network, images, labels, torch.full((len(images),), 1 / 3, device=device))
    except UnsupportedNetwork:
        return False
    for k, label in enumerate(labels):
        expected = real_gradient(network, images[3 * k : 3 * k + 3], label, 3)
        for a, b in zip(gradients, expected, strict=True):
            if not float((a[k] - b).abs().max()) <= TOLERANCE * float(b.abs().max()):
                return False
    return True


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within the block no parameter requires a gradient."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor, GradientEdge]]]:
    """Lists each use of the layers within the block: the layer, its input, and the place of its output in the graph."""
    uses: list[tuple[nn.Module, Tensor, GradientEdge]] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            raise UnsupportedNetwork("the input of a matched layer does not depend on the images")
        uses.append((layer, inputs[0], get_gradient_edge(output)))

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer or a convolution without groups, dilation or padding modes."""
    if isinstance(module, CONVOLUTIONS):
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def matched_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weights are the matched parameters, in their order."""
    types = (*CONVOLUTIONS, nn.Linear, Float32Linear)  # not their other subclasses, which may compute something else
    owners = {id(m.weight): m for m in network.modules() if type(m) in types and is_plain(m)}
    parameters = matched_parameters(network)
    if any(id(p) not in owners for p in parameters):
        raise UnsupportedNetwork("a matched parameter is not the weight of a plain convolution or linear layer")
    return [owners[id(p)] for p in parameters]


def unfolded(x: Tensor, layer: Conv) -> Tensor:
    """The patches that a convolution sees of its input [n, in, *space]: [n, places, in * kernel]."""
    axes = len(layer.kernel_size)
    assert not isinstance(layer.padding, str)
    patches = F.pad(x, [side for p in reversed(layer.padding) for side in (p, p)])
    for axis, (size, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        patches = patches.unfold(2 + axis, size, stride)  # n x in x *places x *kernel
    return patches.movedim(1, 1 + axes).flatten(1 + axes).flatten(1, axes)


class ConvolutionGradient(torch.autograd.Function):
    """Input of a convolution [n, in, *], gradient at its output [n, out, *] -> [classes, out, in, *kernel]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.classes, ctx.layer = classes, layer
        return implementation_for(x.device).products(x, g, classes, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kernels: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, g = ctx.saved_tensors
        derivatives = implementation_for(x.device).derivatives
        return *derivatives(x, g, kernels, ctx.classes, ctx.layer, ctx.needs_input_grad[0]), None, None


class Implementation(NamedTuple):
    """How a convolution's weight gradients, and their derivatives in x (if needed, else None) and g, are computed."""

    products: Callable[[Tensor, Tensor, int, Conv], Tensor]
    derivatives: Callable[[Tensor, Tensor, Tensor, int, Conv, bool], Derivatives]


def implementation_for(device: torch.device) -> Implementation:
    """Grouped convolutions on a CPU only; on a GPU they are taken to be slow (0.17 s a step on an H200, not profiled)."""
    return GROUPED if device.type == "cpu" else UNFOLDED


def _grouped_products(x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
    shape = (classes * layer.out_channels, layer.in_channels, *layer.kernel_size)
    kernels = x.new_zeros(()).expand(shape)  # only its shape is used
    x, g = _classes_to_channels(x, classes), _classes_to_channels(g, classes)
    return _convolution_backward(x, g, kernels, classes, layer, of_input=False).unflatten(0, (classes, -1))


def _grouped_derivatives(x: Tensor, g: Tensor, kernels: Tensor, classes: int, layer: Conv, of_x: bool) -> Derivatives:
    """The products are bilinear: a convolution for g, and a transposed one for x, with a kernel per class."""
    x, g = _classes_to_channels(x, classes), _classes_to_channels(g, classes)
    kernels, convolve = kernels.flatten(0, 1).contiguous(), CONVOLVE[len(layer.kernel_size)]
    derivatives = [convolve(x, kernels, None, layer.stride, layer.padding, layer.dilation, classes)]
    if of_x:
        derivatives.append(_convolution_backward(x, g, kernels, classes, layer, of_input=True))
    # [m, classes * c, *] -> [classes * m, c, *]
    for_g, *for_x = (t.unflatten(1, (classes, -1)).transpose(0, 1).flatten(0, 1) for t in derivatives)
    return for_x[0] if of_x else None, for_g


def _unfolded_products(x: Tensor, g: Tensor, classes: int, layer: Conv) -> Tensor:
    rows = unfolded(x, layer).reshape(classes, -1, layer.in_channels * math.prod(layer.kernel_size))
    columns = g.movedim(1, -1).reshape(classes, -1, layer.out_channels)
    return (columns.transpose(1, 2) @ rows).view(classes, layer.out_channels, layer.in_channels, *layer.kernel_size)


def _unfolded_derivatives(x: Tensor, g: Tensor, kernels: Tensor, classes: int, layer: Conv, of_x: bool) -> Derivatives:
    """Two more matrix products per class; the patches are unfolded again, not kept."""
    x, g = x.detach().requires_grad_(of_x), g.detach().requires_grad_(True)
    with torch.enable_grad():
        products = _unfolded_products(x, g, classes, layer)
    gradients = torch.autograd.grad(products, [x, g] if of_x else [g], kernels)
    return gradients[0] if of_x else None, gradients[-1]


GROUPED = Implementation(_grouped_products, _grouped_derivatives)
UNFOLDED = Implementation(_unfolded_products, _unfolded_derivatives)


def _convolution_backward(x: Tensor, g: Tensor, kernels: Tensor, groups: int, layer: Conv, of_input: bool) -> Tensor:
    mask, no_output_padding = [of_input, not of_input, False], [0] * len(layer.kernel_size)
    return torch.ops.aten.convolution_backward(
        g, x, kernels, None, layer.stride, layer.padding, layer.dilation, False, no_output_padding, groups, mask
    )[0 if of_input else 1]


def _classes_to_channels(t: Tensor, classes: int) -> Tensor:
    """[classes * m, c, *] -> [m, classes * c, *]."""
    return t.unflatten(0, (classes, -1)).transpose(0, 1).flatten(1, 2).contiguous()
