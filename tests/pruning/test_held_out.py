"""select.held_out: a seeded part of each class that no selection keeps; the others are selected as if it were not there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from selection_cases import choose, kept, on_disk, scores_of, skewed

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.pruning.selection import quotas


def held(selection):
    return {row["sample_id"] for row in selection.table.to_pylist() if row["rank"] == manifest.HELD_OUT}


KEYS = [
    {"keep": 0.3}, {"keep": 1.0}, {"order": "useless", "keep": 0.1}, {"order": "stratum", "stratum_start": 0.4, "keep": 0.3},
    {"scope": "global", "keep": 0.2}, {"scope": "adaptive", "keep": 0.2}, {"per_class": 4},
]  # fmt: skip


@pytest.mark.parametrize("keys", KEYS)
def test_the_rest_is_selected_as_if_the_held_out_samples_did_not_exist(keys, tmp_path):
    table = skewed(3)
    selection = choose(on_disk(tmp_path, table), held_out=0.25, held_out_seed=7, **keys)
    outside = held(selection)
    assert not outside & kept(selection)
    labels = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    counts = np.bincount(list(labels.values()))
    numbers = np.bincount([labels[name] for name in outside], minlength=len(counts))
    assert numbers.tolist() == [max(0, min(int(n / 4 + 0.5), n - 1)) for n in counts]
    rest = table.filter(pa.array([name not in outside for name in table["sample_id"].to_pylist()]))
    alone = choose(rest, **keys)
    assert kept(selection) == kept(alone)
    rows = [row for row in selection.table.to_pylist() if row["sample_id"] not in outside]
    assert rows == alone.table.to_pylist()
    assert selection.facts == {**alone.facts, "held_out": len(outside)}


def test_all_selections_of_a_run_hold_out_the_same_samples_and_other_seeds_others():
    table = scores_of([100, 40])
    first = held(choose(table, held_out=0.2))
    assert len(first) == 28
    for keys in ({"criterion": "random", "seed": 5, "keep": 0.1}, {"keep": 0.5}, {"order": "useless"}):
        assert held(choose(table, held_out=0.2, **keys)) == first
    assert held(choose(table, held_out=0.2, held_out_seed=1)) != first
    assert not held(choose(table))


def test_a_class_keeps_the_minimum_and_a_set_too_small_is_refused():
    table = scores_of([10, 3])
    assert held(choose(table, minimum=3, held_out=0.5)) <= {f"s{k:05d}" for k in range(10)}
    with pytest.raises(UserError, match=r"select\.held_out = 0\.5 holds out no sample"):
        choose(table, minimum=10, held_out=0.5)


def test_a_plan_expects_what_is_kept():
    table, section = scores_of([40, 20]), SelectSection(held_out=0.25, keep=0.5)
    assert (
        quotas.expected(section, 1, [40, 20])
        == choose(table, held_out=0.25, keep=0.5).facts["kept_per_class"]
        == [15, 8]
    )


def test_the_held_out_ids_are_read_from_the_manifest(tmp_path):
    selection = choose(scores_of([30, 10]), held_out=0.2)
    path = tmp_path / "manifest.parquet"
    manifest.write(path, selection.table, selection.facts)
    assert set(manifest.held_out(path).to_pylist()) == held(selection)
    every = selection.table["sample_id"].to_pylist()
    assert manifest.held_out(path, outside=False).to_pylist() == [name for name in every if name not in held(selection)]
