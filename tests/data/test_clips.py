"""Clips of a fixed shape: frame sampling, short videos, and files that crash only the child process."""

from __future__ import annotations

import logging
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from videos import cut, marked, number_of, numbered, write_video

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs import clip as clips
from distill_at_scale.data.codecs.clip import ClipDecoder, clip_decoder, decoders_for
from distill_at_scale.data.codecs.clip_worker import ClipRequest, frame_indices
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.codecs.worker_process import IsolatedFunction, WorkerDied

RAW = write_video(None, numbered(60))


def chosen(decoder: str, seek: str) -> tuple[str, ...]:
    return decoders_for(DataSection(decoder=decoder, seek=seek))


HAS_DECORD = "decord" in chosen("auto", "exact")


@pytest.fixture(scope="module")
def child():
    """One child process for all tests that leave it alive."""
    child_process = IsolatedFunction(clips.CHILD)
    yield child_process
    child_process.close()


@pytest.fixture
def decoder(child):
    return lambda frames=4, size=16, channels=3, **keys: ClipDecoder(frames, size, channels, **keys, child=child)


def numbers(pixels):
    return [number_of(frame) for frame in pixels]


def test_uniform_takes_the_middle_of_equal_segments(decoder):
    pixels, remark = decoder(7)("x", RAW)
    assert (pixels.shape, pixels.dtype, remark) == ((7, 3, 16, 16), np.uint8, None)
    assert numbers(pixels) == [4, 12, 21, 30, 38, 47, 55]


def test_segment_takes_a_random_frame_of_each_segment_decided_by_seed_and_id(decoder):
    draws = [numbers(decoder(6, sampling="segment", seed=1)(f"clip {i}", RAW)[0]) for i in range(8)]
    for draw in draws:
        assert [number // 10 for number in draw] == list(range(6))
    assert len({tuple(draw) for draw in draws}) > 4
    assert numbers(decoder(6, sampling="segment", seed=1)("clip 3", RAW)[0]) == draws[3]
    assert numbers(decoder(6, sampling="segment", seed=2)("clip 3", RAW)[0]) != draws[3]


def test_dense_takes_frames_a_stride_apart_from_a_random_start(decoder):
    draws = [numbers(decoder(5, sampling="dense", stride=4, seed=1)(f"clip {i}", RAW)[0]) for i in range(8)]
    for draw in draws:
        assert np.diff(draw).tolist() == [4, 4, 4, 4]
    assert len({draw[0] for draw in draws}) > 3


def test_dense_comes_as_near_to_the_stride_as_the_video_allows(decoder):
    raw = write_video(None, numbered(10))
    assert numbers(decoder(4, sampling="dense", stride=8)("x", raw)[0]) == [0, 3, 6, 9]


@pytest.mark.parametrize("sampling", ["uniform", "segment", "dense"])
def test_frames_are_distinct_ascending_and_in_range_for_any_length(sampling):
    for n in [*range(2, 40), 299, 300, 301]:
        for stride in (1, 3, 50):
            wanted = ClipRequest(8, 16, 3, "square", sampling, stride, "repeat", "exact", 1, 1.0, 0, f"clip {n}")
            indices = frame_indices(n, wanted)
            assert indices == sorted(set(indices))
            assert len(indices) == min(n, 8)
            assert 0 <= indices[0] <= indices[-1] < n


def test_a_short_video_repeats_its_last_frame_and_says_so(decoder):
    pixels, remark = decoder(5)("x", write_video(None, numbered(3)))
    assert numbers(pixels) == [0, 1, 2, 2, 2]
    assert remark == "3 frames, fewer than data.frames = 5: the last one repeats 2 times"


def test_a_short_video_can_be_left_out_instead(decoder):
    with pytest.raises(SampleRejected, match=r"3 frames, fewer than data.frames = 5; data.short = repeat would use it"):
        decoder(5, short="reject")("x", write_video(None, numbered(3)))


def test_a_single_picture_is_not_a_video(decoder):
    for codec in ("libx264", "gif"):
        with pytest.raises(SampleRejected, match="a single frame, not a video"):
            decoder()("x", write_video(None, numbered(1), codec=codec))


def test_an_animated_picture_is_one(decoder):
    assert numbers(decoder()("x", write_video(None, numbered(8), codec="gif"))[0]) == [1, 3, 5, 7]


def test_one_channel_is_the_luma_of_three(decoder):
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    raw = write_video(None, frames)
    (colour, _), (grey, _) = decoder(4)("x", raw), decoder(4, channels=1)("x", raw)
    assert grey.shape == (4, 1, 16, 16)
    for a, b in zip(colour, grey, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.fromarray(a.transpose(1, 2, 0)).convert("L")), b[0])


def test_what_is_left_of_a_cut_file_is_used_with_a_remark_or_rejected(decoder):
    pixels, remark = decoder(2)("x", cut(numbered(60), 0.9))
    assert numbers(pixels) == [15, 45]
    assert remark.startswith("cut: ")
    assert "of 60 frames" in remark
    with pytest.raises(SampleRejected, match=r"cut: \d+ of 60 frames decode"):
        decoder(8)("x", cut(numbered(60), 0.5))


def test_an_empty_file_is_rejected_without_a_child():
    child_process = IsolatedFunction("no_such_module:function")
    with pytest.raises(SampleRejected, match="empty file"):
        ClipDecoder(4, 16, 3, child=child_process)("x", b"")


@pytest.mark.parametrize(
    ("mark", "how"),
    [
        ("abort", r"the decoder died with signal 6 \(SIGABRT\)"),
        ("exit", "the decoder ended with exit code 3"),
        ("spin", r"the decoder gave no answer within 0.7 s \(data.time_limit\)"),
        ("memory", "needs too much memory"),
    ],
)
def test_a_file_that_kills_its_decoder_is_rejected_and_the_next_one_decodes(mark, how):
    child_process = IsolatedFunction(clips.CHILD, memory=2**30)
    decoder = ClipDecoder(4, 16, 3, decoders=("videos:faulty",), time_limit=0.7, child=child_process)
    with pytest.raises(SampleRejected, match=how):
        decoder("bad", marked(RAW, mark))
    assert numbers(decoder("good", RAW)[0]) == [7, 22, 37, 52]
    child_process.close()


@pytest.mark.parametrize("mark", ["abort", "spin", "memory"])
def test_a_file_that_kills_the_first_decoder_is_decoded_by_the_second(mark, caplog):
    child_process = IsolatedFunction(clips.CHILD, memory=2**30)
    decoder = ClipDecoder(4, 16, 3, decoders=("videos:faulty", "pyav"), time_limit=0.7, child=child_process)
    with caplog.at_level(logging.WARNING, "distill_at_scale"):
        assert numbers(decoder("bad", marked(RAW, mark))[0]) == [7, 22, 37, 52]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("bad: decoded by PyAV, as ")
    child_process.close()


@pytest.mark.parametrize("seconds", [0.0, 0.3])  # it is noticed before the call, or in its middle
def test_a_child_that_was_killed_from_outside_is_replaced(seconds):
    child_process = IsolatedFunction(clips.CHILD)
    decoder = ClipDecoder(4, 16, 3, child=child_process)
    decoder("x", RAW)
    before = child_process.pid
    os.kill(before, 9)
    time.sleep(seconds)
    assert numbers(decoder("x", RAW)[0]) == [7, 22, 37, 52]
    assert child_process.pid not in (None, before)
    child_process.close()


def test_a_file_on_which_the_child_is_killed_again_and_again_is_rejected():
    child_process = IsolatedFunction(clips.CHILD)
    with pytest.raises(SampleRejected, match="signal 9"):
        ClipDecoder(4, 16, 3, decoders=("videos:faulty",), child=child_process)("x", marked(RAW, "kill"))
    child_process.close()


def test_a_child_that_keeps_too_much_memory_is_replaced():
    child_process = IsolatedFunction("videos:loaded", resident=1)
    for _ in range(2):
        assert child_process.call({}, b"abc", 5)[1] == b"abc"
        assert child_process.pid is None


def test_the_child_loads_neither_torch_nor_ray():
    child_process = IsolatedFunction("videos:loaded")
    modules = child_process.call({}, b"", 5)[0]["modules"]
    child_process.close()
    assert "distill_at_scale" in modules
    assert not {"torch", "torchvision", "ray"} & set(modules)


