"""The first configuration for a data set: settings whose forecast fits a time budget on this machine.

It starts from the published settings and goes down a ladder of smaller ones (`rungs`) until the estimate fits, then spends the
rest of the budget on distillation steps. If the smallest settings do not fit, it takes fewer classes. `starter_file.py` writes
the result as a commented file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config, validate, with_overrides
from distill_at_scale.core.environment import Machine, this_machine
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.inspection.inspect import Inspection
from distill_at_scale.distillation import engine
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline import validate as checks
from distill_at_scale.pipeline.executors.layout import Layout
from distill_at_scale.pipeline.planning import plan
from distill_at_scale.pipeline.planning.dry_run import DryRun
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate

SIZE = 64  # largest side of an image or frame, in pixels
MANY = 10  # images per class from which pruning by loss costs accuracy (README: Limits)
LEAST_KEPT = 10  # samples per class and synthetic image
KEEP = {"images": 0.02, "clips": 0.4, "tensors": 0.5}  # at one sample per class
NETWORK = {"images": "convnet", "clips": "convnet3d", "tensors": "mlp"}
USED = 0.9  # of the budget, as estimates scatter
MEASURE = 0.4  # seconds per measurement
ENOUGH = {
    "dm": 200, "dc": 300, "dsa": 300, "idc": 20, "mtt": 200, "tesla": 200, "sre2l": 300, "rded": 1, "pca": 1, "coreset": 1,
}  # fmt: skip
FEW = 20  # steps of the smallest settings
WIDTHS = (128, 64, 32, 16)
AFFORDABLE = 0.25  # seconds of a batch in a measurement
BATCH_GAIN = 4  # at most: how much faster a sample is in a batch than alone
FEWER_CLASSES = (10,)  # fewer would be another task


@dataclass(frozen=True)
class Rung:
    """Settings that are smaller than those of the rung before; `steps` is the least number of steps that suffices."""

    values: dict[str, Any]
    steps: int


@dataclass
class Starter:
    """A configuration that fits, its estimate, and that of the published settings."""

    config: Config
    inspection: Inspection
    budget: float  # seconds
    estimates: list[StageEstimate]
    published: Config
    published_estimates: list[StageEstimate]
    cores: int
    gpus: int
    classes: int  # in the whole data set
    problems: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(estimate.seconds for estimate in self.estimates)

    @property
    def fits(self) -> bool:
        return self.seconds <= self.budget


def choose(
    inspection: Inspection,
    method: str,
    ipc: int,
    budget: float,
    name: str,
    folder: Path,
    advance: Callable[[str], None],
) -> Starter:
    """Find the largest settings whose estimate fits.

    Args:
        budget: seconds.
        name: of the run folder below runs/.
        folder: an existing folder on the disk of the run.
        advance: called with a line before each round of measurements.

    Raises:
        UserError: the method does not apply to the data, or a class has too few samples.
    """
    here = this_machine(folder)
    base = _base(inspection, method, ipc, name, here)
    checks.check_names(base)
    known = checks.planned(base, inspection.plan)
    engine.check_inputs(base, known, known.kept)
    checks.check_networks(base, known)
    with Estimator(here) as estimate:
        advance("measuring: published settings")
        published = estimate.published(base, inspection.plan)
        for config, listing, rung, last in _candidates(base, inspection, max(known.kept)):
            if not last and estimate.least(config, listing, rung.steps) > budget:
                continue
            classes = f", {len(listing.class_names)} classes" if config.data.classes is not None else ""
            advance(f"measuring: networks of {config.distill.width} channels{classes}")
            config, estimates = _with_steps(config, rung, budget, partial(estimate, listing=listing))
            if last or sum(one.seconds for one in estimates) <= USED * budget:
                break
    problems = plan.problems(config, Layout(config, here), estimates)
    classes_in_all = len(inspection.plan.class_names)
    cores, gpus = here.cores, here.gpus
    return Starter(config, inspection, budget, estimates, base, published, cores, gpus, classes_in_all, problems)


@dataclass
class Estimator:
    """Estimates of all stages; what configurations share is measured once."""

    here: Machine
    measured: dict[str, DryRun] = field(default_factory=dict)
    images: dict[tuple[object, ...], float] = field(default_factory=dict)

    def __enter__(self) -> Estimator:
        return self

    def __exit__(self, *error: object) -> None:
        for measured in self.measured.values():
            measured.close()

    def __call__(self, config: Config, listing: ingest.IngestPlan) -> list[StageEstimate]:
        planner = self.planner(config, listing)
        stages = ["ingest", "score", "select", "distill", *(["evaluate"] if planner.facts.has_test() else []), "report"]
        estimates: list[StageEstimate] = [getattr(planner, stage)() for stage in stages]
        if planner.layout.local:
            return estimates
        return [estimates[0].later(RAY * planner.measured.start, "start"), *estimates[1:]]

    def planner(self, config: Config, listing: ingest.IngestPlan) -> Planner:
        known, layout = checks.planned(config, listing), Layout(config, self.here)
        any_steps = config.model_copy(update={"distill": config.distill.model_copy(update={"steps": None})})
        key = any_steps.model_dump_json()
        if key not in self.measured:
            same = [one for one in self.measured.values() if one.config.data == config.data and one.prepared]
            prepared = same[0].prepared if same else None
            self.measured[key] = measured = DryRun(config, known, layout, prepared, seconds=MEASURE, most=1)
            measured.seen |= {"ingest": same[0].seen["ingest"]} if same else {}
        return Planner(config, known, layout, self.measured[key])

    def published(self, config: Config, listing: ingest.IngestPlan) -> list[StageEstimate]:
        """The estimates of published settings, scaled up from few steps, and from a smaller width if the network is slow."""
        known = checks.planned(config, listing)
        batch = min(max(known.kept), 256)
        width = next((w for w in WIDTHS if batch * self.image(config, listing, w) <= AFFORDABLE), WIDTHS[-1])
        steps = min(engine.step_count(config), ENOUGH.get(config.distill.method, FEW))
        smaller = _widths(width, config.score.criterion != "random") | {"distill.steps": steps}
        ratio = self.image(config, listing, config.distill.width) / self.image(config, listing, width)
        factors = {
            "steps": ratio * engine.step_count(config) / steps,
            "decode": 1.0,
            "sort": 1.0,
            "open": 1.0,
            "start": 1.0,
        }
        return [
            replace(one, parts={part: seconds * factors.get(part, ratio) for part, seconds in one.parts.items()})
            for one in self(with_overrides(config, smaller), listing)
        ]

    def least(self, config: Config, listing: ingest.IngestPlan, steps: int) -> float:
        """Seconds below which a run cannot stay, from one measurement of a few samples; to skip settings far too large."""
        known, score, section = checks.planned(config, listing), config.score, config.evaluate
        layout = Layout(config, self.here)
        images = 2 * section.seeds * (section.epochs or 300) * known.classes * config.distill.ipc
        if score.criterion != "random":
            images += int(score.trials * score.epochs * known.train * (score.share + 1 / 3))
        if config.distill.method == "dm":
            images += steps * sum(min(kept, config.distill.dm.real_batch) for kept in known.kept) // 3
        side = self.here.cores if not layout.local else 1
        ingested = self.planner(config, listing).ingest().seconds
        return ingested + images * self.image(config, listing, config.distill.width) / BATCH_GAIN / side

    def image(self, config: Config, listing: ingest.IngestPlan, width: int) -> float:
        """Seconds of one sample forward and backward through the network to match, of some width."""
        known, distill = checks.planned(config, listing), config.distill
        spec = NetworkSpec(distill.network, known.shape, known.classes, width, distill.depth, known.kind)
        key = "image", spec.name, spec.shape, width
        if key not in self.images:
            device = Layout(config, self.here).device
            self.images[key] = min(spec.training_seconds(device) for _ in range(4))
        return self.images[key]


def _candidates(
    base: Config, inspection: Inspection, most: int
) -> Iterator[tuple[Config, ingest.IngestPlan, Rung, bool]]:
    """Configurations from the published settings down, then with fewer classes; True with the last one.

    `most`: kept samples of the largest class.
    """
    ladder = list(rungs(base, inspection.kind, most))
    counts = [count for count in FEWER_CLASSES if count < len(inspection.plan.class_names)]
    for rung in ladder:
        yield with_overrides(base, rung.values), inspection.plan, rung, not counts and rung is ladder[-1]
    for count in counts:
        fewer = with_overrides(base, {"data.classes": inspection.plan.class_names[:count]})
        listing = ingest.plan(fewer)
        for rung in ladder[1:]:
            yield with_overrides(fewer, rung.values), listing, rung, count == counts[-1] and rung is ladder[-1]


def _with_steps(
    config: Config, rung: Rung, budget: float, estimate: Callable[[Config], list[StageEstimate]]
) -> tuple[Config, list[StageEstimate]]:
    """As many steps as fit the budget: at least those of the rung, at most the published ones."""
    most = engine.step_count(config)
    least = min(rung.steps, most)
    config = with_overrides(config, {"distill.steps": least})
    estimates = estimate(config)
    distill = next(one for one in estimates if one.stage == "distill")
    each = distill.parts["steps"] / least
    left = USED * budget - sum(one.seconds for one in estimates)
    steps = min(most, _rounded(least + int(max(0.0, left) / max(each, 1e-9))))
    if steps <= least:
        return config, estimates
    config = with_overrides(config, {"distill.steps": steps})
    return config, estimate(config)


def _rounded(number: int) -> int:
    """Down to two figures, as in 230 or 4,700."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit


def _base(inspection: Inspection, method: str, ipc: int, name: str, here: Machine) -> Config:
    """The published settings, for these data and this machine."""
    look, kind, counts = inspection.look, inspection.kind, inspection.counts
    data = copy.deepcopy(inspection.data)
    if kind != "tensors":
        data["size"] = max(8, min(SIZE, look.side or SIZE))
        data["resize"] = "square" if look.square else "crop"
        data["channels"] = 1 if look.all_grey else 3
    network = "convnet" if data["source"] == "audiofolder" else NETWORK[kind]
    keep = keep_rate(kind, ipc, counts)
    score: dict[str, Any] = {"criterion": "random", "network": network}  # nothing is scored where everything is kept
    if keep < 1:
        score = {"criterion": "loss", "trials": 5, "epochs": 5, "network": network, "compile": "never"}
        score["batch"] = max(8, min(256, sum(counts) // 16))
    select: dict[str, Any] = {"keep": keep}
    distill: dict[str, Any] = {"method": method, "ipc": ipc, "network": network}
    runtime = "none"
    if method in ("dc", "dsa", "idc") and keep * min(counts) >= 5 * LEAST_KEPT:
        runtime = "loss"
    section = {"dsa": ["augment"], "dm": ["augment"], "mtt": ["augment", "expert_augment"],
               "tesla": ["augment", "expert_augment"], "idc": ["augment", "student_augment"],
               "coreset": ["student_augment"]}  # fmt: skip
    if kind == "tensors":
        distill[method] = dict.fromkeys(section.get(method, []), "none")
        if method == "idc":
            distill[method] |= {"factor": 1, "network_cutmix": 0.0, "student_cutmix": 0.0}
    evaluate: dict[str, Any] = {"networks": [network], "seeds": 5}
    cluster: dict[str, Any] = {"address": "none"}
    if here.gpus > 1 or (not here.gpus and here.cores > 2):
        cluster = {"address": None, "gpus_per_worker": 1 if here.gpus else 0}
        most = max(1, min(len(counts), here.gpus or here.cores))
        distill["workers"] = most if method in ("dm", "dc", "dsa", "idc", "pca", "coreset") else 1
    values = {
        "run": {"dir": f"runs/{name}", "seed": 0}, "data": data, "score": score, "select": select, "distill": distill,
        "runtime": {"rule": runtime}, "evaluate": evaluate, "cluster": cluster,
    }  # fmt: skip
    return validate(values, file="init")


def keep_rate(kind: str, ipc: int, counts: list[int]) -> float:
    """The share of each class to keep: little at one sample per class, all from MANY on, and never so little that the
    smallest class has fewer than LEAST_KEPT samples per synthetic one.
    """
    least = min(counts)
    wanted = KEEP[kind] if ipc == 1 else ipc / MANY
    rate = min(1.0, max(wanted, ipc * LEAST_KEPT / max(1, least)))
    return 1.0 if rate > 0.8 else float(f"{rate:.2g}")


def rungs(base: Config, kind: str, most: int) -> Iterator[Rung]:
    """From the published settings to the smallest ones; each keeps what the one before reduced. `most`: kept samples of the
    largest class.
    """
    method, scored = base.distill.method, base.score.criterion != "random"
    enough = ENOUGH.get(method, 100)
    values: dict[str, Any] = {}
    yield Rung(dict(values), engine.step_count(base))
    proxies = {"score.trials": 2, "score.epochs": 2} if scored else {}
    for changes, steps in (
        ({"evaluate.seeds": 3, "evaluate.epochs": 300, **proxies, **_method_keys(base, most, small=False)}, enough),
        (_widths(64, scored) | _method_keys(base, most, small=False), enough),
        ({"evaluate.seeds": 2, "evaluate.epochs": 100} | _method_keys(base, most, small=True), enough),
        (_widths(32, scored) | ({"score.share": 0.5} if scored else {}), max(1, enough // 2)),
        (_widths(16, scored) | ({"score.trials": 1, "score.share": 0.2} if scored else {}), FEW),
        ({"data.size": 32} if kind != "tensors" and base.data.size > 32 else {}, FEW),
    ):
        values |= changes
        yield Rung(dict(values), steps)


def _widths(width: int, scored: bool) -> dict[str, Any]:
    return {"distill.width": width} | ({"score.width": width} if scored else {})


def _method_keys(base: Config, most: int, small: bool) -> dict[str, Any]:
    """Smaller values of a method's own keys; `most`: kept samples of the largest class."""
    method = base.distill.method
    experts = {"experts": 4, "expert_epochs": 20, "max_start": 8, "target_epochs": 2, "student_steps": 10}
    if small:
        experts |= {"experts": 2, "expert_epochs": 10, "max_start": 4}
    epochs, labels = (5, 30) if small else (20, 100)
    teacher = {"teacher_network": _batch_norm(base), "teacher_epochs": epochs, "label_epochs": labels}
    batch = {"real_batch": 64 if small else 128}
    if most <= batch["real_batch"]:
        batch = {}  # a batch holds at most what is kept
    keys: Mapping[str, Mapping[str, Any]] = {
        "dm": batch, "dc": batch, "dsa": batch, "idc": {"inner": 10, "network_samples": 200},
        "mtt": experts, "tesla": experts, "sre2l": teacher, "rded": teacher,
    }  # fmt: skip
    own = {f"distill.{method}.{key}": value for key, value in keys.get(method, {}).items()}
    if method in ("sre2l", "rded"):
        own["evaluate.networks"] = [_batch_norm(base)]
    return own


def _batch_norm(base: Config) -> str:
    return "convnet_bn" if base.distill.network == "convnet" else base.distill.network
