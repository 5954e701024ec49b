"""Times a few seconds of the stages' own code on dummy data: decoding, training, scoring and testing one sample.

Each function takes about `SECONDS` for any network. If a real batch would take longer, a smaller one is measured; on a CPU the
time of an image hardly depends on the batch, because networks process it in parts. `step_benchmark.py` times distillations.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import ingest_chunk, recipe_of
from distill_at_scale.data.ingest.plan import open_source
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.spec import NetworkSpec, will_compile
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pipeline.planning import dummy_data
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.scorer import Scorer

SECONDS = 2.0  # per measurement, approximately
EPOCHS = 3  # of a proxy
LEAST = 8  # minimum number of measured samples


@dataclass(frozen=True)
class Throughput:
    each: float  # seconds per sample
    once: float = 0.0  # seconds once: compiling, opening


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def shorter(seconds: float) -> Iterator[None]:
    """Within the block a measurement takes `seconds`: faster and less exact."""
    global SECONDS
    before, SECONDS = SECONDS, seconds
    try:
        yield
    finally:
        SECONDS = before


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    began = now(device)
    work()
    return now(device) - began


def repeated(work: Callable[[], object], device: torch.device, seconds: float | None = None, most: int = 50) -> float:
    """Seconds of the fastest of as many calls as fit `seconds`: other load only slows a call down."""
    first = timed(work, device)
    count = max(0, min(most, int((seconds or SECONDS) / max(first, 1e-6)) - 1))
    return min([first, *(timed(work, device) for _ in range(count))])


def decode(config: Config, listing: ingest.IngestPlan) -> Throughput:
    """Reading and decoding the first real samples of the listing in one thread; archives are read in order."""
    rows, cpu = listing.listings["train"], torch.device("cpu")
    source, recipe = open_source(config.data), recipe_of(config)
    with tempfile.TemporaryDirectory() as folder, threads(1):

        def seconds(count: int, name: str) -> float:
            return timed(lambda: ingest_chunk(source, recipe, rows.slice(0, count), Path(folder) / name), cpu)

        few = min(4, rows.num_rows)
        once, guess = seconds(few, "a.arrow"), seconds(few, "b.arrow") / few
        if guess * few > SECONDS:  # clips
            return Throughput(guess, once)
        count = max(few, min(rows.num_rows, config.data.chunk, int(SECONDS / max(guess, 1e-6))))
        took = seconds(count, "c.arrow")
    return Throughput(took / count, once)


def write(facts: Facts) -> Throughput:
    """Sorting decoded samples into shards in one process."""
    count = max(64, min(4096, int(2**24 / facts.values)))
    with tempfile.TemporaryDirectory() as folder:
        took = timed(lambda: dummy_data.write(Path(folder), facts, [0], count), torch.device("cpu"))
    return Throughput(took / count)


def proxy_training(config: Config, facts: Facts, device: torch.device, cores: int) -> Throughput:
    """One sample of an epoch of one proxy; the fastest of a few epochs after the first."""
    spec = proxy.network_spec(config.score, facts.shape, facts.classes, facts.kind)
    samples = int(facts.train * config.score.share)
    compiled = will_compile(config.score.compile, proxy.training_work(spec, config.score, samples))
    with tempfile.TemporaryDirectory() as name, threads(cores):
        affordable = int(SECONDS / image_seconds(spec, device))
        batch = max(1, min(config.score.batch, samples, max(LEAST, affordable)))
        groups = sum(-(-count // facts.group) for count in facts.counts)
        shards = max(1, min(config.score.shards, batch, groups // 4 or 1))
        count = batch * max(1, min(16, affordable // batch))
        dummy = dummy_data.write(Path(name), facts, [0], max(count, 4 * shards), max(1, count // (4 * shards)))
        update = {"batch": batch, "epochs": EPOCHS, "trials": 1, "share": 1.0, "weights": None, "shards": shards}
        score = config.score.model_copy(update=update | {"compile": "always" if compiled else "never"})
        trial = proxy.ProxyTrial(PreparedDataset(dummy.prepared), score, 0, 0, Path(name) / "proxies", device)
        times = [now(device)]
        trial.run(saved=lambda: times.append(now(device)))
        steps = max(1, trial.loader.steps(trial.loader.shard_groups(0, 1)))  # per epoch
    first, *others = [b - a for a, b in pairwise(times)]
    return Throughput(min(others) / (steps * batch), max(0.0, first - min(others)))


def scoring(config: Config, facts: Facts, device: torch.device) -> Throughput:
    """One sample under one checkpoint."""
    spec = proxy.network_spec(config.score, facts.shape, facts.classes, facts.kind)
    trials, epochs = config.score.checkpoint_counts
    compiled = will_compile(config.score.compile, spec.activation_bytes(facts.train * trials * epochs))
    with tempfile.TemporaryDirectory() as name, threads(1):
        checkpoints = min(4, trials * epochs)
        count = max(LEAST, min(1024, facts.train, int(SECONDS / checkpoints / image_seconds(spec, device))))
        dummy = dummy_data.write(Path(name), facts, [0], count)
        dummy_data.write_checkpoints(Path(name) / "proxies", spec, checkpoints)
        update = {"trials": 1, "epochs": checkpoints, "weights": None, "compile": "always" if compiled else "never"}
        changed = config.model_copy(update={"score": config.score.model_copy(update=update)})
        scorer = Scorer(changed, dummy.prepared, Path(name) / "proxies", device)
        chunks = PreparedDataset(dummy.prepared).chunks()

        def score(run: str) -> None:
            list(scorer.score([(chunk, Path(name) / f"{run}-{chunk.index}") for chunk in chunks]))

        first = timed(lambda: score("a"), device)
        second = min(timed(partial(score, again), device) for again in ("b", "c"))
    return Throughput(second / (count * checkpoints), max(0.0, first - second))


def training(spec: NetworkSpec, protocol: TrainingProtocol, count: int, device: torch.device, cores: int) -> Throughput:
    """One image of an epoch of student training on `count` images."""
    with threads(cores):
        few = max(1, min(count, max(LEAST, int(2 * SECONDS / image_seconds(spec, device)))))
        images = TrainingSet(dummy_data.training_images(spec.shape, few), torch.arange(few) % spec.classes)
        fast = replace(protocol, epochs=1, labels="hard", batch=min(protocol.batch, few))
        students.train(spec, images, fast, 0, device)
        took = repeated(lambda: students.train(spec, images, fast, 0, device), device)
        took -= min(0.5 * took, timed(lambda: spec.build(0).to(device), device))  # the network is built once
    return Throughput(took / few)


def testing(spec: NetworkSpec, count: int, device: torch.device, cores: int) -> Throughput:
    """One image of a test: a forward pass."""
    with threads(cores):
        few = max(1, min(count, 1024, max(LEAST, int(3 * SECONDS / image_seconds(spec, device)))))
        pixels, labels = torch.from_numpy(dummy_data.images(spec.shape, few)), torch.zeros(few, dtype=torch.int64)
        channels, *inner = spec.channel_shape
        normal = Normalization((0.5,) * channels, (0.25,) * channels, 1 if spec.tensors else 255, len(inner))
        network = spec.build(0).to(device)
        at_once = spec.microbatch(device)
        took = repeated(lambda: students.test(network, pixels, labels, normal, device, at_once), device)
    return Throughput(took / few)


def image_seconds(spec: NetworkSpec, device: torch.device) -> float:
    """Approximate seconds of one image forward and backward, to choose how many images to measure."""
    network = spec.build(0).to(device).train()
    images = dummy_data.training_images(spec.shape, 4).to(device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    _, seconds = (timed(lambda: F.cross_entropy(network(images), targets).backward(), device) for _ in range(2))
    return max(1e-7, seconds / 4)
