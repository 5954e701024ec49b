"""A model of the time and cost of a run on many GPUs, from measured and assumed constants.

    python jobs/benchmarks/fleet.py [CONFIG ...] [--gpus 1 8 64] [--price 2.5] [--CONSTANT VALUE ...]

Seconds of a part = start + max(work / (rate x usable places), units / units per second of the driver). CONFIG is a
configuration of ImageNet-1K at 64 x 64 (default: the two in `configs/`). Every constant is an option and is printed with its
source. No rate of a GPU or of a network was measured: these are assumptions, and the printed range has them `--spread` times
better or worse. Cost is the whole run times all GPUs; a GPU's price includes its share of cores. Not covered: downloading the
data, nodes that start or are lost, and waiting for storage.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import torch
from side_by_side import columns
from torch.utils.flop_counter import FlopCounterMode

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest.merge import MAX_THREADS
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import evaluate
from distill_at_scale.distillation.methods.dc import default_loops
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.planning.estimates import POOL, RAY, TASKS, TRAIN

SAMPLES, TESTS, CLASSES, CHUNK, NODE = 1_281_167, 50_000, 1000, 1024, 8  # NODE: GPUs of a machine
CONFIGS = ("imagenet1k_dm_ipc10", "imagenet1k_dc_ipc1")
TRAINED, MATCHED = 3, 9  # forward passes that a training step costs; one with a second derivative (assumed)
Parts = dict[str, float]  # what -> seconds


@dataclass(frozen=True)
class Constants:
    """Rates per second; SOURCES says where each comes from."""

    cores: float = 16
    decode: float = 2200
    merge: float = 28_000
    digest: float = 33_000
    handed: float = 240
    joined: float = 1_000_000
    flops: float = 12.7e12
    step: float = 0.02
    latency: float = 1e-4
    bandwidth: float = 10e9

    def times(self, factor: float) -> Constants:
        """With GPUs and a network that are so much faster."""
        faster = {"flops": self.flops * factor, "bandwidth": self.bandwidth * factor}
        return replace(self, **faster, step=self.step / factor, latency=self.latency / factor)


SOURCES = {
    "cores": "assumed: cores that come with a GPU",
    "decode": "measured, decode.py: images/s of a core, 500 x 375 to 64 x 64",
    "merge": "measured before the merge had threads, ingest.py: images/s of a core",
    "digest": "measured once beside heavy load, simulated.py: images/s of a core",
    "handed": "derived: 4.2 ms of the driver's CPU time per call through Ray Data, one chunk a call: simulated.py",
    "joined": "rounded down from what selection.py measured: samples/s under 25 checkpoints, one process",
    "flops": "ASSUMED: sustained FLOP/s of a GPU; 30,000 images/s forward through a ConvNet-4 of width 128",
    "step": "ASSUMED: seconds of a distillation's step beside its arithmetic",
    "latency": "ASSUMED: seconds of an all-reduce beside its bytes",
    "bandwidth": "ASSUMED: bytes/s between two GPUs",
}


def main() -> None:
    options = _options()
    constants = Constants(**{f.name: getattr(options, f.name) for f in fields(Constants)})
    for name, value in asdict(constants).items():
        print(f"{name:<10}{value:>10g}  {SOURCES[name]}")
    result = {}
    for path in options.configs or [ROOT / "configs" / f"{name}.yaml" for name in CONFIGS]:
        config = configuration.load(path, options.overrides)
        result[Path(path).stem] = rows = table(config, constants, options)
        print(columns(f"{Path(path).stem}, seconds by number of GPUs", rows))
    print(json.dumps({"constants": asdict(constants), "price": options.price, "tables": result}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG", help="configurations, and overrides section.key=value")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU per hour: an assumption")
    parser.add_argument("--spread", type=float, default=2.0, help="uncertainty of the assumed rates, as a factor")
    for constant in fields(Constants):
        parser.add_argument(f"--{constant.name}", type=float, default=constant.default, help=SOURCES[constant.name])
    options = parser.parse_args()
    options.overrides = [word for word in options.words if "=" in word]
    options.configs = [word for word in options.words if "=" not in word]
    return options


def table(config: Config, constants: Constants, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per part and its seconds for every number of GPUs; then totals, their range and the money."""
    by_count = {n: run(config, constants, n) for n in options.gpus}
    names = dict.fromkeys(name for parts in by_count.values() for name in parts)
    rows: list[dict[str, Any]] = [
        {"part": name, **{str(n): f"{by_count[n][name]:,.0f}" for n in options.gpus}} for name in names
    ]
    totals = {n: sum(parts.values()) for n, parts in by_count.items()}
    ends = {
        n: [sum(run(config, constants.times(f), n).values()) for f in (options.spread, 1 / options.spread)]
        for n in totals
    }
    rows += [{"part": "in all", **{str(n): f"{seconds:,.0f}" for n, seconds in totals.items()}},
             {"part": "range, minutes", **{str(n): f"{low / 60:,.0f}-{high / 60:,.0f}" for n, (low, high) in ends.items()}},
             {"part": "GPU hours", **{str(n): f"{n * seconds / 3600:,.1f}" for n, seconds in totals.items()}},
             {"part": "money", **{str(n): f"{n * s / 3600 * options.price:,.0f}" for n, s in totals.items()}}]  # fmt: skip
    return rows


