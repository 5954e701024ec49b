"""Runtime rule `ite`: what it costs, and how well it ranks the samples of a batch.

    python jobs/benchmarks/effects.py PREPARED [--method dc dm idc] [--ipc 1 10] [--networks 3] [--repeats 5] [--skip cost]

PREPARED is the folder `prepared` of a run with CIFAR-10. Cost: `step_time.py`'s steps of ConvNet-3, width 128, one thread, with
256 (IDC: 64) real images per class, in CPU seconds; rows take turns. `gross` is the extra time of the steps that rate their
batches, as a share of all steps of a period of 10; `net` includes what the dropped samples save. Agreement: Spearman's rank
correlation, within a batch, of the rule's effects with the change of the images' gradient if a sample is left out, for one
class per new network; beside it that with the effects under another network, and on other images (noise for real ones or the
reverse: more than images ever change). Images are noise (DC) or real. Prints one JSON object per method and number of images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from distill_at_scale.core.rng import derive
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import AugmentParams
from distill_at_scale.distillation.methods.shared.gradient_distance import synthetic_gradient
from distill_at_scale.distillation.methods.shared.gradient_matching import MatchingMethod
from distill_at_scale.distillation.methods.shared.treatment_effect import (
    SampleGradients,
    feature_effects,
    gradient_effects,
)
from jobs.benchmarks import step_time

REAL, PERIOD = {"dc": 256, "dsa": 256, "dm": 256, "idc": 64}, 10
AT_ONCE = 16
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--method", nargs="+", choices=REAL, default=["dc", "dm", "idc"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind, timed after one more")
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--skip", choices=["cost", "agreement"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = PreparedDataset(options.prepared)
    pixels, labels = dataset.load("train", labels=range(options.classes))
    pool = ClassSampler(
        {c: torch.from_numpy(pixels[labels == c]) for c in range(options.classes)}, normalization_of(dataset), seed=0
    )
    for method in options.method:
        for ipc in options.ipc:
            row: dict[str, object] = {"method": method, "ipc": ipc}
            if options.skip != "cost":
                row |= cost(options, method, ipc, pool)
            if options.skip != "agreement":
                ranks = [agreement(options, method, ipc, pool, k) for k in range(options.networks)]
                for name, values in zip(
                    ("left out", "other network", "other images"), zip(*ranks, strict=True), strict=True
                ):
                    row[f"Spearman, {name}"] = _figure(list(values))
            print(json.dumps(row), flush=True)


def _figure(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def _method(options: argparse.Namespace, method: str, ipc: int, row: str) -> step_time.ImageMethod:
    settings = argparse.Namespace(
        classes=options.classes, clips=False, size=32, width=128, real=REAL[method], precision=options.precision
    )
    return step_time._backend(settings, method, ipc, CPU, row)


def cost(options: argparse.Namespace, method: str, ipc: int, pool: ClassSampler) -> dict[str, object]:
    """CPU seconds of a step without a rule, of one that rates its batches, and of one in between; the shares of the first."""
    kinds = {"plain": "ours", "rates": "ours, ite, every batch looked at", "between": "ours, ite, refresh 10"}
    steps, seconds = {}, {name: list[float]() for name in kinds}
    for name, row in kinds.items():
        steps[name] = _method(options, method, ipc, row)
        steps[name].prepare(pool)
        steps[name].pruning.probes = options.probes
    known = {c: torch.randn(pool.count(c), generator=torch.Generator().manual_seed(c)) for c in range(options.classes)}
    for i in range(options.repeats + 1):
        for name, one in steps.items():
            one.pruning.memory = {c: values.clone() for c, values in known.items()}
            began = time.process_time()
            one.step(PERIOD * i + 1)  # a step that `between` does not rate
            if i:
                seconds[name].append(time.process_time() - began)
    gross = [(b - a) / (PERIOD * a) for a, b in zip(seconds["plain"], seconds["rates"], strict=True)]
    net = [
        (b + (PERIOD - 1) * c) / (PERIOD * a) - 1
        for a, b, c in zip(seconds["plain"], seconds["rates"], seconds["between"], strict=True)
    ]
    shares = {"gross %": _figure([100 * x for x in gross]), "net %": _figure([100 * x for x in net])}
    return {f"{name}, s": _figure(values) for name, values in seconds.items()} | shares


def agreement(options: argparse.Namespace, method: str, ipc: int, pool: ClassSampler, k: int) -> list[float]:
    """Rank correlations for the class k under a new network: with leaving out, another network, other images."""
    own = _method(options, method, ipc, "ours")
    label = k % options.classes
    network, other = (own.context.spec.build(derive(k, "network", i)) for i in range(2))
    real = pool.draw([label], REAL[method], "real batch", k)[0].images
    drawn = pool.draw([label], ipc, "images", k)[0].images
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(k))
    images, others = (noise, drawn) if method in ("dc", "dsa") else (drawn, noise)

    def effects(network: nn.Module, images: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(k)
        if isinstance(own, MatchingMethod):
            view, distance = view_of(own, own.augmentation.draw(rng), label, k), own.effect_distance
            samples = SampleGradients(network, label, AT_ONCE, True)
            return gradient_effects(samples, real, images, view, distance, options.probes, rng)[0]
        features = embedded(network, real)
        return feature_effects(network.embed, features, images, lambda x: x, options.probes, rng, AT_ONCE)

    if isinstance(own, MatchingMethod):
        exact = left_out_gradients(own, network, real, images, label, k)
    else:
        exact = left_out_features(network, embedded(network, real), images)
    found = effects(network, images)
    return [float(spearmanr(found, x)[0]) for x in (exact, effects(other, images), effects(network, others))]


def view_of(own: MatchingMethod, params: AugmentParams, label: int, k: int) -> Callable[[Tensor], Tensor]:
    """Stored images of a class -> what the network sees of them."""
    return lambda stored: own.shown(stored[None], [label], [params], k, 0)


@torch.no_grad()
def embedded(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network.embed(part) for part in images.split(AT_ONCE)])


def left_out_gradients(
    own: MatchingMethod, network: nn.Module, real: Tensor, images: Tensor, label: int, k: int
) -> Tensor:
    """The norm of the change of the images' gradient if a sample is left out, for each sample [n]."""
    view = view_of(own, own.augmentation.draw(torch.Generator()), label, k)
    each = SampleGradients(network, label, AT_ONCE, True)(real)
    leaf, n, distance = images.clone().requires_grad_(True), len(real), own.effect_distance
    synthetic = synthetic_gradient(network, view(leaf), label)
    fixed = [g.detach().requires_grad_(True) for g in synthetic]
    mean = [g.mean(0) for g in each]

    def slopes(real: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(
            distance([a[None] for a in real], [b[None] for b in fixed]).sum(), fixed, allow_unused=True
        )
        return [torch.zeros_like(f) if s is None else s for f, s in zip(fixed, found, strict=True)]

    full, norms = slopes(mean), []
    for i in range(n):
        without = slopes([(n * m - g[i]) / (n - 1) for m, g in zip(mean, each, strict=True)])
        change = [a - b for a, b in zip(full, without, strict=True)]
        norms.append(torch.autograd.grad(synthetic, leaf, change, retain_graph=True)[0].norm())
    return torch.stack(norms)


def left_out_features(network: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """The same for the squared distance of mean features, whose gradient is linear in the real mean [n]."""
    leaf, n = images.clone().requires_grad_(True), len(features)
    synthetic, change = network.embed(leaf).mean(0), (features - features.mean(0)) * (2 / (n - 1))
    return torch.stack([torch.autograd.grad(synthetic, leaf, row, retain_graph=True)[0].norm() for row in change])


if __name__ == "__main__":
    main()
