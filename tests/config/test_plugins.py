"""Plug-ins: a method, a network and a data source from a user's package, run through the command."""

from __future__ import annotations

import json
import sys

import pytest

from distill_at_scale.cli import main
from distill_at_scale.config import load as configuration
from distill_at_scale.config import registry
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.models.spec import NETWORKS
from distill_at_scale.pipeline import validate

METHOD = '''
"""Moves every synthetic image towards the mean of its class's real batch."""

from distill_at_scale.distillation.methods.base import ImageMethod
from distill_at_scale.distillation.student import TrainingProtocol


class Means(ImageMethod):
    default_steps = 50

    @staticmethod
    def init_of(config):
        return "noise"

    @staticmethod
    def protocol(config):
        return TrainingProtocol(epochs=20)

    def __init__(self, context):
        self.batch = context.config.distill.options["batch"]
        super().__init__(context, init="noise", lr=context.config.distill.options["image_lr"], momentum=0.0)

    def step(self, i):
        self.optimizer.zero_grad()
        draws = self.real.draw(self.context.labels, self.batch, "real batch", i)
        losses = [(self.images[k] - draw.images.mean(0)).square().mean() for k, draw in enumerate(draws)]
        sum(losses).backward()
        self.update(losses, i)
        self.raise_if_diverged()
        return {"loss": float(sum(losses).detach()) / len(losses)}
'''
NETWORK = """
from torch import nn


class Linear(nn.Module):
    def __init__(self, spec):
        super().__init__()
        channels, height, width = spec.shape
        self.map = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, spec.classes))

    def forward(self, images):
        return self.map(images)
"""
SOURCE = '''
import numpy as np

from distill_at_scale.data.sources.base import listing


class Stripes:
    """Grey images that are bright on the left or on the right."""

    def __init__(self, config):
        self.class_names = ["left", "right"]

    def splits(self):
        return ["train", "test"]

    def listing(self, split):
        rows = range(40)
        return listing([f"{split}/{k}" for k in rows], [k % 2 for k in rows], [split] * 40, rows)

    def digest(self, split):
        return "stripes 1"

    def read(self, rows):
        return [self.image(row["location"], row["row"]) for row in rows.to_pylist()]

    def image(self, split, k):
        chance = np.random.default_rng([k, split == "test"])
        image = chance.integers(0, 120, (8, 8), np.uint8)
        image[:, slice(0, 4) if k % 2 == 0 else slice(4, 8)] += 120
        return image
'''
CONFIG = {
    "data": {"source": "mine.source:Stripes", "size": 8, "channels": 1, "chunk": 16},
    "score": {"trials": 1, "epochs": 1, "network": "mine.network:Linear", "batch": 16},
    "select": {"keep": 0.5},
    "distill": {
        "method": "mine.method:Means", "steps": 20, "network": "mine.network:Linear",
        "options": {"batch": 8, "image_lr": 5.0},
    },
    "evaluate": {"networks": ["mine.network:Linear"], "seeds": 1},
    "cluster": {"address": "none"},
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in its own folder, the command's working directory."""
    (tmp_path / "mine").mkdir()
    for name, text in (("__init__", ""), ("method", METHOD), ("network", NETWORK), ("source", SOURCE)):
        (tmp_path / "mine" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        del sys.modules[name]


def run(package, *overrides) -> int:
    path = package / "mine.yaml"
    path.write_text(json.dumps(CONFIG | {"run": {"dir": "out"}}), encoding="utf-8")
    return main(["run", str(path), *overrides])


def test_a_users_method_network_and_source_run_through_the_command(package):
    assert run(package) == 0
    synthetic = synthetic_set.load(package / "out")
    assert synthetic.card["method"] == "mine.method:Means"
    assert synthetic.card["method_options"] == {"batch": 8, "image_lr": 5.0}
    assert synthetic.class_names == ["left", "right"]
    left, right = synthetic.pixels().float()
    assert float(left[0, :, :4].mean()) > float(left[0, :, 4:].mean()) + 60
    assert float(right[0, :, 4:].mean()) > float(right[0, :, :4].mean()) + 60
    rows = json.loads((package / "out" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert next(row["top1"] for row in rows if row["set"] == "distilled") > 0.9


def test_a_users_method_resumes_and_skips_like_any_other(package, capsys):
    assert run(package) == 0
    assert run(package) == 0
    assert capsys.readouterr().out.count("already done for this configuration") == 6


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("distill.method", "mine.method:Nothing", "cannot be imported"),
        ("distill.method", "mine.network:Linear", "does not keep the contract"),
        ("data.source", "mine.network:Linear", "does not keep the contract"),
        ("distill.network", "mine.nowhere:Linear", "cannot be imported"),
    ],
)
def test_a_wrong_plugin_is_named_with_its_key(package, capsys, key, value, message):
    assert run(package, f"{key}={value}") == 2
    error = capsys.readouterr().err
    assert key in error
    assert message in error


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("method", 'return {"loss":', "return {}, {'':", "step of the method Means must return a dict of numbers"),
        ("network", "spec.classes)", "spec.classes + 1)", "returns (1, 3) for one sample; it must return (1, 2)"),
        ("network", "return self.map(images)", "return None", "returns NoneType for one sample"),
    ],
)
def test_what_a_plugin_returns_is_compared_with_the_contract(package, capsys, file, old, new, message):
    path = package / "mine" / f"{file}.py"
    code = path.read_text(encoding="utf-8")
    assert old in code
    path.write_text(code.replace(old, new), encoding="utf-8")
    assert run(package) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_method_with_a_wrong_protocol_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "odd_protocol.py").write_text(
        "from distill_at_scale.distillation.methods.dm import *\n\n\n"
        "class Odd(DM):\n    protocol = staticmethod(lambda config: {'epochs': 3})\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = configuration.validate({"distill": {"method": "odd_protocol:Odd"}})
    with pytest.raises(
        UserError, match=r"'odd_protocol:Odd' does not keep the contract: its protocol\(config\) gives dict"
    ):
        validate.check_names(config)


def test_the_names_that_are_checked_first_are_those_of_the_tables():
    tables = {"source": SOURCES, "method": METHODS, "network": NETWORKS}
    assert {table: tuple(names) for table, names in tables.items()} == registry.BUILT_IN
