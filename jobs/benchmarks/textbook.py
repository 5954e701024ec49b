"""The textbook step of each method: the plain loop over classes of published code, the yardstick of step_time.py.

Each real batch goes through the network at once, the distances of all classes are added, and one backward pass follows. It
uses the same draws and gives the same numbers as our steps, and shares only the draws with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.distillation.multi_formation import split_parts

Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def plain(network: nn.Module) -> nn.Module:
    """The network with torch's own poolings, in place; returns it."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.AvgPool2d):
            network.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride))
    return network


def image_gradient(method: str, network: nn.Module, real: list[Tensor], images: Tensor, drop: float) -> Tensor:
    """The gradient of the summed distances in the synthetic images [classes, ipc, *shape]."""
    images = images.detach().clone().requires_grad_(True)
    loss = torch.zeros((), device=images.device)
    for label, batch in enumerate(real):
        kept = batch if not drop else _kept(method, network, batch, label, drop)
        loss = loss + LOSSES[method](network, kept, images[label], label)
    return torch.autograd.grad(loss, images)[0]


@torch.no_grad()
def _kept(method: str, network: nn.Module, real: Tensor, label: int, drop: float) -> Tensor:
    """Drops the largest losses, rated again in every step (DM: the largest and the smallest distances to the real mean)."""
    dropped = min(int(drop * len(real) + 1e-9), len(real) - 1)
    if method == "dm":
        features = network.embed(real)
        values, smallest = (features - features.mean(0)).square().sum(1), dropped // 2
    else:
        values, smallest = F.cross_entropy(network(real), _targets(real, label), reduction="none"), 0
    order = values.argsort(stable=True)
    return real[order[smallest : len(real) - (dropped - smallest)].sort().values]


def _targets(images: Tensor, label: int) -> Tensor:
    return torch.full((len(images),), label, device=images.device)


def _gradients(network: nn.Module, images: Tensor, label: int, second: bool) -> list[Tensor]:
    loss = F.cross_entropy(network(images), _targets(images, label))
    result = torch.autograd.grad(loss, list(network.parameters()), create_graph=second)
    return [g for g in result if g.dim() > 1]


def _dc(network: nn.Module, real: Tensor, own: Tensor, label: int) -> Tensor:
    total = torch.zeros((), device=real.device)
    for a, b in zip(_gradients(network, real, label, False), _gradients(network, own, label, True), strict=True):
        a, b = a.flatten(1), b.flatten(1)
        total = total + (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)).sum()
    return total


def _idc(network: nn.Module, real: Tensor, own: Tensor, label: int) -> Tensor:
    wanted, result = _gradients(network, real, label, False), _gradients(network, split_parts(own, 2), label, True)
    pairs = list(zip(wanted, result, strict=True))[:-1]
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


def _dm(network: nn.Module, real: Tensor, own: Tensor, label: int) -> Tensor:
    with torch.no_grad():
        target = network.embed(real).mean(0)
    return (target - network.embed(own).mean(0)).square().sum()


LOSSES: dict[str, Loss] = {"dc": _dc, "dsa": _dc, "dm": _dm, "idc": _idc}
