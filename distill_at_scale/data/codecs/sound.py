"""Sound files to log-mel spectrograms: float32 [1, bands, frames], the lowest band first.

The channels are averaged, the sound is resampled to `rate`, and its first `seconds` are used; a shorter sound is followed by
silence. Windows of 32 ms (Hann) start every 16 ms. The power spectrum of each, divided so that a sine of amplitude 1 has a peak
of 0.25, is summed in triangular mel bands (`mel_filters`). A value is ln(band + FLOOR).

`decode_sound` runs in a child process (`worker_process.py`): libraries that read damaged files may crash, hang or write to the
terminal.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from distill_at_scale.data.codecs.foreign_files import describe
from distill_at_scale.data.codecs.image import Array, SampleRejected

WINDOW = 0.032  # seconds; windows overlap by half
PADDING = 4  # the Fourier transform is so many times as long as a window, so that each mel band holds a frequency
FLOOR = 1e-6
RATES, MAX_CHANNELS = (1_000, 384_000), 32  # of a file; they bound memory and time
UNKNOWN = 2**62  # from this length on, a FLAC header does not say it
CHILD = "distill_at_scale.data.codecs.sound:decode_sound"
BLOCK = 65_536  # samples of all channels that are decoded together
KINDS = ("a sound", "a FLAC sound", "an Ogg file", "an MP3 sound", "an AIFF sound")
STREAMED = (0x7FFFFFFF, 0xFFFFFFFF)  # lengths in the header of a WAV file whose program did not know the length


@dataclass(frozen=True)
class SoundDecoder:
    """Bytes of a sound file -> spectrogram; see the module's docstring.

    Args:
        rate: samples per second of the spectrogram's input.
        seconds: used of each sound.
        bands: mel bands.
        max_seconds: a longer sound is rejected by its header, before it is decoded.
    """

    rate: int
    seconds: float
    bands: int
    max_seconds: float = 600.0

    @property
    def samples(self) -> int:
        return round(self.seconds * self.rate)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(1, bands, frames): as many whole windows as fit into `seconds`."""
        window = round(WINDOW * self.rate)
        return 1, self.bands, 1 + (self.samples - window) // (window // 2)

    def __call__(self, raw: bytes) -> Array:
        """Raises SampleRejected with the reason for a file that is empty, cut, damaged, too long, or no sound."""
        sound, rate = self.decode(raw)
        if not np.isfinite(sound).all():
            count = int((~np.isfinite(sound)).sum())
            raise SampleRejected(f"{count:,} of its samples are not finite numbers (NaN or infinite); correct them")
        if rate != self.rate:
            from scipy.signal import resample_poly  # imported here: it takes a second

            common = math.gcd(rate, self.rate)
            sound = resample_poly(sound, self.rate // common, rate // common)
        fixed = np.zeros(self.samples)
        fixed[: len(sound)] = sound[: self.samples]
        return log_mel(fixed, self.rate, self.bands)

    def decode(self, raw: bytes) -> tuple[Array, int]:
        """The first `seconds` as one channel, float64 [n], and the file's rate. Raises SampleRejected."""
        import soundfile

        if not raw:
            raise SampleRejected("empty file; replace it")
        if (missing := missing_bytes(raw)) > 0:
            raise SampleRejected(f"cut: {missing:,} bytes are missing at its end; copy or download it again")
        try:
            file = soundfile.SoundFile(io.BytesIO(raw))
        except soundfile.SoundFileError:
            raise SampleRejected(describe(raw, "a sound", KINDS, "WAV or FLAC")) from None
        with file:
            rate, length = file.samplerate, file.frames
            if not RATES[0] <= rate <= RATES[1] or file.channels > MAX_CHANNELS:
                facts = f"{rate:,} samples per second in {file.channels} channels"
                limit = f"{RATES[0]:,} to {RATES[1]:,} in at most {MAX_CHANNELS}"
                raise SampleRejected(f"its header says {facts}; {limit} are read: convert it")
            if length >= UNKNOWN:
                raise SampleRejected("its header does not say its length, as in a stream; write the file again")
            if length > self.max_seconds * rate:
                limit = f"more than data.max_seconds = {self.max_seconds:g}"
                raise SampleRejected(f"{length / rate:,.1f} s long, {limit}; raise it, or cut the sound")
            wanted, parts = math.ceil(self.seconds * rate), list[Array]()
            try:
                while wanted > 0 and len(block := file.read(min(wanted, BLOCK // file.channels), always_2d=True)):
                    parts.append(block.mean(axis=1))
                    wanted -= len(block)
                complete = True
                if file.format == "FLAC" and length:  # a look at its end is fast
                    file.seek(length - 1)
                    complete = len(file.read(1)) == 1
            except soundfile.SoundFileError:
                complete = False
        if not complete:
            raise SampleRejected("cut or damaged: it cannot be decoded to its end; copy or download it again")
        if not parts:
            raise SampleRejected("it holds no samples, only a header; replace or remove it")
        return np.concatenate(parts), rate


def decode_sound(header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Called through `IsolatedFunction` with the fields of a SoundDecoder and a sound file.

    Returns {} and the spectrogram's bytes, or {"rejected": reason} and no bytes.
    """
    try:
        return {}, SoundDecoder(**header)(raw).tobytes()
    except SampleRejected as error:
        return {"rejected": str(error)}, b""
    except MemoryError:
        return {"rejected": "needs too much memory; cut the sound"}, b""
    except Exception as error:  # a library fed with damaged bytes raises almost anything
        return {"rejected": f"damaged: {str(error) or type(error).__name__}; replace the file"}, b""


def missing_bytes(raw: bytes) -> int:
    """The bytes that the data of a WAV file lack according to its header; 0 for other files."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        return 0
    place = 12
    while place + 8 <= len(raw):
        size = int.from_bytes(raw[place + 4 : place + 8], "little")
        if raw[place : place + 4] == b"data":
            return 0 if size in STREAMED else max(0, place + 8 + size - len(raw))
        place += 8 + size + size % 2
    return 0


def log_mel(sound: Array, rate: int, bands: int) -> Array:
    """Samples [n] (n at least one window) -> float32 [1, bands, frames]."""
    window = round(WINDOW * rate)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[:: window // 2] * hann
    power = np.abs(np.fft.rfft(frames, PADDING * window)) ** 2 / hann.sum() ** 2
    return np.log(mel_filters(rate, bands) @ power.T + FLOOR)[None].astype(np.float32)


@lru_cache
def mel_filters(rate: int, bands: int) -> Any:
    """Weights [bands, frequencies] of the power spectrum of `log_mel`, a `scipy.sparse.csr_array`.

    mel(f) = 2595 log10(1 + f / 700). Band i is a triangle that rises from point i to 1 at point i + 1 and falls to 0 at point
    i + 2, of bands + 2 points that lie at equal distances in mel between 0 and rate / 2.
    """
    from scipy.sparse import csr_array

    length = PADDING * round(WINDOW * rate)
    frequencies = np.arange(length // 2 + 1) * rate / length
    points = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 1400), bands + 2) / 2595) - 1)
    low, middle, high = points[:-2, None], points[1:-1, None], points[2:, None]
    weights = np.maximum(0, np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)))
    return csr_array(weights)  # a product with it starts no threads, which would wait for each other in busy processes
