"""`import distill_at_scale`: the public API, which imports its parts on first use."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY

import distill_at_scale
import distill_at_scale as das
from distill_at_scale.config import load as config
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.pipeline import run_reader


def test_the_names_of_the_api_are_those_of_the_package():
    assert distill_at_scale.Config is config.Config
    assert distill_at_scale.open_run is run_reader.open_run
    assert distill_at_scale.UserError is UserError
    assert distill_at_scale.synthetic is synthetic_set
    assert distill_at_scale.SyntheticSet is synthetic_set.SyntheticSet
    assert distill_at_scale.load is synthetic_set.load
    assert set(distill_at_scale.__all__) <= set(dir(distill_at_scale))


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert distill_at_scale.__version__ == project["version"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sythetic'"):
        _ = distill_at_scale.sythetic
    with pytest.raises(ImportError):
        exec("from distill_at_scale import sythetic")


def test_the_import_loads_neither_torch_nor_ray_and_synthetic_comes_on_first_use():
    code = """
import sys, distill_at_scale
assert not {"torch", "ray", "numpy", "pydantic"} & set(sys.modules), sorted(sys.modules)
from distill_at_scale import load_config
assert not {"torch", "ray"} & set(sys.modules)
from distill_at_scale import synthetic
assert synthetic.load and "torch" in sys.modules and "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_synthetic_set_loads_as_the_readme_says(digits_run):
    from distill_at_scale import synthetic

    loaded = synthetic.load(digits_run.dir)
    assert isinstance(loaded, distill_at_scale.SyntheticSet)
    assert loaded.images.shape[0] == len(loaded.labels)


def test_a_configuration_takes_a_file_a_name_or_values_and_keywords_by_section_or_dotted_key(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    keywords = {
        "select": {"keep": 0.1},
        "distill": {"dc": {"inner": 2}},
        "data.size": 16,
        "run": {"dir": tmp_path / "x"},
    }
    for source in (file, str(file), TINY):
        made = das.load_config(source, ["distill.ipc=3", "select.keep=0.9"], **keywords)
        assert (made.select.keep, made.distill.ipc, made.distill.dc.inner, made.data.size) == (0.1, 3, 2, 16)
        assert made.data.classes == TINY["data"]["classes"], "the other keys of a section stay"
        assert made.run.dir == str(tmp_path / "x")
    assert das.load_config(path="digits", overrides=(), **{"select.keep": 0.25}).select.keep == 0.25
    assert das.load_config({"data.frames": 4}).data.chunk == das.load_config({"data": {"frames": 4}}).data.chunk == 64
    assert TINY["select"] == {"keep": 0.2}, "the values given are not changed"


def test_values_of_python_are_taken_as_yaml_would_hold_them():
    values = {"evaluate.networks": ("convnet",), "distill.ipc": np.int64(3), "select.keep": np.float64(0.5)}
    config = das.load_config(values, score={"weights": [Path("a.pt"), Path("b.pt")]})
    assert (config.evaluate.networks, config.distill.ipc, config.select.keep) == (["convnet"], 3, 0.5)
    assert config.score.weights == ["a.pt", "b.pt"]


def test_a_configuration_and_a_single_override_are_taken_too():
    config = das.load_config(das.load_config("digits"), "select.keep=0.2")
    assert config == das.load_config("digits", ["select.keep=0.2"])


@pytest.mark.parametrize("wrong", [None, 3, ["digits"], b"digits"])
def test_what_is_no_configuration_is_a_user_error(wrong):
    with pytest.raises(das.UserError, match="cannot be a configuration; give a path"):
        das.load_config(wrong)


@pytest.mark.parametrize("stages", [[], "", 3, [None]])
def test_stages_that_name_nothing_are_a_user_error(stages):
    with pytest.raises(das.UserError, match=r"names no stage; give None for all|the stage None is unknown"):
        das.run("digits", stages=stages)


def test_a_value_that_is_a_mapping_is_replaced_and_not_merged():
    made = das.load_config({"select": {"criterion": {"loss": 0.5, "el2n": 0.5}}}, select={"criterion": {"grand": 1.0}})
    assert made.select.criterion == {"grand": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selct": {"keep": 0.1}}, "unknown section selct (in the keywords); did you mean select?"),
        ({"select": {"kep": 0.1}}, "unknown key select.kep (in the keywords); did you mean select.keep?"),
        ({"select.keep": 3}, "select.keep = 3 (in the keywords) is not allowed"),
        ({"select": 3}, "select = 3 (in the keywords) is not allowed"),
    ],
)
def test_a_wrong_keyword_is_a_user_error(values, message):
    with pytest.raises(UserError) as error:
        das.load_config("digits", **values)
    assert message in str(error.value)


def test_an_unknown_stage_is_a_user_error_before_anything_starts(tmp_path, capsys):
    with pytest.raises(UserError, match=r"the stage 'distil' is unknown; did you mean distill\?"):
        das.run({**TINY, "run": {"dir": str(tmp_path / "run")}}, stages=["ingest", "distil"])
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


NOTEBOOK = """
import sys
import distill_at_scale as das

config = das.load_config({values!r}, run={{"dir": {folder!r}}})
assert not {{"torch", "ray"}} & set(sys.modules)

# In [1]: the cheap stages, in any order
part = das.run(config, stages=["select", "ingest", "score"])
assert [stage for stage, state in part.stages.items() if state.done] == ["ingest", "score", "select"]
kept = part.manifest.filter(part.manifest["kept"])
assert 0 < kept.num_rows < part.scores.num_rows == part.manifest.num_rows
try:
    part.results
except das.UserError as error:
    print("as expected:", error)

# In [2]: everything
run = das.run(config)
print(run)
assert {{result.set for result in run.results}} == {{"distilled", "random_real"}}
images, labels = run.synthetic.images, run.synthetic.labels
assert len(images) == len(labels) == 3 * config.distill.ipc
for plot in (run.plot_loss, run.plot_scores, run.plot_accuracy, run.plot_images):
    assert plot()._repr_png_().startswith(b"\\x89PNG")
assert "<li>" in run._repr_html_()

# In [3]: again, without a word
assert das.run(config, progress=False).results == run.results
assert "ray" not in sys.modules
"""


def test_a_notebook_runs_the_stages_and_looks_at_what_they_wrote(tmp_path):
    script, folder = tmp_path / "notebook.py", tmp_path / "run"
    script.write_text(NOTEBOOK.format(values=TINY, folder=str(folder)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0]
        == f"distill-at-scale {das.__version__}: select, ingest, score, in the run folder {folder}, in this process"
    )
    assert f"as expected: {folder} has no results yet; run `distill-at-scale evaluate {folder}`" in lines
    assert f"Run('{folder}')" in lines
    assert sum(line.startswith("distill-at-scale ") for line in lines) == 2, "the last run is silent"
