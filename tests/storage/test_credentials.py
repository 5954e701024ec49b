"""Credentials in the address of the data and in the environment are in nothing that a run writes or says, even as it fails."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import TINY
from PIL import Image

from distill_at_scale import cli

KEY, SECRET, IN_ENVIRONMENT = "AKIAQUITESECRETKEY", "hush%2Fhush-do-not-tell", "environment-do-not-tell"
TOLD = [word.encode() for word in (KEY, SECRET, SECRET.replace("%2F", "/"), IN_ENVIRONMENT)]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def configuration(folder: Path, path: str) -> Path:
    data = {"source": "parquet", "path": path, "size": 8, "channels": 1, "chunk": 32}
    values = {**TINY, "data": data, "run": {"dir": str(folder / "run")}}
    (folder / "secret.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "secret.yaml"


def check_folder(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not [word for word in TOLD if word in content], path
    return len(files)


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """`bucket("name")`: its address with credentials; "kept-secrets" holds a tiny data set."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", IN_ENVIRONMENT)
    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    images = pa.array([png(20 * i) for i in range(12)])
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": np.arange(12) % 2}), tmp_path / "set" / f"{split}-0.parquet")
    s3.upload(tmp_path / "set", "kept-secrets")
    return lambda name, **options: s3(f"{KEY}:{SECRET}@{name}", **options)


def test_nothing_that_a_run_writes_or_says_holds_credentials(bucket, tmp_path, capfd):
    file = configuration(tmp_path, bucket("kept-secrets"))
    assert cli.main(["run", str(file)]) == 0
    failures = [
        [f"data.path={bucket('no-such-bucket', attempts='1')}"],
        [f"data.path={bucket('kept-secrets', secret_token=SECRET)}"],
        [f"data.path=s3://{KEY}:{SECRET}@a:b/c"],
        ["data.label_column=nothing"],
        ["data.size=16"],
    ]
    for number, overrides in enumerate(failures):
        where = [] if overrides == ["data.size=16"] else [f"run.dir={tmp_path / 'run' / f'failed{number}'}"]
        assert cli.main(["run", str(file), *overrides, *where]) == 2, overrides
    output = capfd.readouterr()
    assert "error:" in output.err
    assert not [word for word in TOLD if word in (output.out + output.err).encode()]
    assert check_folder(tmp_path / "run") > 10
