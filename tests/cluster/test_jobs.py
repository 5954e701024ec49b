"""The scripts that `ray job submit` runs start as a job starts them: by path, from another folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_starts_and_passes_its_arguments_on(job, tmp_path):
    command = [sys.executable, str(job), str(tmp_path / "absent.yaml")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "cannot read the configuration" in ended.stderr


def test_the_jobs_that_recipes_and_users_name_are_there():
    assert {path.stem for path in JOBS} == {"pipeline", "sweep", "study"}