def run(config: Config, of: Constants, gpus: int) -> Parts:
    """Seconds of every part of a run on a number of GPUs."""
    score, distilling, evaluating = config.score, config.distill, config.evaluate
    proxy = _spec(score.network, config, score.width, score.depth)
    own = _spec(distilling.network, config, distilling.width, distilling.depth)
    trials, epochs = score.checkpoint_counts
    threads, handed = min(MAX_THREADS, of.cores * min(NODE, gpus)), SAMPLES / CHUNK / of.handed
    parts = {"start of Ray": RAY * START}
    parts["ingest: decode"] = POOL + max(SAMPLES / (of.decode * of.cores * gpus), handed)
    parts["ingest: merge and hash"] = SAMPLES / threads * (1 / of.merge + 2 / of.digest)
    if score.weights is None:
        places, waves = (min(gpus, trials), 1) if score.workers == 1 else (min(gpus, score.workers), 0)
        each = SAMPLES * score.share * epochs * TRAINED * flops(proxy) / of.flops
        parts["proxies"] = TASKS + (each * math.ceil(trials / places) if waves else each * trials / places)
    passes = SAMPLES * trials * epochs * flops(proxy) / of.flops
    parts["score"] = POOL + max(passes / gpus, handed) + SAMPLES / of.joined
    parts["distill"] = TRAIN + distill.step_count(config) * _step(config, own, of, gpus)
    jobs = evaluate.jobs(config)
    protocol = distill.method_class(config).protocol(config).overridden(evaluating)
    training = CLASSES * distilling.ipc * protocol.epochs * TRAINED + TESTS
    parts["evaluate"] = TASKS + math.ceil(len(jobs) / gpus) * training * flops(own) / of.flops
    return parts


def _step(config: Config, spec: NetworkSpec, of: Constants, gpus: int) -> float:
    """Seconds of a step of DM, DC or DSA, whose workers own classes; the one with the most classes decides.

    Raises SystemExit for other methods.
    """
    method, ipc = config.distill.method, config.distill.ipc
    section, kept = getattr(config.distill, method), _kept(config)
    classes = math.ceil(CLASSES / gpus)
    if method == "dm":
        passes = section.real_batch * kept + ipc * TRAINED
        return of.step + classes * passes * flops(spec) / of.flops
    if method not in ("dc", "dsa"):
        raise SystemExit(f"distill.method = {method} is not modelled; take dm, dc or dsa")
    outer, inner = (a or b for a, b in zip((section.outer, section.inner), default_loops(ipc), strict=True))
    matched = classes * (section.real_batch * kept * TRAINED + ipc * MATCHED) * flops(spec) / of.flops
    batches = inner * math.ceil(CLASSES * ipc / section.network_batch)
    trained = inner * classes * ipc * TRAINED * flops(spec) / of.flops + batches * _all_reduce(spec, of, gpus)
    return outer * (of.step + matched) + (outer - 1) * trained


def _all_reduce(spec: NetworkSpec, of: Constants, gpus: int) -> float:
    size = 4 * sum(p.numel() for p in spec.build(0).parameters())
    return (of.latency + 2 * (gpus - 1) / gpus * size / of.bandwidth) if gpus > 1 else 0.0


def _kept(config: Config) -> float:
    """Mean fraction of a real batch after runtime pruning; every `refresh` steps the whole batch is scored."""
    runtime = config.runtime
    return 1 - runtime.drop * (1 - 1 / runtime.refresh) if runtime.rule != "none" else 1.0


def _spec(name: str, config: Config, width: int, depth: int | None) -> NetworkSpec:
    return NetworkSpec(name, (config.data.channels, config.data.size, config.data.size), CLASSES, width, depth)


def flops(spec: NetworkSpec) -> float:
    """Of one sample's forward pass."""
    network = spec.build(0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *spec.shape))
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
