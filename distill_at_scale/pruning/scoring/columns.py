"""Where each column of scores.parquet comes from: a criterion over proxy outputs, or scores computed elsewhere.

`score` repeats the first column named in `score.criterion`; it is 0 if none has scores (`random` alone).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import set_aside
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pruning.criteria import factory
from distill_at_scale.pruning.scoring.reliability import TrialAgreement
from distill_at_scale.pruning.scoring.scorer import FEATURES, matrix_to_lists
from distill_at_scale.pruning.selection.ranking import RANDOM
from distill_at_scale.pruning.selection.score_reader import label_runs

Array = np.ndarray[Any, Any]
ScoredPart = tuple[Path, pa.Table]  # the file, for messages, and its rows: sample_id, label and lists of values


@dataclass
class ExtraColumn:
    """A column that does not come from proxies: imported scores, or Monte Carlo utilities.

    `ids` [n] are the ids of the training samples in the order of the prepared data, `scores` float32 [n] their scores;
    `facts` go to the metadata of the table.
    """

    useful: Literal["low", "high"]
    ids: pa.Array
    scores: Array
    facts: dict[str, Any] = field(default_factory=dict)
    _next: int = 0

    def values(self, sample_ids: pa.Array | pa.ChunkedArray) -> Array:
        """The scores float32 [k] of some samples; fast if calls follow the order of the prepared data.

        Raises KeyError for an id that is not among `ids`.
        """
        if isinstance(sample_ids, pa.ChunkedArray):
            sample_ids = sample_ids.combine_chunks()
        first, end = self._next, self._next + len(sample_ids)
        if self.ids.slice(first, len(sample_ids)).equals(sample_ids):
            self._next = end % max(1, len(self.ids))
            return self.scores[first:end]
        rows = pc.index_in(sample_ids, self.ids)
        if rows.null_count:
            raise KeyError(sample_ids.filter(pc.is_null(rows))[0].as_py())
        return self.scores[rows.to_numpy()]


ExtraColumns = Mapping[str, ExtraColumn]  # by name


def training_ids(prepared: PreparedDataset) -> pa.Array:
    """The ids of the training samples, sorted by label and id: a string array [n]."""
    tables = [prepared.read(chunk, columns=["sample_id"]) for chunk in prepared.chunks("train")]
    return pa.concat_tables(tables)["sample_id"].combine_chunks()


class ScoreColumns:
    """Turns scored rows into the columns of scores.parquet, and collects the metadata of the table."""

    def __init__(self, config: Config, extra: ExtraColumns):
        score = config.score
        self.criteria, self.extra = factory.build_criteria(score), dict(extra)
        self.checkpoints = score.checkpoint_counts
        sources: dict[str, Any] = {**self.criteria, **self.extra}
        if missing := [name for name in score.criteria if name not in sources and name != RANDOM]:
            raise ValueError(f"score.criterion = {missing[0]!r} has neither a criterion nor an extra column")
        names = [name for name in [*score.criteria, *extra] if name in sources]
        self.useful = {factory.column_of(name): sources[name].useful for name in names}
        self.names, self.first = list(self.useful), names[0] if names else None
        self.shapes = {name: factory.value_shape(c, self.checkpoints) for name, c in self.criteria.items()}
        # the columns whose single values are published too, and the number of values per sample
        self.list_widths = {
            factory.column_of(name): math.prod(self.shapes[name])
            for name, criterion in self.criteria.items()
            if not factory.is_class_criterion(criterion) or criterion.by_trial
        }
        self.seed = {} if score.weights is not None else {"seed": config.run.seed}  # pretrained weights ignore the seed
        self.agreement = TrialAgreement(self.criteria[self.first].aggregate) if self.first in self.criteria else None

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(
            [("sample_id", pa.string()), ("label", pa.int32())]
            + [(name, pa.float32()) for name in (*self.names, "score")]
            + [(f"{name}_values", pa.list_(pa.float32(), width)) for name, width in self.list_widths.items()]
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The metadata of the table; complete once all rows have been built."""
        trials, epochs = self.checkpoints if self.criteria else (0, 0)
        extra = {factory.column_of(name): column.facts for name, column in self.extra.items() if column.facts}
        return {
            "trials": trials,
            "epochs": epochs,
            "useful": self.useful,
            "criteria": self.names,
            "observed": {factory.column_of(name): factory.epochs_of(c, epochs) for name, c in self.criteria.items()},
            "agreement": self.agreement.facts() if self.agreement else None,
            **self.seed,
            **({"brought": extra} if extra else {}),
        }

    def build(self, parts: Iterable[ScoredPart]) -> Iterator[pa.Table]:
        """The published columns, part by part; class by class if a criterion compares the samples of a class.

        Raises UserError if the values do not fit the checkpoints, or a criterion returns an array of the wrong shape.
        """
        if any(factory.is_class_criterion(criterion) for criterion in self.criteria.values()):
            parts = by_class(parts)
        for path, rows in parts:
            scores, lists = dict[str, Any](), dict[str, Any]()
            for name, criterion in self.criteria.items():
                column, values = factory.column_of(name), self._values(path, name, rows)
                scores[column] = _one_score_each(name, criterion.aggregate(values), rows.num_rows)
                if column in self.list_widths:
                    lists[f"{column}_values"] = matrix_to_lists(values)
                if name == self.first and self.agreement:
                    self.agreement.add(rows["label"].to_numpy(), values)
            for name, extra in self.extra.items():
                scores[factory.column_of(name)] = _one_score_each(name, extra.values(rows["sample_id"]), rows.num_rows)
            first = scores[self.names[0]] if self.names else np.zeros(rows.num_rows, np.float32)
            yield pa.table({"sample_id": rows["sample_id"], "label": rows["label"], **scores, "score": first, **lists})

    def _values(self, path: Path, name: str, rows: pa.Table) -> Array:
        """What a criterion aggregates: float32 [n, trials, epochs]."""
        criterion, shape = self.criteria[name], self.shapes[name]
        if not factory.is_class_criterion(criterion):
            values = lists_to_matrix(rows[name])
            if values.shape[1:] != (math.prod(shape),):
                raise UserError(
                    f"{path} holds {values.shape[1]} values of {name} per sample, not {math.prod(shape)}; "
                    f"{set_aside(path)}"
                )
            return values.reshape(-1, *shape)
        features = lists_to_matrix(rows[FEATURES])
        if not (finite := np.isfinite(features).all(1)).all():
            sample = rows["sample_id"][int(np.argmin(finite))].as_py()
            raise UserError(
                f"the features of {sample!r} are not finite, so its class cannot be compared; lower score.lr, set "
                "score.precision=fp32, or use other weights"
            )
        values = np.asarray(criterion.observe_class(features.reshape(rows.num_rows, self.checkpoints[0], -1)))
        if values.shape != (rows.num_rows, shape[0]):
            raise UserError(
                f"the criterion {name} returns values of shape {values.shape} for {rows.num_rows} samples; its observe_class "
                f"must return [samples, {shape[0]}]"
            )
        return values.reshape(-1, *shape)


