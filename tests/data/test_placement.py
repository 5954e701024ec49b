"""Placement of kept samples: the choice, the same draws from each placement, and prefetching."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from conftest import write_prepared

from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import schema, to_jpeg_table, write_meta, write_shards
from distill_at_scale.data.sampling import placement
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest, Lookahead
from distill_at_scale.data.sampling.placement import InShards, MemoryBudget, choose, kept_places
from distill_at_scale.distillation import engine as distill

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HOLDS = ("device", "host", "shards")


@pytest.fixture
def stored_data(tmp_path):
    """Three classes of 30 samples in row groups of 4; every third is kept."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 2, 4, 4), np.uint8)
    prepared = write_prepared(tmp_path / "prepared", pixels, np.repeat([0, 1, 2], 30))
    rows = []
    for label in range(3):
        rows += [
            {"sample_id": name, "label": label, "score": 0.0, "rank": 0, "kept": place % 3 == 0}
            for place, name in enumerate(prepared.ids("train", label).to_pylist())
        ]
    path = tmp_path / "manifest.parquet"
    manifest.write(path, manifest.SCHEMA.empty_table().from_pylist(rows, manifest.SCHEMA), {})
    return prepared, path


def load(stored_data, hold, labels=(0, 1, 2), free=None):
    return ClassSampler.load(*stored_data, labels, 5, CPU, hold, free)


def test_kept_samples_are_found_by_id_and_class(stored_data):
    places = kept_places(*stored_data, [2, 0])
    assert list(places) == [0, 2]
    assert places[2].tolist() == list(range(0, 30, 3))


def test_the_manifest_may_have_any_order_and_small_row_groups(stored_data, monkeypatch):
    table, facts = manifest.read(stored_data[1])
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    monkeypatch.setattr(manifest, "ROWS", 7)
    manifest.write(stored_data[1], shuffled, facts)
    assert kept_places(*stored_data, [1])[1].tolist() == list(range(0, 30, 3))


def test_a_manifest_of_other_data_is_refused(stored_data):
    table, facts = manifest.read(stored_data[1])
    names = [name.replace("001/", "elsewhere/") for name in table["sample_id"].to_pylist()]
    manifest.write(stored_data[1], table.set_column(0, "sample_id", [names]), facts)
    assert list(kept_places(*stored_data, [0])) == [0]
    with pytest.raises(
        UserError, match=r"keeps 10 samples of the class 'c1' that .*prepared lacks; it was made from other"
    ):
        kept_places(*stored_data, [0, 1])


@pytest.mark.parametrize("hold", HOLDS)
def test_draws_are_the_same_bytes_for_every_placement(stored_data, hold):
    reference, pool = load(stored_data, "host"), load(stored_data, hold)
    for step in range(4):
        for labels in ([0, 1, 2], [1]):
            for a, b in zip(
                reference.draw(labels, 6, "real batch", step), pool.draw(labels, 6, "real batch", step), strict=True
            ):
                assert torch.equal(a.images, b.images)
                assert torch.equal(a.rows, b.rows)
    for a, b in zip(reference.all_samples(), pool.all_samples(), strict=True):
        assert torch.equal(a, b)
    assert [pool.count(c) for c in range(3)] == [10, 10, 10]


def test_a_draw_from_the_shards_is_what_was_stored_there(stored_data):
    prepared, _ = stored_data
    draw = load(stored_data, "shards").draw([1], 4, "x", 0)[0]
    places = (3 * draw.rows).numpy()
    stored = prepared.load("train", labels=[1])[0][places]
    expected = (torch.from_numpy(stored).float() / 255 - 0.5) / 0.25
    assert torch.equal(draw.images, expected)


def test_jpegs_are_decoded_on_the_way(tmp_path):
    from distill_at_scale.data.codecs.image import encode

    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    ids = [f"s{k}" for k in range(6)]
    table = to_jpeg_table(ids, [0] * 6, [encode(image, 90) for image in images], (3, 8, 8))
    write_shards(tmp_path / "train", [table], schema((3, 8, 8), jpeg=True), 2)
    meta = {"class_names": ["a"], "shape": [3, 8, 8], "counts": {"train": [6]}, "mean": [0.5] * 3, "std": [0.2] * 3}
    write_meta(tmp_path, meta | {"jpeg": True}, "x")
    prepared = PreparedDataset(tmp_path)
    in_shards = InShards(prepared, {0: np.array([1, 3, 5], np.int32)}, threads=2)
    drawn = in_shards.take(0, torch.tensor([2, 0]))
    assert np.array_equal(drawn.numpy(), prepared.load("train")[0][[5, 1]])
    assert torch.equal(in_shards.of_class(0), torch.from_numpy(prepared.load("train")[0][[1, 3, 5]]))


