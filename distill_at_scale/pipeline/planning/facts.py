"""Facts about the data before a run: from prepared shards and manifest, or from the source's listing. Nothing is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest.chunks import stores_jpeg
from distill_at_scale.data.ingest.plan import IngestPlan
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import JPEG_RATIO, group_rows
from distill_at_scale.pipeline import validate
from distill_at_scale.pruning.selection import quotas


@dataclass(frozen=True)
class Facts:
    shape: tuple[int, ...]  # of one sample
    class_names: list[str]
    counts: list[int]  # training samples per class
    kept: list[int]  # kept samples per class
    tests: int  # test samples
    jpeg: bool  # whether prepared samples are JPEG
    group: int  # rows per row group
    kind: str  # images, clips or tensors
    listing: IngestPlan | None = None  # None if ingest is done

    def has_test(self) -> bool:
        return self.tests > 0

    @property
    def source_class_names(self) -> list[str]:
        return self.class_names

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def train(self) -> int:
        return sum(self.counts)

    @property
    def samples(self) -> int:
        return self.train + self.tests

    @property
    def values(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Approximate bytes of a prepared sample on disk."""
        return max(1, int(self.held * (JPEG_RATIO if self.jpeg else 1)))

    @property
    def held(self) -> int:
        """Bytes of a sample in memory, in its stored data type."""
        return self.values * (4 if self.kind == "tensors" else 1)


def of_prepared(config: Config, prepared: PreparedDataset, manifest_path: Path | None) -> Facts:
    """From finished stages; `manifest_path` is None before selection."""
    counts, jpeg = prepared.counts("train"), bool(prepared.meta.get("jpeg"))
    kept = manifest.facts(manifest_path)["kept_per_class"] if manifest_path else expected_kept(config, counts)
    tests, group = sum(prepared.counts("test")), group_rows(prepared.shape, jpeg, config.data.chunk)
    return Facts(prepared.shape, prepared.class_names, counts, kept, tests, jpeg, group, prepared.kind)


def of_listing(config: Config, listing: IngestPlan) -> Facts:
    """From the source's listing; broken samples are not known yet."""
    planned = validate.planned(config, listing)
    jpeg, counts = stores_jpeg(config.data), planned.counts
    tests = listing.listings["test"].num_rows if "test" in listing.listings else 0
    tests = tests * len(planned.class_names) // len(listing.class_names)  # fewer if data.transform selects classes
    group = group_rows(planned.shape, jpeg, config.data.chunk)
    kept, kind = expected_kept(config, counts), planned.kind or ("clips" if len(planned.shape) == 4 else "images")
    return Facts(planned.shape, planned.class_names, counts, kept, tests, jpeg, group, kind, listing)


def expected_kept(config: Config, counts: list[int]) -> list[int]:
    """Samples that selection keeps per class: approximate for scope `global`, all if `select.keep` is `auto`."""
    select, minimum = config.select, config.min_per_class
    if select.keep == "auto":
        return list(counts)
    if select.per_class is not None:
        return [min(count, max(minimum, select.per_class)) for count in counts]
    return [quotas.quota(select.rate, count, minimum) for count in counts]
