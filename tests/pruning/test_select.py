"""Static pruning against a plain sort: exact counts, directions, ties, streaming, and metadata."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selection_cases import choose, kept, on_disk, scores_of, skewed

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.pruning.selection import quotas, ranking, score_reader
from distill_at_scale.pruning.selection import select as static


def by_hand(table, number_of, start_of=lambda n: 0, reverse=False):
    """Slow reference: sort each class by (score, id), then cut."""
    rows, kept_ids = table.to_pylist(), set()
    for label in {row["label"] for row in rows}:
        ranked = sorted(
            (r for r in rows if r["label"] == label),
            key=lambda r: (-r["loss"] if reverse else r["loss"], r["sample_id"]),
        )
        start, number = start_of(len(ranked)), number_of(len(ranked))
        start = min(start, len(ranked) - number)
        kept_ids |= {r["sample_id"] for r in ranked[start : start + number]}
    return kept_ids


def test_four_in_ten_thousand_of_five_thousand_keeps_two():
    selection = choose(scores_of([5000, 5000], decimals=6), keep=0.0004)
    assert selection.facts["kept_per_class"] == [2, 2]
    assert kept(selection) == by_hand(scores_of([5000, 5000], decimals=6), lambda n: 2)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.55, 0.95, 1.0])
def test_the_count_is_the_rounded_share_of_every_class(keep):
    table = scores_of([7, 10, 33])
    selection = choose(table, keep=keep)
    expected = [max(1, int(keep * n + 0.5)) for n in (7, 10, 33)]
    assert selection.facts["kept_per_class"] == expected
    assert kept(selection) == by_hand(table, lambda n: max(1, int(keep * n + 0.5)))


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
    assert quotas.quota(share, count, minimum) == expected


@pytest.mark.parametrize("count", [50, 100, 200, 1000])
def test_the_quota_does_not_suffer_from_the_inexactness_of_decimals(count):
    for thousandths in range(1, 1001):
        assert quotas.quota(thousandths / 1000, count, 0) == (2 * thousandths * count + 1000) // 2000


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
def test_every_order_keeps_its_end_of_the_scale(order, low, reverse):
    table = scores_of([20, 9])
    assert kept(choose(table, low=low, order=order, keep=0.3)) == by_hand(
        table, lambda n: int(0.3 * n + 0.5), reverse=reverse
    )


@pytest.mark.parametrize("low", [True, False])
def test_a_stratum_starts_at_the_configured_place(low):
    table = scores_of([20, 10])
    selection = choose(table, low=low, order="stratum", stratum_start=0.4, keep=0.3)
    expected = by_hand(table, lambda n: int(0.3 * n + 0.5), lambda n: int(0.4 * n + 0.5), reverse=not low)
    assert kept(selection) == expected


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
    selection = choose(scores_of([100, 10, 2]), keep=0.05, minimum=3)
    assert selection.facts["kept_per_class"] == [5, 3, 2]
    assert selection.facts["raised_to_minimum"] == [1, 2]
    assert selection.facts["asked"] == {"keep": 0.05}
    assert selection.facts["reached"] == round(10 / 112, 8)


def test_a_count_per_class_is_kept_instead_of_a_share():
    selection = choose(scores_of([100, 3]), per_class=5)
    assert selection.facts["kept_per_class"] == [5, 3]
    assert selection.facts["asked"] == {"per_class": 5}


def test_the_global_scope_ranks_all_classes_together():
    table = scores_of([30, 30, 30], decimals=4)
    low = [{**row, "loss": row["loss"] + (5 if row["label"] == 2 else 0)} for row in table.to_pylist()]
    table = pa.Table.from_pylist(low)
    selection = choose(table, scope="global", keep=0.2, minimum=1)
    ranked = sorted(low, key=lambda r: (r["loss"], r["label"], r["sample_id"]))
    best_of_last = min((r for r in low if r["label"] == 2), key=lambda r: (r["loss"], r["sample_id"]))
    assert kept(selection) == {r["sample_id"] for r in ranked[:18]} | {best_of_last["sample_id"]}
    assert selection.facts["raised_to_minimum"] == [2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", ["useful", "useless", "stratum"])
def test_the_global_scope_raises_a_class_to_the_minimum_and_no_further(order, seed):
    table = scores_of([40, 12], seed, decimals=5)
    selection = choose(
        table, scope="global", order=order, stratum_start=0.3 if order == "stratum" else 0.0, keep=0.1, minimum=4
    )
    for label in selection.facts["raised_to_minimum"]:
        assert selection.facts["kept_per_class"][label] == 4
    assert min(selection.facts["kept_per_class"]) >= 4


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


def reference(table, config, minimum, low, label_wise):
    """One numpy lexsort of everything: (sample ids in order, rank within the class, kept)."""
    table = table.sort_by([("label", "ascending"), ("sample_id", "ascending")])
    labels, values = table["label"].to_numpy(), table["loss"].to_numpy().astype(np.float64)
    values = values if low else -values
    ids = np.array(table["sample_id"].to_pylist())
    ranks, kept = np.empty(len(ids), int), np.zeros(len(ids), bool)
    order = np.lexsort((ids, labels, values))  # all rows by (score, label, id)
    windows = [order[labels[order] == c] for c in np.unique(labels)]
    for members in windows:
        ranks[members] = np.arange(len(members))
    for members in windows if label_wise else [order]:
        n = len(members)
        floor = minimum if label_wise else 1
        number = quotas.quota(config.keep, n, floor)
        if config.per_class:
            number = min(n, max(config.per_class, minimum) if label_wise else config.per_class * len(windows))
        start = int(config.stratum_start * n + 0.5) if config.order == "stratum" else 0
        kept[members[min(start, n - number) :][:number]] = True
    for members in windows:
        lacking = min(minimum, len(members)) - kept[members].sum()
        kept[members[~kept[members]][: max(0, lacking)]] = True
    return ids.tolist(), ranks.tolist(), kept.tolist()


OPTIONS = {
    "keep": {"keep": 0.3},
    "little": {"keep": 0.01},
    "all": {"keep": 1.0},
    "useless": {"keep": 0.3, "order": "useless"},
    "high": {"keep": 0.45, "order": "high"},
    "low": {"keep": 0.45, "order": "low"},
    "stratum": {"keep": 0.2, "order": "stratum", "stratum_start": 0.35},
    "stratum at the end": {"keep": 0.5, "order": "stratum", "stratum_start": 0.9},
    "count": {"per_class": 6},
    "count from the top": {"per_class": 6, "order": "high"},
}


@pytest.mark.parametrize("scope", ["class", "global"])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_and_kept_equal_a_full_sort_on_random_tables_with_many_ties(name, scope):
    for seed in range(12):
        table, minimum, low = skewed(seed, decimals=seed % 3), seed % 4, seed % 2 == 0
        config = SelectSection(**OPTIONS[name], scope=scope)
        up = {"useless": not low, "high": False, "low": True}.get(config.order, low)
        selection = choose(table, minimum, low, **OPTIONS[name], scope=scope)
        ids, ranks, kept_there = reference(table, config, minimum, up, scope == "class")
        assert selection.table["sample_id"].to_pylist() == ids
        assert selection.table["rank"].to_pylist() == ranks
        assert selection.table["kept"].to_pylist() == kept_there
        counts = np.bincount(
            selection.table["label"].to_numpy()[kept_there], minlength=len(selection.facts["kept_per_class"])
        )
        assert selection.facts["kept_per_class"] == counts.tolist()
        assert (selection.facts["kept"], selection.facts["of"]) == (sum(kept_there), len(ids))


@pytest.mark.parametrize("kind", ["float64", "int32", "float16"])
def test_scores_of_other_types_rank_as_their_values_do(kind):
    table = skewed(3, decimals=0)
    table = table.set_column(2, "loss", pa.array(table["loss"].to_numpy().astype(kind)))
    for scope in ("class", "global"):
        _, ranks, there = reference(table, SelectSection(keep=0.3), 1, True, scope == "class")
        selection = choose(table, keep=0.3, scope=scope)
        assert (selection.table["rank"].to_pylist(), selection.table["kept"].to_pylist()) == (ranks, there)


def test_doubles_that_are_one_float_still_rank_apart():
    table = pa.table({"sample_id": ["a", "b"], "label": [0, 0], "loss": [1 + 1e-12, 1.0]})
    assert kept(choose(table, per_class=1)) == {"b"}
    assert kept(choose(table, per_class=1, scope="global")) == {"b"}


def test_keys_sort_as_the_numbers_do():
    edges = [-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, np.nextafter(np.float32(1), np.float32(2)), 3e38]
    for kind in (np.float32, np.float64):
        values = np.array(edges, kind)
        up, down = ranking.sort_keys(values, True), ranking.sort_keys(values, False)
        for i in range(len(values)):
            for j in range(len(values)):
                assert (up[i] < up[j], down[i] < down[j]) == (values[i] < values[j], values[i] > values[j])


def test_minus_zero_ties_with_zero():
    table = pa.table({"sample_id": ["a", "b", "c"], "label": [0] * 3, "loss": pa.array([0.0, -0.0, 0.0], pa.float32())})
    for order in ("low", "high"):
        assert choose(table, order=order).table["rank"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 7, 64, 10_000])
@pytest.mark.parametrize("scope", ["class", "global"])
@pytest.mark.parametrize("criterion", ["loss", "random"])
def test_streaming_from_disk_equals_what_is_found_in_memory(tmp_path, monkeypatch, batch, scope, criterion):
    table = skewed(1)
    there = choose(table, 2, scope=scope, criterion=criterion, keep=0.3)
    monkeypatch.setattr(score_reader, "BATCH", batch)
    monkeypatch.setattr(score_reader, "SORTABLE", 0)
    selection = choose(on_disk(tmp_path, table), 2, scope=scope, criterion=criterion, keep=0.3)
    assert selection.table.equals(there.table)
    assert selection.facts == there.facts


def test_rows_are_handed_on_as_they_are_read_and_classes_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(score_reader, "BATCH", 20)
    out = []
    static.select(on_disk(tmp_path, scores_of([30, 1, 20])), out, SelectSection(), "loss", True, 1, 0)
    assert [part.num_rows for part in out] == [20, 20, 11]


POOLS = []  # kept to the end: a buffer that outlives its pool crashes the process


def peak_memory(path, target):
    """The most bytes that Arrow held while selecting from disk to disk."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        with manifest.writing(target) as out:
            out.facts = static.select(path, out, SelectSection(keep=0.1), "loss", True, 1, 0)
    finally:
        pa.set_memory_pool(before)
    return pool.max_memory()


