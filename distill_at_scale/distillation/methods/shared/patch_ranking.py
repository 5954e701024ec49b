"""Ranking crops of real images by a teacher's loss, for RDED: one pass over the prepared shards, as scoring makes one.

Of every class a seeded draw of kept samples are candidates; each gives some random crops, which are enlarged to the size of
an image and scored by the teacher's cross-entropy of the true class. The work is cut into the fixed chunks of the shards,
whose pieces are published one by one, so a pass goes on where it was stopped and its numbers do not depend on who shares
it. Row groups without a candidate are not read, and of the others nothing else is decoded.

The table has the columns sample_id, label, row (the sample's place among the kept ones of its class, by id), crop and loss.
Left out: how images are built of patches (backends/rded.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import RDEDSection
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Chunk, RowGroup
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, crop_and_flip, resized_crop_boxes

CANDIDATES = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("row", pa.int32())])
SCHEMA = CANDIDATES.append(pa.field("crop", pa.int32())).append(pa.field("loss", pa.float32()))

Found = tuple[pa.Table, np.ndarray]  # rows of CANDIDATES, and their pixels uint8 [n, *shape]


def table_path(networks: Path, config: Config) -> Path:
    """Where the finished table lies: beside the teacher, named after everything else that decides it."""
    section = config.distill.rded
    decisive = [section.crops, section.candidates, section.crop_scale, config.distill_seed]
    return networks / f"patches-{digest(decisive)[:16]}.parquet"


def parts_folder(networks: Path, config: Config) -> Path:
    """For the candidates and the pieces, until the table is there."""
    return table_path(networks, config).with_suffix(".pieces")


def crop_boxes(seed: int, sample_id: str, section: RDEDSection) -> Tensor:
    """The crops of a sample [crops, 4], as shares of its sides."""
    numbers = torch.rand(section.crops, 4, generator=rng.generator(seed, "patch crops", sample_id))
    return resized_crop_boxes(numbers, section.crop_scale)


def draw_candidates(path: Path, config: Config, folder: Path) -> pa.Table:
    """Of the samples that the manifest at `path` keeps, up to `candidates` of each class; published in `folder`."""
    target = _candidates_path(folder)
    if not target.exists():
        table, _ = manifest.read(path, ["sample_id", "label", "kept"])
        kept = table.filter(table["kept"]).sort_by([("label", "ascending"), ("sample_id", "ascending")])
        labels = kept["label"].to_numpy()
        chosen, rows = [], []
        for label in np.unique(labels).tolist():
            first, last = np.searchsorted(labels, [label, label + 1])
            draw = rng.numpy_generator(config.distill_seed, "patch candidates", label)
            places = np.sort(draw.permutation(last - first)[: config.distill.rded.candidates])
            chosen.append(first + places)
            rows.append(places)
        drawn = kept.take(np.concatenate(chosen)).select(["sample_id", "label"])
        drawn = drawn.append_column("row", pa.array(np.concatenate(rows), pa.int32())).cast(CANDIDATES)
        with publish(target) as temporary:
            pq.write_table(drawn, temporary)
    return pq.read_table(target)


def _candidates_path(folder: Path) -> Path:
    return folder / "candidates.parquet"


class PatchRanker:
    """Holds the teacher on one device and ranks the candidates of chunks."""

    def __init__(self, config: Config, prepared: Path, networks: Path, device: torch.device):
        self.config, self.device, self.prepared = config, device, PreparedDataset(prepared)
        self.teacher = Teacher.load(networks / TEACHER, device, config.distill.rded.teacher_network)
        self.candidates = pq.read_table(_candidates_path(parts_folder(networks, config))).combine_chunks()
        self.normalization = Normalization(tuple(self.prepared.mean), tuple(self.prepared.std))
        self.groups = {(group.file, group.number): group for group in self.prepared.groups("train")}

    def rank(self, units: Sequence[tuple[Chunk, Path]]) -> Iterator[int]:
        """Publish the piece of each chunk; yields the chunk's samples. What is next is read meanwhile."""
        for (chunk, target), found in prefetch((unit, list(self._candidates_in(unit[0]))) for unit in units):
            tables = [self._ranked(rows, pixels) for rows, pixels in found]
            with publish(target) as temporary:
                pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *tables]), temporary)
            yield chunk.rows

    def _candidates_in(self, chunk: Chunk) -> Iterator[Found]:
        for number in range(chunk.first, chunk.first + chunk.groups):
            group = self.groups[chunk.file, number]
            ids = self.prepared.read(group, columns=["sample_id"])["sample_id"]
            mine = self._of_class(group)
            places = pc.index_in(ids, mine["sample_id"]).combine_chunks()
            if places.null_count < len(places):
                table = self.prepared.read(group).filter(places.is_valid())
                yield mine.take(places.drop_null()), self.prepared.pixels(table)

    def _of_class(self, group: RowGroup) -> pa.Table:
        labels = self.candidates["label"].to_numpy()
        first, last = np.searchsorted(labels, [group.label, group.label + 1])
        return self.candidates.slice(first, last - first)

    def _ranked(self, rows: pa.Table, pixels: np.ndarray) -> pa.Table:
        section, seed = self.config.distill.rded, self.config.distill_seed
        boxes = torch.cat([crop_boxes(seed, name, section) for name in rows["sample_id"].to_pylist()])
        images = self.normalization.apply(torch.from_numpy(np.array(pixels)).to(self.device))
        with torch.no_grad():
            logits = self.teacher.logits(crop_and_flip(images.repeat_interleave(section.crops, 0), boxes))
            targets = torch.from_numpy(rows["label"].to_numpy().astype(np.int64)).to(self.device)
            losses = F.cross_entropy(logits, targets.repeat_interleave(section.crops), reduction="none").cpu()
        if not torch.isfinite(losses).all():
            name = rows["sample_id"][int((~torch.isfinite(losses)).nonzero()[0]) // section.crops].as_py()
            raise UserError(
                f"the teacher's loss for {name!r} is not finite; lower the teacher's rate, or take other weights"
            )
        repeated = rows.take(np.repeat(np.arange(rows.num_rows), section.crops))
        crops = pa.array(np.tile(np.arange(section.crops), rows.num_rows), pa.int32())
        return repeated.append_column("crop", crops).append_column("loss", pa.array(losses.numpy())).cast(SCHEMA)


def read_table(path: Path, **options: Any) -> pa.Table:
    """A finished table, as `pyarrow.parquet.read_table` reads it. Raises UserError for one that is damaged."""
    try:
        return pq.read_table(path, **options)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"the ranked patches {path} cannot be read ({error}); remove it to have them ranked again"
        ) from None


def images_per_class(table: Path, crops: int) -> list[int]:
    """How many images of every class, by label, were ranked."""
    labels = read_table(table, columns=["label"])["label"].to_numpy()
    return [int(count) // crops for count in np.bincount(labels)]


def merge(pieces: Sequence[Path], candidates: pa.Table, crops: int, target: Path) -> None:
    """One table of all pieces, sorted by label, row and crop; every crop of every candidate is in it, once."""
    order = [("label", "ascending"), ("row", "ascending"), ("crop", "ascending")]
    table = pa.concat_tables([pq.read_table(path) for path in pieces]).sort_by(order)
    expected = candidates["sample_id"].combine_chunks().take(np.repeat(np.arange(candidates.num_rows), crops))
    if not table["sample_id"].combine_chunks().equals(expected):
        raise UserError(
            f"the ranked patches are not those of the candidates ({table.num_rows} rows of {len(expected)}): the prepared data "
            f"and the manifest do not belong together; remove {pieces[0].parent} and give the command again"
        )
    with publish(target) as temporary:
        pq.write_table(table, temporary)
