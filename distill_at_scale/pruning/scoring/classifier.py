"""Networks as criteria see them: stored values in; logits, features and gradient norms out.

Features are the input of the last linear layer, from `embed` or, for networks without it, recorded by a hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import Precision, autocast
from distill_at_scale.models.spec import MemoryFormat, NetworkSpec, in_parts, last_linear
from distill_at_scale.pruning.scoring.gradient_norms import GradientNorms


class Classifier(nn.Module):
    """Stored values [n, *shape] -> logits float32 [n, classes]; normalizes its input."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: NetworkSpec, device: torch.device, memory_format: MemoryFormat):
        super().__init__()
        self.device, self.spec, self.memory_format = device, spec, memory_format
        self.network = spec.build(0)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(spec.channel_shape))
        self.to(device).eval().requires_grad_(False)
        memory_format.network(self.network)

    def forward(self, pixels: Tensor, precision: Precision = "fp32") -> Tensor:
        images = self.normalized(pixels)
        with autocast(precision, self.device):
            return self.network(self.memory_format.images(images)).float()

    def normalized(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() if self.spec.tensors else pixels.float() / 255) - self.mean) / self.std

    def with_features(self, pixels: Tensor, precision: Precision = "fp32") -> Tensor:
        """Logits followed by features: float32 [n, classes + features]."""
        images: Tensor = self.memory_format.images(self.normalized(pixels))
        with autocast(precision, self.device):
            if has_embedding(self.network):
                features = self.network.embed(images)  # type: ignore[operator]
                logits = self.network.classifier(features)  # type: ignore[operator]
            else:
                if (last := last_linear(self.network)) is None:
                    raise UserError(_no_features(self.spec))
                inputs: list[Tensor] = []
                hook = last.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
                try:
                    logits = self.network(images)
                finally:
                    hook.remove()
                if not inputs:
                    raise UserError(_no_features(self.spec))
                features = inputs[-1]
        return torch.cat([logits.float(), features.flatten(1).float()], 1)


def has_embedding(network: nn.Module) -> bool:
    return callable(getattr(network, "embed", None)) and isinstance(getattr(network, "classifier", None), nn.Linear)


def check_features(spec: NetworkSpec) -> None:
    """Raises UserError if the network has no features that a criterion could use."""
    network = spec.skeleton()
    if not has_embedding(network) and last_linear(network) is None:
        raise UserError(_no_features(spec))


def _no_features(spec: NetworkSpec) -> str:
    return (
        f"score.criterion needs features, the input of a network's last linear layer, but score.network = {spec.name!r} ends "
        "with no linear layer; give it embed(images) and a linear `classifier`, or use another network or criterion"
    )


class CompiledClassifier:
    """A classifier with compiled forward passes, into which checkpoints are loaded one after the other."""

    def __init__(self, classifier: Classifier, mode: ForwardMode, microbatch: int):
        self.classifier, self.microbatch, network = classifier, microbatch, classifier.network
        self.forward = mode.compile(classifier.forward)
        self.with_features = (mode.compile if has_embedding(network) else mode.eager)(classifier.with_features)
        self.gradient_norms = GradientNorms(classifier.spec, network)

    def load(self, state: Any, mean: Tensor, std: Tensor) -> None:
        self.classifier.network.load_state_dict(state)
        self.classifier.mean.copy_(mean)
        self.classifier.std.copy_(std)


class BatchOutputs:
    """ProxyOutputs of a batch under the checkpoint that `model` holds, each computed when first used.

    `pixels` are padded to full batches; `columns` are the logits of the data's classes (None: all). With `wide`, logits and
    features come from one forward pass.
    """

    def __init__(
        self, model: CompiledClassifier, pixels: Tensor, labels: Tensor, columns: Sequence[int] | None, wide: bool
    ):
        self.model, self.pixels, self.labels, self.columns, self.wide = model, pixels, labels, columns, wide
        self.classes = model.classifier.spec.classes

    @cached_property
    def logits(self) -> Tensor:
        if self.wide:
            logits = self._logits_and_features[:, : self.classes]
        else:
            logits = in_parts(self.model.forward, self.pixels, self.model.microbatch)[: len(self.labels)]
        return logits if self.columns is None else logits[:, self.columns]

    @cached_property
    def features(self) -> Tensor:
        return self._logits_and_features[:, self.classes :]

    @cached_property
    def _logits_and_features(self) -> Tensor:
        return in_parts(self.model.with_features, self.pixels, self.model.microbatch)[: len(self.labels)]

    @cached_property
    def gradient_norms(self) -> Tensor:
        images = self.model.classifier.normalized(self.pixels[: len(self.labels)])
        return self.model.gradient_norms(images, self.labels, self.columns)


def random_projection(features: Tensor, dimensions: int) -> Tensor:
    """Features [n, f] -> [n, dimensions] with nearly the same distances (Johnson & Lindenstrauss 1984); smaller ones stay
    unchanged. The matrix is always the same, whatever the seed of the run: pretrained weights do not depend on it.
    """
    count = features.shape[1]
    if count <= dimensions:
        return features
    matrix = torch.randn(count, dimensions, generator=rng.generator(0, "feature projection", count, dimensions))
    return features @ (matrix / dimensions**0.5).to(features.device)