def test_processes_that_read_images_load_no_video_library():
    code = (
        "import sys, distill_at_scale.data.ingest.chunks; sys.exit(bool({'av', 'decord', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def test_a_child_that_cannot_start_is_not_the_fault_of_a_sample():
    with pytest.raises(RuntimeError, match="no_such_module"):
        IsolatedFunction("no_such_module:function").call({}, b"", 5)


def test_bytes_of_any_number_pass_both_ways():
    child_process = IsolatedFunction("videos:loaded")
    for count in (0, 1, 65_536, 3_000_001):
        body = os.urandom(count)
        assert child_process.call({}, body, 20)[1] == body
    child_process.close()


def test_no_answer_in_time_raises_and_the_next_call_has_its_own_answer():
    child_process = IsolatedFunction("videos:slow")
    with pytest.raises(WorkerDied, match=r"gave no answer within 0.2 s"):
        child_process.call({"sleep": 5}, b"", 0.2)
    assert child_process.call({"sleep": 0}, b"mine", 5)[1] == b"mine"
    child_process.close()


ORPHAN = """
import os
from distill_at_scale.data.codecs.worker_process import IsolatedFunction
isolated = IsolatedFunction("videos:loaded")
isolated.call({}, b"", 30)
print(isolated.pid, flush=True)
os._exit(1)
"""


def test_the_child_ends_when_its_parent_does():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, env=environment)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is still there")


def test_a_decoder_can_be_sent_to_another_process():
    decoder = ClipDecoder(4, 16, 3, seed=5)
    decoder("x", RAW)
    copy = pickle.loads(pickle.dumps(decoder))
    assert copy == decoder
    assert copy.child.pid is None
    np.testing.assert_array_equal(copy("x", RAW)[0], decoder("x", RAW)[0])
    for each in (copy, decoder):
        each.child.close()


def test_decoders_can_be_chosen_and_are_counted(decoder):
    assert re.fullmatch(
        r"decord 0\.\d+\.\d+, or PyAV [\d.]+ where that cannot", clips.describe_decoders(("decord", "pyav"))
    )
    one = decoder(decoders=("pyav",))
    for _ in range(2):
        one("x", RAW)
    assert dict(one.tally) == {"PyAV": 2}


@pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
def test_a_file_that_decord_cannot_do_is_decoded_by_pyav_and_logged(decoder, caplog):
    raw = write_video(None, numbered(60), codec="gif")
    with caplog.at_level(logging.INFO, "distill_at_scale"):
        assert numbers(decoder(decoders=("decord", "pyav"))("a gif", raw)[0]) == [7, 22, 37, 52]
    assert any(m.startswith("a gif: decoded by PyAV, as decord ") for m in caplog.messages)
    with pytest.raises(SampleRejected, match="decord"):
        decoder(decoders=("decord",))("a gif", raw)


def test_the_configuration_decides_the_decoders(monkeypatch):
    assert chosen("pyav", "exact") == chosen("auto", "fast") == ("pyav",)
    monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: object())
    assert chosen("auto", "exact") == ("decord", "pyav")
    assert chosen("decord", "exact") == ("decord",)
    with pytest.raises(UserError, match=r"data\.seek"):
        chosen("decord", "fast")
    monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
    assert chosen("auto", "exact") == ("pyav",)
    with pytest.raises(UserError, match="not installed"):
        chosen("decord", "exact")


def test_every_key_of_the_configuration_reaches_the_decoder():
    keys = {"frames": 5, "size": 20, "channels": 1, "resize": "crop", "sampling": "dense", "stride": 3, "short": "reject",
            "seek": "fast", "max_pixels": 1000, "max_seconds": 9.0, "time_limit": 7.0}  # fmt: skip
    data = configuration.validate({"data": keys}).data
    decoder = clip_decoder(data, seed=4)
    assert {key: getattr(decoder, key) for key in keys} == keys
    assert (decoder.seed, decoder.decoders, decoder.shape) == (4, ("pyav",), (5, 1, 20, 20))
