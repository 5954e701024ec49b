"""What is known of the data before a run: from the prepared shards and the manifest, else from the source's listing.

Nothing is decoded here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import stores_jpeg
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import JPEG_PART, group_rows
from distill_at_scale.pipeline import validate
from distill_at_scale.pruning.selection import quotas


@dataclass(frozen=True)
class Facts:
    """Shape of a sample, the classes, training samples and kept ones by class, and the number of test samples.

    `listing` is what is to be ingested, None where that is done.
    """

    shape: tuple[int, ...]
    class_names: list[str]
    counts: list[int]
    kept: list[int]
    tests: int
    jpeg: bool
    group: int  # rows of a row group
    kind: str  # images, clips or tensors
    listing: ingest.IngestPlan | None = None

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
        """About the bytes of a prepared sample."""
        return max(1, int(self.held * (JPEG_PART if self.jpeg else 1)))

    @property
    def held(self) -> int:
        """Bytes of a sample in memory, as it is stored."""
        return self.values * (4 if self.kind == "tensors" else 1)

    @property
    def groups(self) -> int:
        """Row groups of the training split."""
        return sum(-(-count // self.group) for count in self.counts)


def of_prepared(config: Config, prepared: PreparedDataset, chosen: Path | None) -> Facts:
    """From finished stages; `chosen` is the manifest, where there is one."""
    counts, jpeg = prepared.counts("train"), bool(prepared.meta.get("jpeg"))
    kept = manifest.facts(chosen)["kept_per_class"] if chosen else will_keep(config, counts)
    tests, group = sum(prepared.counts("test")), group_rows(prepared.shape, jpeg, config.data.chunk)
    return Facts(prepared.shape, prepared.class_names, counts, kept, tests, jpeg, group, prepared.kind)


def of_listing(config: Config, listing: ingest.IngestPlan) -> Facts:
    """From what the source lists; that samples may be broken is not known yet."""
    planned = validate.planned(config, listing)
    jpeg, counts = stores_jpeg(config.data), planned.counts
    tests = listing.listings["test"].num_rows if "test" in listing.listings else 0
    tests = tests * len(planned.class_names) // len(listing.class_names)  # fewer where classes are chosen by variance
    group = group_rows(planned.shape, jpeg, config.data.chunk)
    kept, kind = will_keep(config, counts), planned.kind or ("clips" if len(planned.shape) == 4 else "images")
    return Facts(planned.shape, planned.class_names, counts, kept, tests, jpeg, group, kind, listing)


def will_keep(config: Config, counts: list[int]) -> list[int]:
    """About what selection keeps of every class (of scope `global`, what it would keep class by class; all, where the rate is
    still to be found).
    """
    select, minimum = config.select, config.min_per_class
    if select.keep == "auto":
        return list(counts)
    if select.per_class is not None:
        return [min(count, max(minimum, select.per_class)) for count in counts]
    return [quotas.quota(select.rate, count, minimum) for count in counts]
