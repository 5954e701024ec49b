"""Opens an `s3://` URI as a pyarrow file system with time limits.

`pyarrow.fs.FileSystem.from_uri` has no time limits, so this module parses the options. Credentials come from the usual places
(environment, ~/.aws, instance role), or from the URI (`s3://key:secret@bucket`), which is not recommended.
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
DEFAULTS = {"connect_timeout": 5.0, "request_timeout": 10.0}  # seconds per attempt


def connect(uri: str) -> tuple[Any, str]:
    """The file system and the URI's folder in it. Raises ValueError for an unknown option, a wrong value or credentials
    that are not escaped, OSError if the bucket's region cannot be determined.
    """
    parts = urlsplit(uri, allow_fragments=False)
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket:
        raise ValueError("it names no bucket; write s3://bucket/folder")
    if ":" in bucket:
        raise ValueError("the bucket's name holds a ':'; in credentials before '@' write '/' as %2F and '?' as %3F")
    options: dict[str, Any] = dict(DEFAULTS)
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        kind = OPTIONS.get(name)
        if kind is None:
            raise ValueError(f"unknown option {name!r}; known: {', '.join(OPTIONS)}")
        if kind is bool and text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text}: write true or false")
        try:
            options[name] = text.lower() == "true" if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"{name}={text}: write a number") from None
    attempts = options.pop("attempts", 3)
    if parts.username:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    if not options.get("region") and not options.get("endpoint_override"):
        options["region"] = fs.resolve_s3_region(bucket)
    options["allow_delayed_open"] = True  # stores a small file with one request
    system = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts))
    return system, f"{bucket}{unquote(parts.path)}".rstrip("/")