@pytest.mark.parametrize(
    ("hold", "needed", "device", "where"),
    [
        ("auto", 50, GPU, "device"),
        ("auto", 150, GPU, "host"),
        ("auto", 1500, GPU, "shards"),
        ("auto", 50, CPU, "host"),
        ("auto", 1500, CPU, "shards"),
        ("shards", 50, GPU, "shards"),
        ("host", 50, GPU, "host"),
        ("device", 10**12, GPU, "device"),
        ("device", 50, CPU, "host"),
    ],
)
def test_the_placement_follows_from_sizes_or_the_configuration(hold, needed, device, where):
    assert choose(hold, needed, device, MemoryBudget(100, 1000))[0] == where


def test_the_pool_says_where_it_is_and_why(stored_data):
    assert load(stored_data, "auto").held.startswith("30 kept samples (1.0 KB) are held in host memory (at most")
    assert "stay on disk" in load(stored_data, "auto", free=MemoryBudget(0, 100)).held
    assert "as distill.hold = shards asks" in load(stored_data, "shards").held


def test_workers_of_one_machine_share_its_memory(monkeypatch, make_config, tmp_path):
    monkeypatch.setattr(placement, "free_memory", lambda: 1000)

    class Three(SingleProcess):
        size = 3

        def gather(self, value):
            return [value, (value[0], 400), ("elsewhere", 1)]

    assert distill.worker_memory(make_config(tmp_path), Three(), CPU).host == 400 // 2
    assert distill.worker_memory(make_config(tmp_path), SingleProcess(), CPU).host == 500


def test_memory_within_a_container_counts(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000\n", encoding="utf-8")
    used.write_text("2000\n", encoding="utf-8")
    monkeypatch.setattr(placement, "CGROUPS", [(limit, used)])
    assert placement.free_memory() == 3000
    limit.write_text("max\n", encoding="utf-8")
    assert placement.free_memory() > 3000


def draws_of(step):
    """DC's pattern: class by class, two outer iterations a step."""
    for outer in range(2):
        for label in range(3):
            yield DrawRequest((label,), 4, "real batch", (step, outer))


def test_every_scheduled_draw_is_read_in_advance(stored_data):
    reference, sampler = load(stored_data, "host"), load(stored_data, "shards")
    assert reference.lookahead is None
    sampler.schedule(itertools.chain.from_iterable(draws_of(step) for step in itertools.count()))
    for step in range(6):
        for request in draws_of(step):
            arguments = request.labels, request.n, request.purpose, *request.index
            (drawn,), (expected,) = sampler.draw(*arguments), reference.draw(*arguments)
            assert torch.equal(drawn.images, expected.images)
    assert (sampler.lookahead.hits, sampler.lookahead.misses) == (36, 0)


def test_the_next_scheduled_draw_is_read_before_it_is_requested():
    answered, done = [], threading.Event()

    def answer(request):
        answered.append(request.index)
        if len(answered) == 2:
            done.set()
        return request.index

    lookahead = Lookahead(answer)
    lookahead.schedule(DrawRequest((0,), 1, "x", (step,)) for step in range(9))
    assert lookahead(DrawRequest((0,), 1, "x", (0,))) == (0,)
    assert done.wait(10)
    assert answered == [(0,), (1,)]


def test_a_draw_that_is_not_scheduled_leaves_the_schedule_as_it_is():
    lookahead = Lookahead(lambda request: (request.purpose, request.index))
    lookahead.schedule(DrawRequest((0,), 1, "x", (step,)) for step in range(2))
    assert lookahead(DrawRequest((0,), 1, "other", (7,))) == ("other", (7,))
    assert [lookahead(DrawRequest((0,), 1, "x", (step,))) for step in range(3)] == [("x", (k,)) for k in range(3)]
    assert (lookahead.hits, lookahead.misses) == (2, 2)


def test_an_error_while_reading_ahead_arrives_with_its_own_draw():
    def answer(request):
        if request.index == (2,):
            raise UserError("damaged")
        return request.index

    lookahead = Lookahead(answer)
    lookahead.schedule(DrawRequest((0,), 1, "x", (step,)) for step in range(4))
    assert [lookahead(DrawRequest((0,), 1, "x", (step,))) for step in range(2)] == [(0,), (1,)]
    with pytest.raises(UserError, match="damaged"):
        lookahead(DrawRequest((0,), 1, "x", (2,)))
    assert lookahead(DrawRequest((0,), 1, "x", (3,))) == (3,)
