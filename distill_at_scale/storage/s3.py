"""From an `s3://` URI to a file system of pyarrow, with limits on how long a dead address may be waited for.

`pyarrow.fs.FileSystem.from_uri` takes no time limits, so the options are read here. Credentials come from the usual places
of the cloud (environment, ~/.aws, instance role), or from the URI (`s3://key:secret@bucket`), which is not advised.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

OPTIONS = {
    "region": str,
    "scheme": str,
    "endpoint_override": str,
    "tls_ca_file_path": str,
    "anonymous": bool,
    "force_virtual_addressing": bool,
    "connect_timeout": float,
    "request_timeout": float,
    "attempts": int,
}
DEFAULTS = {"connect_timeout": 5.0, "request_timeout": 10.0}  # seconds without an answer, of each attempt


def connect(uri: str) -> tuple[Any, str]:
    """The file system, and the folder of the URI in it.

    Raises ValueError for an unknown option, a wrong value or credentials that are not escaped, and OSError where the bucket's
    region cannot be found.
    """
    parts = urlsplit(uri, allow_fragments=False)
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket:
        raise ValueError("it names no bucket; write s3://bucket/folder")
    if ":" in bucket:
        raise ValueError("the bucket's name holds a ':'; in credentials before '@' write '/' as %2F and '?' as %3F")
    options: dict[str, Any] = {**DEFAULTS, **_options(parts.query)}
    attempts = options.pop("attempts", 3)
    if parts.username:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    if not options.get("region") and not options.get("endpoint_override"):
        options["region"] = fs.resolve_s3_region(bucket)
    options["allow_delayed_open"] = True  # a small file is stored by one request
    system = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts))
    return system, f"{bucket}{unquote(parts.path)}".rstrip("/")


def _options(query: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}; known: {', '.join(OPTIONS)}")
        found[name] = _value(name, text)
    return found


def _value(name: str, text: str) -> Any:
    kind = OPTIONS[name]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text}: write true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text}: write a number") from None
