"""The dry run of one configuration: how much is measured, the data and the processes, and the rates by name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.planning import dry_data, dry_run
from distill_at_scale.pipeline.planning.dry_run import Crew, Rate
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Spread
from distill_at_scale.pruning.proxies import train as proxy

DRAWN = ("real_batch", "candidates")  # keys of methods: real samples of a class that a step may use
CLASSES, SAMPLES, TESTS, BYTES = 20, 2048, 1000, 2**28  # limits of the dry set
STEP, BATCH, DECODE, TEST = 10.0, 4.0, 1.5, 3.0  # seconds: a step and a batch at most, decoding at least, a test about
OTHERS = 7  # further processes at most


class Measurements:
    """Starts when a rate is asked for. `prepared`: where the samples come from; None decodes some of the listing."""

    def __init__(
        self, config: Config, facts: Facts, layout: ClusterLayout, prepared: PreparedDataset | None = None,
        seconds: float | None = None, others: int | None = None,
    ):  # fmt: skip
        self.seconds = dry_run.SECONDS if seconds is None else seconds
        self.config, self.facts, self.layout, self.prepared = config, facts, layout, prepared
        self._rates, self._temporary = dict[Any, Rate](), tempfile.TemporaryDirectory()
        self._ingest: tuple[Rate, Rate, float] | None = None
        self._crew: Crew | None = None
        self.folder, device = Path(self._temporary.name), layout.device
        self.others = 0 if device.type == "cuda" else min(layout.most - 1, OTHERS if others is None else others)
        wanted, score, short = config.distill, config.score, self.seconds / 3
        proxies = proxy.network_spec(score, facts.shape, facts.classes, facts.kind)
        matched = NetworkSpec(wanted.network, facts.shape, facts.classes, wanted.width, wanted.depth, facts.kind)
        image, section = dry_run.image_seconds(matched, device), getattr(wanted, wanted.method, None)
        drawn = [value for key in DRAWN if (value := getattr(section, key, None))] or [64]
        network_batch, patches = getattr(section, "network_samples", 0), getattr(section, "factor", 1)
        self.drawn = max(*drawn, network_batch // facts.classes, wanted.ipc * patches**2)  # real samples of a class
        self.classes = min(facts.classes, CLASSES, max(2, int(short * STEP / (image * self.kept_of(facts)))))
        self.batch = min(score.batch, max(4, int(short * BATCH / dry_run.image_seconds(proxies, device))))
        rows = max(self.drawn, -(-min(facts.train, max(SAMPLES, 8 * self.batch)) // self.classes))
        self.each = max(1, wanted.ipc, min(rows, max(facts.counts), BYTES // (self.classes * facts.held)))
        self.tests = min(facts.tests, TESTS, max(64, int(short * TEST / image)))
        steps = max(1, engine.step_count(config) * facts.classes // self.classes)
        sections = {"score": score.model_copy(update={"batch": self.batch}),
                    "distill": wanted.model_copy(update={"steps": steps})}  # fmt: skip
        self.dry = config.model_copy(update=sections)

    def kept_of(self, facts: Facts) -> int:
        """Kept samples of a class that a step may use."""
        return max(1, min(self.drawn, round(sum(facts.kept) / facts.classes)))

    def ingest(self) -> tuple[Rate, Rate, float]:
        """To decode a sample, to sort one, and the seconds of the stage besides."""
        if self._ingest is None:
            listing, count, seen = self.facts.listing, 2 * self.classes, list[tuple[int, float, float]]()
            assert listing is not None
            least = DECODE * self.seconds / 3
            while len(seen) < 2 or (seen[-1][1] < least and (len(seen) == 2 or seen[-1][0] > seen[-2][0])):
                place = self.folder / f"ingest{len(seen)}"
                seen.append(dry_data.ingested(self.config, listing, place, self.classes, count))
                count *= 8 if len(seen) > 1 else 1
            self.prepared = PreparedDataset(place / "prepared")
            (_, cold, _), (few, short, decode_few), (many, long, decode_many) = seen[0], seen[1], seen[-1]
            if many == few:  # there are no more
                few, short, decode_few = 0, 0.0, 0.0
            each, decode = max(0.0, long - short) / (many - few), max(0.0, decode_many - decode_few) / (many - few)
            once = max(0.0, long - many * each) + max(0.0, cold - seen[1][1])
            self._ingest = Rate.fixed(min(each, decode)), Rate.fixed(max(0.0, each - decode)), once
        return self._ingest

    def take_samples(self, other: Measurements) -> None:
        """The samples, and the rates of their ingest, of a dry run of the same data."""
        self.prepared, self._ingest = other.prepared, other._ingest

    def rate(self, name: str, spread: Spread, **arguments: Any) -> Rate:
        """A method of `dry_run.DryRun` by processes side by side; each is measured once."""
        key = name, spread.threads, str(arguments)
        if key not in self._rates:
            self._rates[key] = self.crew.measure(name, spread.side_by_side, spread.threads, self.seconds, **arguments)
        return self._rates[key]

    def steps(self, facts: Facts, spread: Spread, workers: int, prune: bool) -> Rate:
        """A step on the samples that `facts` keeps."""
        self.made("synthetic")
        kept = self.kept_of(facts)
        dry_data.write_manifest(self.folder, self.classes, self.each, kept)
        try:
            return self.rate("steps", spread, workers=workers, prune=prune, kept=kept)
        finally:
            dry_data.write_manifest(self.folder, self.classes, self.each, self.kept_of(self.facts))

    @property
    def crew(self) -> Crew:
        if self._crew is None:
            if self.prepared is None:
                self.ingest()
            assert self.prepared is not None
            dry_data.write(self.folder, self.prepared, self.classes, self.each, self.kept_of(self.facts), self.tests)
            self._crew = Crew(self.dry, self.folder, self.layout.device, self.others)
            for name in ("networks", "synthetic"):
                self._rates[name] = self._crew.measure(name, self.others + 1, 1, self.seconds)
        return self._crew

    def made(self, name: str) -> Rate:
        """Of `networks` or `synthetic`, which are measured first."""
        assert self.crew is not None  # it measures them when it is made
        return self._rates[name]

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()
        self._temporary.cleanup()