def test_memory_holds_a_small_part_of_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(score_reader, "BATCH", 500)
    monkeypatch.setattr(manifest, "ROWS", 1000)
    ids, labels = [f"s{k:023d}" for k in range(200_000)], pa.array(np.repeat(np.arange(200), 1000), pa.int32())
    loss = np.random.default_rng(1).random(len(ids), np.float32)
    table = pa.table({"sample_id": ids, "label": labels, "loss": loss})
    assert peak_memory(on_disk(tmp_path, table, rows=1000), tmp_path / "manifest.parquet") < table.nbytes / 5


@pytest.mark.parametrize("place", ["first", "batch's edge", "last"])
@pytest.mark.parametrize("scope", ["class", "global"])
def test_a_table_with_two_rows_exchanged_is_sorted_if_it_is_small(tmp_path, monkeypatch, place, scope):
    monkeypatch.setattr(score_reader, "BATCH", 50)
    table = skewed(2).sort_by([("label", "ascending"), ("sample_id", "ascending")])
    k = {"first": 0, "batch's edge": 49, "last": table.num_rows - 2}[place]
    order = np.arange(table.num_rows)
    order[[k, k + 1]] = [k + 1, k]
    pq.write_table(table.take(order), tmp_path / "scores.parquet")
    expected = choose(table, scope=scope, keep=0.3)
    selection = choose(tmp_path / "scores.parquet", scope=scope, keep=0.3)
    assert selection.table.equals(expected.table)
    monkeypatch.setattr(score_reader, "SORTABLE", table.num_rows)
    with pytest.raises(UserError, match=r"scores.parquet are not sorted by label and sample_id .*or run `score` again"):
        choose(tmp_path / "scores.parquet", scope=scope, keep=0.3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_id_that_is_there_twice_in_its_class_is_an_error(tmp_path, shuffled):
    table = scores_of([20, 9])
    table = pa.concat_tables([table, table.slice(12, 1)])
    name = table["sample_id"][12].as_py()
    source = table if shuffled else on_disk(tmp_path, table)
    with pytest.raises(UserError, match=f"the sample '{name}' appears twice"):
        choose(source)


@pytest.mark.parametrize("scope", ["class", "global"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_score_on_disk_that_is_not_finite_names_its_sample(tmp_path, scope, bad):
    table = scores_of([60, 40]).sort_by([("label", "ascending"), ("sample_id", "ascending")])
    values = table["loss"].to_pylist()
    values[77] = bad
    table = table.set_column(2, "loss", pa.array(values, pa.float32()))
    with pytest.raises(UserError, match=f"'{table['sample_id'][77].as_py()}' is not finite"):
        choose(on_disk(tmp_path, table), scope=scope, keep=0.5)


@pytest.mark.parametrize("labels", [[-1, 0], [0, None], [0.0, 1.0], ["x", "y"]])
def test_labels_that_are_not_class_numbers_are_refused(labels):
    with pytest.raises(UserError, match="label must hold class numbers from 0 on"):
        choose(pa.table({"sample_id": ["a", "b"], "label": labels, "loss": [1.0, 2.0]}))


def test_a_missing_id_is_refused():
    with pytest.raises(UserError, match="1 rows have no sample_id"):
        choose(pa.table({"sample_id": ["a", None], "label": [0, 0], "loss": [1.0, 2.0]}))


def test_a_table_without_rows_is_refused():
    with pytest.raises(UserError, match="holds no sample; run `score` again"):
        choose(scores_of([3]).slice(0, 0))


def test_a_table_that_is_cut_short_or_damaged_inside_is_refused(tmp_path):
    path = on_disk(tmp_path, scores_of([3000, 2000], decimals=5), rows=1000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"scores.parquet is not a readable Parquet file"):
        choose(path)
    path.write_bytes(data[:2000] + bytes(len(data) // 3) + data[2000 + len(data) // 3 :])
    with pytest.raises(UserError, match=r"scores.parquet is not a readable Parquet file.*run `score` again"):
        choose(path)
    path.unlink()
    with pytest.raises(UserError, match=r"scores.parquet is missing; run `distill-at-scale score CONFIG` first"):
        choose(path)


def test_a_random_draw_of_a_class_does_not_depend_on_the_other_classes():
    table = scores_of([40, 40, 40]).select(["sample_id", "label"])
    alone = table.filter(pa.compute.field("label") == 1)
    three, one = (choose(t, criterion="random", keep=0.25).table for t in (table, alone))
    assert three.filter(pa.compute.field("label") == 1).equals(one)
