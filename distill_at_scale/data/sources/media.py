"""Which files hold samples of a medium, judged by their names, and why other files are not used. No file is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.data.sources.base import Column, set_aside_table

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff",
    ".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".apng", ".dib", ".pbm", ".pnm",
)  # fmt: skip
VIDEO_EXTENSIONS = (  # no .gif: in a folder of videos it is a preview
    ".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts",
)  # fmt: skip
SOUND_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aif", ".aiff", ".au")
OTHER_SOUNDS = {  # formats that the decoder does not accept
    ".m4a": "M4A", ".aac": "AAC", ".wma": "WMA", ".amr": "AMR", ".ape": "APE", ".sph": "SPHERE", ".mid": "MIDI",
}  # fmt: skip
OTHER_IMAGES = {  # formats that the decoder does not accept, by their endings
    ".avif": "AVIF", ".heic": "HEIC", ".heif": "HEIF", ".hif": "HEIF", ".jxl": "JPEG XL",
    ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".jpx": "JPEG 2000", ".svg": "SVG", ".svgz": "SVG", ".psd": "PSD", ".xcf": "XCF",
    ".tga": "TGA", ".ico": "ICO", ".eps": "EPS", ".exr": "OpenEXR", ".hdr": "HDR", ".dcm": "DICOM", ".nii": "NIfTI",
}  # fmt: skip
CAMERA_IMAGES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw")
UNFINISHED = (".part", ".crdownload", ".download", ".partial", ".tmp", ".temp", ".aria2", ".ytdl")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".7z")
COMPANIONS = (  # lists, annotations, notes, checksums, programs: no samples, so they are passed over without a word
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".html", ".htm", ".pdf", ".log",
    ".md5", ".sha1", ".sha256", ".sha512", ".sfv", ".asc", ".sig", ".db", ".ini", ".lnk", ".url", ".torrent", ".nfo", ".lst",
    ".mat", ".names", ".py", ".ipynb", ".sh", ".bat", ".m", ".srt", ".vtt", ".description",
)  # fmt: skip
COMPANION_NAMES = (  # a pattern of paths
    r"(?i)(?:(?:^|/)(?:readme|licen[cs]e|copying|notice|authors|changelog|citation|makefile|(?:md5|sha\d+)sums?|checksums?|classes"
    r"|labels|_success)|~|_original)$"  # the last two are copies that editors and ExifTool keep
)
ENDING = r"(?P<ending>\.[A-Za-z][A-Za-z0-9]*)$"  # `.JPG_large`, `.jpg~1`, `.jpg.1` and `.jpg?w=9` are no endings


@dataclass(frozen=True)
class Medium:
    """What the files of a folder hold: a noun for messages, and file extensions (lower case, with the dot)."""

    noun: str
    extensions: tuple[str, ...]
    others: dict[str, str] = field(default_factory=dict)  # ending of what looks like a sample -> why it is not used
    without_ending: bool = False  # whether the content of files without an ending decides

    def mask(self, paths: pa.Array) -> pa.Array:
        """Which paths (string) have one of the extensions; the case does not matter."""
        pattern = f"(?:{'|'.join(re.escape(extension) for extension in self.extensions)})$"
        return pc.match_substring_regex(paths, pattern, ignore_case=True)

    def samples(self, paths: pa.Array) -> pa.Array:
        """Which paths (string) of files in class folders are samples: also those without an ending, if the content decides."""
        mask = self.mask(paths)
        if not self.without_ending:
            return mask
        plain = pc.match_substring_regex(paths, rf"{ENDING}|{COMPANION_NAMES}")
        return pc.or_(mask, pc.invert(plain))

    def unused(self, paths: pa.Array, labels: Column, inside: pa.Array) -> pa.Table:
        """Sets aside (schema SET_ASIDE) those of some unused files that look like samples.

        `inside`: whether each file lies where samples are expected; elsewhere fewer files look like samples.
        """
        endings = pc.fill_null(pc.utf8_lower(pc.struct_field(pc.extract_regex(paths, ENDING), "ending")), "")
        known = pc.unique(endings)
        reason_inside, reason_elsewhere = (
            pa.array([self._reason(ending, where) for ending in known.to_pylist()], pa.string())
            for where in (True, False)
        )
        of_each = pc.index_in(endings, known)
        reasons = pc.if_else(inside, reason_inside.take(of_each), reason_elsewhere.take(of_each))
        keep = pc.and_not(pc.is_valid(reasons), pc.match_substring_regex(paths, COMPANION_NAMES))
        labels = pa.array(labels, pa.int32())
        return set_aside_table(paths.filter(keep), labels.filter(keep), reasons.filter(keep))

    def _reason(self, ending: str, inside: bool) -> str | None:
        """Why a file with this ending ("" for none) is not used; None if it is no sample."""
        if ending in self.extensions:
            return f"{'an' if self.noun[0] in 'aeio' else 'a'} {self.noun} in no class folder; move it into one"
        if ending in UNFINISHED:
            return "a download that was not finished; finish it, or remove the file"
        if ending in COMPANIONS:
            return None
        if ending in self.others or not inside:
            return self.others.get(ending)
        if ending in ARCHIVES:
            return "an archive, which is not read here; unpack it"
        problem = f"no {self.noun} by its name, which {f'ends in {ending!r}' if ending else 'has no ending'}"
        return f"{problem}; rename or remove the file"


IMAGES = Medium(
    "image",
    IMAGE_EXTENSIONS,
    {ending: f"{name} is not read; convert it to JPEG or PNG" for ending, name in OTHER_IMAGES.items()}
    | dict.fromkeys(CAMERA_IMAGES, "a camera's raw format, which is not read; convert it to JPEG or PNG")
    | dict.fromkeys(VIDEO_EXTENSIONS, "a video; set data.source to videofolder to use videos"),
    without_ending=True,
)
VIDEOS = Medium("video", VIDEO_EXTENSIONS)
SOUNDS = Medium(
    "sound",
    SOUND_EXTENSIONS,
    {ending: f"{name} is not read; convert it to WAV or FLAC" for ending, name in OTHER_SOUNDS.items()},
)
