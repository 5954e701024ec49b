"""Derived data sets: remaining samples and classes, near-duplicates, raw and JPEG storage."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from plan_cases import measure_quickly

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.ingest.near_duplicates import jitter
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import schema, to_table, write_meta, write_shards


def prepared_set(folder, counts, tests=3, spread=None, shape=(1, 8, 8), dtype=np.uint8):
    """Classes of `counts` samples whose pixels differ from a class mean by about `spread[label]`."""
    draw = np.random.default_rng(0)
    sizes = {"train": counts, "test": [tests] * len(counts)}
    for split, of in sizes.items():
        labels = np.repeat(np.arange(len(of)), of)
        widths = np.array(spread or [20] * len(of))[labels].reshape(-1, *(1,) * len(shape))
        values = 120 + widths * draw.standard_normal((len(labels), *shape))
        pixels = np.clip(values, 0, 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)
        ids = [f"{split}/{label}/{place:05d}" for place, label in enumerate(labels.tolist())]
        write_shards(folder / split, [to_table(ids, labels, pixels)], schema(shape, dtype=dtype), 4)
    meta = {"class_names": [f"c{i}" for i in range(len(counts))], "shape": list(shape), "counts": sizes, "chunk": 16,
            "mean": [0.5] * shape[0], "std": [0.25] * shape[0], "jpeg": False,
            **({} if dtype == np.uint8 else {"kind": "tensors"})}  # fmt: skip
    write_meta(folder, meta, "synthetic")
    return folder


def derived(folder, seed=0, **keys):
    meta = derived_splits.derive(folder, DataSection(chunk=16, **keys), seed)
    prepared = PreparedDataset(folder)
    assert {k: v for k, v in prepared.meta.items() if k != "fingerprint"} == json.loads(json.dumps(meta))
    ids, labels = prepared.index("train")
    pairs = list(zip(labels.tolist(), ids, strict=True))
    assert pairs == sorted(pairs)
    assert len(set(ids)) == len(ids)
    assert np.bincount(labels, minlength=len(prepared.class_names)).tolist() == prepared.counts("train")
    return prepared


def test_a_long_tail_falls_from_the_largest_class_by_the_factor(tmp_path):
    prepared = derived(prepared_set(tmp_path, [100] * 5), transform="long_tail", imbalance=10.0)
    assert sorted(prepared.counts("train"), reverse=True) == [100, 56, 32, 18, 10]
    assert prepared.counts("test") == [3] * 5
    assert prepared.meta["transform"]["counts_before"]["train"] == [100] * 5


def test_a_long_tail_keeps_a_sample_of_every_class_and_only_existing_ones(tmp_path):
    prepared = derived(prepared_set(tmp_path, [3, 2, 3]), transform="long_tail", imbalance=1000.0)
    assert min(prepared.counts("train")) == 1
    assert max(prepared.counts("train")) <= 3


def test_a_steeper_tail_keeps_a_part_of_a_flatter_one_and_another_seed_other_samples(tmp_path):
    flat, steep, other = (
        set(
            derived(prepared_set(tmp_path / str(i), [60] * 4), seed, transform="long_tail", imbalance=f).index("train")[
                0
            ]
        )
        for i, (f, seed) in enumerate([(10.0, 0), (50.0, 0), (10.0, 1)])
    )
    assert steep < flat
    assert flat != other


def test_near_duplicates_keep_the_original_and_add_jittered_ones_next_to_it(tmp_path):
    before = _by_id(PreparedDataset(prepared_set(tmp_path / "a", [6, 5])), "train")
    prepared = derived(prepared_set(tmp_path / "b", [6, 5]), transform="near_duplicates", copies=3)
    after = _by_id(prepared, "train")
    assert prepared.counts("train") == [18, 15]
    assert prepared.counts("test") == [3, 3]
    assert set(after) == {f"{name}{end}" for name in before for end in ("", "#1", "#2")}
    for name, pixels in before.items():
        assert np.array_equal(after[name], pixels)
        assert not np.array_equal(after[f"{name}#1"], pixels)
        assert not np.array_equal(after[f"{name}#1"], after[f"{name}#2"])


def _by_id(prepared, split):
    ids, _ = prepared.index(split)
    return dict(zip(ids, prepared.load(split)[0], strict=True))


def test_more_than_ten_copies_of_ids_with_equal_prefixes_stay_sorted_for_any_memory(tmp_path, monkeypatch):
    def prepared_of(folder):
        write_shards(folder / "train", [to_table(["a", "a b", "a0"], [0, 0, 0], np.zeros((3, 1, 8, 8), np.uint8))],
                     schema((1, 8, 8)), 4)  # fmt: skip
        write_meta(folder, {"class_names": ["x"], "shape": [1, 8, 8], "counts": {"train": [3]}, "mean": [0.5],
                            "std": [0.25], "chunk": 16}, "synthetic")  # fmt: skip
        return _by_id(derived(folder, transform="near_duplicates", copies=12), "train")

    expected = prepared_of(tmp_path / "whole")
    monkeypatch.setattr("distill_at_scale.data.ingest.near_duplicates.READ_BYTES", 1)
    parts = prepared_of(tmp_path / "parts")
    assert len(expected) == 36
    assert expected.keys() == parts.keys()
    assert all(np.array_equal(expected[name], parts[name]) for name in expected)


def test_a_duplicate_is_near_and_not_the_same_and_a_clip_moves_as_one():
    ramp = np.broadcast_to(np.linspace(60, 180, 32), (1, 32, 32)).astype(np.uint8)
    jittered = jitter(ramp, np.random.default_rng(1)).astype(float)
    assert np.corrcoef(jittered.ravel(), ramp.ravel().astype(float))[0, 1] > 0.9
    assert not np.array_equal(jittered, ramp)
    clip = jitter(np.stack([ramp] * 4), np.random.default_rng(1))
    assert all(np.array_equal(frame, clip[0]) for frame in clip)


def test_tensors_get_noise_of_a_twentieth_of_their_deviation(tmp_path):
    folder = prepared_set(tmp_path, [50], shape=(4, 10), dtype=np.float32)
    prepared = derived(folder, transform="near_duplicates", copies=2)
    after = _by_id(prepared, "train")
    noise = np.stack([after[f"{name}#1"] - after[name] for name in after if "#" not in name])
    assert noise.std() == pytest.approx(0.05 * 0.25, rel=0.1)
    assert prepared.mean == pytest.approx(prepared.load("train")[0].mean((0, 2)).tolist(), rel=1e-4)


def test_an_id_that_a_copy_would_bear_is_refused(tmp_path):
    table = to_table(["a", "a#1"], [0, 0], np.zeros((2, 1, 8, 8), np.uint8))
    write_shards(tmp_path / "train", [table], schema((1, 8, 8)), 4)
    meta = {
        "class_names": ["x"],
        "shape": [1, 8, 8],
        "counts": {"train": [2]},
        "mean": [0.5],
        "std": [0.25],
        "chunk": 16,
    }
    write_meta(tmp_path, meta, "synthetic")
    with pytest.raises(UserError, match="name two samples 'a#1'"):
        derived_splits.derive(tmp_path, DataSection(transform="near_duplicates"), 0)


@pytest.mark.parametrize(("transform", "left"), [("low_variance", ["c1", "c3"]), ("high_variance", ["c0", "c2"])])
def test_a_choice_by_variance_renumbers_the_classes_of_both_splits(tmp_path, transform, left):
    prepared = derived(
        prepared_set(tmp_path, [9, 8, 7, 6], spread=[30, 2, 40, 5]), transform=transform, variance_classes=2
    )
    assert prepared.class_names == left
    assert prepared.counts("train") == [{"c0": 9, "c1": 8, "c2": 7, "c3": 6}[name] for name in left]
    assert prepared.counts("test") == [3, 3]
    assert set(prepared.index("test")[1].tolist()) == {0, 1}
    facts = prepared.meta["transform"]
    assert facts["changes"] == ["train", "test"]
    assert facts["variances"]["c0"] == pytest.approx((30 / 255) ** 2, rel=0.3)


@pytest.mark.parametrize("transform", ["long_tail", "near_duplicates", "low_variance"])
def test_statistics_are_those_of_the_derived_split(tmp_path, transform):
    prepared = derived(prepared_set(tmp_path, [30, 20, 10], spread=[5, 50, 20], shape=(3, 8, 8)), transform=transform)
    pixels = prepared.load("train")[0] / 255
    assert prepared.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=2e-6)
    assert prepared.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=2e-6)


def test_too_few_classes_are_refused_before_anything_is_decoded(tmp_path, make_run):
    asked = {"data__transform": "low_variance", "data__variance_classes": 4}
    with pytest.raises(UserError, match=r"data\.variance_classes = 4, but the data have 3"):
        make_run(tmp_path / "run", **asked).stages("ingest")
    one = {"data__classes": ["0"], "data__transform": "long_tail"}
    with pytest.raises(UserError, match="long_tail needs at least 2 classes"):
        make_run(tmp_path / "other", **one).stages("ingest")


def test_a_class_with_fewer_samples_than_images_to_distil_is_named_by_validate(tmp_path, make_run):
    run = make_run(
        tmp_path / "run", data__transform="long_tail", data__imbalance=100.0, distill__ipc=5, distill__method="dm"
    )
    with pytest.raises(UserError, match=r"distill\.ipc"):
        run.pipeline.validate()


@pytest.mark.parametrize("store", ["raw", "jpeg"])
@pytest.mark.parametrize("transform", ["long_tail", "near_duplicates", "high_variance"])
def test_a_whole_run_on_a_derived_set_of_either_store(tmp_path, make_run, monkeypatch, store, transform):
    measure_quickly(monkeypatch)
    keys = {"transform": transform, "store": store, "copies": 2, "variance_classes": 2}
    run = make_run(tmp_path / "run", **{f"data__{k}": v for k, v in keys.items()}, evaluate__seeds=1)
    assert run.pipeline.validate() == 0
    assert "data.transform" in run.text
    assert run.pipeline.forecast().problems == []
    run.stages("ingest", "score", "select", "distill", "evaluate", "report")
    prepared = PreparedDataset(run.dir / "prepared")
    assert pq.read_metadata(run.dir / "scores.parquet").num_rows == sum(prepared.counts("train"))
    assert "training split was changed on purpose" in (run.dir / "report.html").read_text(encoding="utf-8")
    assert prepared.groups("train")[0].rows <= 64
    if transform == "near_duplicates" and store == "jpeg":
        plain = make_run(tmp_path / "plain", data__store="jpeg").stages("ingest")
        first = prepared.read(prepared.groups("train")[0]).to_pylist()[0]
        assert (
            first
            == PreparedDataset(plain.dir / "prepared")
            .read(PreparedDataset(plain.dir / "prepared").groups("train")[0])
            .to_pylist()[0]
        )


def test_the_forecast_is_what_comes_out(tmp_path):
    for number, keys in enumerate([{"transform": "long_tail"}, {"transform": "near_duplicates", "copies": 4}]):
        prepared = derived(prepared_set(tmp_path / str(number), [40, 30, 20]), seed=3, **keys)
        expected = derived_splits.derived_counts(DataSection(**keys), [40, 30, 20], 3)
        assert (expected.classes, expected.counts) == ([0, 1, 2], prepared.counts("train"))


def test_a_transform_changes_the_run_and_its_parameters_do_only_with_it(tmp_path, make_run):
    run = make_run(tmp_path / "run").stages("ingest")
    make_run(tmp_path / "run", data__copies=9).stages("ingest")  # without a transform of no meaning
    with pytest.raises(UserError, match="transform"):
        make_run(tmp_path / "run", data__transform="long_tail").stages("ingest")
    assert "transform" not in PreparedDataset(run.dir / "prepared").meta
