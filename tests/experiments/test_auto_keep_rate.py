"""select.keep: auto: the search, its published result, reuse by later commands, and refused configurations."""

from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from conftest import TINY, tiny_config
from fake_points import FakePointSet

from distill_at_scale import cli
from distill_at_scale.config.load import validate
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.experiments import auto_keep_rate


class Standing(FakePointSet):
    """A fake point set that remembers the run whose scores it took over."""

    def take_over(self, run):
        self.stood_on = run.path


@pytest.fixture
def finished(make_run, tmp_path):
    """A run whose scores are there."""
    return make_run(tmp_path / "run", select__keep="auto", distill__steps=8).stages("ingest", "score")


def find(run, accuracy=lambda config, share: 0.6 if share >= 0.1 else 0.3, **keys):
    point_sets = []

    @contextlib.contextmanager
    def make(config):
        point_sets.append(Standing(run.dir / "auto", accuracy))
        point_sets[0].config = config
        yield point_sets[0]

    config = tiny_config(run.dir, select__keep="auto", **{"distill__steps": 8, **keys})
    return auto_keep_rate.rate(config, make, lambda line: None), point_sets


@pytest.mark.parametrize(("accuracy", "warned"), [(0.3, True), (0.7, False)])  # of 4 classes
def test_a_search_at_chance_says_that_it_says_little(finished, accuracy, warned):
    lines = []

    @contextlib.contextmanager
    def make(config):
        yield Standing(finished.dir / "auto", lambda config, share: accuracy)

    auto_keep_rate.rate(tiny_config(finished.dir, select__keep="auto", distill__steps=8), make, lines.append)
    assert any("near chance" in line for line in lines) == warned


def test_the_rate_is_found_published_and_read_again(finished):
    rate, point_sets = find(finished)
    assert 0.1 <= rate < 0.2
    assert point_sets[0].stood_on == finished.dir
    assert {config.distill.steps for config in point_sets[0].tried} == {2}, "a quarter of the run's"
    result = json.loads((finished.dir / "auto.json").read_text(encoding="utf-8"))
    assert result["rate"] == rate
    assert [one["keep"] for one in result["curve"]] == sorted(one["keep"] for one in result["curve"])
    assert result["unpruned"] == pytest.approx(0.6)
    again, point_sets = find(finished)
    assert again == rate
    assert not point_sets
    assert auto_keep_rate.known_rate(tiny_config(finished.dir, select__keep="auto", distill__steps=8)) == rate


def test_another_method_is_searched_again(finished):
    find(finished)
    assert find(finished, distill__method="dm")[1]


def test_the_rate_above_which_all_tried_ones_suffice_is_taken(finished):
    rate, _ = find(finished, lambda config, share: 0.3 if 0.01 < share < 0.6 else 0.6, select__auto__points=10)
    assert 0.59 < rate < 0.7
    assert json.loads((finished.dir / "auto.json").read_text(encoding="utf-8"))["smallest_sufficient"] < 0.01


def test_adaptive_rates_are_held_against_the_same_rate_for_all_classes(finished):
    def accuracy(config, share):
        return (0.6 if share >= 0.1 else 0.3) + (0.05 if config.select.scope == "adaptive" and share < 1 else 0.0)

    find(finished, accuracy, select__scope="adaptive")
    result = json.loads((finished.dir / "auto.json").read_text(encoding="utf-8"))
    assert result["adaptive_less_fixed"]["mean"] == pytest.approx(0.05)
    assert result["adaptive"]["mean"] - result["fixed"]["mean"] == pytest.approx(0.05)


def test_the_search_needs_a_test_split(make_run, tmp_path):
    run = make_run(tmp_path / "run", select__keep="auto", data__holdout=None).stages("ingest", "score")
    with pytest.raises(UserError, match="no test split"):
        find(run, data__holdout=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"per_class": 3}, "which select.per_class sets"),
        ({"order": "stratum"}, "select.order: stratum give a rate"),
    ],
)
def test_keys_that_do_not_go_with_auto_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        validate({"select": {"keep": "auto", **keys}})


def test_a_damaged_file_is_named(finished):
    find(finished)
    (finished.dir / "auto.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"auto\.json is damaged .* it was renamed to auto\.json\.damaged"):
        find(finished)


@pytest.fixture
def tiny_file(tmp_path):
    values = {**TINY, "run": {"dir": str(tmp_path / "run")}}
    values["select"] = {"keep": "auto", "auto": {"points": 2, "lowest": 0.05, "steps": 1}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_a_plan_says_that_the_rate_has_to_be_found(tiny_file, capsys):
    assert cli.main(["plan", tiny_file]) == 0
    output = capsys.readouterr().out
    assert "select.keep: auto tries up to 7 short distillations" in output
    assert "search " in output


def test_a_whole_run_finds_the_rate_and_uses_it(tiny_file, tmp_path, capsys):
    assert cli.main(["run", tiny_file]) == 0
    run = tmp_path / "run"
    rate = json.loads((run / "auto.json").read_text(encoding="utf-8"))["rate"]
    facts = manifest.facts(run / "manifest.parquet")
    assert facts["asked"] == {"keep": "auto", "found": rate}
    assert "The rate was searched" in (run / "report.html").read_text(encoding="utf-8")
    assert json.loads((run / "stages" / "select.json").read_text(encoding="utf-8"))["config"]["select.keep"] == rate
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["select"]["keep"] == "auto"
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (run / "auto" / "shared").glob("scores-*/stages/*.json")
    ]
    assert {record["reused_from"] for record in records} == {str(run)}
    capsys.readouterr()
    assert cli.main(["run", tiny_file]) == 0
    output = capsys.readouterr().out
    assert "was found before" in output
    assert "select: already done" in output
    assert cli.main(["run", tiny_file, f"select.keep={rate}"]) == 0, "the rate given is the same selection"
