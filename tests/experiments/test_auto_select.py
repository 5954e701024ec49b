"""select: auto: halving over known accuracies, the choice, its published result, resume, and a whole run."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import yaml
from conftest import TINY, tiny_config
from fake_points import FakePointSet
from plan_cases import measure_quickly

import distill_at_scale as das
from distill_at_scale import cli
from distill_at_scale.config.load import load, validate
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.experiments import auto_select
from distill_at_scale.experiments.auto_select import RoundResult, Tried
from distill_at_scale.experiments.runners import LocalRunner

RATES = (0.02, 0.1, 0.2, 0.4)
EPOCHS = 300
PORTFOLIO = [{"criterion": name, "keep": rate} for rate in RATES for name in ("random", "loss")]


class Standing(FakePointSet):
    """A fake point set that remembers the run whose scores it took over; `seconds` of a point and of a step pass on `clock`."""

    runner, seconds, stop_after = LocalRunner(), (0.0, 0.0), None

    def take_over(self, run):
        self.stood_on = run.path

    def run(self, points):
        if self.stop_after is not None and len(self.tried) + len(points) > self.stop_after:
            raise KeyboardInterrupt
        outcomes = super().run(points)
        for point, outcome in zip(points, outcomes, strict=True):
            each, step = self.seconds
            share = point.overrides["evaluate.epochs"] / EPOCHS
            outcome.seconds.update(evaluate=each * share, distill=step * point.overrides["distill.steps"])
        return outcomes


@pytest.fixture(scope="module")
def scored(make_run, tmp_path_factory):
    """A run whose scores are there; `finished` copies it."""
    return make_run(tmp_path_factory.mktemp("auto_select") / "run", **KEYS).stages("ingest", "score")


@pytest.fixture
def finished(scored, make_run, tmp_path):
    """A run whose scores are there, free to be changed."""
    shutil.copytree(scored.dir, tmp_path / "run")
    return make_run(tmp_path / "run", **KEYS)


KEYS = {
    "select__keep": "auto",
    "select__auto": {"portfolio": PORTFOLIO},
    "distill__steps": 72,
    "evaluate__epochs": EPOCHS,
}


def accuracy(config, share):
    """Random reaches everything from 20 % on, the lowest loss never does."""
    if share == 1:
        return 0.7
    return min(0.7, 0.5 + share) if config.select.criterion == "random" else 0.4 + 0.1 * share


def find(run, accuracy=accuracy, noise=0.004, prepare=lambda points: None, say=lambda line: None, **keys):
    point_sets = []

    @contextlib.contextmanager
    def make(config):
        point_sets.append(Standing(run.dir / "auto", accuracy, noise))
        point_sets[0].config = config
        prepare(point_sets[0])
        yield point_sets[0]

    return auto_select.selection(tiny_config(run.dir, **KEYS | keys), make, say), point_sets


def saved(run):
    return json.loads((run.dir / "auto.json").read_text(encoding="utf-8"))


def test_halving_finds_the_cheapest_that_does_what_everything_does(finished):
    lines = []
    chosen, (points,) = find(finished, say=lines.append)
    assert chosen == {"criterion": "random", "keep": 0.2}
    assert points.stood_on == finished.dir
    tried = [(config.distill.steps, config.select.criterion, config.select.keep) for config in points.tried]
    assert [tried.count((9, c["criterion"], c["keep"])) for c in PORTFOLIO] == [1] * 8
    assert [tried.count((18, "random", rate)) for rate in RATES] == [0, 3, 3, 3], (
        "three finalists, a quarter of the steps"
    )
    assert tried.count((9, None, 1.0)) == 1
    assert tried.count((18, None, 1.0)) == 3
    assert {(config.distill.steps, config.evaluate.epochs) for config in points.tried} == {(9, 150), (18, 300)}
    assert {(config.select.held_out, config.evaluate.split) for config in points.tried} == {(0.2, "held_out")}
    result = saved(finished)
    assert (result["name"], result["kept"], result["of"]) == ("random, 20 %", 200, 1000)
    decisions = {row["name"]: row["decision"] for row in result["rounds"][1]["tried"]}
    assert decisions.pop("random, 20 %") == "chosen"
    assert set(decisions.values()) == {"not chosen", "for comparison"}
    assert [one["decision"] for one in result["rounds"][0]["tried"]] == [
        "for comparison",
        *["goes on"] * 3,
        *["out"] * 5,
    ]
    assert "round 1 of 2: 8 candidates, 9 steps × 1" in lines[0]
    assert "difference +0.0 ±" in lines[-1]


def test_everything_is_kept_where_no_candidate_reaches_it(finished):
    chosen, _ = find(finished, lambda config, share: 0.7 if share == 1 else 0.6)
    assert chosen == {"order": "useful", "keep": 1.0}
    assert "no candidate reaches its 70.0%" in saved(finished)["reason"]


def test_everything_is_kept_where_all_are_near_chance(finished):
    chosen, _ = find(finished, lambda config, share: 0.38 + 0.01 * (share < 1))  # of three classes
    assert chosen["keep"] == 1.0
    assert "the search says nothing" in saved(finished)["reason"]


def tried(name, keep, *accuracies, criterion="loss"):
    return Tried({"criterion": criterion, "keep": keep}, name, int(1000 * keep), list(accuracies))


def test_a_better_candidate_is_taken_and_of_equal_ones_the_cheapest():
    everything = tried("everything", 1.0, 0.50, 0.52)
    large, small = tried("large", 0.5, 0.60, 0.62), tried("small", 0.1, 0.60, 0.61)
    poor = tried("poor", 0.01, 0.57, 0.58)
    chosen, reason = auto_select.choose([RoundResult(9, 2, 1.0, 0.0, 0.0, [everything, large, small, poor])], 10)
    assert chosen is small
    assert "reaches 60.5% and everything 51.0% (difference +9.5 ±" in reason


def test_what_was_below_random_of_the_same_size_is_not_chosen():
    """Random selection was left out in the first round only because others were better there."""
    first = [
        tried("everything", 1.0, 0.5), tried("c", 0.3, 0.7), tried("random", 0.1, 0.65, criterion="random"),
        tried("loss", 0.1, 0.6),
    ]  # fmt: skip
    last = [tried("everything", 1.0, 0.50, 0.52), tried("loss", 0.1, 0.60, 0.62), tried("c", 0.3, 0.55, 0.57)]
    rounds = [RoundResult(3, 1, 1.0, 0.0, 0.0, first), RoundResult(9, 2, 1.0, 0.0, 0.0, last)]
    assert auto_select.choose(rounds, 10)[0].name == "c"
    assert last[1].decision == "below random"
    chosen, reason = auto_select.choose([rounds[0], RoundResult(9, 2, 1.0, 0.0, 0.0, last[:2])], 10)
    assert chosen is last[0]
    assert reason.startswith("every candidate was below random selection")


def test_repetitions_without_any_spread_are_compared_by_their_means():
    one = RoundResult(9, 2, 1.0, 0.0, 0.0, [tried("everything", 1.0, 0.5, 0.5), tried("small", 0.1, 0.5, 0.5)])
    assert auto_select.choose([one], 10)[0].name == "small"
    one.tried[1].accuracies = [0.49, 0.49]
    chosen, reason = auto_select.choose([one], 10)
    assert chosen.name == "everything"
    assert "differs by -1.0 ± 0.0 points" in reason


@pytest.mark.parametrize("minutes", [2.0, 8.0])
def test_the_search_keeps_to_its_time(finished, monkeypatch, minutes):
    clock = [0.0]
    monkeypatch.setattr(auto_select.time, "perf_counter", lambda: clock[0])

    def slow(points):
        points.seconds = 2.0, 0.5  # and three rounds with all steps would take longer than 300 s
        plain = points.run

        def run(wanted):
            outcomes, known = plain(wanted), getattr(points, "known", set())
            for point, outcome in zip(wanted, outcomes, strict=True):
                key = json.dumps([point.overrides, point.seed])
                clock[0] += 0.0 if key in known else sum(outcome.seconds.values())
                points.known = known = known | {key}
            return outcomes

        points.run = run

    _, (points,) = find(finished, prepare=slow, select__auto={"portfolio": PORTFOLIO, "minutes": minutes})
    spent = saved(finished)["seconds"]
    assert spent == pytest.approx(clock[0], abs=0.01)
    assert 0.5 * 60 * minutes < spent <= 60 * minutes
    assert (max(config.distill.steps for config in points.tried) > 18) == (minutes == 8), "more time, more steps"


def test_the_selection_is_read_again_until_something_changes(finished):
    chosen, _ = find(finished)
    assert find(finished) == (chosen, [])
    assert auto_select.known_selection(tiny_config(finished.dir, **KEYS)) == chosen
    assert auto_select.known_selection(tiny_config(finished.dir, **KEYS, distill__method="dm")) is None
    assert find(finished, distill__method="dm")[1]


def test_an_interrupted_search_goes_on_after_its_last_finished_round(finished):
    def stop(points):
        points.stop_after = 10

    with pytest.raises(KeyboardInterrupt):
        find(finished, prepare=stop)
    first = saved(finished)["rounds"]
    assert len(first) == 1
    assert auto_select.known_selection(tiny_config(finished.dir, **KEYS)) is None
    chosen, (points,) = find(finished)
    assert {config.distill.steps for config in points.tried} == {18}
    assert saved(finished)["rounds"][0] == first[0]
    assert chosen == {"criterion": "random", "keep": 0.2}


def test_a_damaged_file_is_named(finished):
    find(finished)
    (finished.dir / "auto.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"auto\.json is damaged .* it was renamed to auto\.json\.damaged"):
        find(finished)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"per_class": 3}, "select.per_class is one"),
        ({"order": "stratum"}, "which do not fit select.order: stratum"),
        ({"auto": {"portfolio": [{"held_out": 0.1}]}}, "sets held_out, which does not belong to a selection"),
        ({"auto": {"portfolio": [{"criterion": 5}]}}, "needs a criterion's name"),
        ({"auto": {"portfolio": []}}, "at least 1"),
    ],
)
def test_keys_that_do_not_go_with_auto_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        validate({"select": {"keep": "auto", **keys}})


@pytest.mark.parametrize("candidate", [{"kept": 0.1}, {"keep": 2.0}, {"criterion": "lost", "keep": 0.1}])
def test_a_wrong_candidate_stops_the_command_before_it_starts(make_run, tmp_path, candidate):
    with pytest.raises(UserError, match=r"kept|keep|lost"):
        make_run(tmp_path / "run", select__keep="auto", select__auto={"portfolio": [candidate]}).stages("ingest")
    assert not (tmp_path / "run" / "prepared").exists()


def test_select_auto_is_short_for_its_keep(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("select: auto\n", encoding="utf-8")
    expected = load({"select": {"keep": "auto"}})
    assert load(path) == load({"select": "auto"}) == expected
    assert load("digits", ["select=auto"]).select.keep == "auto"
    assert load(path, ["select.auto.minutes=3"]).select.auto.minutes == 3.0


@pytest.fixture
def tiny_file(tmp_path):
    values = {**TINY, "run": {"dir": str(tmp_path / "run")}, "data": {**TINY["data"]}}
    del values["data"]["holdout"]  # there is no test split
    values["distill"] = {**TINY["distill"], "method": "dm", "steps": 8}
    values["evaluate"] = {**TINY["evaluate"], "epochs": 40}
    portfolio = [
        {"criterion": "random", "keep": 0.1},
        {"keep": 0.1},
        {"order": "useless", "keep": 0.1},
        {"per_class": 40},
    ]
    values["select"] = {"keep": "auto", "auto": {"portfolio": portfolio, "steps": 2, "seeds": 2}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_a_plan_says_that_the_selection_has_to_be_found(tiny_file, capsys, monkeypatch):
    measure_quickly(monkeypatch)
    assert cli.main(["plan", tiny_file]) == 0
    output = capsys.readouterr().out
    assert "select: auto tries 4 selections in 11 short distillations" in output
    assert "search " in output


def test_a_whole_run_without_a_test_split_finds_a_selection_and_uses_it(tiny_file, tmp_path, capsys):
    assert cli.main(["run", tiny_file]) == 0
    run = tmp_path / "run"
    found = json.loads((run / "auto.json").read_text(encoding="utf-8"))
    facts, keys = manifest.facts(run / "manifest.parquet"), {"keep": 1.0} | found["chosen"]
    assert facts["asked"]["keep"] == "auto"
    assert facts["asked"]["found"] == ({"per_class": 40} if "per_class" in keys else {"keep": keys["keep"]})
    assert "held_out" not in facts, "the run itself holds nothing out"
    assert "The selection was searched" in (run / "report.html").read_text(encoding="utf-8")
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["select"]["keep"] == "auto"
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (run / "auto" / "shared").glob("scores-*/stages/*.json")
    ]
    assert {record["reused_from"] for record in records} == {str(run)}
    points = [path for path in (run / "auto" / "points").iterdir() if path.is_dir()]
    assert len(points) == sum(one["repetitions"] * len(one["tried"]) for one in found["rounds"])
    assert len({frozenset(manifest.held_out(path / "manifest.parquet").to_pylist()) for path in points}) == 1
    capsys.readouterr()
    assert cli.main(["run", tiny_file]) == 0
    output = capsys.readouterr().out
    assert "was found before" in output
    assert "select: already done" in output
    overrides = [f"select.{key}={value}" for key, value in keys.items()]
    assert cli.main(["run", tiny_file, "select.keep=1.0", *overrides]) == 0, "the keys given are the same selection"


def test_a_search_never_reads_the_test_split(make_run, tmp_path, monkeypatch):
    run = make_run(
        tmp_path / "run", select__keep="auto", distill__method="dm", distill__steps=2,
        select__auto={"portfolio": [{"keep": 0.1}], "steps": 1, "seeds": 2},
    ).stages("ingest", "score")  # fmt: skip
    assert PreparedDataset(run.dir / "prepared").has_test()
    splits, load_split = [], PreparedDataset.load

    def watched(self, split, *arguments, **keys):
        splits.append(split)
        return load_split(self, split, *arguments, **keys)

    monkeypatch.setattr(PreparedDataset, "load", watched)
    das.find_selection(run.pipeline, run.pipeline.display)
    assert splits == ["train"] * 4
