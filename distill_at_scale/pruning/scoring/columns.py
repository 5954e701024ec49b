"""The columns of the score table: made of scored pieces by criteria, and brought from elsewhere.

`score` repeats the first column that `score.criterion` names; where that has no score (`random` alone) it is 0. Left out:
joining the pieces and writing the table (`table.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pruning.criteria.factory import (
    build_criteria,
    column_of,
    epochs_of,
    is_class_criterion,
    value_shape,
)
from distill_at_scale.pruning.scoring.reliability import TrialAgreement
from distill_at_scale.pruning.scoring.scorer import FEATURES
from distill_at_scale.pruning.selection.ranking import RANDOM

Array = np.ndarray[Any, Any]
ScoredPart = tuple[
    Path, pa.Table
]  # where rows were read, for messages, and the rows: sample_id, label, lists of values


class Column(Protocol):
    """Scores that were not made in the scoring pass: imported ones, or such as were measured on subsets."""

    useful: Literal["low", "high"]
    facts: dict[str, Any]  # about them, for the table's metadata

    def values(self, ids: pa.Array) -> Array:
        """float32 [n] of some sample ids (strings), in their order; asked for once each, sorted by label and id over all.

        Raises UserError for an id that has no score, naming it.
        """


class ScoreColumns:
    """What a configuration publishes of every sample, and the facts about it; holds what agreement is measured on."""

    def __init__(self, config: Config, more: Mapping[str, Column]):
        score = config.score
        self.criteria, self.more, self.checkpoints = build_criteria(score), dict(more), score.checkpoint_counts
        self.class_wise = any(is_class_criterion(criterion) for criterion in self.criteria.values())
        made = {**self.criteria, **self.more}
        if lacking := [name for name in score.criteria if name not in made and name != RANDOM]:
            raise ValueError(f"nobody brings the column of score.criterion = {lacking[0]!r}")
        names = [name for name in [*score.criteria, *more] if name in made]
        self.useful = {column_of(name): made[name].useful for name in names}
        self.names, self.first = list(self.useful), names[0] if names else None
        self.seed = {} if score.weights is not None else {"seed": config.run.seed}  # ready-made weights depend on none
        self.agreement = TrialAgreement(self.criteria[names[0]].aggregate) if self.first in self.criteria else None

    @cached_property
    def lists(self) -> dict[str, int]:
        """Columns whose values are published too, and how many there are per sample."""
        shapes = {name: value_shape(criterion, self.checkpoints) for name, criterion in self.criteria.items()}
        listed = [
            name for name, criterion in self.criteria.items() if not is_class_criterion(criterion) or criterion.by_trial
        ]
        return {column_of(name): math.prod(shapes[name]) for name in listed}

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(
            [("sample_id", pa.string()), ("label", pa.int32())]
            + [(name, pa.float32()) for name in (*self.names, "score")]
            + [(f"{name}_values", pa.list_(pa.float32(), width)) for name, width in self.lists.items()]
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Once all rows were made: what the table's metadata says."""
        trials, epochs = self.checkpoints if self.criteria else (0, 0)
        observed = {column_of(name): epochs_of(c, epochs) for name, c in self.criteria.items()}
        agreement = self.agreement.facts() if self.agreement else None
        about = {"useful": self.useful, "criteria": self.names, "observed": observed, "agreement": agreement}
        brought = {column_of(name): facts for name, column in self.more.items() if (facts := column.facts)}
        return {"trials": trials, "epochs": epochs, **about, **self.seed} | ({"brought": brought} if brought else {})

    def of(self, parts: Iterable[ScoredPart]) -> Iterator[pa.Table]:
        """The published columns, part by part, or class by class where a criterion looks at whole classes.

        Raises UserError where the values do not fit the checkpoints, or a criterion does not make one score of every
        sample's.
        """
        for piece, table in by_class(parts) if self.class_wise else parts:
            yield self._made(piece, table)

    def _made(self, piece: Path, table: pa.Table) -> pa.Table:
        scores: dict[str, Any] = {"sample_id": table["sample_id"], "label": table["label"]}
        lists: dict[str, Any] = {}
        for name, criterion in self.criteria.items():
            values = self._values(piece, name, table)
            column = column_of(name)
            scores[column] = _scores(name, criterion.aggregate(values), len(values))
            if column in self.lists:
                flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
                lists[f"{column}_values"] = pa.FixedSizeListArray.from_arrays(flat, self.lists[column])
            if name == self.first and self.agreement:
                self.agreement.add(table["label"].to_numpy(), values)
        for name, brought in self.more.items():
            ids = table["sample_id"].combine_chunks()
            scores[column_of(name)] = _scores(name, brought.values(ids), len(ids))
        first = scores[self.names[0]] if self.names else np.zeros(table.num_rows, np.float32)
        return pa.table({**scores, "score": first, **lists})

    def _values(self, piece: Path, name: str, table: pa.Table) -> Array:
        """What a criterion aggregates: float32 [n, trials, epochs]."""
        criterion, trials = self.criteria[name], self.checkpoints[0]
        shape = value_shape(criterion, self.checkpoints)
        if is_class_criterion(criterion):
            found = np.asarray(criterion.observe_class(_features(table).reshape(table.num_rows, trials, -1)))
            if found.shape != (table.num_rows, shape[0]):
                raise UserError(
                    f"the criterion {name} makes values of shape {found.shape} of {table.num_rows} samples; its observe_class "
                    f"must return [samples, {shape[0]}]"
                )
            return found.reshape(-1, *shape)
        found = lists_to_matrix(table[name])
        if found.shape[1:] != (math.prod(shape),):
            raise UserError(
                f"{piece} holds {found.shape[1]} values of {name} per sample, not {math.prod(shape)}; remove the score work "
                "folder and run `score` again"
            )
        return found.reshape(-1, *shape)


