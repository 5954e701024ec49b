"""DM, distribution matching (Zhao & Bilen 2023, arXiv 2110.04181).

A worker goes through its classes in groups that fit into GROUP_BYTES: besides the images, their gradient and momentum,
memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.augment import Augmentation, AugmentParams, apply_each
from distill_at_scale.distillation.methods.base import USUAL_WORKERS, ImageMethod
from distill_at_scale.distillation.methods.contract import Judge, MethodContext
from distill_at_scale.distillation.methods.shared.treatment_effect import feature_effects
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import Precision, autocast
from distill_at_scale.models.spec import in_parts

GROUP_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # of a group's images and activations
KEPT_LAYERS = 5  # activations kept for the backward pass, in outputs of the widest layer
COPIES = 4  # of a real batch at one time: drawn, normalised, augmented, concatenated with those of the other classes


class DM(ImageMethod):
    default_steps: ClassVar[int] = 20_000
    section_name: ClassVar[str] = "dm"
    both_tails: ClassVar[bool] = True
    forward_mode: ForwardMode

    def __init__(self, context: MethodContext) -> None:
        options, spec = context.config.distill.dm, context.spec
        default_lr = 10.0 if context.config.distill.ipc >= 100 else 1.0
        super().__init__(context, options.init, options.image_lr or default_lr, options.image_momentum)
        self.augmentation, self.real_batch = Augmentation(options.augment), options.real_batch
        self.at_once = spec.microbatch(context.device)
        self.net = spec.build(0).to(context.device).train().requires_grad_(False)
        self.embed: Any = getattr(self.net, "embed", None)  # samples [n, *shape] -> features [n, d]
        if not callable(self.embed):
            raise UserError(
                f"distill.network: the network {spec.name!r} has no method embed(images), which distribution matching "
                "needs; give it one, or take another network or method"
            )
        real_bytes = self.real_batch * COPIES * 4 * torch.Size(spec.shape).numel()
        memory = GROUP_BYTES.get(context.device.type, GROUP_BYTES["cpu"])
        self.group_size = max(1, memory // (spec.activation_bytes(self.ipc) * KEPT_LAYERS + real_bytes))  # classes

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        context, spec = self.context, self.context.spec
        most = max(min(self.real_batch, real.count(label)) for label in context.labels)
        most = context.workers.all_reduce_max(most)  # so that any number of workers compiles, or none does
        visits, precision = spec.classes * context.steps, context.config.distill.precision
        on_gpu = context.device.type != "cpu"
        self.forward_mode = ForwardMode(
            spec, "auto", precision, on_gpu, trained=visits * self.ipc, passed=visits * most, processes=USUAL_WORKERS
        )
        group = min(self.group_size, len(context.labels))
        self.real_part, self.syn_part = (_even_parts(group * n, self.at_once) for n in (most, self.ipc))
        self.layout = spec.memory_format("match", context.device, self.forward_mode.compiled)
        self.layout.network(self.net)
        self.embed_real = self.forward_mode.compile(self._embed_real)
        self.embed_syn = self.forward_mode.compile(self._embed_syn)

    def _embed_real(self, images: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, self.context.device):
            return self.embed(images).float()

    def _embed_syn(self, images: Tensor, precision: Precision) -> Tensor:
        return self.embed(images)  # derivatives in the images need float32

    def draws(self, step: int) -> Iterator[DrawRequest]:
        for first in range(0, len(self.context.labels), self.group_size):
            labels = tuple(self.context.labels[first : first + self.group_size])
            yield DrawRequest(labels, self.real_batch, "real batch", (step,))

    def step(self, i: int) -> dict[str, float]:
        """Algorithm 1 of the paper: one random network, loss sum_c |mean embed(real_c) - mean embed(syn_c)|^2."""
        self.context.spec.renew(self.net, derive(self.context.seed, "network", i))
        self.optimizer.zero_grad()  # frees the old gradient before the new one is allocated
        gradient, losses = torch.empty_like(self.images.detach()), []
        chance = generator(self.context.seed, "siamese", i)
        of_class = self.augmentation.draw_each(chance, self.context.spec.classes)
        used = drawn = 0
        for first in range(0, len(self.context.labels), self.group_size):
            labels = self.context.labels[first : first + self.group_size]
            params = [of_class[c] for c in labels]
            syn = self.images.detach()[first : first + self.group_size].requires_grad_(True)
            seen = apply_each(params, syn.flatten(0, 1), [self.ipc] * len(labels))
            features = in_parts(self.embed_syn, self.layout.images(seen), self.syn_part, self.forward_mode.compiled)
            mean_syn = features.view(len(labels), self.ipc, -1).mean(1)  # classes x features
            mean_real, counts = self._real_means(syn.detach(), labels, params, i)
            group_losses = (mean_real - mean_syn).square().sum(1)
            gradient[first : first + self.group_size] = torch.autograd.grad(group_losses.sum(), syn)[0]
            losses.append(group_losses.detach())
            used, drawn = used + counts[0], drawn + counts[1]
        self.images.grad = gradient
        numbers = self.update(torch.cat(losses).unbind(), i)
        self.raise_if_diverged()
        return {"loss": sum(numbers) / len(numbers), "real_share": used / drawn}

    def judge(self, step: int) -> Judge:
        """The squared distances of features from the mean of the samples, in the random network of the step."""
        embed = self.forward_mode.eager(self._embed_real)  # its parts do not depend on the number of workers

        @torch.no_grad()
        def distances(label: int, parts: Iterable[Tensor]) -> Tensor:
            features = torch.cat([in_parts(embed, self.layout.images(x), self.at_once) for x in parts])
            return (features - features.mean(0)).square().sum(1)

        return distances

    def _real_means(
        self, syn: Tensor, labels: list[int], params: list[AugmentParams], step: int
    ) -> tuple[Tensor, tuple[int, int]]:
        """Mean features of the real batches after runtime pruning [classes, features]; samples embedded, samples drawn.

        Rule `loss` rates a sample by the squared distance of its feature from the mean of the whole real batch.
        """
        batches = self.real.draw(labels, self.real_batch, "real batch", step)
        drawn = sum(len(batch.rows) for batch in batches)
        real, rated = self.augmented_batches(batches, params, step)
        counts = [len(x) for x in real]
        with torch.no_grad():
            images = self.layout.images(torch.cat(real))
            features = in_parts(self.embed_real, images, self.real_part, self.forward_mode.compiled)
        owner = np.repeat(np.arange(len(labels)), counts)

        finite = features.isfinite().all(1, keepdim=True)
        numbers = torch.where(finite, features, 0)  # 0 x inf would carry it into the means of other classes

        def means(shares: list[np.ndarray[Any, Any]]) -> Tensor:
            weights = np.zeros((len(labels), len(features)), np.float32)
            weights[owner, np.arange(len(owner))] = np.concatenate([own / own.sum() for own in shares])
            matrix = torch.from_numpy(weights).to(features.device, non_blocking=True)
            return torch.where(matrix @ (~finite).float() > 0, torch.nan, matrix @ numbers)

        @cache
        def distances() -> tuple[Tensor, ...]:  # read from the device at one time
            owners = torch.from_numpy(owner).to(features.device, non_blocking=True)
            centres = means([np.ones(count) for count in counts])[owners]
            return (features - centres).square().sum(1).cpu().split(counts)

        def effects(k: int) -> Tensor:
            rng, at_once = generator(self.context.seed, "effects", step, labels[k]), max(self.at_once // 2, 1)
            mine = features.split(counts)[k]
            return feature_effects(self.embed, mine, syn[k], params[k].apply, self.pruning.probes, rng, at_once)

        kept = [np.ones(count) for count in counts]
        for k in rated:
            mask = self.kept_mask(batches[k], partial(lambda k: distances()[k], k), partial(effects, k))
            kept[k][:] = mask.cpu().numpy()
        return means(kept), (sum(counts), drawn)


def _even_parts(n: int, most: int) -> int:
    """The size of the fewest parts of n samples with at most `most` each, so that padding the last one wastes little."""
    return -(-n // -(-n // most))
