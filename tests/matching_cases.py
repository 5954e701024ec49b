"""A small method of gradient matching on one fixed network, and gradients computed image by image to compare it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import FixedNetwork

from distill_at_scale.config import load as configuration
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.models.spec import NetworkSpec

SHAPE, CLASSES, HELD = (1, 8, 8), 3, 9
CPU = torch.device("cpu")


def reference_distance(real, synthetic):
    """`match_loss` of Zhao et al. for `ours`: the gradients of all parameters except vectors."""
    total = torch.zeros(())
    for a, b in zip(real, synthetic, strict=True):
        if a.dim() < 2:
            continue
        for channel in range(len(a)):
            x, y = a[channel].reshape(-1), b[channel].reshape(-1)
            total = total + 1 - torch.dot(x, y) / (torch.sqrt((x * x).sum()) * torch.sqrt((y * y).sum()) + 0.000001)
    return total


def of_one_class(distance):
    """The distance between the gradients of one class [*parameter], a scalar."""
    return lambda real, synthetic: distance([a[None] for a in real], [b[None] for b in synthetic])[0]


def reference_gradient(network, batch, label, create_graph=False):
    loss = torch.stack([F.cross_entropy(network(image[None]), torch.tensor([label])) for image in batch]).mean()
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)


def make_sampler(held: int = HELD) -> ClassSampler:
    chance = torch.Generator().manual_seed(0)
    pixels = {c: torch.randint(256, (held, *SHAPE), dtype=torch.uint8, generator=chance) for c in range(CLASSES)}
    return ClassSampler(pixels, Normalization((0.5,), (0.3,)), seed=0)


def make_method(method: str, pool: ClassSampler, ipc: int = 2, runtime: dict | None = None, labels=None, **options):
    """A method with one fixed network; the whole class is a real batch, the image rate is 1, no momentum."""
    section = {"image_lr": 1.0, "image_momentum": 0.0, "real_batch": 256, "augment": "none", **options}
    config = configuration.validate(
        {"distill": {"method": method, "ipc": ipc, "width": 6, method: section}, "runtime": runtime or {}}
    )
    spec = FixedNetwork(NetworkSpec("convnet", SHAPE, CLASSES, width=6), at_once=4)
    labels = list(range(CLASSES)) if labels is None else labels
    matcher = METHODS[method](MethodContext(config, spec, ["zero", "one", "two"], labels, SingleProcess(), CPU, 1))
    matcher.prepare(pool)
    return matcher


def image_gradient(method) -> tuple[torch.Tensor, torch.Tensor]:
    """The images before a step, and the gradient that the step followed [classes, ipc, *shape]."""
    before = method.images.detach().clone()
    method.step(0)
    return before, before - method.images.detach()


def assert_close(actual, expected, tolerance=2e-3):
    assert float(expected.abs().max()) > 0
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def all_images_of(pool, label):
    return pool.normalization.apply(pool.pixels[label])