def _features(table: pa.Table) -> Array:
    """float32 [n, trials * dimensions]. Raises UserError where one is not finite: no order could be made of them."""
    found = lists_to_matrix(table[FEATURES])
    wrong = np.flatnonzero(~np.isfinite(found).all(1))
    if len(wrong):
        name = table["sample_id"][int(wrong[0])].as_py()
        raise UserError(
            f"the features of {name!r} are not finite, so its class cannot be compared; lower score.lr, set "
            "score.precision=fp32, or take other weights"
        )
    return found


def _scores(name: str, found: Any, count: int) -> Array:
    scores = np.asarray(found, np.float32)
    if scores.shape != (count,):
        raise UserError(
            f"the criterion {name} makes scores of shape {scores.shape} of {count} samples; its aggregate must return one "
            "number for each"
        )
    return scores


def by_class(parts: Iterable[ScoredPart]) -> Iterator[ScoredPart]:
    """The same rows, sorted by label, class by class; memory holds one class and a part."""
    held: list[pa.Table] = []
    for piece, table in parts:
        labels = table["label"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        for start, end in pairwise(starts):
            if held and start < end and held[0]["label"][0].as_py() != labels[start]:
                yield piece, pa.concat_tables(held)
                held = []
            held += [table.slice(start, end - start)] if start < end else []
    if held:
        yield piece, pa.concat_tables(held)


def lists_to_matrix(column: pa.ChunkedArray) -> Array:
    """A column of equally long lists as [n, values]; [0, 1] where there is no row.

    Raises ValueError where the lists differ in length.
    """
    flat = np.concatenate([np.zeros(0, np.float32), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
    if not len(column):
        return flat.reshape(0, 1)
    if not pa.types.is_fixed_size_list(column.type) and len(pc.unique(pc.list_value_length(column))) > 1:
        raise ValueError("the lists differ in length")
    return flat.reshape(len(column), -1)


@dataclass
class ExtraColumn:
    """Scores float32 [n] of the samples `ids` [n], which are sorted as the prepared data are; `facts` go to the table's."""

    useful: Literal["low", "high"]
    ids: pa.Array
    scores: Array
    facts: dict[str, Any] = field(default_factory=dict)
    _next: int = 0

    def values(self, sample_ids: pa.Array | pa.ChunkedArray) -> Array:
        """The scores of some samples, float32 [k]; asked in the order of the table it looks nothing up.

        Raises KeyError for an id that is not among the training samples.
        """
        if isinstance(sample_ids, pa.ChunkedArray):
            sample_ids = sample_ids.combine_chunks()
        end = self._next + len(sample_ids)
        if not self.ids.slice(self._next, len(sample_ids)).equals(sample_ids):
            places = pc.index_in(sample_ids, self.ids)
            if places.null_count:
                raise KeyError(sample_ids.filter(pc.is_null(places))[0].as_py())
            return self.scores[places.to_numpy()]
        first, self._next = self._next, end % max(1, len(self.ids))
        return self.scores[first:end]


def training_ids(prepared: PreparedDataset) -> pa.Array:
    """The ids of the training samples, by label and id, as a string array [n]."""
    parts = [prepared.read(chunk, columns=["sample_id"])["sample_id"] for chunk in prepared.chunks("train")]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()).combine_chunks()
