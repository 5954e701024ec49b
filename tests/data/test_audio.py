"""Sound files: spectrograms against the formula, what is rejected and why, both ways to label, and a run from end to end."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from distill_at_scale.cli import main
from distill_at_scale.config.load import validate
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.codecs.sound import FLOOR, SoundDecoder, mel_filters
from distill_at_scale.data.sources.audio import AudioFolder
from distill_at_scale.pipeline import warnings

RATE = 8000
PATTERN = r"(?P<label>\d+)_\w+_\d+\.\w+$"


def sine(hertz: float, seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1)


def encoded(wave: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def write(path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def source_of(folder, **keys) -> AudioFolder:
    return AudioFolder(DataSection(source="audiofolder", path=str(folder), rate=RATE, bands=16, **keys))


def decoder(**keys) -> SoundDecoder:
    return SoundDecoder(**{"rate": RATE, "seconds": 1.0, "bands": 32, **keys})


def why_not(raw: bytes, **keys) -> str:
    with pytest.raises(SampleRejected) as reason:
        decoder(**keys)(raw)
    return str(reason.value)


def test_mel_filters_are_the_triangles_of_the_formula():
    rate, bands = 16_000, 10
    filters = mel_filters(rate, bands).toarray()
    hertz = np.linspace(0, rate / 2, filters.shape[1])
    mel = 2595 * np.log10(1 + hertz / 700)
    step = mel[-1] / (bands + 1)
    for band in range(bands):
        inside = (mel > band * step) & (mel < (band + 2) * step - 1e-9)
        assert np.array_equal(filters[band] > 1e-9, inside)
        peak = 700 * (10 ** ((band + 1) * step / 2595) - 1)
        assert abs(hertz[filters[band].argmax()] - peak) <= hertz[1]
    inner = (mel >= step) & (mel <= bands * step)
    np.testing.assert_allclose(filters.sum(0)[inner], 1, atol=1e-9)  # neighbours add up to 1


@pytest.mark.parametrize("rate", [4_000, 16_000, 96_000])
def test_no_mel_band_is_empty(rate):
    assert mel_filters(rate, 128).toarray().max(1).min() > 0.1


def test_a_spectrogram_is_the_log_of_the_power_in_each_band():
    wave, rate, window = sine(1000), RATE, 256
    values = decoder()(encoded(wave, subtype="DOUBLE"))
    assert values.dtype == np.float32
    assert values.shape == decoder().shape == (1, 32, 1 + (8000 - 256) // 128)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    for frame in (0, 7, 60):
        piece = wave[frame * 128 : frame * 128 + window, 0] * hann
        turns = np.exp(-2j * np.pi * np.outer(np.arange(513) / 1024, np.arange(window)))
        power = np.abs(turns @ piece) ** 2 / hann.sum() ** 2
        np.testing.assert_allclose(values[0, :, frame], np.log(mel_filters(rate, 32) @ power + FLOOR), atol=1e-4)
    loudest = mel_filters(rate, 32).toarray()[:, 128].argmax()  # 128 x 7.8125 Hz = 1 kHz
    assert set(values[0].argmax(0)) == {loudest}


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("WAV", 1e-3), ("FLAC", 1e-3), ("AIFF", 1e-3), ("OGG", 0.5), ("MP3", 0.5)]
)
def test_formats_rates_and_channels_give_one_spectrogram(kind, tolerance):
    wanted = decoder()(encoded(sine(440), subtype="PCM_16"))
    loud = wanted > wanted.max() - 6
    other = decoder()(encoded(sine(440, rate=16_000, channels=2), 16_000, kind))
    inner = np.s_[:, :, 3:-3]  # filters and codecs differ at the ends
    assert np.abs(other - wanted)[inner][loud[inner]].max() < max(tolerance, 0.05)


def test_short_sounds_are_padded_and_long_ones_are_cut():
    short, long, whole = (decoder()(encoded(sine(440, seconds))) for seconds in (0.5, 3.0, 1.0))
    np.testing.assert_allclose(short[:, :, :29], whole[:, :, :29], atol=1e-6)
    np.testing.assert_allclose(short[:, :, -29:], np.log(FLOOR), atol=1e-6)
    np.testing.assert_allclose(long, whole, atol=1e-6)


def test_reasons():
    wav, flac = encoded(sine(440)), encoded(np.random.default_rng(0).normal(size=RATE) / 9, kind="FLAC")
    assert why_not(b"") == "empty file; replace it"
    assert why_not(b"seven words that are no sound at all") == "not a sound but text; replace or remove it"
    assert why_not(bytes(100)).startswith("not a sound: it holds only zeros")
    assert "Git LFS" in why_not(b"version https://git-lfs.github.com/spec/v1\n")
    assert why_not(wav[:-1000]) == "cut: 1,000 bytes are missing at its end; copy or download it again"
    assert why_not(flac[: len(flac) // 2]).startswith("cut or damaged: it cannot be decoded to its end")
    assert why_not(flac[: len(flac) // 2], seconds=0.1).startswith("cut or damaged")  # after the part that is used
    assert why_not(wav[:20]).startswith("damaged: it begins like a sound")
    assert why_not(encoded(np.zeros((0, 1)))).startswith("it holds no samples")
    assert why_not(wav, max_seconds=0.9) == "1.0 s long, more than data.max_seconds = 0.9; raise it, or cut the sound"
    broken = sine(440)
    broken[5:8] = np.nan
    assert why_not(encoded(broken, subtype="FLOAT")).startswith("3 of its samples are not finite")
    assert "100 samples per second" in why_not(encoded(sine(10), 100))
    assert "in 33 channels" in why_not(encoded(sine(440, channels=33)))


def test_a_header_that_promises_hours_is_not_decoded(monkeypatch):
    """A FLAC header says its length, whatever follows."""
    flac = bytearray(encoded(sine(440), kind="FLAC"))
    flac[21] |= 0x0F  # the upper bits of the number of samples, in STREAMINFO
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    assert "more than data.max_seconds = 600" in why_not(bytes(flac))


def test_a_stream_of_unknown_length_is_read_from_wav():
    wav = bytearray(encoded(sine(440)))
    place = wav.index(b"data") + 4
    wav[place : place + 4] = b"\xff\xff\xff\xff"
    np.testing.assert_array_equal(decoder()(bytes(wav)), decoder()(encoded(sine(440))))

    flac = bytearray(encoded(sine(440), kind="FLAC"))
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])  # STREAMINFO's number of samples
    assert why_not(bytes(flac)).startswith("its header does not say its length")


def test_decoding_ends_no_process_and_writes_nothing_to_the_terminal(tmp_path, capfd):
    """Damaged MP3 files make libsndfile's decoder write to stderr; a child process decodes them."""
    mp3 = encoded(np.random.default_rng(0).normal(size=RATE) / 9, kind="MP3")
    for name in "ab":
        for i in range(20):
            damaged = bytearray(mp3)
            for place in np.random.default_rng(i).integers(100, len(mp3), 30):
                damaged[place] ^= 0xFF
            write(tmp_path / name / f"{i}.mp3", bytes(damaged))
    source = source_of(tmp_path)
    capfd.readouterr()
    items = source.read(source.listing("train"))
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(item, SampleRejected) or np.isfinite(item).all() for item in items)
    with pytest.raises(SampleRejected, match=r"the decoder gave no answer within 0\.0001 s"):
        raise source_of(tmp_path, time_limit=1e-4).read(source.listing("train").slice(0, 1))[0]


