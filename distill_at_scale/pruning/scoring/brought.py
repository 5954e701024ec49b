"""A column of the score table that does not come from proxy checkpoints: one finished number per training sample.

`table.write_scores(..., more={name: column})` asks for it chunk by chunk. Left out: where the numbers come from
(`imported.py`, `monte_carlo.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.data.prepared.dataset import Prepared

Array = np.ndarray[Any, Any]


@dataclass
class Brought:
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


def ids_of(prepared: Prepared) -> pa.Array:
    """The ids of the training samples, by label and id, as a string array [n]."""
    parts = [prepared.read(chunk, columns=["sample_id"])["sample_id"] for chunk in prepared.chunks("train")]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()).combine_chunks()
