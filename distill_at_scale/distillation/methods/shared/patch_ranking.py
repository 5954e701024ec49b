"""Ranks crops of real images by a teacher's loss, for RDED, in one pass over the prepared shards.

The work is cut into the fixed chunks of the shards; the part file of each chunk is published on its own, so a stopped pass
continues. Row groups without a candidate are not read, and only candidates are decoded.

The table has the columns sample_id, label, row (index among the kept samples of the class, sorted by id), crop and loss.
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
from distill_at_scale.core.atomic_files import publish, set_aside
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, crop_and_flip, resized_crop_boxes

CANDIDATES_FILE = "candidates.parquet"
CANDIDATES = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("row", pa.int32())])
SCHEMA = CANDIDATES.append(pa.field("crop", pa.int32())).append(pa.field("loss", pa.float32()))


def table_path(networks: Path, config: Config) -> Path:
    """The finished table, next to the teacher; its name is a digest of the other values that it depends on."""
    section = config.distill.rded
    values = [section.crops, section.candidates, section.crop_scale, config.distill_seed]
    return networks / f"patches-{digest(values)[:16]}.parquet"


def parts_folder(networks: Path, config: Config) -> Path:
    """The folder of the candidates and part files, until the table is finished."""
    return table_path(networks, config).with_suffix(".pieces")


def crop_boxes(seed: int, sample_id: str, section: RDEDSection) -> Tensor:
    """The crops of a sample [crops, 4], as shares of its sides."""
    numbers = torch.rand(section.crops, 4, generator=rng.generator(seed, "patch crops", sample_id))
    return resized_crop_boxes(numbers, section.crop_scale)


def draw_candidates(path: Path, config: Config, folder: Path) -> pa.Table:
    """Up to `candidates` of the samples that the manifest at `path` keeps of each class; published in `folder`."""
    target = folder / CANDIDATES_FILE
    if not target.exists():
        table, _ = manifest.read(path, ["sample_id", "label", "kept"])
        kept = table.filter(table["kept"]).sort_by([("label", "ascending"), ("sample_id", "ascending")])
        labels = kept["label"].to_numpy()
        chosen, rows = [], []
        for label in np.unique(labels).tolist():
            first, last = np.searchsorted(labels, [label, label + 1])
            draw = rng.numpy_generator(config.distill_seed, "patch candidates", label)
            class_rows = np.sort(draw.permutation(last - first)[: config.distill.rded.candidates])
            chosen.append(first + class_rows)
            rows.append(class_rows)
        drawn = kept.take(np.concatenate(chosen)).select(["sample_id", "label"])
        drawn = drawn.append_column("row", pa.array(np.concatenate(rows), pa.int32())).cast(CANDIDATES)
        with publish(target) as temporary:
            pq.write_table(drawn, temporary)
    return pq.read_table(target)


class PatchRanker:
    """Holds the teacher on one device and ranks the candidates of chunks."""

    def __init__(self, config: Config, prepared: Path, networks: Path, device: torch.device):
        self.config, self.device, self.prepared = config, device, PreparedDataset(prepared)
        self.teacher = Teacher.load(networks / TEACHER, device, config.distill.rded.teacher_network)
        self.candidates = pq.read_table(parts_folder(networks, config) / CANDIDATES_FILE).combine_chunks()
        self.normalization = Normalization(tuple(self.prepared.mean), tuple(self.prepared.std))
        self.groups = {(group.file, group.number): group for group in self.prepared.groups("train")}

    def rank(self, units: Sequence[tuple[Chunk, Path]]) -> Iterator[int]:
        """Publish the part file of each chunk; yields the chunk's samples. The next chunk is read meanwhile."""
        for (chunk, target), groups in prefetch((unit, list(self._read(unit[0]))) for unit in units):
            tables = [self._rank(rows, pixels) for rows, pixels in groups]
            with publish(target) as temporary:
                pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *tables]), temporary)
            yield chunk.rows

    def _read(self, chunk: Chunk) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Per row group with candidates: their rows of CANDIDATES, and their pixels uint8 [n, *shape]."""
        for number in range(chunk.first, chunk.first + chunk.groups):
            group = self.groups[chunk.file, number]
            ids = self.prepared.read(group, columns=["sample_id"])["sample_id"]
            first, last = np.searchsorted(self.candidates["label"].to_numpy(), [group.label, group.label + 1])
            of_class = self.candidates.slice(first, last - first)
            rows = pc.index_in(ids, of_class["sample_id"]).combine_chunks()
            if rows.null_count < len(rows):
                table = self.prepared.read(group).filter(rows.is_valid())
                yield of_class.take(rows.drop_null()), self.prepared.pixels(table)

    def _rank(self, rows: pa.Table, pixels: np.ndarray) -> pa.Table:
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
                f"the teacher's loss for {name!r} is not finite; lower the teacher's learning rate or take other weights"
            )
        repeated = rows.take(np.repeat(np.arange(rows.num_rows), section.crops))
        crops = pa.array(np.tile(np.arange(section.crops), rows.num_rows), pa.int32())
        return repeated.append_column("crop", crops).append_column("loss", pa.array(losses.numpy())).cast(SCHEMA)


def merge(parts: Sequence[Path], candidates: pa.Table, crops: int, target: Path) -> None:
    """Publish one table of all part files, sorted by label, row and crop; each crop of each candidate is in it once."""
    order = [("label", "ascending"), ("row", "ascending"), ("crop", "ascending")]
    table = pa.concat_tables([pq.read_table(path) for path in parts]).sort_by(order)
    expected = candidates["sample_id"].combine_chunks().take(np.repeat(np.arange(candidates.num_rows), crops))
    if not table["sample_id"].combine_chunks().equals(expected):
        raise UserError(
            f"the ranked patches are not those of the candidates ({table.num_rows} rows of {len(expected)}): the prepared "
            f"data and the manifest do not belong together; {set_aside(parts[0].parent)}"
        )
    with publish(target) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path, **options: Any) -> pa.Table:
    """A finished table; `options` are those of `pyarrow.parquet.read_table`. Raises UserError if it is damaged."""
    try:
        return pq.read_table(path, **options)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"the ranked patches {path} cannot be read ({error}); {set_aside(path)}") from None


def images_per_class(table: Path, crops: int) -> list[int]:
    """How many images of each class were ranked, by label."""
    return [int(n) // crops for n in np.bincount(read_table(table, columns=["label"])["label"].to_numpy())]
