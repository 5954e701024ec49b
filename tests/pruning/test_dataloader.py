"""Training batches: every sample once, classes spread, the same for any number of workers, in bounded memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import write_prepared

from distill_at_scale.pruning.proxies import dataloader
from distill_at_scale.pruning.proxies.dataloader import ProxyDataLoader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 samples of four uneven classes; the first pixels of sample k spell k."""
    labels = np.repeat(np.arange(4), [150, 80, 50, 20])
    pixels = np.zeros((300, 1, 4, 4), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(300) % 256, np.arange(300) // 256
    return write_prepared(tmp_path_factory.mktemp("stream"), pixels, labels)


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()).tolist()


def epoch(source: ProxyDataLoader, number=0, own=None, trial=0):
    dealt = source.shard_groups(trial, number)
    return list(source.batches(trial, number, dealt, own or range(len(dealt))))


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_no_sample_comes_twice_in_an_epoch_and_few_sit_out(data, shards):
    steps = epoch(ProxyDataLoader(data, 0, 32, shards))
    seen = [n for parts in steps for images, *_ in parts for n in numbers(images)]
    assert len(seen) == len(set(seen)) == len(steps) * 32
    assert len(steps) == 300 // 32


def test_labels_belong_to_their_images(data):
    classes = np.repeat(np.arange(4), [150, 80, 50, 20])
    for parts in epoch(ProxyDataLoader(data, 0, 32, 4)):
        for images, labels, _ in parts:
            assert labels.tolist() == classes[numbers(images)].tolist()


def test_every_worker_gets_its_own_part_of_the_very_same_batches(data):
    source = ProxyDataLoader(data, 0, 32, 4)
    expected = epoch(source)
    first, second = epoch(source, own=range(2)), epoch(source, own=range(2, 4))
    for all_parts, a, b in zip(expected, first, second, strict=True):
        assert [numbers(images) for images, *_ in all_parts] == [numbers(images) for images, *_ in [*a, *b]]


def test_epochs_trials_and_seeds_differ_and_repeat(data):
    def order(source=ProxyDataLoader(data, 0, 32, 4), **keys):
        return [n for parts in epoch(source, **keys) for images, *_ in parts for n in numbers(images)]

    orders = [order(), order(number=1), order(trial=1), order(ProxyDataLoader(data, 1, 32, 4))]
    assert len({tuple(f) for f in orders}) == 4
    assert order() == orders[0]


@pytest.mark.parametrize("window", [1, 200, 10**6])
def test_a_small_window_still_gives_every_sample_once_and_mixes_classes(data, monkeypatch, window):
    monkeypatch.setattr(dataloader, "WINDOW_BYTES", window)
    steps = epoch(ProxyDataLoader(data, 0, 32, 4))
    seen = [n for parts in steps for images, *_ in parts for n in numbers(images)]
    assert len(seen) == len(set(seen)) == 288
    classes = Counter(label for parts in steps[:3] for _, labels, _ in parts for label in labels.tolist())
    assert len(classes) >= 3, "the first batches hold hardly any classes"


def test_a_window_bounds_what_is_held(data, monkeypatch):
    held = []
    monkeypatch.setattr(dataloader, "WINDOW_BYTES", 4 * 16 * 10)
    windows = dataloader._windows

    def watched(groups, size, prepared):
        for window in windows(groups, size, prepared):
            held.append(sum(group.rows for group in window))
            yield window

    monkeypatch.setattr(dataloader, "_windows", watched)
    epoch(ProxyDataLoader(data, 0, 32, 4))
    assert len(held) > 20
    assert max(held) * 16 <= 16 * 10


def test_a_share_takes_its_part_of_every_class(data):
    source = ProxyDataLoader(data, 0, 8, 1, share=0.25)
    rows = Counter()
    for group in source.groups:
        rows[group.label] += group.rows
    for label, count in enumerate((150, 80, 50, 20)):
        assert 0.25 * count - 4 <= rows[label] <= 0.25 * count + 4
    assert ProxyDataLoader(data, 0, 8, 1, share=0.001).samples >= 4, "every class keeps at least one row group"


def test_a_set_smaller_than_a_batch_is_one_batch(tmp_path):
    small = write_prepared(tmp_path, np.zeros((10, 1, 4, 4), np.uint8), np.arange(10) % 2)
    steps = epoch(ProxyDataLoader(small, 0, 256, 8))
    assert len(steps) == 1
    assert sum(len(labels) for _, labels, _ in steps[0]) == 10


def test_positions_name_the_samples_and_a_mask_leaves_the_others_out(data):
    source, kept = ProxyDataLoader(data, 0, 32, 4), torch.arange(300) % 3 != 0
    batches = [parts for step in epoch(source) for parts in step]
    order = {
        n: position for images, _, rows in batches for n, position in zip(numbers(images), rows.tolist(), strict=True)
    }
    assert order == {n: n for n in order}, "the samples lie in the order of their classes"
    dealt = source.shard_groups(0, 0)
    assert sum(source.rows(dealt, kept)) == 200
    masked = list(source.batches(0, 0, dealt, range(len(dealt)), kept))
    seen = [position for step in masked for _, _, rows in step for position in rows.tolist()]
    assert len(seen) == len(set(seen)) == 32 * len(masked) >= 160
    assert all(position % 3 for position in seen)
