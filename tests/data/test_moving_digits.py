"""The embedded clips: real files, the class in the motion alone, and no digit in both splits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs import mp4
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources.video import moving_digits
from distill_at_scale.data.sources.video.moving_digits import (
    DIRECTIONS,
    FRAMES,
    SIDE,
    TEST_EVERY,
    clip,
    digits,
    path,
)

DIGIT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.fixture
def few(monkeypatch):
    """Nine clips per direction instead of 1,797 in all."""
    images, splits = digits()
    monkeypatch.setattr(moving_digits, "digits", lambda: (images[:72], splits[:72]))


def test_every_direction_has_files_of_both_splits(tmp_path, few, make_config):
    folder = tmp_path / "clips"
    plan = ingest.plan(make_config(tmp_path, data={"source": "moving_digits", "path": str(folder), "frames": 8}))
    assert sorted(plan.class_names) == sorted(DIRECTIONS)
    for split, each in (("train", 6), ("test", 3)):
        assert np.bincount(plan.listings[split]["label"].to_numpy()).tolist() == [each] * 8
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.mp4")}
    ingest.plan(make_config(tmp_path, data={"source": "moving_digits", "path": str(folder), "frames": 8}))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.mp4")} == before  # encoded once


def test_the_path_of_a_class_goes_in_its_direction():
    for direction, (down, right) in {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}.items():
        step = (path(direction, 7)[1] - path(direction, 7)[0] + SIDE / 2) % SIDE - SIDE / 2
        assert np.allclose(step / np.abs(step).max(), (down, right), atol=1e-9)
    assert np.allclose(np.diff(np.unwrap(path("down-right", 3), period=SIDE, axis=0), axis=0).std(0), 0, atol=1e-9)


@pytest.mark.parametrize("frame", [0, FRAMES // 2, FRAMES - 1])
def test_the_place_in_one_frame_says_nothing_about_the_class(frame):
    numbers = range(1797)
    classes = [number // TEST_EVERY % 8 for number in numbers]
    places = np.array([path(DIRECTIONS[c], n)[frame] for c, n in zip(classes, numbers, strict=True)])
    for axis in (0, 1):
        table = np.zeros((8, 4))
        np.add.at(table, (classes, (places[:, axis] // (SIDE / 4)).astype(int)), 1)
        assert chi2_contingency(table).pvalue > 0.01


def test_no_digit_is_in_both_splits_and_both_hold_every_digit():
    images, splits = digits()
    assert len(images) == 1797
    assert splits.count("test") == 599


def test_digits_wrap_around_the_frame():
    frames = clip(DIGIT, np.array([[0.0, 0.0], [40.0, 50.0]]))
    assert frames.shape == (2, SIDE, SIDE, 3)
    assert np.array_equal(np.roll(frames[0], (40, 50), (0, 1)), frames[1])


def test_the_files_are_real_videos_that_look_like_their_frames():
    decord = pytest.importorskip("decord")
    frames = clip(DIGIT, path("left", 0))
    video = decord.VideoReader(io.BytesIO(mp4.encode_mp4(frames, 12, moving_digits.ENCODER)))
    assert len(video) == FRAMES
    assert np.abs(video.get_batch(range(FRAMES)).asnumpy().astype(int) - frames).mean() < 3


def test_a_folder_with_other_files_is_not_overwritten(tmp_path, make_config):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no moving digits; name a new folder in data\.path"):
        ingest.plan(make_config(tmp_path / "r", data={"source": "moving_digits", "path": str(tmp_path), "frames": 8}))
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_uri_is_refused(tmp_path, make_config):
    with pytest.raises(UserError, match="needs a local folder"):
        ingest.plan(make_config(tmp_path, data={"source": "moving_digits", "path": "s3://b/x", "frames": 8}))
