"""What a run leaves on object storage."""

from __future__ import annotations

import hashlib
import json

ARTEFACTS = (
    "prepared/",
    "scores.parquet",
    "rejected.parquet",
    "manifest.parquet",
    "synthetic/",
    "evaluation.json",
    "proxies/",
)


def stored_objects(s3, bucket):
    """Content by name; markers of empty folders are left out."""
    listed = s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])
    keys = [o["Key"] for o in listed if not o["Key"].endswith("/")]
    return {key.removeprefix("run/"): s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def artefact_digests(files):
    """Digests by name of the files that are equal on every storage; evaluation.json without its seconds."""
    digests = {}
    for name, content in files.items():
        if name == "evaluation.json":
            rows = json.loads(content)["rows"]
            content = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
        if name.startswith(ARTEFACTS):
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests
