"""Images of tiles and clips: each tile and frame is in its place, and the same input gives the same bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distill_at_scale.core import images


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def frames_in(encoded):
    """RGB frames [T, H, W, 3] of an encoded picture, their durations in ms, and how often it loops (0: forever)."""
    picture = Image.open(io.BytesIO(encoded))
    frames, durations = [], []
    for place in range(getattr(picture, "n_frames", 1)):
        picture.seek(place)
        frames.append(np.asarray(picture.convert("RGB")))
        durations.append(picture.info.get("duration"))
    return np.stack(frames), durations, picture.info.get("loop")


def as_rgb(clip):
    return np.broadcast_to(clip, (len(clip), 3, *clip.shape[2:])).transpose(0, 2, 3, 1)


def test_a_grid_shows_each_tile_in_its_place():
    tiles = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None] * 40, (6, 1, 4, 4))
    (sheet,) = images.grid(tiles, columns=3, side=4, gap=2)
    pixels = np.asarray(sheet)[:, :, 0]
    assert pixels.shape == (2 * 6 + 2, 3 * 6 + 2)
    for k in range(6):
        row, column = k // 3 * 6 + 2, k % 3 * 6 + 2
        assert (pixels[row : row + 4, column : column + 4] == 40 * k).all()


def test_a_grid_of_clips_shows_every_frame_of_every_tile():
    clips = noise(4, 3, 3, 5, 5)  # [n, T, C, H, W]
    sheets = images.grid(clips, columns=2, side=10, gap=1)
    assert len(sheets) == 3
    for t, sheet in enumerate(sheets):
        for k in range(4):
            row, column = k // 2 * 11 + 1, k % 2 * 11 + 1
            tile = np.asarray(sheet)[row : row + 10 : 2, column : column + 10 : 2]
            assert np.array_equal(tile, clips[k, t].transpose(1, 2, 0))


def test_a_still_of_a_clip_is_its_middle_frame():
    clip = noise(5, 3, 4, 6)
    assert np.array_equal(np.asarray(images.to_image(clip)), clip[2].transpose(1, 2, 0))
    assert images.to_image(clip[:, :1]).mode == "L"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animated_png_holds_the_exact_frames_in_an_endless_loop(channels):
    clip = noise(8, channels, 16, 16)
    frames, durations, loop = frames_in(images.png(images.to_frames(clip)))
    assert np.array_equal(frames, as_rgb(clip))
    assert durations == [1000 / images.FRAMES_PER_SECOND] * 8
    assert loop == 0


def test_an_image_is_a_plain_png():
    image = noise(3, 9, 9)
    encoded = images.png(images.to_frames(image))
    assert b"acTL" not in encoded
    assert np.array_equal(frames_in(encoded)[0][0], image.transpose(1, 2, 0))


def test_a_palette_takes_less_and_has_few_colours():
    frames = images.to_frames(noise(8, 3, 32, 32))
    small, exact = images.palette_png(frames), images.png(frames)
    shown, _, _ = frames_in(small)
    assert len(small) < len(exact) / 2
    assert len(shown) == 8
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= images.COLORS
    assert np.abs(shown.astype(int) - as_rgb(noise(8, 3, 32, 32))).mean() < 20


def test_a_palette_leaves_grey_exact():
    clip = noise(4, 1, 16, 16)
    assert np.array_equal(frames_in(images.palette_png(images.to_frames(clip)))[0], as_rgb(clip))


def test_webp_is_animated_and_near_on_a_smooth_scene():
    ramp = np.linspace(0, 200, 32)[None, None, None] + np.arange(8)[:, None, None, None] * 6
    clip = np.broadcast_to(ramp, (8, 3, 32, 32)).astype(np.uint8)
    frames, durations, loop = frames_in(images.webp(images.to_frames(clip)))
    assert np.abs(frames.astype(int) - as_rgb(clip)).mean() < 4
    assert len(durations) == 8
    assert loop == 0


@pytest.mark.parametrize("encode", [images.png, images.palette_png, images.webp])
def test_the_same_clip_gives_the_same_bytes(encode):
    assert encode(images.to_frames(noise(5, 3, 20, 20))) == encode(images.to_frames(noise(5, 3, 20, 20)))


def test_large_frames_are_reduced():
    assert {frame.size for frame in images.to_frames(noise(3, 3, 128, 128), 64)} == {(64, 64)}
    assert {frame.size for frame in images.to_frames(noise(3, 3, 16, 16), 64)} == {(16, 16)}
