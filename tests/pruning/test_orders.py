"""Orders that draw from a part of each class, against slow references; and the clusters that one of them reads."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config
from selection_cases import choose, kept, on_disk, scores_of, skewed

from distill_at_scale.config.load import validate
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.pipeline import validate as checks
from distill_at_scale.pruning.criteria.factory import build_criteria
from distill_at_scale.pruning.selection import score_reader

DRAWN = ["coverage", "clusters", "easy_random", "window"]


def clustered(table, count=4, seed=3):
    """The same rows with a cluster number, which has nothing to do with the score; the clusters differ in size."""
    chance = np.random.default_rng(seed)
    numbers = np.minimum(chance.geometric(0.4, table.num_rows) - 1, count - 1).astype(np.float32)
    return table.append_column("clusters", pa.array(numbers))


def by_class(table, low=True):
    """The rows of each class by label, the most useful first, ties by id."""
    rows = sorted(table.to_pylist(), key=lambda r: (r["loss"] if low else -r["loss"], r["sample_id"]))
    return {label: [r for r in rows if r["label"] == label] for label in sorted({r["label"] for r in rows})}


def part(rows, start, end):
    first, last = (int(share * len(rows) + 0.5) for share in (start, end))
    return rows[first : max(last, first + 1)]


def order_of(selection, label):
    """The ids of a class by rank."""
    rows = [r for r in selection.table.to_pylist() if r["label"] == label]
    assert sorted(r["rank"] for r in rows) == list(range(len(rows)))
    return [r["sample_id"] for r in sorted(rows, key=lambda r: r["rank"])]


# What every such order keeps


@pytest.mark.parametrize("order", DRAWN)
@pytest.mark.parametrize("low", [True, False])
def test_the_part_comes_first_and_the_others_follow_by_usefulness(order, low):
    table = clustered(skewed(1))
    selection = choose(table, low=low, order=order, easiest=0.6, window=[0.2, 0.7], keep=0.3)
    for label, rows in by_class(table, low).items():
        inside = part(rows, 0.2, 0.7) if order == "window" else part(rows, 0, 0.6)
        ids, inner = order_of(selection, label), {r["sample_id"] for r in inside}
        assert set(ids[: len(inside)]) == inner
        assert ids[len(inside) :] == [r["sample_id"] for r in rows if r["sample_id"] not in inner]


@pytest.mark.parametrize("order", DRAWN)
def test_the_first_ranks_are_kept_in_the_numbers_that_the_rate_asks_for(order):
    table = clustered(skewed(2))
    few, many = (choose(table, order=order, keep=keep, minimum=2) for keep in (0.1, 0.4))
    for selection, keep in ((few, 0.1), (many, 0.4)):
        for label, rows in by_class(table).items():
            number = min(len(rows), max(2, int(keep * len(rows) + 0.5)))
            assert selection.facts["kept_per_class"][label] == number
            assert {r for r in kept(selection) if r in order_of(selection, label)} == set(
                order_of(selection, label)[:number]
            )
    assert kept(few) < kept(many)


@pytest.mark.parametrize("order", DRAWN)
def test_the_result_follows_from_the_seed_whatever_the_batches_and_other_classes(order, tmp_path, monkeypatch):
    table = clustered(skewed(3))
    whole = choose(table, order=order, keep=0.3).table
    monkeypatch.setattr(score_reader, "BATCH", 7)
    assert choose(on_disk(tmp_path, table), order=order, keep=0.3).table == whole
    one = table.filter(pa.compute.equal(table["label"], 4))
    assert choose(one, order=order, keep=0.3).table == whole.filter(pa.compute.equal(whole["label"], 4))
    other = choose(table, order=order, keep=0.3, seed=1).table
    assert (other == whole) == (order == "clusters")


@pytest.mark.parametrize("order", DRAWN)
def test_numbers_of_the_scope_adaptive_are_those_of_the_plain_order(order):
    table = clustered(skewed(4))
    plain, drawn = (choose(table, order=name, keep=0.3, scope="adaptive") for name in ("useful", order))
    assert drawn.facts["kept_per_class"] == plain.facts["kept_per_class"]
    assert len(set(drawn.facts["rates"].values())) > 1


def test_weighted_ranks_decide_what_is_easy():
    table = scores_of([40], decimals=6)
    table = table.append_column("other", pa.array(np.random.default_rng(5).random(40, np.float32)))
    weighted = {"criterion": {"loss": 1.0, "other": 3.0}, "low": {"loss": True, "other": False}, "keep": 0.5}
    useful, drawn = choose(table, **weighted), choose(table, order="easy_random", easiest=0.5, **weighted)
    assert kept(drawn) == kept(useful)
    assert order_of(drawn, 0) != order_of(useful, 0)


# Each order


def test_random_draws_are_those_of_the_class_alone():
    table = skewed(5)
    for order, shares in (("easy_random", (0, 0.6)), ("window", (0.2, 0.7))):
        selection = choose(table, order=order, easiest=0.6, window=[0.2, 0.7], keep=0.2, seed=9)
        for label, rows in by_class(table).items():
            inside = [r["sample_id"] for r in part(rows, *shares)]
            drawn = rng.numpy_generator(9, "selection order", label).permutation(len(inside))
            assert order_of(selection, label)[: len(inside)] == [inside[k] for k in drawn]


def test_a_random_draw_is_uniform_over_its_part():
    table, times = scores_of([10], decimals=6), 600
    counts = dict.fromkeys([r["sample_id"] for r in by_class(table)[0]], 0)
    for seed in range(times):
        for name in kept(choose(table, order="window", window=[0.2, 0.7], keep=0.2, seed=seed)):
            counts[name] += 1
    numbers = list(counts.values())
    assert numbers[:2] + numbers[7:] == [0] * 5
    assert all(abs(n - times * 2 / 5) < 60 for n in numbers[2:7])  # five deviations of a binomial


def fair_numbers(sizes, number):
    """CCS: the smallest stratum first takes its even part of what is left, or all it has."""
    numbers, left = dict.fromkeys(sizes, 0), number
    for done, stratum in enumerate(sorted(sizes, key=lambda s: (sizes[s], s))):
        numbers[stratum] = min(sizes[stratum], left // (len(sizes) - done))
        left -= numbers[stratum]
    return numbers


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("per_class", [1, 3, 7, 16, 30, 60])
def test_coverage_takes_equal_numbers_from_the_strata_that_have_enough(per_class, low):
    table = skewed(6, decimals=2)
    selection = choose(table, low=low, order="coverage", easiest=0.8, strata=6, per_class=per_class)
    for label, rows in by_class(table, low).items():
        inside = part(rows, 0, 0.8)
        losses = [r["loss"] for r in inside]
        width = (max(losses) - min(losses)) / 6 or 1
        stratum = {r["sample_id"]: min(5, int((r["loss"] - min(losses)) / width)) for r in inside}
        sizes = {s: list(stratum.values()).count(s) for s in set(stratum.values())}
        number = min(per_class, len(inside))
        found = [stratum[name] for name in order_of(selection, label)[:number]]
        assert {s: found.count(s) for s in sizes} == fair_numbers(sizes, number)


def test_coverage_draws_at_random_within_a_stratum_of_equal_scores():
    table = scores_of([30], decimals=0).set_column(2, "loss", pa.array(np.ones(30, np.float32)))
    seen = {tuple(order_of(choose(table, order="coverage", easiest=1.0, keep=0.5, seed=s), 0)) for s in range(5)}
    assert len(seen) == 5


@pytest.mark.parametrize("per_class", [1, 4, 9, 33])
def test_clusters_give_in_proportion_to_their_sizes_the_most_useful_first(per_class):
    table = clustered(skewed(7))
    selection = choose(table, order="clusters", easiest=0.8, per_class=per_class)
    for label, rows in by_class(table).items():
        inside = part(rows, 0, 0.8)
        members = {c: [r for r in inside if r["clusters"] == c] for c in {r["clusters"] for r in inside}}
        taken = dict.fromkeys(members, 0)
        for name in order_of(selection, label)[: min(per_class, len(inside))]:
            # Webster: next is the cluster with the largest size / (2 taken + 1), of equal ones the most useful sample
            rank = {r["sample_id"]: k for k, r in enumerate(inside)}
            open_ones = [c for c in members if taken[c] < len(members[c])]
            best = max(
                open_ones,
                key=lambda c: (
                    Fraction(len(members[c]), 2 * taken[c] + 1),
                    -rank[members[c][taken[c]]["sample_id"]],
                ),
            )
            assert name == members[best][taken[best]]["sample_id"]
            taken[best] += 1


def test_without_usefulness_clusters_are_drawn_by_the_seed():
    table = clustered(scores_of([60]))
    first, second = (choose(table, criterion="random", order="clusters", keep=0.3, seed=s) for s in (0, 1))
    assert kept(first) != kept(second)


def test_the_manifest_says_which_part_was_drawn_from():
    facts = choose(scores_of([20]), order="coverage", easiest=0.5, strata=4, keep=0.1).facts
    assert (facts["order"], facts["easiest"], facts["strata"]) == ("coverage", 0.5, 4)
    assert "easiest" not in choose(scores_of([20]), keep=0.1).facts
    assert choose(scores_of([20]), order="window", window=[0.1, 0.3], keep=0.1).facts["window"] == [0.1, 0.3]


# What is refused


@pytest.mark.parametrize("order", DRAWN)
def test_an_order_within_classes_does_not_rank_all_samples_together(order):
    with pytest.raises(UserError, match=f"select.scope: global ranks all samples together, but select.order: {order}"):
        validate({"select": {"order": order, "scope": "global"}})


def test_a_window_at_the_end_of_a_small_class_holds_its_hardest_sample():
    """0.9 of three ranks is rounded to 3, where the class ends."""
    table = scores_of([3, 40])
    hardest = {rows[-1]["sample_id"] for rows in by_class(table).values() if len(rows) == 3}
    assert hardest <= set(kept(choose(table, order="window", window=[0.9, 1.0], keep=0.01)))


@pytest.mark.parametrize("window", [[0.5, 0.5], [0.6, 0.2], [0.1], [0.1, 0.2, 0.3], [-0.1, 0.5], [0.5, 1.1]])
def test_a_window_is_two_ascending_shares(window):
    with pytest.raises(UserError, match=r"select\.window.*give two shares of the ranks"):
        validate({"select": {"window": window}})


def test_the_order_clusters_has_the_clusters_scored(tmp_path):
    config = tiny_config(tmp_path / "run", select__order="clusters")
    assert config.score.criteria == ["loss", "clusters"]
    checks.check_names(config)
    assert tiny_config(tmp_path / "run", select__order="coverage").score.criteria == ["loss"]
    both = ["clusters", "loss"]
    assert tiny_config(tmp_path / "run", score__criterion=both, select__order="clusters").score.criteria == both
    with pytest.raises(UserError, match=r"clusters, which is not scored; add it to score\.criterion"):
        choose(scores_of([9]), order="clusters", keep=0.5)


@pytest.mark.parametrize("criterion", [None, "clusters", {"loss": 1.0, "clusters": 0.5}])
def test_numbers_of_clusters_rank_nothing(tmp_path, criterion):
    with pytest.raises(UserError, match="numbers groups of samples and ranks none"):
        checks.check_names(
            tiny_config(tmp_path / "run", score__criterion=["clusters", "loss"], select__criterion=criterion)
        )


# The criterion with the clusters


def test_clusters_are_those_of_lloyd_at_rest():
    """Three groups far apart: k-means finds them, and each sample is in the cluster with the nearest mean."""
    chance = np.random.default_rng(0)
    truth = chance.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    features = (20 * np.eye(6)[truth] + chance.standard_normal((60, 6)) + 100).astype(np.float32)
    features = np.stack([features, features[:, ::-1]], 1)
    criterion = build_criteria(ScoreSection(criterion="clusters", clusters=3))["clusters"]
    found = criterion.observe_class(features)
    assert found.shape == (60, 1)
    assert len({*zip(truth, found[:, 0], strict=True)}) == 3
    assert np.array_equal(criterion.observe_class(features), found)
    assert criterion.aggregate(found[:, :, None]).tolist() == found[:, 0].tolist()


def test_finer_clusters_have_the_nearest_mean_too():
    points = np.random.default_rng(1).standard_normal((200, 2)).astype(np.float32)
    found = build_criteria(ScoreSection(criterion="clusters", clusters=7))["clusters"].observe_class(points[:, None])[
        :, 0
    ]
    means = np.stack([points[found == k].mean(0) for k in range(7)])
    assert np.linalg.norm(points[:, None] - means, axis=2).argmin(1).tolist() == found.tolist()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_small_classes_and_copies_have_fewer_clusters(count):
    criterion = build_criteria(ScoreSection(criterion="clusters", clusters=20))["clusters"]
    alone = criterion.observe_class(np.eye(count, dtype=np.float32)[:, None])
    assert sorted(alone[:, 0].tolist()) == list(range(count))
    assert len(set(criterion.observe_class(np.ones((count, 1, 3), np.float32))[:, 0])) == 1


def test_a_run_selects_from_the_clusters_of_its_proxies(make_run, tmp_path):
    keys = {"score__criterion": ["loss", "clusters"], "score__clusters": 4, "select__order": "clusters"}
    run = make_run(tmp_path / "run", **keys, select__keep=0.1)
    run.stages("ingest", "score", "select", "distill")
    scores = pq.read_table(run.dir / "scores.parquet").to_pylist()
    clusters = {r["sample_id"]: r["clusters"] for r in scores}
    manifest = pq.read_table(run.dir / "manifest.parquet").to_pylist()
    for label in range(3):
        rows = [r for r in manifest if r["label"] == label]
        assert {clusters[r["sample_id"]] for r in rows} == {0, 1, 2, 3}
        ranked = by_class(pa.Table.from_pylist([r for r in scores if r["label"] == label]))[label]
        easy = {r["sample_id"] for r in part(ranked, 0, 0.8)}
        chosen = [r["sample_id"] for r in rows if r["kept"]]
        assert len(chosen) == int(0.1 * len(rows) + 0.5)
        assert set(chosen) <= easy
        for cluster in range(4):  # its number is its share of the easy ones, and they are its most useful
            own = [r["sample_id"] for r in ranked if r["sample_id"] in easy and r["clusters"] == cluster]
            number = sum(name in chosen for name in own)
            assert abs(number - len(chosen) * len(own) / len(easy)) < 1
            assert set(own[:number]) <= set(chosen)