def test_class_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for k, name in enumerate(("low", "high")):
            for i in range(count):
                write(tmp_path / split / name / f"{i}.WAV", encoded(sine(300 * (k + 1), 0.2)))
    write(tmp_path / "train" / "low" / "x.m4a", b"?")
    write(tmp_path / "train" / "low" / "notes.txt", b"?")
    source = source_of(tmp_path)
    assert (source.splits(), source.class_names, source.shape) == (["train", "test"], ["high", "low"], (1, 16, 61))
    assert np.bincount(source.listing("train")["label"]).tolist() == [3, 3]
    assert source.listing("test").num_rows == 4
    aside = source.set_aside("train").to_pylist()
    assert [(row["sample_id"], row["reason"]) for row in aside] == [
        ("train/low/x.m4a", "M4A is not read; convert it to WAV or FLAC")
    ]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.digest("train") == source.digest("train")
    assert copy.read(source.listing("train").slice(0, 1))[0].shape == source.shape


def test_class_folders_in_the_root(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "0.flac", encoded(sine(440), kind="FLAC"))
    assert (source_of(tmp_path).splits(), source_of(tmp_path).class_names) == (["train"], ["a", "b"])


@pytest.fixture
def named(tmp_path):
    for label in (10, 9):
        for take in range(4):
            write(tmp_path / "recordings" / f"{label}_anna_{take}.wav", encoded(sine(100 * label, 0.2)))
    return tmp_path


