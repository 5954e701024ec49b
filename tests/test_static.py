"""Static pruning against a plain sort: exact counts, directions, ties, and what the manifest says about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_at_scale.config import SelectSection
from distill_at_scale.errors import UserError
from distill_at_scale.pruning import manifest, static


def scores_of(sizes, seed=0, decimals=1):
    """Shuffled rows of some classes; scores are rounded, so that there are many ties."""
    chance = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = chance.permutation(len(labels))
    values = chance.random(len(labels)).round(decimals).astype(np.float32)
    ids = [f"s{k:05d}" for k in range(len(labels))]
    table = pa.table({"sample_id": ids, "label": labels.astype(np.int32), "loss": values, "score": values})
    return table.take(order)


def kept(selection):
    return {row["sample_id"] for row in selection.table.to_pylist() if row["kept"]}


@dataclass
class Found:
    table: pa.Table
    facts: dict


def choose(source, minimum=1, low=True, criterion="loss", seed=0, **section):
    out = []
    facts = static.select(source, out, SelectSection(**section), criterion, low, minimum, seed)
    return Found(pa.concat_tables(out).combine_chunks(), facts)


def by_hand(table, number_of, start_of=lambda n: 0, reverse=False):
    """The slow reference: sort each class by (score, id), cut."""
    rows, found = table.to_pylist(), set()
    for label in {row["label"] for row in rows}:
        ranked = sorted(
            (r for r in rows if r["label"] == label),
            key=lambda r: (-r["loss"] if reverse else r["loss"], r["sample_id"]),
        )
        start, number = start_of(len(ranked)), number_of(len(ranked))
        start = min(start, len(ranked) - number)
        found |= {r["sample_id"] for r in ranked[start : start + number]}
    return found


def test_four_in_ten_thousand_of_five_thousand_keeps_two():
    found = choose(scores_of([5000, 5000], decimals=6), keep=0.0004)
    assert found.facts["kept_per_class"] == [2, 2]
    assert kept(found) == by_hand(scores_of([5000, 5000], decimals=6), lambda n: 2)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.55, 0.95, 1.0])
def test_the_count_is_the_rounded_share_of_every_class(keep):
    table = scores_of([7, 10, 33])
    found = choose(table, keep=keep)
    expected = [max(1, int(keep * n + 0.5)) for n in (7, 10, 33)]
    assert found.facts["kept_per_class"] == expected
    assert kept(found) == by_hand(table, lambda n: max(1, int(keep * n + 0.5)))


@pytest.mark.parametrize(
    ("share", "count", "minimum", "expected"),
    [
        (0.25, 10, 0, 3),
        (0.24, 10, 0, 2),
        (0.05, 10, 0, 1),
        (0.04, 10, 0, 0),
        (0.04, 10, 3, 3),
        (0.5, 2, 9, 2),
        (1.0, 7, 0, 7),
        (0.35, 10, 0, 4),
    ],
)
def test_the_quota_rounds_half_up_and_keeps_the_minimum(share, count, minimum, expected):
    assert static.quota(share, count, minimum) == expected


@pytest.mark.parametrize("count", [50, 100, 200, 1000])
def test_the_quota_does_not_suffer_from_the_inexactness_of_decimals(count):
    for thousandths in range(1, 1001):
        assert static.quota(thousandths / 1000, count, 0) == (2 * thousandths * count + 1000) // 2000


@pytest.mark.parametrize(
    ("order", "low", "reverse"),
    [
        ("useful", True, False),
        ("useful", False, True),
        ("useless", True, True),
        ("useless", False, False),
        ("low", True, False),
        ("low", False, False),
        ("high", True, True),
        ("high", False, True),
    ],
)
def test_every_order_takes_its_end_of_the_scale(order, low, reverse):
    table = scores_of([20, 9])
    assert kept(choose(table, low=low, order=order, keep=0.3)) == by_hand(
        table, lambda n: int(0.3 * n + 0.5), reverse=reverse
    )


@pytest.mark.parametrize("low", [True, False])
def test_a_stratum_starts_where_it_is_told(low):
    table = scores_of([20, 10])
    found = choose(table, low=low, order="stratum", stratum_start=0.4, keep=0.3)
    expected = by_hand(table, lambda n: int(0.3 * n + 0.5), lambda n: int(0.4 * n + 0.5), reverse=not low)
    assert kept(found) == expected


def test_strata_that_adjoin_share_nothing_and_miss_nothing():
    table = scores_of([20, 10])
    parts = [kept(choose(table, order="stratum", stratum_start=start / 10, keep=0.2)) for start in (0, 2, 4, 6, 8)]
    assert sum(map(len, parts)) == 30
    assert set().union(*parts) == set(table["sample_id"].to_pylist())


def test_ties_break_by_sample_id():
    table = pa.table({"sample_id": ["d", "b", "c", "a"], "label": [0] * 4, "loss": [1.0] * 4, "score": [1.0] * 4})
    for order in ("low", "high"):
        assert kept(choose(table, order=order, per_class=2)) == {"a", "b"}
    assert kept(choose(table, scope="global", per_class=2)) == {"a", "b"}


def test_the_order_of_the_rows_does_not_matter():
    table = scores_of([20, 9])
    assert choose(table, keep=0.3).table.equals(choose(table.take(np.arange(29)[::-1].copy()), keep=0.3).table)


def test_the_minimum_overrides_the_rate_and_says_so():
    found = choose(scores_of([100, 10, 2]), keep=0.05, minimum=3)
    assert found.facts["kept_per_class"] == [5, 3, 2]
    assert found.facts["raised_to_minimum"] == [1, 2]
    assert found.facts["asked"] == {"keep": 0.05}
    assert found.facts["reached"] == round(10 / 112, 8)


def test_a_count_per_class_is_kept_instead_of_a_share():
    found = choose(scores_of([100, 3]), per_class=5)
    assert found.facts["kept_per_class"] == [5, 3]
    assert found.facts["asked"] == {"per_class": 5}


def test_the_global_scope_ranks_all_classes_together():
    table = scores_of([30, 30, 30], decimals=4)
    low = [{**row, "loss": row["loss"] + (5 if row["label"] == 2 else 0)} for row in table.to_pylist()]
    table = pa.Table.from_pylist(low)
    found = choose(table, scope="global", keep=0.2, minimum=1)
    ranked = sorted(low, key=lambda r: (r["loss"], r["label"], r["sample_id"]))
    best_of_last = min((r for r in low if r["label"] == 2), key=lambda r: (r["loss"], r["sample_id"]))
    assert kept(found) == {r["sample_id"] for r in ranked[:18]} | {best_of_last["sample_id"]}
    assert found.facts["raised_to_minimum"] == [2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", ["useful", "useless", "stratum"])
def test_the_global_scope_raises_a_class_to_the_minimum_and_no_further(order, seed):
    table = scores_of([40, 12], seed, decimals=5)
    found = choose(
        table, scope="global", order=order, stratum_start=0.3 if order == "stratum" else 0.0, keep=0.1, minimum=4
    )
    for label in found.facts["raised_to_minimum"]:
        assert found.facts["kept_per_class"][label] == 4
    assert min(found.facts["kept_per_class"]) >= 4


def test_random_is_seeded_and_needs_no_scores():
    table = scores_of([40, 40]).select(["sample_id", "label"])
    first, same, other = (choose(table, criterion="random", seed=s, keep=0.25) for s in (0, 0, 1))
    assert first.facts["kept_per_class"] == [10, 10]
    assert kept(first) == kept(same) != kept(other)


def test_random_is_independent_of_the_score():
    table = scores_of([2000], decimals=6)
    chosen = kept(choose(table, criterion="random", keep=0.5))
    mean = np.mean([row["loss"] for row in table.to_pylist() if row["sample_id"] in chosen])
    assert 0.45 < mean < 0.55


def test_ranks_count_from_the_first_to_be_kept():
    table = scores_of([6, 5], decimals=5)
    for row in choose(table, order="high", keep=0.5).table.to_pylist():
        better = [r for r in table.to_pylist() if r["label"] == row["label"] and r["loss"] > row["score"]]
        assert row["rank"] == len(better)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_its_sample(bad):
    table = pa.table({"sample_id": ["a", "b"], "label": [0, 0], "loss": [0.5, bad], "score": [0.5, bad]})
    with pytest.raises(UserError, match="'b' is not finite"):
        choose(table, keep=0.5)


def test_a_criterion_without_scores_lists_those_there_are():
    table = scores_of([4]).append_column("loss_values", pa.array([[0.5]] * 4))
    with pytest.raises(UserError) as error:
        choose(table, criterion="el2n")
    assert str(error.value) == "select.criterion = 'el2n' has no scores; scored are: loss (or random)"


def test_the_manifest_holds_the_table_and_its_facts(tmp_path):
    found = choose(scores_of([8, 4]), keep=0.25, seed=7)
    manifest.write(tmp_path / "m.parquet", found.table, found.facts | {"fingerprint": "abc"})
    table, facts = manifest.read(tmp_path / "m.parquet")
    assert table.schema.remove_metadata() == manifest.SCHEMA
    rows = [(row["label"], row["sample_id"]) for row in table.to_pylist()]
    assert rows == sorted(rows)
    assert len(rows) == 12
    expected = {
        "criterion": "loss",
        "order": "useful",
        "scope": "class",
        "kept": 3,
        "of": 12,
        "reached": 0.25,
        "seed": 7,
        "fingerprint": "abc",
        "kept_per_class": [2, 1],
        "min_per_class": 1,
        "raised_to_minimum": [],
    }
    assert {key: facts[key] for key in expected} == expected
    assert set(manifest.kept_ids(tmp_path / "m.parquet")) == kept(found)


def test_equal_selections_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        found = choose(scores_of([8, 4]), keep=0.25)
        manifest.write(tmp_path / name, found.table, found.facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_manifest_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="distill-at-scale select"):
        manifest.read(tmp_path / "none.parquet")
    (tmp_path / "text").write_text("text")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        manifest.read(tmp_path / "text")
    pq.write_table(pa.table({"sample_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="lacks the columns label, score, rank, kept"):
        manifest.read(tmp_path / "other.parquet")
