"""Images per second of proxy training and of the scoring pass, and the share of the compiled network's own rate.

python jobs/benchmarks/proxy_training.py RUN [--width W] [--threads N] [--share S] [--epochs E] [--ways COMPILE,PRECISION]

RUN is a run folder whose ingest is finished. The rate of the network is that of forward and backward passes of one
microbatch, again and again, in one thread. Prints one JSON object per row: mean and standard deviation over the epochs after
the first, which compiles; the fastest of two passes. Two threads need two idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from distill_at_scale.config.load import load
from distill_at_scale.core.environment import keep_freed_memory
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pruning.proxies.train import ProxyTrial
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path

CPU = torch.device("cpu")
WAYS = [("never", "fp32"), ("always", "fp32"), ("always", "bf16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=4, help="at least 3")
    parser.add_argument("--ways", nargs="+", metavar="COMPILE,PRECISION", help="all, unless named")
    options = parser.parse_args()
    keep_freed_memory()  # as the workers of a run
    data = PreparedDataset(options.run / "prepared")
    for choice, precision in WAYS if options.ways is None else [way.split(",") for way in options.ways]:
        keys = {"compile": choice, "precision": precision, "trials": 1, "criterion": "loss"}
        keys |= {name: getattr(options, name) for name in ("width", "share", "epochs")}
        config = load({}, keys={"score": keys})
        row: dict[str, Any] = {"width": options.width, "compile": choice, "precision": precision}
        with tempfile.TemporaryDirectory() as name:
            with threads(options.threads):
                trial, times = ProxyTrial(data, config.score, 0, 0, Path(name), CPU), [time.perf_counter()]
                trial.run(saved=lambda times=times: times.append(time.perf_counter()))  # type: ignore[misc]
            seconds = [end - begin for begin, end in pairwise(times)]
            rates = [trial.loader.samples / epoch for epoch in seconds[1:]]
            row["train"], row["train_std"] = round(statistics.fmean(rates)), round(statistics.stdev(rates))
            row["epochs_s"] = [round(epoch, 2) for epoch in seconds]
            with threads(1):
                row["network_train"] = round(_rate(trial))
                row["pass"] = round(_pass_rate(Scorer(config, data.folder, Path(name), CPU), data, Path(name)))
        row["share_of_network"] = round(row["train"] / row["network_train"] / options.threads, 2)
        print(json.dumps(row), flush=True)


def _rate(trial: ProxyTrial) -> float:
    """Images per second of the gradient of one shard, without data."""
    size = trial.config.batch // trial.loader.logical_shards
    images = torch.randint(256, (size, *trial.spec.shape), dtype=torch.uint8)
    labels = torch.arange(size) % trial.spec.classes
    return size / _fastest(lambda: trial._gradient((images, labels), size, size), 50)


def _pass_rate(scorer: Scorer, data: PreparedDataset, folder: Path) -> float:
    """Images per second and checkpoint, from disk to disk."""
    chunks, numbers = data.chunks("train")[:2], iter(range(99))

    def score() -> None:
        place = folder / f"scores-{next(numbers)}"
        place.mkdir()
        list(scorer.score([(chunk, score_part_path(place, chunk)) for chunk in chunks]))

    return sum(chunk.rows for chunk in chunks) * len(scorer.checkpoints) / _fastest(score, 2)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
