"""A scoring network as criteria see it: stored values in, logits and features out, and the gradient norm of each sample.

Features are what the last layer sees. A network with `embed` and `classifier`, as all of ours have, gives them on the way
to its logits; of any other they are the input of its last linear layer. Left out: which criteria ask for what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.models.spec import Layout, NetworkSpec, in_parts, maybe_compile
from distill_at_scale.pruning.proxies.train import autocast
from distill_at_scale.pruning.scoring.gradient_norms import GradientNorms


class Classifier(nn.Module):
    """Stored values [n, *shape] -> logits float32 [n, classes]; the normalisation is part of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: NetworkSpec, precision: str, device: torch.device, layout: Layout):
        super().__init__()
        self.precision, self.device, self.spec, self.layout = precision, device, spec, layout
        self.network = spec.build(0)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(spec.columns))
        self.to(device).eval().requires_grad_(False)
        layout.network(self.network)

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.images(pixels)
        with autocast(self.precision, self.device):
            return self.network(self.layout.images(images)).float()

    def images(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() if self.spec.tensors else pixels.float() / 255) - self.mean) / self.std

    def with_features(self, pixels: Tensor) -> Tensor:
        """Logits and, behind them, features: float32 [n, classes + features]."""
        images: Tensor = self.layout.images(self.images(pixels))
        with autocast(self.precision, self.device):
            if has_embedding(self.network):
                features = self.network.embed(images)  # type: ignore[operator]
                logits = self.network.classifier(features)  # type: ignore[operator]
            else:
                logits, features = self._watched(images)
        return torch.cat([logits.float(), features.flatten(1).float()], 1)

    def _watched(self, images: Tensor) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []
        if (last := last_linear(self.network)) is None:
            raise UserError(_without_features(self.spec))
        hook = last.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0]))
        try:
            logits = self.network(images)
        finally:
            hook.remove()
        if not caught:
            raise UserError(_without_features(self.spec))
        return logits, caught[-1]


def has_embedding(network: nn.Module) -> bool:
    return callable(getattr(network, "embed", None)) and isinstance(getattr(network, "classifier", None), nn.Linear)


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The last layer that is linear, if the network ends with one."""
    found = [layer for layer in network.modules() if not any(True for _ in layer.children())]
    linear = [layer for layer in found if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


def check_features(spec: NetworkSpec) -> None:
    """Raises UserError where the network has no features that a criterion could see."""
    network = spec.skeleton()
    if not has_embedding(network) and last_linear(network) is None:
        raise UserError(_without_features(spec))


def _without_features(spec: NetworkSpec) -> str:
    return (
        f"score.criterion asks for the features that a network's last layer sees, and score.network = {spec.name!r} ends with "
        "no linear layer; give it embed(images) and a linear `classifier`, or take another network or criterion"
    )


class CompiledClassifier:
    """A classifier ready to be loaded with checkpoints: what it says of pixels, in parts that fit."""

    def __init__(self, classifier: Classifier, at_once: int, compile: str, work: int):
        self.classifier, self.at_once = classifier, at_once
        self.forward = maybe_compile(classifier, compile, work)
        choice = compile if has_embedding(classifier.network) else "never"
        self.with_features: Callable[[Tensor], Tensor] = maybe_compile(classifier.with_features, choice, work)
        self.gradient_norms = GradientNorms(classifier.spec, classifier.network)

    def load(self, state: Any, mean: Tensor, std: Tensor) -> None:
        self.classifier.network.load_state_dict(state)
        self.classifier.mean.copy_(mean)
        self.classifier.std.copy_(std)


class BatchOutputs:
    """What criteria may see of some samples under the checkpoint that an eye is loaded with (criteria.base.Seen).

    `pixels` are padded to whole parts; `columns` are the logits of the data's classes, None for all.
    """

    def __init__(
        self, eye: CompiledClassifier, pixels: Tensor, labels: Tensor, columns: Sequence[int] | None, features: bool
    ):
        self.eye, self.pixels, self._labels, self.columns, self.wide = eye, pixels, labels, columns, features

    @property
    def labels(self) -> Tensor:
        return self._labels

    @cached_property
    def logits(self) -> Tensor:
        if self.wide:
            found = self._both[:, : self.eye.classifier.spec.classes]
        else:
            found = in_parts(self.eye.forward, self.pixels, self.eye.at_once)[: len(self.labels)]
        return found if self.columns is None else found[:, self.columns]

    @cached_property
    def features(self) -> Tensor:
        return self._both[:, self.eye.classifier.spec.classes :]

    @cached_property
    def gradient_norms(self) -> Tensor:
        images = self.eye.classifier.images(self.pixels[: len(self.labels)])
        return self.eye.gradient_norms(images, self.labels, self.columns)

    @cached_property
    def _both(self) -> Tensor:
        return in_parts(self.eye.with_features, self.pixels, self.eye.at_once)[: len(self.labels)]


def random_projection(features: Tensor, dimensions: int) -> Tensor:
    """Features [n, many] -> [n, dimensions] with about the same distances (Johnson & Lindenstrauss 1984); fewer stay as they
    are. The projection is random but always the same, whatever the run's seed: ready-made weights depend on none.
    """
    many = features.shape[1]
    if many <= dimensions:
        return features
    draw = torch.randn(many, dimensions, generator=rng.generator(0, "feature projection", many, dimensions))
    return features @ (draw / dimensions**0.5).to(features.device)
