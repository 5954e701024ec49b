"""Reasons in rejected.parquet for files that no decoder reads: what such a file is, and the next action."""

from __future__ import annotations

from collections.abc import Sequence

HEAD = 4096  # bytes that are looked at
ISO_BRANDS = {  # the brand after "ftyp" in the ISO base media format
    b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image",
    b"M4A ": "an M4A sound", b"hevc": "a HEIC image", b"mif1": "a HEIC image", b"msf1": "a HEIC image", b"crx ": "a raw photo",
}  # fmt: skip
SIGNATURES = (  # the first bytes of a file -> its kind
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\x01\0", "an icon"),
    (b"DDS ", "a DDS texture"),
    (b"fLaC", "a FLAC sound"),
    (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 sound"),
    (b"FORM", "an AIFF sound"),
    (b"%PDF", "a PDF document"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
)


def describe(raw: bytes, noun: str, kinds: Sequence[str], advice: str) -> str:
    """The reason for bytes that no decoder reads.

    Args:
        noun: what the bytes should be: "an image", "a video" or "a sound".
        kinds: kinds of SIGNATURES and ISO_BRANDS that the decoder reads if they are whole.
        advice: the formats to convert to, such as "JPEG or PNG".
    """
    head = raw[:HEAD]
    if not raw.strip(b"\0"):
        return f"not {noun}: it holds only zeros, as an interrupted download leaves; download it again"
    if head.startswith(b"version https://git-lfs"):
        return f"not {noun} but a Git LFS pointer to it; fetch the file with `git lfs pull`"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return f"not {noun} but an HTML page, as a failed download leaves; download it again"
    if text.startswith((b"<?xml", b"<!--", b"<!doctype svg", b"<svg")):
        if b"<svg" in text:
            return f"not {noun} of pixels but an SVG drawing; convert it to {advice}"
        return f"not {noun} but XML text, as a failed download leaves; download it again"
    kind = _kind_of(head)
    if kind in kinds:
        return f"damaged: it begins like {kind}, but its header cannot be read; replace it, or convert it to {advice}"
    if kind is not None:
        return f"{kind}, which cannot be used here; convert it to {advice}, or remove it"
    if _is_text(head):
        return f"not {noun} but text; replace or remove it"
    return f"not {noun} in a known format; convert it to {advice}, or remove it"


def _kind_of(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(64, len(head)), 4))]
        return next((ISO_BRANDS[brand] for brand in brands if brand in ISO_BRANDS), "an MP4 or MOV video")
    if head[:4] == b"RIFF":
        return {b"WEBP": "a WebP image", b"AVI ": "an AVI video", b"WAVE": "a sound"}.get(head[8:12])
    return next((kind for signature, kind in SIGNATURES if head.startswith(signature)), None)


def _is_text(head: bytes) -> bool:
    try:
        text = head[: HEAD - 4].decode("utf-8")  # without the last bytes, which may be a part of a letter
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
