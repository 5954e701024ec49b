"""`import distill_at_scale`: the public API, which imports its parts on first use."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import distill_at_scale
from distill_at_scale.config import load as config
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation import synthetic_set


def test_the_names_of_the_api_are_those_of_the_package():
    assert distill_at_scale.Config is config.Config
    assert distill_at_scale.load_config is config.load
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
