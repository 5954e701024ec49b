"""Proxies: networks trained from scratch on the training split, with a checkpoint after each epoch or part of it.

On CPUs the gradients of the logical shards are added in one fixed order, so the weights are the same bytes for any number of
workers with the same number of threads; with batch norm, running statistics are averaged over workers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.collectives import Collectives, SingleProcess
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Progressed, noted
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.models import precision
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import Precision
from distill_at_scale.models.spec import NetworkSpec, mixes_samples
from distill_at_scale.pruning.infobatch import InfoBatch
from distill_at_scale.pruning.proxies.dataloader import Batch, ProxyDataLoader

# of the section score: what only the training of proxies reads
KEYS = (
    "trials",
    "epochs",
    "checkpoints_per_epoch",
    "share",
    "shards",
    "batch",
    "lr",
    "momentum",
    "weight_decay",
    "infobatch",
)


def network_spec(config: ScoreSection, shape: tuple[int, ...], classes: int, kind: str | None = None) -> NetworkSpec:
    return NetworkSpec(config.network, shape, classes, config.width, config.depth, kind)


def forward_mode(spec: NetworkSpec, config: ScoreSection, samples: int, on_gpu: bool) -> ForwardMode:
    """How proxies are trained on `samples` samples per epoch; decided by the time of one proxy."""
    return ForwardMode(spec, config.compile, config.precision, on_gpu, trained=round(samples * config.epochs))


def describe(prepared: PreparedDataset, config: Config) -> str:
    """How proxies are trained, for the user."""
    score = config.score
    spec = network_spec(score, prepared.shape, len(prepared.class_names), prepared.kind)
    samples = loader(prepared, score, config.run.seed).samples
    return f"proxies: {forward_mode(spec, score, samples, precision.on_gpu(config)).note}"


def finished_checkpoints(config: ScoreSection, folder: Path) -> int:
    """The number of checkpoints, over all trials, that are written."""
    trials, count = config.checkpoint_counts
    return sum(checkpoint_path(folder, t, k).exists() for t in range(trials) for k in range(count))


def trained_samples(config: ScoreSection, samples: int, checkpoints: int) -> int:
    """Samples that a proxy was trained on before its first `checkpoints` checkpoints, in epochs of `samples` each."""
    return checkpoints * samples // config.checkpoints_per_epoch


def finished_samples(config: ScoreSection, folder: Path, samples: int) -> int:
    """Samples that proxies were trained on, over all trials and epochs of `samples` each, also after the last checkpoint."""
    trials, count = config.checkpoint_counts
    done = 0
    for trial in range(trials):
        saved = sum(checkpoint_path(folder, trial, number).exists() for number in range(count))
        done += max(trained_samples(config, samples, saved), noted(note_path(folder, trial)))
    return done


def note_path(folder: Path, trial: int) -> Path:
    """Where the worker of a trial notes the samples that it is done with."""
    return folder / f"trial-{trial:02d}" / "samples.txt"


def checkpoint_path(folder: Path, trial: int, epoch: int) -> Path:
    """The file of a checkpoint; `epoch` counts the checkpoints of the trial, from 0."""
    return folder / f"trial-{trial:02d}" / f"epoch-{epoch:03d}.safetensors"


def loader(prepared: PreparedDataset, config: ScoreSection, seed: int) -> ProxyDataLoader:
    return ProxyDataLoader(prepared, seed, config.batch, config.shards, config.share)


def check_training(prepared: PreparedDataset, config: ScoreSection, seed: int) -> None:
    """Raises UserError if the workers of a proxy cannot share its logical shards evenly, or an epoch has fewer batches than
    checkpoints."""
    batches = loader(prepared, config, seed)
    if batches.logical_shards % config.workers:
        raise UserError(
            f"score.workers = {config.workers} cannot share {batches.logical_shards} logical shards evenly; use a power of two "
            f"up to {batches.logical_shards}, or raise score.shards (now {config.shards})"
        )
    if config.checkpoints_per_epoch > 1:
        for trial, epoch in itertools.product(range(config.trials), range(math.ceil(config.epochs))):
            part_ends(config, batches.steps(batches.rows(batches.shard_groups(trial, epoch))))


def part_ends(config: ScoreSection, steps: int) -> list[int]:
    """The batches of an epoch of `steps` before and after each of its parts: 0, then one per checkpoint, ascending.

    Raises UserError if a part would have no batch.
    """
    count = config.checkpoints_per_epoch
    if steps < count:
        raise UserError(
            f"score.checkpoints_per_epoch = {count}, but an epoch has {steps} batches; lower it, or score.batch (now "
            f"{config.batch})"
        )
    return [steps * part // count for part in range(count + 1)]


class ShardThreads:
    """A context with threads that run whole shards, each with one thread of torch; in this thread if there is one."""

    def __init__(self, count: int):
        self.pool = ThreadPoolExecutor(count, "shard", torch.set_num_threads, (1,)) if count > 1 else None
        self.first = True

    def map(self, function: Callable[[Batch], Tensor], parts: Sequence[Batch]) -> list[Tensor]:
        """The results in the order of the parts."""
        if self.pool is None:
            return [function(part) for part in parts]
        if self.first:  # one after the other, as it compiles
            self.first = False
            return [self.pool.submit(function, part).result() for part in parts]
        return list(self.pool.map(function, parts))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *problem: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()


class ProxyTrial:
    """One worker's part in the training of one proxy."""

    def __init__(
        self, prepared: PreparedDataset, config: ScoreSection, trial: int, seed: int, folder: Path,
        device: torch.device, workers: Collectives | None = None,
    ):  # fmt: skip
        self.prepared, self.config, self.trial, self.seed = prepared, config, trial, seed
        self.folder, self.device, self.workers = folder, device, workers or SingleProcess()
        self.spec = network_spec(config, prepared.shape, len(prepared.class_names), prepared.kind)
        self.normalization = normalization_of(prepared, whitened=False)
        self.loader = loader(prepared, config, seed)
        self.network = self.spec.build(rng.derive(seed, "proxy", trial)).to(device)
        self.mode = forward_mode(self.spec, config, self.loader.samples, device.type == "cuda")
        self.memory_format = self.spec.memory_format("train", device, self.mode.compiled)
        self.memory_format.network(self.network)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
        samples, rule_seed = self.loader.samples if config.infobatch else 0, rng.derive(seed, "proxy infobatch", trial)
        self.rule = InfoBatch(config.infobatch, samples, math.ceil(config.epochs), rule_seed, device)
        self.mixes = mixes_samples(self.network)
        self.forward = self.mode.compile(self._logits)
        # Each thread takes whole shards, as operations of one shard are too short to share; with batch norm they follow one
        # another in this thread.
        self.threads = ShardThreads(1 if device.type == "cuda" or self.mixes else torch.get_num_threads())

    def run(self, progressed: Progressed = lambda samples: None, saved: Callable[[], object] = lambda: None) -> None:
        """Trains up to all checkpoints that are missing. `progressed` gets the samples of all epochs so far, after each batch;
        `saved` is called after each checkpoint.

        Raises DistillationDiverged with trial, epoch and learning rate if a weight is not finite, and UserError if an epoch has
        fewer batches than checkpoints.
        """
        with self.threads:
            for checkpoint in self._train(self._resume(), progressed):
                if self.workers.rank == 0:
                    self._save(checkpoint)
                self.workers.all_reduce_max(0)  # a barrier: all workers wait for the checkpoint
                saved()

    def _save(self, epoch: int) -> None:
        tensors = {f"weight.{k}": v for k, v in self.network.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            if (buffer := self.optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None:
                tensors[f"momentum.{i}"] = buffer
        if self.config.infobatch:
            tensors["infobatch.losses"] = self.rule.losses
        facts = {"class_names": json.dumps(self.prepared.class_names)}
        safetensors_io.save(checkpoint_path(self.folder, self.trial, epoch), tensors, facts)

    def _train(self, done: int, progressed: Progressed) -> Iterator[int]:
        """Trains on from `done` checkpoints, and yields the number of each one, from 0, when it is reached."""
        count, per_epoch = self.config.checkpoint_counts[1], self.config.checkpoints_per_epoch
        while done < count:
            epoch, first = divmod(done, per_epoch)
            shards = self.loader.shard_groups(self.trial, epoch)
            each = len(shards) // self.workers.size
            own = range(self.workers.rank * each, (self.workers.rank + 1) * each)
            kept = self.rule.start(epoch) if self.config.infobatch else None
            if kept is not None and not all(
                self.loader.rows(shards, kept)
            ):  # of a small set: each shard needs a sample
                kept = None
                self.rule.weights.fill_(1)
            rows, known = self.loader.rows(shards, kept), self.rule.losses.clone()
            sizes, steps = self.loader.batch_sizes(rows), self.loader.steps(rows)
            ends = part_ends(self.config, steps)
            last = min(per_epoch, count - epoch * per_epoch)
            batches = self.loader.batches(self.trial, epoch, shards, own, kept)
            for step, parts in enumerate(itertools.islice(batches, ends[first], ends[last]), ends[first] + 1):
                gradient = self._batch_gradient(parts, sizes).split([p.numel() for p in self.parameters])
                for parameter, part in zip(self.parameters, gradient, strict=True):
                    parameter.grad = part.view_as(parameter)
                self.optimizer.step()
                progressed(epoch * self.loader.samples + self.loader.samples * step // steps)
                if step in ends:
                    self._finish_part(epoch)
                    self.rule.share(known, self.workers)
                    yield done
                    done += 1

    def _finish_part(self, epoch: int) -> None:
        """Averages running statistics over the workers. Raises DistillationDiverged if a weight is not finite."""
        statistics = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        if self.workers.size > 1 and statistics:
            self.workers.all_reduce_sum(statistics)
            for buffer in statistics:
                buffer.div_(self.workers.size)
        if not all(torch.isfinite(p).all() for p in self.parameters):
            raise DistillationDiverged(
                f"proxy training diverged in trial {self.trial}, epoch {epoch}, at score.lr = {self.config.lr}; lower score.lr"
            )

    def _batch_gradient(self, parts: Sequence[Batch], sizes: Sequence[int]) -> Tensor:
        """The flat gradient of a batch, over all workers; on CPUs shards are added in one fixed order."""
        # on a GPU one pass over all shards, unless batch norm must see them separately
        if self.device.type == "cuda" and not self.mixes:
            images, labels, rows = (torch.cat(list(tensors)) for tensors in zip(*parts, strict=True))
            own = self._gradient((images, labels, rows), sum(sizes), len(images))
        else:
            own = tree_sum(self.threads.map(lambda part: self._gradient(part, sum(sizes), max(sizes)), parts))
        if self.device.type == "cpu":
            return tree_sum(self.workers.all_gather(own))
        self.workers.all_reduce_sum([own])
        return own

    def _gradient(self, batch: Batch, total: int, largest: int) -> Tensor:
        """The flat gradient of (sum of losses) / total, summed over microbatches that fit the cache; compiled code gets
        padded ones of one size, which follows from the `largest` batch."""
        images, labels, rows = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        size = len(images) if self.mixes else min(largest, self.spec.microbatch(self.device))
        if self.mode.compiled and (missing := -len(images) % size):
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        for part, targets, own in zip(images.split(size), labels.split(size), rows.split(size), strict=True):
            logits, count = self.forward(part), len(own)
            loss = self.rule.cross_entropy(logits[:count], targets[:count], own, reduction="sum") / total
            parts = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            gradient += torch.cat([part.reshape(-1) for part in parts])
        return gradient

    def _resume(self) -> int:
        done, count = 0, self.config.checkpoint_counts[1]
        while done < count and checkpoint_path(self.folder, self.trial, done).exists():
            done += 1
        done = self.workers.broadcast(done)
        if 0 < done < count:
            saved = safetensors_io.load(checkpoint_path(self.folder, self.trial, done - 1), again=True)
            self.network.load_state_dict(weights_of(saved))
            self.rule.losses = saved.get("infobatch.losses", self.rule.losses).to(self.device)
            for i, parameter in enumerate(self.parameters):
                if f"momentum.{i}" in saved:
                    self.optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{i}"].to(parameter.device)
        return done

    def _logits(self, pixels: Tensor, used: Precision) -> Tensor:
        images = self.memory_format.images(self.normalization.apply(pixels))
        with precision.autocast(used, self.device):
            return self.network(images).float()


def load_proxy(spec: NetworkSpec, path: Path, device: torch.device) -> nn.Module:
    """The proxy of a checkpoint, in evaluation mode."""
    network = spec.build(0)
    network.load_state_dict(weights_of(safetensors_io.load(path)))
    return network.to(device).eval().requires_grad_(False)


def weights_of(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network in a checkpoint."""
    return {key.removeprefix("weight."): value for key, value in saved.items() if key.startswith("weight.")}


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of 2^k tensors in the order of a binary tree, so that workers can add subtrees first with the same result."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
