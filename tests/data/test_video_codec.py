"""Video files: the right frames from each container, or a reason for rejecting the file."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from videos import cut, number_of, numbered, rotated, without_index, write_audio, write_video, write_without_frames

from distill_at_scale.data.codecs.video_decoders import DecoderFailed, FewerFrames, decord_frames, pyav_frames
from distill_at_scale.data.codecs.video_probe import VideoRejected, open_video

FRAMES = numbered(60)
B_FRAMES = {"preset": "medium", "bf": "3", "b-pyramid": "normal", "crf": "10"}
OPEN_GROUPS = {**B_FRAMES, "x264-params": "open-gop=1:keyint=15:min-keyint=15:scenecut=0"}
KINDS = {  # how a file is encoded, and whether decord returns the requested frames
    "h264 mp4": ({}, True),
    "h264 mp4 with B-frames": ({"settings": B_FRAMES, "gop": 20}, True),
    "h264 mp4, open groups": ({"settings": OPEN_GROUPS}, False),
    "h264 matroska with B-frames": ({"settings": B_FRAMES, "container": "matroska"}, False),
    "h264 matroska without B-frames": ({"settings": {"bf": "0"}, "gop": 250, "container": "matroska"}, False),
    "h264 flv": ({"settings": {"bf": "0"}, "gop": 250, "container": "flv"}, False),
    "mpeg4 in fragments": (
        {
            "codec": "mpeg4",
            "container": "mp4",
            "settings": {"bf": "2"},
            "gop": 1,
            "movflags": "frag_keyframe+empty_moov",
        },
        False,
    ),
    "h264 avi with B-frames": ({"settings": B_FRAMES, "container": "avi"}, False),
    "h264 mpegts": ({"settings": B_FRAMES, "container": "mpegts"}, False),
    "mpeg4 avi": ({"codec": "mpeg4"}, False),
    "mpeg4 avi with B-frames": ({"codec": "mpeg4", "settings": {"bf": "2"}}, False),
    "mpeg4 mp4 with B-frames": ({"codec": "mpeg4", "container": "mp4", "settings": {"bf": "2"}}, False),
    "vp8 webm": ({"codec": "libvpx"}, True),
    "vp9 webm": ({"codec": "libvpx-vp9"}, True),
    "motion JPEG": ({"codec": "mjpeg"}, False),
    "gif": ({"codec": "gif"}, False),
}
WANTED = ([4, 12, 21, 30, 38, 47, 55], list(range(1, 60, 2)), [0, 59], [14, 15, 16], [29])


@pytest.fixture(scope="module")
def files():
    return {kind: write_video(None, FRAMES, **settings) for kind, (settings, _) in KINDS.items()}


def limits(**changed):
    return {"max_pixels": 10**8, "max_seconds": 600.0, **changed}


def decode(decoder, raw, wanted, size=24, resize="square", fast=False):
    with open_video(raw, **limits()) as video:
        return decoder(video, wanted, size, resize, fast)


def numbers(frames):
    return [number_of(frame.transpose(2, 0, 1)) for frame in frames]


def rejection(raw, **changed):
    with pytest.raises(VideoRejected) as caught, open_video(raw, **limits(**changed)):
        pass
    return str(caught.value)


def decibels(a, b):
    return 10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [False, True])
def test_pyav_returns_the_requested_frames(files, kind, fast):
    for wanted in WANTED:
        assert numbers(decode(pyav_frames, files[kind], wanted, fast=fast)) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_decord_returns_the_requested_frames_or_raises(files, kind):
    pytest.importorskip("decord")
    if not KINDS[kind][1]:
        with pytest.raises(DecoderFailed):
            decode(decord_frames, files[kind], WANTED[0])
        return
    for wanted in WANTED:
        assert numbers(decode(decord_frames, files[kind], wanted)) == wanted


@pytest.mark.parametrize("kind", ["h264 mp4 with B-frames", "h264 mp4, open groups", "mpeg4 mp4 with B-frames"])
def test_leaving_out_what_is_not_wanted_changes_no_bit(files, kind):
    with av.open(io.BytesIO(files[kind])) as container:
        scale = {"width": 24, "height": 24, "format": "rgb24", "interpolation": "BILINEAR", "threads": 1}
        plain = np.stack([frame.reformat(**scale).to_ndarray() for frame in container.decode(video=0)])
    generator = np.random.default_rng(0)
    for _ in range(10):
        wanted = sorted(generator.choice(60, int(generator.integers(1, 12)), replace=False).tolist())
        np.testing.assert_array_equal(decode(pyav_frames, files[kind], wanted), plain[wanted])


def test_fewer_packets_are_decoded_than_there_are(files, monkeypatch):
    from distill_at_scale.data.codecs import video_decoders as module

    given = []
    original = module._decoded
    monkeypatch.setattr(module, "_decoded", lambda video, packet: given.append(packet) or original(video, packet))
    decode(pyav_frames, files["h264 mp4 with B-frames"], [3, 45])
    assert sum(packet is not None for packet in given) < 20


@pytest.mark.parametrize("size", [8, 16, 20, 24, 48, 64])
@pytest.mark.parametrize("resize", ["square", "crop"])
def test_decord_and_pyav_agree_at_every_size(files, size, resize):
    pytest.importorskip("decord")
    a, b = (decode(d, files["h264 mp4"], [7, 43], size, resize) for d in (decord_frames, pyav_frames))
    assert a.shape == b.shape == (2, size, size, 3)
    assert decibels(a, b) > 40


def test_decord_and_pyav_return_the_same_frames_of_real_clips(shared_data):
    pytest.importorskip("decord")
    paths = sorted((shared_data / "kinetics400" / "val").rglob("*.mp4"), key=lambda path: path.stat().st_size)
    for path in paths[:3]:
        raw, wanted = path.read_bytes(), [30, 31, 32]
        a, b = (decode(d, raw, wanted, 64) for d in (decord_frames, pyav_frames))
        for frame, same in zip(a, range(3), strict=True):
            assert decibels(frame, b[same]) > 45
            assert np.argmax([decibels(frame, other) for other in b]) == same


def test_a_real_clip_without_the_loop_filter_is_near_exact(shared_data):
    path = min((shared_data / "kinetics400" / "val").rglob("*.mp4"), key=lambda path: path.stat().st_size)
    exact, fast = (decode(pyav_frames, path.read_bytes(), [10, 40, 70], 64, fast=f) for f in (False, True))
    assert not np.array_equal(exact, fast)
    assert decibels(exact, fast) > 35


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_videos_are_shown_upright(degrees):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # the corner at the top left
    raw = rotated(write_video(None, frames), degrees)
    corners = decode(pyav_frames, raw, [0, 3], 32)[:, 4:-4:23, 4:-4:23, 0].reshape(2, 4) > 127
    place = {90: 1, 180: 3, 270: 2}[degrees]  # turned clockwise, among: top left, top right, bottom left, bottom right
    np.testing.assert_array_equal(corners, np.eye(4, dtype=bool)[[place, place]])
    with pytest.raises(DecoderFailed, match="turned"):
        decode(decord_frames, raw, [0])


def test_crop_keeps_the_centre_and_the_aspect_ratio():
    frames = np.zeros((3, 48, 96, 3), np.uint8)
    frames[:, :, 24:48] = (255, 0, 0)
    frames[:, :, 48:72] = (0, 0, 255)  # the centre square is half red, half blue; the rest is black
    pixels = decode(pyav_frames, write_video(None, frames), [1], 24, "crop")[0].astype(int)
    assert (abs(pixels[:, 2:10] - (255, 0, 0)) < 40).all()
    assert (abs(pixels[:, 14:22] - (0, 0, 255)) < 40).all()


def test_small_pictures_are_averages_not_samples():
    stripes = np.zeros((3, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    pixels = decode(pyav_frames, write_video(None, stripes), [1], 16)[0]
    assert (abs(pixels[2:-2, 2:-2].astype(int) - 127) < 25).all()


def test_packets_that_show_no_frame_are_found_out(files):
    with open_video(files["vp8 webm"], **limits()) as video:
        last = bytes(video.packets[-1])
        hidden = av.Packet(bytes([last[0] & ~16]) + last[1:])  # without the bit that says: to be shown
        hidden.pts = hidden.dts = video.packets[-1].pts + 1
        video.packets.append(hidden)
        video.times.append(hidden.pts)
        video.frames = 61
        assert numbers(pyav_frames(video, [3], 24, "square", False)) == [3]
        with pytest.raises(FewerFrames) as caught:
            pyav_frames(video, [3, 60], 24, "square", False)
        assert caught.value.frames == 60


def test_files_that_are_not_videos_are_rejected_with_a_reason(files):
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(picture, "JPEG")
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    text = "not a video but text; replace or remove it"
    assert [rejection(b"hello, world\n" * 50), rejection(playlist)] == [text, text]
    assert rejection(picture.getvalue()) == "a JPEG image, which cannot be used here; convert it to MP4, or remove it"
    assert rejection(b"\0" * 1000).startswith("not a video: it holds only zeros, as an interrupted download leaves")
    assert rejection(b"\xfe\x01" * 500).startswith("not a video in a known format; convert it to MP4")
    assert rejection(write_audio(None)) == "no video stream, only sound or a cover; replace or remove the file"
    assert rejection(write_without_frames(None)) == "no frames; replace or remove the file"
    assert "moov" in rejection(without_index(files["h264 mp4"]))


def test_titles_in_old_encodings_are_not_damage(files):
    raw = files["h264 mp4"].replace(b"Lavf", b"\xe9\xff\xfef")
    assert raw != files["h264 mp4"]
    assert numbers(decode(pyav_frames, raw, [7])) == [7]


def test_a_file_cut_anywhere_yields_the_requested_frames_or_none(files):
    for kind in ("h264 matroska with B-frames", "vp8 webm", "mpeg4 avi"):
        for end in range(100, len(files[kind]), len(files[kind]) // 40):
            try:
                assert numbers(decode(pyav_frames, files[kind][:end], [5, 25, 55])) == [5, 25, 55]
            except VideoRejected:
                continue


def test_limits_hold_before_anything_is_decoded(files):
    pixels = "64 x 48 pixels, more than data.max_pixels = 3000; raise data.max_pixels, or make the video smaller"
    seconds = "6.0 s, more than data.max_seconds = 5; raise it, or cut the video"
    assert rejection(files["h264 mp4"], max_pixels=3000) == pixels
    assert rejection(files["h264 mp4"], max_seconds=5.0) == rejection(files["vp8 webm"], max_seconds=5.0) == seconds


@pytest.mark.parametrize("settings", [{}, {"settings": B_FRAMES}])
def test_only_the_existing_frames_of_a_cut_file_can_be_used(settings):
    raw = cut(FRAMES, 0.6, **settings)
    with open_video(raw, **limits()) as video:
        assert video.cut
        assert video.frames == 60
        assert numbers(pyav_frames(video, [2, 11], 24, "square", False)) == [2, 11]
        with pytest.raises(VideoRejected, match=r"^cut: \d+ of 60 frames decode; replace the file$"):
            pyav_frames(video, [2, 11, 58], 24, "square", False)
    with pytest.raises(DecoderFailed, match="cut"):
        decode(decord_frames, raw, [2])


@pytest.mark.parametrize(("kind", "share"), [("vp8 webm", 0.6), ("mpeg4 avi", 0.6)])
def test_cut_files_of_other_containers_are_noticed(files, kind, share):
    raw = files[kind][: int(len(files[kind]) * share)]
    with open_video(raw, **limits()) as video:
        assert video.cut
        assert video.frames == 60
        with pytest.raises(VideoRejected, match=r"^cut: "):
            pyav_frames(video, [58], 24, "square", False)


def test_damage_in_the_middle_never_yields_other_frames(files):
    raw = bytearray(files["h264 mp4"])
    start = raw.index(b"mdat") + 4
    raw[start + 200 : start + (len(raw) - start) // 2] = bytes((len(raw) - start) // 2 - 200)
    with pytest.raises(VideoRejected, match=r"^damaged: \d+ of 60 frames decode; replace the file$"):
        decode(pyav_frames, bytes(raw), [5, 55])


def without_packet(raw: bytes, number: int) -> bytes:
    """The file with one packet of its video zeroed behind its first bytes."""
    with av.open(io.BytesIO(raw)) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        at = raw.index(bytes(packet))
    return raw[: at + 6] + bytes(packet.size - 6) + raw[at + packet.size :]


def test_a_damaged_file_whose_frames_are_only_known_by_order_is_rejected():
    raw = without_packet(write_video(None, FRAMES, codec="mpeg4", container="avi"), 20)
    with pytest.raises(VideoRejected, match=r"damaged: \d+ of \d+ frames decode"):
        decode(pyav_frames, raw, [5, len(FRAMES) - 2])


def test_packets_that_do_not_decode_are_counted():
    raw = without_packet(write_video(None, FRAMES, settings=B_FRAMES, gop=12), 20)  # a key frame
    with open_video(raw, **limits()) as video:
        pyav_frames(video, [5, 22], 24, "square", False)
        assert video.errors == 1


def test_a_video_that_is_too_long_without_saying_so_in_its_header_is_rejected():
    raw = write_video(None, FRAMES[:10], fps=Fraction(1, 20), codec="libvpx", container="webm", live="1")
    assert "more than data.max_seconds = 100" in rejection(raw, max_seconds=100.0)