def _one_score_each(name: str, scores: Any, count: int) -> Array:
    scores = np.asarray(scores, np.float32)
    if scores.shape != (count,):
        raise UserError(
            f"the criterion {name} returns scores of shape {scores.shape} for {count} samples; its aggregate must return one "
            "number per sample"
        )
    return scores


def by_class(parts: Iterable[ScoredPart]) -> Iterator[ScoredPart]:
    """The same rows, which are sorted by label, class by class; memory holds one class and one part."""
    runs = (
        (label, path, rows.slice(start, end - start))
        for path, rows in parts
        for label, start, end in label_runs(rows["label"].to_numpy())
    )
    for _, group in itertools.groupby(runs, key=itemgetter(0)):
        _, paths, tables = zip(*group, strict=True)
        yield paths[-1], pa.concat_tables(tables)


def lists_to_matrix(column: pa.ChunkedArray) -> Array:
    """A column of equally long lists as [n, values]; [0, 1] for no rows.

    Raises ValueError if the lists differ in length.
    """
    flat = np.concatenate([np.zeros(0, np.float32), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
    if not len(column):
        return flat.reshape(0, 1)
    if not pa.types.is_fixed_size_list(column.type) and len(pc.unique(pc.list_value_length(column))) > 1:
        raise ValueError("the lists differ in length")
    return flat.reshape(len(column), -1)