def test_labels_in_names(named):
    write(named / "recordings" / "hum.wav", encoded(sine(50)))
    write(named / "recordings" / "9_anna_7.wma", b"?")
    source = source_of(named, label_pattern=PATTERN, test_pattern=r"_0\.wav$")
    assert source.class_names == ["9", "10"]
    assert source.listing("test")["sample_id"].to_pylist() == ["recordings/9_anna_0.wav", "recordings/10_anna_0.wav"]
    assert source.listing("train")["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert {row["sample_id"]: row["reason"].partition(";")[0] for row in source.set_aside("train").to_pylist()} == {
        "recordings/hum.wav": "data.label_pattern finds no label in its path",
        "recordings/9_anna_7.wma": "WMA is not read",
    }
    assert pickle.loads(pickle.dumps(source)).digest("train") == source.digest("train")


def test_labels_in_names_and_splits_in_folders(named):
    (named / "recordings").rename(named / "Training")
    for folder, take in (("dev", 0), ("test", 1)):
        for label in (9, 10):
            write(named / folder / f"{label}_ben_{take}.wav", encoded(sine(90, 0.2)))
    source = source_of(named, label_pattern=PATTERN)
    assert source.listing("train").num_rows == 8
    assert source.listing("test")["sample_id"].to_pylist() == ["dev/9_ben_0.wav", "dev/10_ben_0.wav"]
    assert source.notes()[0].startswith("dev/ is the test split; not used: test")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_pattern": r"(?P<label>x)"}, "finds no label in a training path"),
        ({"label_pattern": PATTERN, "test_pattern": "none"}, "finds no sound of"),
        ({"label_pattern": PATTERN, "test_pattern": "9_anna"}, "the label '9' occurs in the test split"),
        ({"test_pattern": "_0"}, "data.test_pattern needs data.label_pattern"),
        ({}, "would be a class|a single class|holds no"),
    ],
)
def test_patterns_that_do_not_fit(named, keys, message):
    if not keys:
        (named / "recordings").rename(named / "train")
    with pytest.raises(UserError, match=message):
        source_of(named, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"label_pattern": "("}, "not a regular expression"), ({"label_pattern": r"(\d)"}, "name the part that is the class"),
     ({"test_pattern": "*"}, "not a regular expression")],
)  # fmt: skip
def test_patterns_are_checked_with_the_configuration(keys, message):
    with pytest.raises(UserError, match=message):
        validate({"data": keys})


def test_keys_of_sound_without_sound_have_no_effect():
    lines = warnings.of_keys(validate({"data": {"seconds": 2.0, "max_seconds": 9.0}}))
    assert any("data.seconds has no effect" in line and "audiofolder" in line for line in lines)
    assert any("data.max_seconds has no effect" in line for line in lines)
    sound = validate({"data": {"source": "audiofolder", "path": "x", "seconds": 2.0, "max_seconds": 9.0}})
    assert warnings.of_keys(sound) == []


def test_a_run_from_end_to_end(named, tmp_path):
    """A run ends; a broken file, an empty one and a text are listed, each with its reason."""
    folder = named / "recordings"
    write(folder / "9_cut_1.wav", encoded(sine(900, 0.2))[:-100])
    write(folder / "9_empty_1.wav", b"")
    write(folder / "10_text_1.wav", b"no sound")
    keys = [
        "data.source=audiofolder", f"data.path={named}", f"data.label_pattern={PATTERN}", r"data.test_pattern=_[01]\.wav$",
        "data.rate=8000", "data.seconds=0.3", "data.bands=16", "score.criterion=random",
        "select.keep=1.0", "distill.method=dm", "distill.ipc=1", "distill.steps=2", "distill.width=8",
        "distill.dm.augment=none", "evaluate.networks=convnet", "evaluate.seeds=1", "evaluate.epochs=20",
        "cluster.address=none",
    ]  # fmt: skip
    out = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text("evaluate: {bounds: []}", encoding="utf-8")
    assert main(["run", str(config), *keys, f"run.dir={out}"]) == 0
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    assert {row["sample_id"].rpartition("/")[2]: row["reason"].partition(";")[0] for row in rejected} == {
        "9_cut_1.wav": "cut: 100 bytes are missing at its end",
        "9_empty_1.wav": "empty file",
        "10_text_1.wav": "not a sound but text",
    }
    assert (out / "evaluation.json").exists()
